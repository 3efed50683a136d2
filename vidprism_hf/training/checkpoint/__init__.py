"""Checkpoints and resume: files, callback, signals, lock."""
