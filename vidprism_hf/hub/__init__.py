"""Publishing: the export layout and the model card."""

from .card import CardFacts, render_card
from .export import export_model

__all__ = ["CardFacts", "export_model", "render_card"]
