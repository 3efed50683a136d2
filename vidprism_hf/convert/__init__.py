"""Converts checkpoints of other formats."""
