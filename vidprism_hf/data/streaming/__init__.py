"""Videos of a Hub dataset as an iterable, without a table."""
