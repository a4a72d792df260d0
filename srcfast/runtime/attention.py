"""Old name of `srcfast.attention.forest_attention`."""

from srcfast.attention.forest_attention import forest_attention

__all__ = ["forest_attention"]
