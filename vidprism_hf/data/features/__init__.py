"""Frame features of a frozen tower, computed once and kept."""
