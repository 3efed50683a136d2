"""Turns a table of videos into each rank's batches: dataset, views, position in the epoch, workers."""
