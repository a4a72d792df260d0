"""Sentence-level beam search: diverse rationale-answer candidates, grown sentence by sentence.

Each live beam proposes continuations of one sentence by sampling; the kept ones go on until the end token. The prompt,
image included, is run once a sample; a beam that is kept forks its own continuation's cache, never the prompt's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from srcfast.config.settings import CandidatesConfig
from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.decode import Features, Prompt, Sampling, Start, Written, decode
from srcfast.generation.generate import Generated, random_of
from srcfast.models.protocols import VisionLanguageModel


@dataclass
class Beam:
    """A response under way; `row` is where its cache lies."""

    tokens: tuple[int, ...] = ()
    logprob: float = 0.0
    row: int = 0
    bigrams: frozenset[tuple[int, int]] = frozenset()

    def score(self, settings: CandidatesConfig) -> float:
        return self.logprob / max(1, len(self.tokens)) ** settings.length_penalty


class Search:
    """One sample's search, the task that `decode` is given."""

    def __init__(self, prompt: Prompt, settings: CandidatesConfig, seed: int, end_token_id: int) -> None:
        self.prompt, self.settings, self.end = prompt, settings, end_token_id
        self.random = random_of(seed, prompt.key)
        self.live = [Beam()]
        self.finished: list[Beam] = []
        self.sentences = 0
        self.parents: list[Beam] = []  # of the rows that are being written

    def begin(self) -> Start:
        """Every row writes a first sentence."""
        return self._next_sentence()

    def ended(self, rows: Sequence[Written]) -> Start | None:
        """All rows have written a sentence: keep the best, and let these go on."""
        children = []
        for row, (parent, written) in enumerate(zip(self.parents, rows, strict=True)):
            tokens = (*parent.tokens, *written.token_ids)
            bigrams = frozenset(zip(tokens, tokens[1:], strict=False))
            children.append(Beam(tokens, parent.logprob + written.logprob, row, bigrams))
        _keep(self, children, self.end, self.settings)
        return self._next_sentence() if self.live and self.sentences < self.settings.max_sentences else None

    def _next_sentence(self) -> Start:
        first, self.sentences = not self.sentences, self.sentences + 1
        self.parents = _parents(self, self.settings)
        return Start(
            parents=() if first else [beam.row for beam in self.parents],
            draws=self.random.random((self.settings.width, self.settings.max_sentence_tokens)),
            room=[self.settings.max_new_tokens - len(beam.tokens) for beam in self.parents],
            by_sentence=True,
        )


def sentence_beam_search(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    features: Features,
    settings: CandidatesConfig,
    seed: int,
    *,
    slots: int = 8,
    on_done: Callable[[int, int], None] | None = None,
    graphs: bool = True,
    memory: DecodingMemory | None = None,
) -> tuple[list[list[Generated]], int]:
    """Search candidates of every sample.

    Args:
        prompts: their keys seed the samples' random numbers, so a sample's candidates don't depend on its batch.
        features: image keys -> embeddings.
        slots: samples searched at once; as one ends, the next takes its place.
        on_done: told of the samples done and the tokens run since the last time.
        graphs: on a GPU, replay steps as CUDA graphs.
        memory: as for `decode`.

    Returns:
        Up to `num_candidates` finished continuations a sample, distinct by their text, best score first; and the number
        of tokens run.
    """
    searches = [Search(prompt, settings, seed, model.end_token_id) for prompt in prompts]
    order = sorted(searches, key=lambda search: len(search.prompt.token_ids))  # like lengths together: less padding
    tokens_run = decode(
        model,
        order,
        features,
        slots=slots,
        width=settings.width,
        limit=settings.max_new_tokens + settings.max_sentence_tokens,
        sampling=Sampling(settings.temperature, settings.top_p),
        on_done=on_done,
        graphs=graphs,
        memory=memory,
    )
    return [_choose(model, search, settings) for search in searches], tokens_run


def _parents(search: Search, settings: CandidatesConfig) -> list[Beam]:
    """The live beam that each of a sample's rows continues, shared out as evenly as they go."""
    return [search.live[row * len(search.live) // settings.width] for row in range(settings.width)]


def _keep(search: Search, children: Sequence[Beam], end_token_id: int, settings: CandidatesConfig) -> None:
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


def _diverse(beams: Sequence[Beam], count: int, settings: CandidatesConfig) -> list[Beam]:
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


def _choose(model: VisionLanguageModel, search: Search, settings: CandidatesConfig) -> list[Generated]:
    """Distinct finished candidates by text, best score first."""
    by_text: dict[str, Beam] = {}
    for beam in sorted(search.finished, key=lambda b: (-b.score(settings), b.tokens)):
        by_text.setdefault(model.decode(beam.tokens), beam)
    chosen = _diverse(list(by_text.values()), settings.num_candidates, settings)
    return [Generated(beam.tokens, beam.logprob, True) for beam in chosen]
