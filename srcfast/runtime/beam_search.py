"""Sentence-level beam search: diverse rationale-answer candidates, grown sentence by sentence.

Each live beam proposes continuations of one sentence by sampling; the kept ones go on until the end token. The prompt,
image included, is run once a sample; a beam that is kept forks its own continuation's cache, never the prompt's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcfast.errors import ConfigError
from srcfast.runtime.generation import (
    DecodeState,
    Features,
    Generated,
    Prompt,
    next_logits,
    prefill,
    sample_tokens,
)
from srcfast.runtime.sentences import TERMINATORS, needs_next, sentence_ended


@dataclass(frozen=True)
class BeamSettings:
    """How candidates are searched.

    Attributes:
        num_candidates: distinct candidates wanted a sample.
        num_beams: live beams kept after each sentence.
        proposals: sampled continuations a beam and sentence.
        temperature, top_p: of the sampling; log-probabilities are always the model's own.
        max_sentences, max_sentence_tokens, max_new_tokens: limits of a response.
        length_penalty: a score is the summed log-probability over tokens ** length_penalty.
        diversity: what a full overlap of token bigrams with a better beam takes off the score.
    """

    num_candidates: int = 8
    num_beams: int = 4
    proposals: int = 2
    temperature: float = 1.0
    top_p: float = 1.0
    max_sentences: int = 12
    max_sentence_tokens: int = 48
    max_new_tokens: int = 256
    length_penalty: float = 1.0
    diversity: float = 0.5

    def __post_init__(self) -> None:
        for name in (
            "num_candidates",
            "num_beams",
            "proposals",
            "max_sentences",
            "max_sentence_tokens",
            "max_new_tokens",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"candidates.{name}: expected at least 1, found {getattr(self, name)}")
        if self.temperature < 0.0 or not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"candidates: expected temperature >= 0 and 0 < top_p <= 1, found {self.temperature}, {self.top_p}"
            )

    @property
    def width(self) -> int:
        """Rows a sample."""
        return self.num_beams * self.proposals


@dataclass
class Beam:
    """A response under way; `row` is where its cache lies."""

    tokens: tuple[int, ...] = ()
    logprob: float = 0.0
    row: int = 0
    bigrams: frozenset[tuple[int, int]] = frozenset()

    def score(self, settings: BeamSettings) -> float:
        return self.logprob / max(1, len(self.tokens)) ** settings.length_penalty


@dataclass
class Search:
    """One sample's search."""

    prompt: Prompt
    random: np.random.Generator
    live: list[Beam]
    finished: list[Beam] = field(default_factory=list)


@torch.inference_mode()
def sentence_beam_search(
    model: Any, prompts: Sequence[Prompt], features: Features, settings: BeamSettings, seed: int
) -> tuple[list[list[Generated]], int]:
    """Search one batch of samples.

    Args:
        model: an LVLM: `embed`, `decoder`, `decode`, `end_token_id`.
        prompts: their keys seed the samples' random numbers, so a sample's candidates don't depend on its batch.
        features: image keys -> embeddings.

    Returns:
        Up to `num_candidates` finished continuations a sample, distinct by their text, best score first; and the number
        of tokens run.
    """
    searches = [Search(prompt, _generator(seed, prompt.key), [Beam(row=i)]) for i, prompt in enumerate(prompts)]
    images: Mapping[str, Tensor] = features([key for prompt in prompts for key in prompt.images])
    state, hidden = prefill(model, prompts, images)
    endings = _ending_tokens(model.tokenizer, model.decoder.head_weight.shape[0])
    tokens_run = sum(len(prompt.token_ids) for prompt in prompts)
    active = searches
    for _ in range(settings.max_sentences):
        parents = [beam for search in active for beam in _parents(search, settings)]
        rows = torch.tensor([beam.row for beam in parents], device=hidden.device)
        state.select_rows(rows, settings.width)
        uniform = np.stack([s.random.random((settings.width, settings.max_sentence_tokens)) for s in active])
        draws = torch.from_numpy(uniform).flatten(0, 1).to(hidden.device)  # [R, max_sentence_tokens]
        children, hidden, steps = _write_sentence(model, state, hidden[rows], draws, parents, settings, endings)
        tokens_run += steps
        for index, search in enumerate(active):
            own = children[index * settings.width : (index + 1) * settings.width]
            _keep(search, own, model.end_token_id, settings)
        going = [i for i, search in enumerate(active) if search.live]
        if not going:
            break
        if len(going) < len(active):
            # rows of a sample move up by the samples that left before it
            state.select_samples(torch.tensor(going, device=hidden.device))
            hidden = hidden.view(len(active), settings.width, -1)[going].flatten(0, 1)
            for index, i in enumerate(going):
                for beam in active[i].live:
                    beam.row += (index - i) * settings.width
            active = [active[i] for i in going]
    return [_choose(model, search, settings) for search in searches], tokens_run


def _generator(seed: int, key: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest[:16], dtype=np.uint32))


@lru_cache(maxsize=4)
def _ending_tokens(tokenizer: Any, vocabulary: int) -> np.ndarray:
    """[V] bool: tokens after which a sentence may have ended, so that only then its text is looked at."""
    found = np.zeros(vocabulary, dtype=bool)
    for token in range(min(vocabulary, len(tokenizer))):
        found[token] = any(mark in tokenizer.decode([token]) for mark in TERMINATORS)
    return found


def _parents(search: Search, settings: BeamSettings) -> list[Beam]:
    """The live beam that each of a sample's rows continues, shared out as evenly as they go."""
    return [search.live[row * len(search.live) // settings.width] for row in range(settings.width)]


def _write_sentence(
    model: Any,
    state: DecodeState,
    hidden: Tensor,
    uniform: Tensor,
    parents: Sequence[Beam],
    settings: BeamSettings,
    endings: np.ndarray,
) -> tuple[list[Beam], Tensor, int]:
    """Continue every row by one sentence: the children, the hidden states [R, D] after their last tokens, tokens run."""
    count = len(parents)
    written: list[list[int]] = [[] for _ in range(count)]
    logprobs = torch.zeros(count, dtype=torch.float64, device=hidden.device)
    ended = np.zeros(count, dtype=bool)
    waiting = np.zeros(count, dtype=bool)
    last_hidden = hidden.clone()
    lengths = state.lengths.clone()
    room = np.array([settings.max_new_tokens - len(beam.tokens) for beam in parents])
    steps = 0
    for step in range(settings.max_sentence_tokens):
        logits = next_logits(model, hidden)
        tokens = sample_tokens(logits, uniform[:, step], settings.temperature, settings.top_p)
        going = ~ended
        own = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        mask = torch.from_numpy(going).to(hidden.device)
        logprobs += own.double() * mask
        picked = tokens.cpu().numpy()
        for row in np.flatnonzero(going).tolist():
            written[row].append(int(picked[row]))
        hidden = state.step(model, tokens)
        steps += int(going.sum())
        last_hidden = torch.where(mask[:, None], hidden, last_hidden)
        lengths = torch.where(mask, state.lengths, lengths)
        ended |= going & ((picked == model.end_token_id) | (step + 1 >= room))
        for row in np.flatnonzero(~ended & (endings[picked] | waiting)).tolist():
            text = model.tokenizer.decode(written[row])
            ended[row] = sentence_ended(text)
            waiting[row] = needs_next(text)
        if ended.all():
            break
    state.lengths = lengths  # an ended row went on only to keep the batch whole; what it wrote there is forgotten
    summed = logprobs.tolist()
    children = []
    for row, parent in enumerate(parents):
        tokens_so_far = (*parent.tokens, *written[row])
        bigrams = frozenset(zip(tokens_so_far, tokens_so_far[1:], strict=False))
        children.append(Beam(tokens_so_far, parent.logprob + summed[row], row, bigrams))
    return children, last_hidden, steps


def _keep(search: Search, children: Sequence[Beam], end_token_id: int, settings: BeamSettings) -> None:
    """Sort the children into finished and live ones; keep the best live ones that differ."""
    distinct = {child.tokens: child for child in children}
    known = {beam.tokens for beam in search.finished}
    live = []
    for child in distinct.values():
        if child.tokens[-1] == end_token_id:
            if child.tokens not in known:
                search.finished.append(child)
        elif len(child.tokens) < settings.max_new_tokens:
            live.append(child)
    search.live = _diverse(live, settings.num_beams, settings)


def _diverse(beams: Sequence[Beam], count: int, settings: BeamSettings) -> list[Beam]:
    """Maximal marginal relevance (Carbonell and Goldstein, 1998): a beam's score less its overlap with what was kept."""
    left = sorted(beams, key=lambda beam: (-beam.score(settings), beam.tokens))
    overlap = [0.0] * len(left)
    kept: list[Beam] = []
    while left and len(kept) < count:
        values = [beam.score(settings) - settings.diversity * most for beam, most in zip(left, overlap, strict=True)]
        best = values.index(max(values))
        chosen = left.pop(best)
        overlap.pop(best)
        kept.append(chosen)
        overlap = [max(most, bigram_overlap(beam, chosen)) for beam, most in zip(left, overlap, strict=True)]
    return kept


def bigram_overlap(one: Beam, other: Beam) -> float:
    """Jaccard overlap of two beams' token bigrams, in [0, 1]."""
    union = len(one.bigrams | other.bigrams)
    return len(one.bigrams & other.bigrams) / union if union else 0.0


def _choose(model: Any, search: Search, settings: BeamSettings) -> list[Generated]:
    """Distinct finished candidates by text, best score first."""
    by_text: dict[str, Beam] = {}
    for beam in sorted(search.finished, key=lambda b: (-b.score(settings), b.tokens)):
        by_text.setdefault(model.decode(beam.tokens), beam)
    chosen = _diverse(list(by_text.values()), settings.num_candidates, settings)
    return [Generated(beam.tokens, beam.logprob, True) for beam in chosen]
