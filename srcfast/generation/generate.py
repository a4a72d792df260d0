"""Generate responses to prompts without a search: the likeliest tokens, or several samples a prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.decode import Features, Prompt, Sampling, Start, Written, decode
from srcfast.models.protocols import VisionLanguageModel

__all__ = ["Features", "Generated", "Prompt", "Responses", "generate_greedy", "random_of", "sample_responses"]


@dataclass(frozen=True)
class Generated:
    """A continuation: its tokens, the end token included, and their summed log-probability under the model itself."""

    token_ids: tuple[int, ...]
    logprob: float
    finished: bool  # it ends with the end token
    sampled: bool = False  # token by token, beside a search


def most_tokens(model: VisionLanguageModel, prompt: Prompt, wanted: int) -> int:
    """Return how many tokens a response to a prompt may have: as many as wanted, or as the model has positions for."""
    return min(wanted, model.decoder.config.max_positions - len(prompt.token_ids))


class Responses:
    """A `Task` that writes some responses to one prompt side by side."""

    def __init__(self, prompt: Prompt, draws: np.ndarray, limit: int | None = None) -> None:
        self.prompt, self.draws = prompt, draws  # [responses, max_new_tokens]
        self.limit = draws.shape[1] if limit is None else limit
        self.written: Sequence[Written] = ()

    def begin(self) -> Start:
        return Start((), self.draws, [self.limit] * len(self.draws))

    def ended(self, rows: Sequence[Written]) -> None:
        self.written = rows

    def generated(self, model: VisionLanguageModel) -> list[Generated]:
        """Return the responses once they are written."""
        return [Generated(row.token_ids, row.logprob, row.token_ids[-1] in model.end_tokens) for row in self.written]


def generate_greedy(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    features: Features,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int, int], None] | None = None,
    graphs: bool = True,
    memory: DecodingMemory | None = None,
) -> list[Generated]:
    """Generate the likeliest token at each step, until the end token or `max_new_tokens`; results are in the order of `prompts`.

    Args:
        batch_size: prompts decoded at once; as one ends, the next is started.
        on_batch: called with the samples done and the tokens run since the last call.
        graphs: on a GPU, replay steps as CUDA graphs.
        memory: as for `decode`.
    """
    tasks = [
        Responses(prompt, np.zeros((1, max_new_tokens)), most_tokens(model, prompt, max_new_tokens))
        for prompt in prompts
    ]
    _respond(model, tasks, features, batch_size, Sampling(temperature=0.0), on_batch, graphs, memory)
    return [task.generated(model)[0] for task in tasks]


def sample_responses(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    features: Features,
    *,
    count: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    slots: int = 8,
    on_done: Callable[[int, int], None] | None = None,
    graphs: bool = True,
    memory: DecodingMemory | None = None,
) -> list[list[Generated]]:
    """Sample `count` independent responses to each prompt.

    Args:
        seed: decides, with a prompt's key, the prompt's random numbers.
        slots: prompts decoded at once; as one ends, the next is started.
        on_done: called with the samples done and the tokens run since the last call.
        graphs: on a GPU, replay steps as CUDA graphs.
        memory: as for `decode`.
    """
    tasks = [
        Responses(
            prompt,
            random_of(seed, prompt.key).random((count, max_new_tokens)),
            most_tokens(model, prompt, max_new_tokens),
        )
        for prompt in prompts
    ]
    _respond(model, tasks, features, slots, Sampling(temperature, top_p), on_done, graphs, memory)
    return [task.generated(model) for task in tasks]


def _respond(
    model: VisionLanguageModel,
    tasks: Sequence[Responses],
    features: Features,
    slots: int,
    sampling: Sampling,
    on_done: Callable[[int, int], None] | None,
    graphs: bool,
    memory: DecodingMemory | None,
) -> None:
    order = sorted(tasks, key=lambda task: len(task.prompt.token_ids))  # similar lengths together need less padding
    width, limit = tasks[0].draws.shape if tasks else (0, 0)
    decode(
        model,
        order,
        features,
        slots=slots,
        width=width,
        limit=limit,
        sampling=sampling,
        on_done=on_done,
        graphs=graphs,
        memory=memory,
    )


def random_of(seed: int, key: str) -> np.random.Generator:
    """Return a sample's generator of random numbers, which depends on the seed and the sample's key alone."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest[:16], dtype=np.uint32))
