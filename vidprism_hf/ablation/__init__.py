"""Studies of the head on kept features."""
