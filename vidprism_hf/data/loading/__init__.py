"""Clips become the batches of each rank: dataset, views, position in the epoch, workers."""
