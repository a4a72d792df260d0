"""Continuous decoding: rows of many samples advance together, and when a sample is done, the next one starts.

Each sample is a `Task`: it says which rows to write, gets what they wrote when all of them have ended, and
says what to write next, or that it is done. A row ends with the end token, with a sentence (where the task wants that), or at
its limit of tokens. It then leaves the batch at once; when its sample is done, the next sample's prompt is run in its slot.

`step.py` computes a step. The host reads the sampled tokens: on a CPU after each step; on a GPU while the next step runs, so
that the device never waits, and what a row sampled past its end is dropped. The host waits for a GPU once a step, for the event
behind the tokens' copy, and nowhere else. Uniform numbers come from the task alone, so that results don't depend on what else
is in the batch, except for rounding.
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
from srcfast.attention.options import CAUSAL, AttentionOptions
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.kv_store import Layout
from srcfast.generation.row_states import RowStates
from srcfast.generation.sampling import Sampling
from srcfast.generation.sentences import SentenceEnds
from srcfast.generation.step import step_numbers
from srcfast.models.experts import has_experts_in_4_bits
from srcfast.models.head import check_numbers
from srcfast.models.protocols import VisionLanguageModel
from srcfast.models.sharding import is_sharded
from srcfast_kernels.transfers import to_device

Features = Callable[[Iterable[str]], Mapping[str, Tensor]]  # image keys -> embeddings [n, D] each
PREFILL_TOKENS = 4096  # at most, of the prompts run together; a longer one runs alone
IMAGES_AHEAD = 32  # prompts whose images are encoded together


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens [n] (image placeholders expanded) and the keys of its images in order."""

    token_ids: np.ndarray
    images: tuple[str, ...] = ()
    key: str = ""  # names the sample: its random numbers depend on nothing else


@dataclass(frozen=True)
class Start:
    """Rows to write side by side.

    Attributes:
        parents: for each row, the index of the ended row that it continues; empty: all rows follow the prompt.
        draws: [rows, limit] float64 in [0, 1): each token's uniform number; no row writes more than `limit` tokens.
        limits: for each row, the number of tokens that it may still write.
        by_sentence: whether a row also ends with a sentence.
    """

    parents: Sequence[int]
    draws: np.ndarray
    limits: Sequence[int]
    by_sentence: bool = False


@dataclass(frozen=True)
class Written:
    """The tokens that a row wrote since its start, and their summed log-probability under the model itself."""

    token_ids: tuple[int, ...]
    logprob: float


class Task(Protocol):
    """One sample's decisions."""

    prompt: Prompt

    def begin(self) -> Start:
        """Return the first rows."""
        ...

    def ended(self, rows: Sequence[Written]) -> Start | None:
        """Return the rows that continue these; None when the sample is done."""
        ...


@dataclass
class _Slot:
    """A sample that is being decoded."""

    task: Task
    rows: list[int]  # indices, in the order of its last Start
    before: list[int]  # for each row, the number of tokens that it had then


@dataclass
class _Step:
    """Tokens [R] sampled for rows; `generation_ids` tells a row from a later one of the same index."""

    rows: np.ndarray
    generation_ids: np.ndarray
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
    """Decode all tasks, started in this order, `slots` of them at once.

    Args:
        features: image keys -> embeddings; called for the images of `IMAGES_AHEAD` prompts at a time.
        width: maximum of rows that a task writes at once.
        limit: maximum of tokens that a row has in the end, those of the rows that it continues included.
        on_done: called with the samples done and the tokens run since the last call.
        graphs: on a GPU, replay steps as CUDA graphs (see `cuda_graphs`); not for layers that are sharded over ranks.
        memory: shared with other calls on the same weights; default: memory that is freed at the end of the call.

    Returns:
        The number of tokens run, of prompts and of rows.
    """
    if not tasks:
        return 0
    sharded = is_sharded(model.decoder)
    graphs = graphs and not (sharded or model.decoder.has_states or has_experts_in_4_bits(model.decoder))
    on_gpu = model.decoder.head_weight.is_cuda
    longest = max(len(task.prompt.token_ids) for task in tasks)
    layout = Layout.of(min(slots, len(tasks)), width, longest, limit, on_gpu=on_gpu, spare=graphs and on_gpu)
    with (
        DecodingMemory() if memory is None else nullcontext(memory) as buffers,
        # A sharded layer that is gathered in inference mode could not be gathered outside of it again.
        torch.inference_mode(not sharded),
        torch.no_grad(),
    ):
        return _Decoding(model, tasks, features, layout, limit, sampling, buffers).run(on_done)


class _Decoding:
    """The state of one `decode`. Arrays by row have a row's value at slot * width + row."""

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
        self.states = RowStates(layout.slots, layout.width) if model.decoder.has_states else None
        # Steps by which the host reads tokens late: none where a step that nobody reads would spoil a row's state.
        self.delay = int(self.device.type == "cuda" and self.states is None)
        self.step, self.graphs = memory.step(model, layout, sampling)
        self.cache, self.pending = self.step.cache, self.step.pending
        self.ends = SentenceEnds.of(model.tokenizer, len(model.decoder.head_weight))
        self.is_end = np.zeros(len(model.decoder.head_weight), dtype=bool)  # [V] tokens that end a response
        self.is_end[[token for token in model.end_tokens if 0 <= token < len(self.is_end)]] = True
        self.slots: list[_Slot | None] = [None] * layout.slots
        self.images: dict[str, Tensor] = {}
        count = layout.rows
        self.active = np.zeros(count, dtype=bool)
        self.awaiting_boundary = np.zeros(
            count, dtype=bool
        )  # only the next character tells whether a sentence has ended
        self.by_sentence = np.zeros(count, dtype=bool)
        self.generation_ids = np.zeros(count, dtype=np.int64)
        self.prompts = np.zeros(count, dtype=np.int64)  # positions that follow them
        self.lengths = np.zeros(count, dtype=np.int64)  # positions in the cache behind the prompt
        self.num_sampled = np.zeros(
            count, dtype=np.int64
        )  # tokens since the row's start, those of running steps included
        self.num_read = np.zeros(count, dtype=np.int64)  # of these, the ones that the host has read
        self.limits = np.zeros(count, dtype=np.int64)  # of `num_sampled`
        self.draws = np.zeros((count, limit))
        self.tokens = np.zeros((count, limit), dtype=np.int64)
        self.logprobs = np.zeros((count, limit))
        self.steps: deque[_Step] = deque()  # that the host has not read
        self.tokens_run = 0

    def run(self, on_done: Callable[[int, int], None] | None) -> int:
        """Decode until no task is left; return the number of tokens run."""
        reported = 0
        while self.queue or any(self.slots):
            if self.queue and None in self.slots:
                self._admit()
            elif not self.steps and self.graphs is None:
                self._compact_slots()
            stepped = self._step()
            done = 0
            while len(self.steps) > self.delay * stepped:
                done += self._read(self.steps.popleft())
            if done and on_done is not None:
                on_done(done, self.tokens_run - reported)
                reported = self.tokens_run
        return self.tokens_run

    # Prompts ----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Run the next prompts, packed, and sample the first token of each of their rows."""
        free = [number for number, slot in enumerate(self.slots) if slot is None]
        tasks: list[Task] = []
        budget = PREFILL_TOKENS
        while self.queue and len(tasks) < len(free):
            budget -= len(self.queue[0].prompt.token_ids)
            if tasks and budget < 0:
                break
            tasks.append(self.queue.popleft())
        slots = free[: len(tasks)]
        logits, positions = self._prefill([task.prompt for task in tasks], slots)  # [S, V]
        starts = [task.begin() for task in tasks]
        for slot, task, start, position in zip(slots, tasks, starts, positions, strict=True):
            before = [0] * len(start.limits)
            rows_of_slot = self.cache.start(slot, [], before)
            if self.states is not None:
                self.states.start(slot, rows_of_slot, [None] * len(rows_of_slot))
            self._start_rows(slot, task, start, rows_of_slot, before)
            self.prompts[slot * self.width : (slot + 1) * self.width] = position
        rows = np.concatenate([self._slot(slot).rows for slot in slots])
        counts = to_device([len(start.limits) for start in starts], self.device)
        logits = logits.repeat_interleave(counts, dim=0, output_size=len(rows))
        tokens, logprobs = self.step.draw(logits, to_device(self.draws[rows, 0], self.device))
        self.pending[to_device(rows, self.device)] = tokens
        self._queue_step(rows, tokens, logprobs)

    def _prefill(self, prompts: Sequence[Prompt], slots: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Run prompts and store their keys and values; return the logits [S, V] and the positions of what follows them."""
        forest = Forest.of([Tree((Segment(prompt.token_ids),), prompt.images, prompt.key) for prompt in prompts])
        forest = forest.to(self.device)
        attend = forest_attend(forest)
        self.cache.admit(slots, [len(prompt.token_ids) for prompt in prompts])

        def record(layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions = CAUSAL, /) -> Tensor:
            self.cache.record(layer, k, v)
            return attend(layer, q, k, v, options)

        embeddings = self.model.embed(forest, self._encoded(prompts))
        if self.states is not None:
            embeddings = self.states.recording(embeddings, forest, slots)
        hidden = self.step.prefill(embeddings, forest.positions, record)
        self.tokens_run += forest.num_tokens
        logits = self.step.head(hidden[forest.cu_seqlens_q[1:].long() - 1])
        return logits, self.model.decoder.next_positions(forest, embeddings)

    def _encoded(self, prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """Embed the prompts' images, and with them those of the next prompts in the queue."""
        keys = [key for prompt in prompts for key in prompt.images]
        if not all(key in self.images for key in keys):
            ahead = [key for task in islice(self.queue, IMAGES_AHEAD) for key in task.prompt.images]
            self.images = dict(self.features([*keys, *ahead]))
        return self.images

    # Rows -------------------------------------------------------------------------------------------------

    def _start_rows(self, slot: int, task: Task, start: Start, rows: list[int], before: list[int]) -> None:
        """Start a slot's rows at these indices, each behind `before` tokens of rows that it continues."""
        self.slots[slot] = _Slot(task, rows, before)
        limit = start.draws.shape[1]
        self.active[rows] = True
        self.awaiting_boundary[rows] = False
        self.by_sentence[rows] = start.by_sentence
        self.generation_ids[rows] += 1
        self.lengths[rows] = np.maximum(np.array(before) - 1, 0)  # the last token is pending: no step has run it yet
        self.num_sampled[rows] = self.num_read[rows] = 0
        self.limits[rows] = np.minimum(limit, start.limits)
        self.draws[rows, :limit] = start.draws

    def _step(self) -> bool:
        """Run the pending token of each active row and sample the next one; return False if no row is active."""
        rows = np.flatnonzero(self.active & (self.num_sampled < self.limits))
        if not len(rows):
            return False
        longest = int(self.lengths[rows].max()) + 1
        positions = self.prompts[rows] + self.lengths[rows]
        uniform = self.draws[rows, self.num_sampled[rows]]
        if self.graphs is not None:
            sampled = self.graphs(rows, positions, uniform, self.lengths, longest)
        else:
            used = 1 + max(number for number, slot in enumerate(self.slots) if slot is not None)
            numbers = step_numbers(rows, positions, uniform, self.lengths, len(rows))
            sampled = self.step(to_device(numbers, self.device), len(rows), used, longest, self.states)
        self._queue_step(rows, *sampled)
        self.lengths[rows] += 1
        return True

    def _queue_step(self, rows: np.ndarray, tokens: Tensor, logprobs: Tensor) -> None:
        """Queue the tokens [R] sampled for these rows, for the host to read."""
        arrived = None
        if tokens.is_cuda:
            tokens, logprobs = (x.to("cpu", non_blocking=True) for x in (tokens, logprobs))
            arrived = torch.cuda.Event()
            arrived.record()
        self.steps.append(_Step(rows, self.generation_ids[rows], tokens, logprobs, arrived))
        self.num_sampled[rows] += 1

    def _read(self, step: _Step) -> int:
        """Read a step's tokens and end the rows that they end; return the number of samples that are now done."""
        if step.arrived is not None:
            step.arrived.synchronize()
        # On a GPU a row may have ended, or its index may be another row's, since the step was queued.
        current = self.active[step.rows] & (self.generation_ids[step.rows] == step.generation_ids)
        rows, tokens = step.rows[current], step.tokens.numpy()[current]
        number = self.num_read[rows]
        self.tokens[rows, number] = tokens
        self.logprobs[rows, number] = logprobs = step.logprobs.numpy()[current]
        if not np.isfinite(logprobs).all():
            keys = [self._slot(row // self.width).task.prompt.key for row in rows]
            check_numbers(self.model, logprobs, keys)
        self.num_read[rows] = number = number + 1
        self.tokens_run += len(rows)
        ended = self.is_end[tokens] | (number >= self.limits[rows])
        # A sentence's end depends on the text, so text is made only where the last token may have ended one.
        candidates = self.by_sentence[rows] & ~ended & (self.ends.may_end[tokens] | self.awaiting_boundary[rows])
        for index in np.flatnonzero(candidates).tolist():
            row = rows[index]
            written = self.tokens[row, : number[index]].tolist()
            ended[index], self.awaiting_boundary[row] = self.ends.look(written)
        self.active[rows[ended]] = False
        slots = dict.fromkeys((rows[ended] // self.width).tolist())
        return sum(self._advance(slot) for slot in slots if not self.active[self._slot(slot).rows].any())

    def _advance(self, number: int) -> bool:
        """Start the rows that continue a slot's rows, which have all ended; return True if the sample is done."""
        slot = self._slot(number)
        written = [self.tokens[row, : self.num_read[row]].tolist() for row in slot.rows]
        sums = [float(self.logprobs[row, : self.num_read[row]].sum()) for row in slot.rows]
        start = slot.task.ended([Written(tuple(ids), total) for ids, total in zip(written, sums, strict=True)])
        if start is None:
            self.cache.release(number)
            self.slots[number] = None
            return True
        before = [slot.before[parent] + len(written[parent]) for parent in start.parents]
        parents = [slot.rows[parent] for parent in start.parents]
        rows = self.cache.start(number, parents, [count - 1 for count in before])
        if self.states is not None:
            self.states.start(
                number, rows, [parent if count > 1 else None for parent, count in zip(parents, before, strict=True)]
            )
        last = [written[parent][-1] for parent in start.parents]
        indices, tokens = to_device(np.array([rows, last]), self.device)
        self.pending[indices] = tokens
        self._start_rows(number, slot.task, start, rows, before)
        return False

    def _compact_slots(self) -> None:
        """Move the last samples to free slots, so that steps cover fewer slots; for when the queue is empty."""
        taken = [number for number, slot in enumerate(self.slots) if slot is not None]
        for target, source in enumerate(reversed(taken)):
            if target >= len(taken) or self.slots[target] is not None:
                continue
            if source <= target:
                break
            self._move(source, target)

    def _move(self, source: int, target: int) -> None:
        """Move a sample to a free slot."""
        self.cache.move(source, target)
        if self.states is not None:
            self.states.move(source, target)
        flags = (self.active, self.awaiting_boundary, self.by_sentence, self.generation_ids)
        counts = (self.prompts, self.lengths, self.num_sampled, self.num_read, self.limits)
        old, new = (slice(slot * self.width, (slot + 1) * self.width) for slot in (source, target))
        for by_row in (*flags, *counts, self.draws, self.tokens, self.logprobs, self.pending):
            by_row[new] = by_row[old]
        self.active[old] = False
        slot = self._slot(source)
        slot.rows = [row + (target - source) * self.width for row in slot.rows]
        self.slots[target], self.slots[source] = slot, None

    def _slot(self, number: int) -> _Slot:
        slot = self.slots[number]
        assert slot is not None
        return slot
