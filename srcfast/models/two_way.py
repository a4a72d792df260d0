"""Read from a model's masks which of a prompt's tokens see each other in both directions: an image's, as in Gemma, or all.

transformers' models say it in `create_masks_for_generate`, given the token types that their processor made. So nothing here names
a family.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from srcfast.attention.options import AttentionOptions
from srcfast.data.forest import Forest
from srcfast.errors import InputError
from srcfast.models.supported import ANOTHER_FAMILY

Ranges = tuple[tuple[int, int], ...]
TYPES = ("token_type_ids", "mm_token_type_ids")
WINDOW = 5  # of the masks that are read: shorter than the check's prompt, and than its image mostly


@dataclass(frozen=True)
class TwoWay:
    """What sees each other: each image's tokens, or the whole prompt.

    Attributes:
        full, sliding: whether it does in layers without and with a window.
        beyond_window: whether a token sees the others even where a window would hide them.
    """

    tokens: Literal["image", "prompt"]
    full: bool
    sliding: bool
    beyond_window: bool

    def ranges(self, forest: Forest, image_token_id: int) -> Ranges:
        """List the ranges of rows of a forest whose roots are prompts."""
        host = forest.host or forest
        ranges: list[tuple[int, int]] = []
        for tree, starts in zip(host.trees, host.segment_start, strict=True):
            tokens = tree.segments[0].tokens
            of_tree = _image_runs(tokens, image_token_id) if self.tokens == "image" else [(0, len(tokens))]
            ranges += [(starts[0] + start, starts[0] + end) for start, end in of_tree]
        return tuple(ranges)

    def options(self, ranges: Ranges, window: int | None, softcap: float | None) -> AttentionOptions:
        """Return a layer's options."""
        applies = self.full if window is None else self.sliding
        return AttentionOptions(window, softcap, ranges if applies else (), self.beyond_window)


def two_way_of(model: Any, prompt: np.ndarray, inputs: Any, image_token_id: int, path: Any) -> TwoWay | None:
    """Read it from the masks of a prompt with an image; None where attention is causal.

    Args:
        model: of transformers.
        prompt: [n] token ids.
        inputs: what the processor made of the prompt, with token types.
        image_token_id: the image's placeholder.
        path: of the checkpoint, for errors.

    Raises:
        InputError: the masks are neither causal nor of these two kinds.
    """
    make = getattr(model, "create_masks_for_generate", None)
    parameters = {} if make is None else inspect.signature(make).parameters
    names = [name for name in TYPES if name in parameters]
    if make is None or not names or names[0] not in inputs:
        return None
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text._attn_implementation = config._attn_implementation = "eager"  # whose masks are numbers added to scores
    if getattr(text, "sliding_window", None):
        text.sliding_window = WINDOW
    embeddings = torch.zeros(1, len(prompt), 1)
    masks = make(
        config=config,
        inputs_embeds=embeddings,
        attention_mask=None,
        position_ids=None,
        is_first_iteration=True,
        **{names[0]: inputs[names[0]]},
        **{name: None for name in ("cache", "past_key_values") if name in parameters},  # by transformers' version
    )
    by_kind = masks if isinstance(masks, dict) else {"full_attention": masks}
    visible = {kind: mask[0, 0] == 0 for kind, mask in by_kind.items() if isinstance(mask, Tensor)}  # [n, n] bool
    sliding, full = visible.pop("sliding_attention", None), visible.pop("full_attention", None)
    candidates = {
        (tokens, beyond): _image_runs(prompt, image_token_id) if tokens == "image" else [(0, len(prompt))]
        for tokens, beyond in product(("image", "prompt"), (False, True))
    }
    if not visible and _is(full, None, ()) and _is(sliding, WINDOW, ()):
        return None
    for (tokens, beyond), ranges in candidates.items():
        in_full, in_sliding = _is(full, None, ranges), _is(sliding, WINDOW, ranges, beyond)
        if not visible and (in_full or _is(full, None, ())) and (in_sliding or _is(sliding, WINDOW, ())):
            return TwoWay("image" if tokens == "image" else "prompt", in_full, in_sliding, beyond)
    raise InputError(
        file=path,
        field="model_type",
        expected="attention that is causal, or two-way within an image or a prompt",
        found=f"{config.model_type}: masks of another form",
        fix=ANOTHER_FAMILY,
    )


def _is(visible: Tensor | None, window: int | None, ranges: Any, beyond: bool = False) -> bool:
    """Return whether a mask [n, n] is that of these options; True for a mask that a model does not have."""
    if visible is None:
        return True
    before, behind = AttentionOptions(window, None, tuple(ranges), beyond).reach(len(visible))
    distance = np.arange(len(visible)) - np.arange(len(visible))[:, None]  # [query, key]
    expected = (distance <= behind[:, None]) & (distance >= -before[:, None])
    return np.array_equal(visible.numpy(), expected)


def _image_runs(tokens: np.ndarray, image_token_id: int) -> list[tuple[int, int]]:
    """List the ranges (start, end) of consecutive placeholders among tokens [n]."""
    is_image = np.concatenate([[False], tokens == image_token_id, [False]])
    bounds = np.flatnonzero(is_image[1:] != is_image[:-1])
    return [(int(start), int(end)) for start, end in bounds.reshape(-1, 2)]
