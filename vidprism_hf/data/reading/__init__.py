"""Turns a video into a uint8 clip: sampling, transforms, processor, time limit."""
