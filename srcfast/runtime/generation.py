"""Decoding with a shared prompt: each prompt is run once, and its keys and values serve all of its rows.

Rows are laid out [samples, rows a sample]. A step scores all rows of a sample against its prompt in one product and
against their own continuations in another, under one softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.runtime.attention import forest_attend

Features = Callable[[Iterable[str]], Mapping[str, Tensor]]  # image keys -> embeddings [n, D] each
GROWTH = 32  # positions by which continuations' caches grow


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens [n] (image placeholders expanded) and the keys of its images in order."""

    token_ids: np.ndarray
    images: tuple[str, ...] = ()
    key: str = ""  # names the sample: its random numbers depend on nothing else


@dataclass(frozen=True)
class Generated:
    """A continuation: its tokens, the end token included, and their summed log-probability under the model itself."""

    token_ids: tuple[int, ...]
    logprob: float
    finished: bool  # the end token was given


class DecodeState:
    """Keys and values of S prompts, and of S x W continuations of different lengths."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], prompt_lengths: Tensor) -> None:
        self.prompt_keys, self.prompt_values = keys, values  # a layer each: [S, Hkv, P, d]
        self.prompt_lengths = prompt_lengths  # [S]
        columns = torch.arange(keys[0].shape[2], device=prompt_lengths.device)
        hidden = columns >= prompt_lengths[:, None]  # [S, P]
        self.prompt_mask = torch.zeros(hidden.shape, dtype=keys[0].dtype, device=hidden.device)
        self.prompt_mask.masked_fill_(hidden, float("-inf"))
        samples, heads, _, size = keys[0].shape
        self.width = 1
        self.lengths = torch.zeros(samples, dtype=torch.int64, device=hidden.device)  # [R] of the continuations
        self.shape = (samples, heads, GROWTH, size)  # of a layer's keys, and of its values: [R, Hkv, L, d]
        # A layer each, flat. Beyond a row's length they hold anything finite: zeros, or what a row before had there.
        self.keys = [k.new_zeros(math.prod(self.shape)) for k in keys]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self._spare = torch.zeros_like(self.keys[0])

    @property
    def samples(self) -> int:
        return len(self.prompt_lengths)

    def select_rows(self, rows: Tensor, width: int) -> None:
        """Keep, repeat or reorder continuations: `rows` [S * width] are indices into the current ones, sample by sample."""
        longest = int(self.lengths[rows].max()) if len(rows) else 0
        self._rearrange(rows, longest)
        self.lengths = self.lengths[rows]
        self.width = width

    def _rearrange(self, rows: Tensor | None, longest: int) -> None:
        """Take these rows (None: all as they are), with room for more than `longest` positions.

        Each layer is written into memory that another one has left: fresh memory costs more than the copy.
        """
        count, heads, old_room, size = self.shape
        room = (longest // GROWTH + 1) * GROWTH
        shape = (count if rows is None else len(rows), heads, room, size)
        for cache in (self.keys, self.values):
            for layer, flat in enumerate(cache):
                kept = _shaped(flat, self.shape)
                if self._spare.numel() < math.prod(shape):
                    self._spare = self._spare.new_zeros(math.prod(shape))
                moved = _shaped(self._spare, shape)
                if room == old_room and rows is not None:
                    torch.index_select(kept, 0, rows, out=moved)
                else:
                    held = kept[:, :, : min(room, old_room)]
                    moved[:, :, : held.shape[2]] = held if rows is None else held.index_select(0, rows)
                cache[layer], self._spare = self._spare, flat
        self.shape = shape

    def select_samples(self, samples: Tensor) -> None:
        """Keep some samples, with all of their rows."""
        self.prompt_keys = [k.index_select(0, samples) for k in self.prompt_keys]
        self.prompt_values = [v.index_select(0, samples) for v in self.prompt_values]
        self.prompt_lengths, self.prompt_mask = self.prompt_lengths[samples], self.prompt_mask[samples]
        rows = (samples[:, None] * self.width + torch.arange(self.width, device=samples.device)).flatten()
        self.select_rows(rows, self.width)

    def step(self, model: Any, tokens: Tensor) -> Tensor:
        """Run one token a row, [R] -> hidden states [R, D]; each row's continuation grows by it."""
        positions = self.prompt_lengths.repeat_interleave(self.width) + self.lengths
        longest = int(self.lengths.max()) + 1
        if longest > self.shape[2]:
            self._rearrange(None, longest)
        rows = torch.arange(len(tokens), device=tokens.device)
        unseen = torch.arange(longest, device=tokens.device) > self.lengths[:, None]  # [R, L]
        self._suffix_mask = torch.zeros(unseen.shape, dtype=self.prompt_mask.dtype, device=tokens.device)
        self._suffix_mask.masked_fill_(unseen, float("-inf"))
        self._rows = rows
        hidden = model.decoder(model.decoder.embed(tokens), positions, self._attend)
        self.lengths = self.lengths + 1
        return hidden

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, H, d], k and v [R, Hkv, d] -> [R, H, d]."""
        rows, heads, size = q.shape
        kv_heads = k.shape[1]
        group = heads // kv_heads
        keys, values = _shaped(self.keys[layer], self.shape), _shaped(self.values[layer], self.shape)
        keys[self._rows, :, self.lengths] = k
        values[self._rows, :, self.lengths] = v
        length = self._suffix_mask.shape[1]
        q = q * size**-0.5
        shape = (self.samples, self.width, kv_heads, group)
        together = q.view(*shape, size).transpose(1, 2).reshape(self.samples, kv_heads, self.width * group, size)
        prompt = together @ self.prompt_keys[layer].mT  # [S, Hkv, W * G, P]
        prompt += self.prompt_mask[:, None, None]
        prompt = prompt.view(self.samples, kv_heads, self.width, group, -1).transpose(1, 2)
        suffix = q.view(rows, kv_heads, group, size) @ keys[:, :, :length].mT  # [R, Hkv, G, L]
        suffix += self._suffix_mask[:, None, None]
        weights = torch.cat((prompt.reshape(rows, kv_heads, group, -1), suffix), dim=-1).softmax(-1)
        on_prompt, on_suffix = weights.split((prompt.shape[-1], length), dim=-1)
        on_prompt = on_prompt.reshape(*shape, -1).transpose(1, 2).reshape(*together.shape[:3], -1)
        seen = (on_prompt @ self.prompt_values[layer]).view(self.samples, kv_heads, self.width, group, size)
        return seen.transpose(1, 2).reshape(rows, heads, size) + (on_suffix @ values[:, :, :length]).reshape(
            rows, heads, size
        )


def _shaped(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat[: math.prod(shape)].view(shape)


def prefill(model: Any, prompts: Sequence[Prompt], features: Mapping[str, Tensor]) -> tuple[DecodeState, Tensor]:
    """Run every prompt once, packed; returns the state (one row a sample) and the last positions' hidden states [S, D]."""
    forest = Forest.of([Tree((Segment(p.token_ids),), p.images, p.key) for p in prompts])
    device = next(model.decoder.parameters()).device
    forest = forest.to(device)
    attend = forest_attend(forest)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    lengths = torch.tensor([len(p.token_ids) for p in prompts], device=device)
    sample = torch.arange(len(prompts), device=device).repeat_interleave(lengths)  # [T]

    def record(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for cache, new in ((keys, k), (values, v)):
            padded = new.new_zeros(len(prompts), int(lengths.max()), *new.shape[1:])
            padded[sample, forest.positions] = new
            cache.append(padded.transpose(1, 2).contiguous())
        return attend(layer, q, k, v)

    hidden = model.decoder(model.embed(forest, features), forest.positions, record)
    return DecodeState(keys, values, lengths), hidden[forest.cu_seqlens_q[1:].long() - 1]


def next_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [R, V] in fp32 (fp64 for an fp64 model)."""
    logits = hidden @ model.decoder.head_weight.to(hidden.dtype).T
    return logits if logits.dtype == torch.float64 else logits.float()


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Inverse-CDF sampling: one uniform number a row, [R] -> tokens [R]. Temperature 0 takes the likeliest.

    Nucleus sampling (Holtzman et al., 2020) keeps the likeliest tokens up to a mass of `top_p`.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    order = None
    if top_p < 1.0:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    # A draw that rounds to 1 would fall behind the last token that can be drawn.
    below_one = uniform.to(cumulative.dtype).clamp(max=1.0 - torch.finfo(cumulative.dtype).eps / 2)
    threshold = below_one[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
    return (picked if order is None else order.gather(-1, picked))[:, 0]


@torch.inference_mode()
def generate_greedy(
    model: Any,
    prompts: Sequence[Prompt],
    features: Features,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """The likeliest token at each step, until the end token or `max_new_tokens`.

    Prompts of like length are run together; the results come in the order of `prompts`. `on_batch` is told of the
    samples done and the tokens run.
    """
    results: list[Generated | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        own = [prompts[i] for i in batch]
        state, hidden = prefill(model, own, features([key for prompt in own for key in prompt.images]))
        alive = batch
        tokens_of: dict[int, list[int]] = {i: [] for i in batch}
        logprob_of = dict.fromkeys(batch, 0.0)
        ended: set[int] = set()
        for _ in range(max_new_tokens):
            best = next_logits(model, hidden).log_softmax(-1).max(-1)
            for i, token, logprob in zip(alive, best.indices.tolist(), best.values.tolist(), strict=True):
                if i not in ended:
                    tokens_of[i].append(token)
                    logprob_of[i] += logprob
                    if token == model.end_token_id:
                        ended.add(i)
            going = [row for row, i in enumerate(alive) if i not in ended]
            if not going:
                break
            tokens = best.indices
            if len(going) < 0.75 * len(alive):  # leave the ended rows behind, but not at every step: it copies
                kept = torch.tensor(going, device=tokens.device)
                state.select_samples(kept)
                alive, tokens = [alive[row] for row in going], tokens[kept]
            hidden = state.step(model, tokens)
        for i in batch:
            results[i] = Generated(tuple(tokens_of[i]), logprob_of[i], i in ended)
        if on_batch is not None:
            on_batch(len(batch), sum(len(p.token_ids) for p in own) + sum(len(tokens_of[i]) for i in batch))
    return [result for result in results if result is not None]
