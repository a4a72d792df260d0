"""Models: the hand-written decoder, the LVLM around it, LoRA, checkpoints."""

from srcfast.models.lvlm import LVLM, AnyLVLM, ImageFeatures, load_lvlm
from srcfast.models.text_model import TextModel, load_text_model

__all__ = ["LVLM", "AnyLVLM", "ImageFeatures", "TextModel", "load_lvlm", "load_text_model"]
