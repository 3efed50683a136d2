"""From other formats to the package's own."""
