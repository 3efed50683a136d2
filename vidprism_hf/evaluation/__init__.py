"""Prediction and evaluation."""
