"""`vidprism ablate`: variants of the head on small data, compared in a table."""

from ..ablation.ablate import main

__all__ = ["main"]
