"""Text in: tokens -> transformer -> head -> embedding, in NumPy."""

from ehi.index.text.encoder import TextEncoder, TowerNotFoundError, load_text_encoder

__all__ = ["TextEncoder", "TowerNotFoundError", "load_text_encoder"]
