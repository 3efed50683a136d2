"""Which videos, which labels: every kind of source becomes a table."""
