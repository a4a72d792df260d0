"""Continuous decoding: rows of many samples advance together, and a sample that is done makes room for the next.

Each sample is a `Task`: it says which rows to write, is told when all of them have ended, and says what to write next, until
it says nothing. A row ends with the end token, with a sentence (where the task asks for that), or when its room is used up; it
then leaves the batch at once, and when its sample is done the next sample's prompt is run and takes the slot. What a step
computes is in `decoding_step`. The host looks at the drawn tokens: on a CPU after each step; on a GPU while the next step is
under way, so that the device never waits, and what a row drew past its end is dropped. The host waits for a GPU once a step, for
the event behind the tokens' copy, and nowhere else. Draws come from the task alone, so that results don't depend on what else is
in the batch, but for rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from srcfast.attention.forest_attention import forest_attend
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.kv_cache import Layout
from srcfast.generation.sampling import Sampling
from srcfast.generation.sentences import SentenceEnds
from srcfast.generation.step import step_numbers
from srcfast.models.protocols import VisionLanguageModel
from srcfast.models.sharding import is_sharded
from srcfast_kernels.transfers import to_device

Features = Callable[[Iterable[str]], Mapping[str, Tensor]]  # image keys -> embeddings [n, D] each
PREFILL_TOKENS = 4096  # of the prompts that are run together, unless one alone has more
IMAGES_AHEAD = 32  # prompts whose images are encoded together


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens [n] (image placeholders expanded) and the keys of its images in order."""

    token_ids: np.ndarray
    images: tuple[str, ...] = ()
    key: str = ""  # names the sample: its random numbers depend on nothing else


@dataclass(frozen=True)
class Start:
    """Rows to be written side by side.

    Attributes:
        parents: for each row, which row of those that ended it continues; empty: all follow the prompt.
        draws: [rows, limit] float64 in [0, 1): the uniform number of each token; limit is the most tokens that a row writes.
        room: for each row, how many tokens it may still write.
        by_sentence: whether a row ends with a sentence, too.
    """

    parents: Sequence[int]
    draws: np.ndarray
    room: Sequence[int]
    by_sentence: bool = False


@dataclass(frozen=True)
class Written:
    """What a row wrote since its start, and the tokens' summed log-probability under the model itself."""

    token_ids: tuple[int, ...]
    logprob: float


class Task(Protocol):
    """One sample's decisions."""

    prompt: Prompt

    def begin(self) -> Start:
        """The first rows."""
        ...

    def ended(self, rows: Sequence[Written]) -> Start | None:
        """The rows that continue these; None: the sample is done."""
        ...


@dataclass
class _Slot:
    """A sample that is being decoded."""

    task: Task
    places: list[int]  # of its rows, in the order of its last Start
    before: list[int]  # for each row, how many tokens it had then


@dataclass
class _Step:
    """Tokens [R] drawn for rows; `serials` tells a row from one that has taken its place since."""

    places: np.ndarray
    serials: np.ndarray
    tokens: Tensor
    logprobs: Tensor
    arrived: torch.cuda.Event | None  # when both are on the host


def decode(
    model: VisionLanguageModel,
    tasks: Sequence[Task],
    features: Features,
    *,
    slots: int,
    width: int,
    limit: int,
    sampling: Sampling,
    on_done: Callable[[int, int], None] | None = None,
    graphs: bool = True,
    memory: DecodingMemory | None = None,
) -> int:
    """Decode all tasks, taken up in this order, `slots` of them at once.

    Args:
        features: image keys -> embeddings; asked for the images of `IMAGES_AHEAD` prompts at a time.
        width: most rows that a task writes at once.
        limit: most tokens that a row has in the end, those of the rows that it continues included.
        on_done: told of samples done and tokens run since the last time.
        graphs: on a GPU, replay steps as CUDA graphs (see `step_graphs`); none on a CPU or of layers that ranks share out.
        memory: shared with other calls on the same weights; default: memory of its own, which is gone at the end.

    Returns:
        Tokens run: of prompts and of rows.
    """
    if not tasks:
        return 0
    shared, on_gpu = is_sharded(model.decoder), model.decoder.head_weight.is_cuda
    longest = max(len(task.prompt.token_ids) for task in tasks)
    layout = Layout.of(
        min(slots, len(tasks)), width, longest, limit, on_gpu=on_gpu, spare=graphs and on_gpu and not shared
    )
    with (
        DecodingMemory() if memory is None else nullcontext(memory) as held,
        # A layer that is put together in inference mode could not be put together outside of it again.
        torch.inference_mode(not shared),
        torch.no_grad(),
    ):
        return _Decoding(model, tasks, features, layout, limit, sampling, held).run(on_done)


class _Decoding:
    """The state of one `decode`; what is kept by row is kept at the row's place, slot * width + row."""

    def __init__(
        self,
        model: VisionLanguageModel,
        tasks: Sequence[Task],
        features: Features,
        layout: Layout,
        limit: int,
        sampling: Sampling,
        memory: DecodingMemory,
    ) -> None:
        self.model, self.features, self.width = model, features, layout.width
        self.queue = deque(tasks)
        self.device = model.decoder.head_weight.device
        self.late = int(self.device.type == "cuda")  # steps by which the host looks at tokens late
        self.step, self.graphs = memory.step(model, layout, sampling)
        self.cache, self.pending = self.step.cache, self.step.pending
        self.ends = SentenceEnds.of(model.tokenizer, len(model.decoder.head_weight))
        self.slots: list[_Slot | None] = [None] * layout.slots
        self.images: dict[str, Tensor] = {}
        places = layout.rows
        self.going = np.zeros(places, dtype=bool)
        self.waiting = np.zeros(places, dtype=bool)  # for the character that tells whether a sentence has ended
        self.by_sentence = np.zeros(places, dtype=bool)
        self.serials = np.zeros(places, dtype=np.int64)
        self.prompts = np.zeros(places, dtype=np.int64)  # lengths
        self.lengths = np.zeros(places, dtype=np.int64)  # own positions in the cache
        self.drawn = np.zeros(places, dtype=np.int64)  # tokens since the row's start, those under way included
        self.seen = np.zeros(places, dtype=np.int64)  # of these, the ones that the host has looked at
        self.limits = np.zeros(places, dtype=np.int64)  # of these
        self.draws = np.zeros((places, limit))
        self.tokens = np.zeros((places, limit), dtype=np.int64)
        self.logprobs = np.zeros((places, limit))
        self.steps: deque[_Step] = deque()  # that the host has not looked at
        self.tokens_run = 0

    def run(self, on_done: Callable[[int, int], None] | None) -> int:
        told = 0
        while self.queue or any(self.slots):
            if self.queue and None in self.slots:
                self._admit()
            elif not self.steps and self.graphs is None:
                self._close_ranks()
            stepped = self._step()
            done = 0
            while len(self.steps) > self.late * stepped:
                done += self._look(self.steps.popleft())
            if done and on_done is not None:
                on_done(done, self.tokens_run - told)
                told = self.tokens_run
        return self.tokens_run

    # Prompts ----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Run the next prompts, packed, and draw the first token of each of their rows."""
        free = [slot for slot, held in enumerate(self.slots) if held is None]
        tasks: list[Task] = []
        room = PREFILL_TOKENS
        while self.queue and len(tasks) < len(free):
            room -= len(self.queue[0].prompt.token_ids)
            if tasks and room < 0:
                break
            tasks.append(self.queue.popleft())
        slots = free[: len(tasks)]
        logits = self._prefill([task.prompt for task in tasks], slots)  # [S, V]
        starts = [task.begin() for task in tasks]
        for slot, task, start in zip(slots, tasks, starts, strict=True):
            rows = len(start.room)
            self._open(slot, task, start, self.cache.start(slot, [], [0] * rows), [0] * rows)
            self.prompts[slot * self.width : (slot + 1) * self.width] = len(task.prompt.token_ids)
        places = np.concatenate([self._slot(slot).places for slot in slots])
        counts = to_device([len(start.room) for start in starts], self.device)
        logits = logits.repeat_interleave(counts, dim=0, output_size=len(places))
        tokens, logprobs = self.step.draw(logits, to_device(self.draws[places, 0], self.device))
        self.pending[to_device(places, self.device)] = tokens
        self._drew(places, tokens, logprobs)

    def _prefill(self, prompts: Sequence[Prompt], slots: Sequence[int]) -> Tensor:
        """Run prompts once, keep their keys and values, and give the logits [S, V] of what follows them."""
        forest = Forest.of([Tree((Segment(prompt.token_ids),), prompt.images, prompt.key) for prompt in prompts])
        forest = forest.to(self.device)
        attend = forest_attend(forest)
        self.cache.admit(slots, [len(prompt.token_ids) for prompt in prompts])

        def record(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.cache.record(layer, k, v)
            return attend(layer, q, k, v)

        embeddings = self.model.embed(forest, self._encoded(prompts))
        hidden = self.step.forward(embeddings, forest.positions, record)
        self.tokens_run += forest.num_tokens
        return self.step.head(hidden[forest.cu_seqlens_q[1:].long() - 1])

    def _encoded(self, prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """The prompts' images; those of the next prompts in the queue are encoded with them."""
        wanted = [key for prompt in prompts for key in prompt.images]
        if not all(key in self.images for key in wanted):
            ahead = [key for task in islice(self.queue, IMAGES_AHEAD) for key in task.prompt.images]
            self.images = dict(self.features([*wanted, *ahead]))
        return self.images

    # Rows -------------------------------------------------------------------------------------------------

    def _open(self, slot: int, task: Task, start: Start, places: list[int], before: list[int]) -> None:
        """Rows begin at these places, each behind as many tokens as `before` says."""
        self.slots[slot] = _Slot(task, places, before)
        limit = start.draws.shape[1]
        self.going[places], self.waiting[places], self.by_sentence[places] = True, False, start.by_sentence
        self.serials[places] += 1
        self.lengths[places] = np.maximum(np.array(before) - 1, 0)  # all but the last are run
        self.drawn[places] = self.seen[places] = 0
        self.limits[places] = np.minimum(limit, start.room)
        self.draws[places, :limit] = start.draws

    def _step(self) -> bool:
        """Run the pending token of each row and draw the next one; False where no row is going."""
        live = np.flatnonzero(self.going & (self.drawn < self.limits))
        if not len(live):
            return False
        longest = int(self.lengths[live].max()) + 1
        positions, uniform = self.prompts[live] + self.lengths[live], self.draws[live, self.drawn[live]]
        if self.graphs is not None:
            drawn = self.graphs(live, positions, uniform, self.lengths, longest)
        else:
            used = 1 + max(slot for slot, held in enumerate(self.slots) if held is not None)
            numbers = step_numbers(live, positions, uniform, self.lengths, len(live))
            drawn = self.step(to_device(numbers, self.device), len(live), used, longest)
        self._drew(live, *drawn)
        self.lengths[live] += 1
        return True

    def _drew(self, rows: np.ndarray, tokens: Tensor, logprobs: Tensor) -> None:
        """Tokens [R] were drawn for the rows at these places; the host will look at them."""
        arrived = None
        if tokens.is_cuda:
            tokens, logprobs = (x.to("cpu", non_blocking=True) for x in (tokens, logprobs))
            arrived = torch.cuda.Event()
            arrived.record()
        self.steps.append(_Step(rows, self.serials[rows], tokens, logprobs, arrived))
        self.drawn[rows] += 1

    def _look(self, step: _Step) -> int:
        """Take down drawn tokens and see which rows have ended; the number of samples that are done with it."""
        if step.arrived is not None:
            step.arrived.synchronize()
        current = self.going[step.places] & (self.serials[step.places] == step.serials)
        places, tokens = step.places[current], step.tokens.numpy()[current]
        number = self.seen[places]
        self.tokens[places, number] = tokens
        self.logprobs[places, number] = step.logprobs.numpy()[current]
        self.seen[places] = number = number + 1
        self.tokens_run += len(places)
        ended = (tokens == self.model.end_token_id) | (number >= self.limits[places])
        asked = self.by_sentence[places] & ~ended & (self.ends.may_end[tokens] | self.waiting[places])
        for index in np.flatnonzero(asked).tolist():
            place = places[index]
            written = self.tokens[place, : number[index]].tolist()
            ended[index], self.waiting[place] = self.ends.look(written)
        self.going[places[ended]] = False
        touched = dict.fromkeys((places[ended] // self.width).tolist())
        return sum(self._advance(slot) for slot in touched if not self.going[self._slot(slot).places].any())

    def _advance(self, number: int) -> bool:
        """All rows of a slot have ended: start those that continue them. True where the sample is done."""
        slot = self._slot(number)
        written = [self.tokens[place, : self.seen[place]].tolist() for place in slot.places]
        sums = [float(self.logprobs[place, : self.seen[place]].sum()) for place in slot.places]
        start = slot.task.ended([Written(tuple(row), total) for row, total in zip(written, sums, strict=True)])
        if start is None:
            self.cache.release(number)
            self.slots[number] = None
            return True
        before = [slot.before[parent] + len(written[parent]) for parent in start.parents]
        parents = [slot.places[parent] for parent in start.parents]
        places = self.cache.start(number, parents, [count - 1 for count in before])
        rows, tokens = to_device(np.array([places, [written[parent][-1] for parent in start.parents]]), self.device)
        self.pending[rows] = tokens
        self._open(number, slot.task, start, places, before)
        return False

    def _close_ranks(self) -> None:
        """No sample is waiting: move the last ones to the slots that are free, so that steps cover fewer."""
        taken = [number for number, held in enumerate(self.slots) if held is not None]
        for target, source in enumerate(reversed(taken)):
            if target >= len(taken) or self.slots[target] is not None:
                continue
            if source <= target:
                break
            self._move(source, target)

    def _move(self, source: int, target: int) -> None:
        self.cache.move(source, target)
        by_row = (self.waiting, self.by_sentence, self.serials, self.prompts, self.lengths, self.drawn, self.seen)
        here, there = (slice(slot * self.width, (slot + 1) * self.width) for slot in (source, target))
        for kept in (*by_row, self.going, self.limits, self.draws, self.tokens, self.logprobs, self.pending):
            kept[there] = kept[here]
        self.going[here] = False
        held = self._slot(source)
        held.places = [place + (target - source) * self.width for place in held.places]
        self.slots[target], self.slots[source] = held, None

    def _slot(self, number: int) -> _Slot:
        held = self.slots[number]
        assert held is not None
        return held
