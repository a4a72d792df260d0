"""Compare the general backbone with transformers' ordinary pass when a checkpoint is loaded, so that nothing runs inexactly.

One short prompt, of an LVLM with an image, and two responses run as a tree, and each path by itself through transformers' own
attention. What the forest does not do (two-way attention within images, soft caps, masks of a family's own) makes the two differ
by far more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import InputError
from srcfast.models.fused_modules import ordinary_modules
from srcfast.models.head import Head
from srcfast.models.supported import ANOTHER_FAMILY, logit_caps, logit_scales
from srcfast.models.transformers_decoder import ATTENTION, text_model
from srcfast.models.two_way import two_way_of

# Root mean square difference of logits, of their own: rounding makes 1e-6 to 1e-5 in fp32 and up to 0.03 in 16 bits over tens of
# layers, another mask 0.1 and more.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.08, torch.float16: 0.04}
SIZE = (96, 64)  # of the image, in pixels
ANSWERS = ("It is a red one.", "Blue")


Ordinary = Callable[[Tensor], Tensor]  # token ids [n] -> logits [n, V] of transformers' ordinary pass


def check_lvlm(lvlm: Any, model: Any) -> None:
    """Raise InputError where a `TransformersLVLM` does not compute what transformers' `model`, which it holds, computes."""
    image = Image.effect_mandelbrot(SIZE, (-2.0, -1.0, 1.0, 1.0), 20).convert("RGB")
    prompt = lvlm.encode_prompt("What is it?", [image])
    inputs = lvlm.processor_inputs("What is it?", [image])
    dtype = lvlm.decoder.head_weight.dtype
    lvlm.decoder.two_way = two_way_of(model, prompt, inputs, lvlm.image_token_id, lvlm.path)

    def ordinary(token_ids: Tensor) -> Tensor:
        behind = len(token_ids) - len(prompt)
        arguments = {
            # A response's tokens have the type of text; where all of a prompt is two-way, that is 1.
            name: F.pad(value, (0, behind), value=int(name == "token_type_ids" and _prompt_is_two_way(lvlm)))
            if value.shape[:2] == (1, len(prompt))
            else value
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }
        arguments |= {"input_ids": token_ids[None], "attention_mask": torch.ones_like(token_ids)[None]}
        moved = {
            name: value.to(token_ids.device, dtype if value.is_floating_point() else None)
            for name, value in arguments.items()
        }
        return model(**moved, use_cache=False).logits[0]

    responses = [lvlm.encode_response(text) for text in ANSWERS]
    _check(lvlm, model, prompt, responses, {"image": lvlm.encode_images([image])[0]}, ordinary)


def _prompt_is_two_way(lvlm: Any) -> bool:
    return lvlm.decoder.two_way is not None and lvlm.decoder.two_way.tokens == "prompt"


def check_text_model(text_model: Any, model: Any) -> None:
    """Raise InputError where a `TextModel` does not compute what transformers' causal `model`, which it holds, computes."""

    def encode(text: str) -> np.ndarray:
        return np.array(text_model.tokenizer(text, add_special_tokens=False).input_ids)

    prompt, responses = encode("What is on the table?"), [encode(text) for text in ANSWERS]
    _check(
        text_model, model, prompt, responses, None, lambda ids: model(input_ids=ids[None], use_cache=False).logits[0]
    )


@torch.no_grad()
def _check(
    ours: Any, model: Any, prompt: np.ndarray, responses: Sequence[np.ndarray], features: Any, ordinary: Ordinary
) -> None:
    """Compare a tree of prompt and responses with each path by itself, and set the scale and cap of its logits.

    Raises:
        InputError: they differ by more than rounding.
    """
    images = ("image",) if features else ()
    tree = Tree((Segment(prompt), *(Segment(response, 0) for response in responses)), images, "self-check")
    device, dtype = ours.decoder.head_weight.device, ours.decoder.head_weight.dtype
    forest = Forest.of([tree]).to(device)
    hidden = ours(forest, features) if features else ours(forest)  # [T, D]
    packed = (hidden @ ours.decoder.head_weight.T).float()  # [T, V]
    with _ordinary_layers(ours.decoder, model):
        expected = [(path, ordinary(forest.token_ids[path]).float()) for path in forest.paths()]  # [n, V] each
    squares = sum(float(logits.square().sum()) for _, logits in expected) or 1.0  # of a model without weights
    # Whether a class applies what its config names is seen from its logits.
    scales, caps = [1.0, *logit_scales(model.config)], [None, *logit_caps(model.config)]
    ratios = {}
    for scale, cap in product(scales, caps):
        ours_so = Head(ours.decoder.head_weight, cap).capped(packed * scale)
        differences = sum(float((ours_so[path] - logits).square().sum()) for path, logits in expected)
        ratios[scale, cap] = (differences / squares) ** 0.5
    ours.decoder.logit_scale, ours.decoder.softcap = best = min(ratios, key=lambda key: ratios[key])
    ratio = ratios[best]
    if not ratio <= TOLERANCE[dtype]:  # so written, the test fails for NaN as well
        raise InputError(
            file=ours.path,
            field="model_type",
            expected="logits on the packed forest as in transformers' ordinary pass, but for rounding",
            found=f"{model.config.model_type}: logits that differ by {ratio:.2g} of their size",
            fix=ANOTHER_FAMILY,
        )


@contextmanager
def _ordinary_layers(decoder: Any, model: Any) -> Iterator[None]:
    """Run the body with transformers' own attention and modules."""
    text = text_model(model)
    text.set_attn_implementation("eager")
    try:
        with ordinary_modules(decoder.layers):
            yield
    finally:
        text.set_attn_implementation(ATTENTION)
