"""Publishing: export layout, model card and push."""

from .card import CardFacts, render_card
from .export import export_model

__all__ = ["CardFacts", "export_model", "render_card"]
