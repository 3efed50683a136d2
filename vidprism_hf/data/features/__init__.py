"""Caches the frame features of a frozen tower."""
