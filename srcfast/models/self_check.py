"""Compare the general backbone with transformers' ordinary pass when a checkpoint is loaded, so that nothing runs inexactly.

One short prompt with an image and two responses run as a tree, and each path by itself through transformers' own attention. What
the forest does not do (two-way attention within images, soft caps, masks of a family's own) makes the two differ by far more
than rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import InputError
from srcfast.models.fused_modules import ordinary_modules
from srcfast.models.transformers_decoder import ATTENTION, text_model

# Root mean square difference of logits, of their own: rounding makes 1e-6 to 1e-5 in fp32 and up to 0.03 in 16 bits over tens of
# layers, another mask 0.1 and more.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.08, torch.float16: 0.04}
SIZE = (96, 64)  # of the image, in pixels


@torch.no_grad()
def check_exact(lvlm: Any, model: Any) -> None:
    """Raise InputError where a `TransformersLVLM` does not compute what transformers' `model`, which it holds, computes."""
    image = Image.effect_mandelbrot(SIZE, (-2.0, -1.0, 1.0, 1.0), 20).convert("RGB")
    prompt = lvlm.encode_prompt("What is it?", [image])
    responses = [lvlm.encode_response(text) for text in ("It is a red one.", "Blue")]
    tree = Tree((Segment(prompt), *(Segment(response, 0) for response in responses)), ("image",), "self-check")
    device, dtype = lvlm.decoder.head_weight.device, lvlm.decoder.head_weight.dtype
    forest = Forest.of([tree]).to(device)
    hidden = lvlm(forest, {"image": lvlm.encode_images([image])[0]})  # [T, D]
    packed = (hidden @ lvlm.decoder.head_weight.T).float()  # [T, V]
    differences, squares = 0.0, 0.0
    for path in forest.paths():
        ordinary = _ordinary_logits(lvlm, model, forest.token_ids[path], len(prompt), image)  # [n, V]
        differences += float((packed[path] - ordinary).square().sum())
        squares += float(ordinary.square().sum())
    ratio = (differences / squares) ** 0.5
    if not ratio <= TOLERANCE[dtype]:  # so written, the test fails for NaN as well
        raise InputError(
            file=lvlm.path,
            field="model_type",
            expected="logits on the packed forest as in transformers' ordinary pass, but for rounding",
            found=f"{model.config.model_type}: logits that differ by {ratio:.2g} of their size",
            fix="choose a checkpoint of another family; see docs/models.md",
        )


def _ordinary_logits(lvlm: Any, model: Any, token_ids: Tensor, num_prompt: int, image: Image.Image) -> Tensor:
    """Compute the logits [n, V] of a sequence by transformers' own attention, from pixels."""
    device, dtype = token_ids.device, lvlm.decoder.head_weight.dtype
    inputs = lvlm.processor_inputs("What is it?", [image])
    behind = len(token_ids) - num_prompt
    arguments = {
        name: F.pad(value, (0, behind)) if value.shape[:2] == (1, num_prompt) else value
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }
    arguments |= {"input_ids": token_ids[None], "attention_mask": torch.ones_like(token_ids)[None]}
    arguments = {
        name: value.to(device, dtype if value.is_floating_point() else None) for name, value in arguments.items()
    }
    text = text_model(model)
    text.set_attn_implementation("eager")
    try:
        with ordinary_modules(lvlm.decoder.layers):
            return model(**arguments, use_cache=False).logits[0].float()
    finally:
        text.set_attn_implementation(ATTENTION)
