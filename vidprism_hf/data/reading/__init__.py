"""A video becomes a uint8 clip: sampling, transforms, processor, time limit."""
