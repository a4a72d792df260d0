"""Attention over a packed prefix forest: one definition, several backends."""
