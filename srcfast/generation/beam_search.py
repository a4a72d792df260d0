"""Sentence-level beam search: diverse rationale-answer candidates, extended sentence by sentence.

Each live beam proposes continuations of one sentence by sampling; the selected ones go on until the end token. The prompt,
image included, is run once a search; a beam forks the cache of its continuation, never the prompt's.

Beside the search, responses can be sampled token by token: what a search that keeps the likeliest beams never offers. They are
decoded in the same batch, as tasks of at most as many rows as a search has.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace

from srcfast.config.settings import CandidatesConfig
from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.decode import Features, Prompt, Sampling, Start, Task, Written, decode
from srcfast.generation.generate import Generated, Responses, most_tokens, random_of
from srcfast.models.protocols import VisionLanguageModel


@dataclass
class Beam:
    """An unfinished response; `row` is the index of its row among those of the last step."""

    tokens: tuple[int, ...] = ()
    logprob: float = 0.0
    row: int = 0
    bigrams: frozenset[tuple[int, int]] = frozenset()

    def score(self, settings: CandidatesConfig) -> float:
        """Return the log-probability, normalised by length."""
        return self.logprob / max(1, len(self.tokens)) ** settings.length_penalty


class Search:
    """One sample's search, a `Task` for `decode`."""

    def __init__(self, prompt: Prompt, settings: CandidatesConfig, seed: int, end_tokens: Container[int]) -> None:
        self.prompt, self.settings, self.end_tokens = prompt, settings, end_tokens
        self.random = random_of(seed, prompt.key)
        self.live = [Beam()]
        self.finished: list[Beam] = []
        self.sentences = 0
        self.parents: list[Beam] = []  # by row of the sentence being written

    def begin(self) -> Start:
        """Start all rows on a first sentence."""
        return self._next_sentence()

    def ended(self, rows: Sequence[Written]) -> Start | None:
        """Select the best of the rows, which have all written a sentence, and continue them."""
        children = []
        for row, (parent, written) in enumerate(zip(self.parents, rows, strict=True)):
            tokens = (*parent.tokens, *written.token_ids)
            bigrams = frozenset(zip(tokens, tokens[1:], strict=False))
            children.append(Beam(tokens, parent.logprob + written.logprob, row, bigrams))
        _select(self, children, self.end_tokens, self.settings)
        return self._next_sentence() if self.live and self.sentences < self.settings.max_sentences else None

    def _next_sentence(self) -> Start:
        is_first = not self.sentences
        self.sentences += 1
        # Each live beam for about as many of the sample's rows.
        self.parents = [self.live[row * len(self.live) // self.settings.width] for row in range(self.settings.width)]
        return Start(
            parents=() if is_first else [beam.row for beam in self.parents],
            draws=self.random.random((self.settings.width, self.settings.max_sentence_tokens)),
            limits=[self.settings.max_new_tokens - len(beam.tokens) for beam in self.parents],
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
        prompts: prompts whose keys seed the samples' random numbers, so that a sample's candidates don't depend on its batch.
        features: image keys -> embeddings.
        slots: samples searched at once; as one ends, the next is started.
        on_done: called with the samples done and the tokens run since the last call.
        graphs: on a GPU, replay steps as CUDA graphs.
        memory: as for `decode`.

    Returns:
        A sample's candidates, all finished and distinct by their text: up to `num_candidates` of the search, best score first,
        then up to `plain_samples` sampled ones, in the order of their draws; and the number of tokens run.
    """
    searches: list[Search] = []
    sampled: list[list[Responses]] = []
    for prompt in prompts:
        most = most_tokens(model, prompt, settings.max_new_tokens)
        limited = settings if most == settings.max_new_tokens else settings.replace(max_new_tokens=most)
        searches.append(Search(prompt, limited, seed, model.end_tokens))
        sampled.append(_plain_samples(prompt, limited, seed))
    # Similar lengths together need less padding. One after the other, a sample's tasks share its encoded images.
    order = sorted(
        zip(searches, sampled, strict=True), key=lambda tasks_of_sample: len(tasks_of_sample[0].prompt.token_ids)
    )
    tasks: list[Task] = []
    for search, plain in order:
        tasks += [search, *plain]
    tokens_run = decode(
        model,
        tasks,
        features,
        slots=slots,
        width=settings.width,
        limit=settings.max_new_tokens + settings.max_sentence_tokens,
        sampling=Sampling(settings.temperature, settings.top_p),
        on_done=None if on_done is None else _counting_samples(on_done, len(tasks) // max(1, len(prompts))),
        graphs=graphs,
        memory=memory,
    )
    candidates = [
        _with_samples(model, _choose(model, search, settings), plain)
        for search, plain in zip(searches, sampled, strict=True)
    ]
    return candidates, tokens_run


def _plain_samples(prompt: Prompt, settings: CandidatesConfig, seed: int) -> list[Responses]:
    """Return the tasks that sample a prompt's `plain_samples` responses; their random numbers are none of the search's."""
    draws = random_of(seed, f"{prompt.key}/plain").random((settings.plain_samples, settings.max_new_tokens))
    starts = range(0, settings.plain_samples, settings.width)
    return [Responses(prompt, draws[start : start + settings.width]) for start in starts]


def _counting_samples(on_done: Callable[[int, int], None], tasks_a_sample: int) -> Callable[[int, int], None]:
    """Return an `on_done` that is called with tasks, and calls this one with samples."""
    done = 0

    def count(tasks: int, tokens: int) -> None:
        nonlocal done
        before, done = done, done + tasks
        on_done(done // tasks_a_sample - before // tasks_a_sample, tokens)

    return count


def _with_samples(model: VisionLanguageModel, beams: list[Generated], tasks: Sequence[Responses]) -> list[Generated]:
    """Append the sampled responses that have ended and whose texts are new."""
    by_text = {model.decode(beam.token_ids): beam for beam in beams}
    for response in (response for task in tasks for response in task.generated(model)):
        if response.finished:
            by_text.setdefault(model.decode(response.token_ids), replace(response, sampled=True))
    return list(by_text.values())


def _select(search: Search, children: Sequence[Beam], end_tokens: Container[int], settings: CandidatesConfig) -> None:
    """Sort the children into finished and live ones; select the best live ones that differ."""
    distinct = {child.tokens: child for child in children}
    known = {beam.tokens for beam in search.finished}
    live = []
    for child in distinct.values():
        if child.tokens[-1] in end_tokens:
            if child.tokens not in known:
                search.finished.append(child)
        elif len(child.tokens) < settings.max_new_tokens:
            live.append(child)
    search.live = _diverse(live, settings.num_beams, settings)


def _diverse(beams: Sequence[Beam], count: int, settings: CandidatesConfig) -> list[Beam]:
    """Select up to `count` beams by maximal marginal relevance (Carbonell and Goldstein, 1998).

    Each is the one with the highest score less its largest overlap with a beam that is selected already.
    """
    left = sorted(beams, key=lambda beam: (-beam.score(settings), beam.tokens))
    overlaps = [0.0] * len(left)  # of each, its largest with a selected beam
    selected: list[Beam] = []
    while left and len(selected) < count:
        pairs = zip(left, overlaps, strict=True)
        values = [beam.score(settings) - settings.diversity * overlap for beam, overlap in pairs]
        best = values.index(max(values))
        chosen = left.pop(best)
        overlaps.pop(best)
        selected.append(chosen)
        overlaps = [max(overlap, bigram_overlap(beam, chosen)) for beam, overlap in zip(left, overlaps, strict=True)]
    return selected


def bigram_overlap(first: Beam, second: Beam) -> float:
    """Compute the Jaccard overlap of two beams' token bigrams, in [0, 1]."""
    union = len(first.bigrams | second.bigrams)
    return len(first.bigrams & second.bigrams) / union if union else 0.0


def _choose(model: VisionLanguageModel, search: Search, settings: CandidatesConfig) -> list[Generated]:
    """Return the finished candidates, distinct by their text, best score first."""
    by_text: dict[str, Beam] = {}
    for beam in sorted(search.finished, key=lambda b: (-b.score(settings), b.tokens)):
        by_text.setdefault(model.decode(beam.tokens), beam)
    chosen = _diverse(list(by_text.values()), settings.num_candidates, settings)
    return [Generated(beam.tokens, beam.logprob, True) for beam in chosen]
