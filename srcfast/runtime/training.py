"""The training loop: global batches of trees, packed into forests, one update each.

A global batch is `micro_batch_size * gradient_accumulation_steps` items. Its order is a pure function of
(seed, epoch), and the loss's denominator is taken over all of it before the first backward; how it is then
cut into forests (micro-batches, token budget) changes nothing but rounding.

A GPU is never waited for but for one step back: the update is skipped on the device where loss or norm is not finite,
and the numbers of a step are read while the device computes the next one, before that one's update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from srcfast.data.forest import Forest, Tree, pack_sizes
from srcfast.errors import SrcfastError
from srcfast.runtime.forecast import plan_checkpointing
from srcfast.runtime.loader import PackedStep, packed_steps
from srcfast.runtime.loss_rows import takes_rows
from srcfast.runtime.optimizer import AdamW, OptimizerName, learning_rate_at
from srcfast.runtime.profiling import StepProfiler
from srcfast.runtime.telemetry import StepMeter

Metrics = dict[str, Any]
Features = Callable[[Iterable[str]], Mapping[str, Tensor]]  # image keys -> [n, D] each
# (hidden [T, D] or [M, D] of the rows asked for, forest, head weight [V, D], items in the forest's order, denominator) ->
# (loss, metrics). The losses of a global batch's forests are added, and so are their metrics, but for those named max_*, of
# which the greatest counts. A loss that waits for the device makes every step wait.
Loss = Callable[[Tensor, Forest, Tensor, Sequence["TrainingItem"], Any], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class TrainingItem:
    """A tree to train on, and what the loss function needs to know of it."""

    tree: Tree
    meta: Any = None


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    Args:
        epochs: passes over the items.
        micro_batch_size: most trees in a forest.
        gradient_accumulation_steps: micro-batches an update.
        token_budget: most tokens in a forest; a micro-batch that exceeds it is run as several forests.
        learning_rate: peak.
        warmup_ratio: share of the steps for linear warm-up; a cosine follows.
        min_learning_rate_ratio: where the cosine ends, as a share of the peak.
        weight_decay: of matrices.
        max_grad_norm: global norm to which gradients are clipped.
        seed: of the order.
        optimizer: see `AdamW`.
        activation_checkpointing: layers a group whose activations are recomputed in backward instead of kept; 0 for none,
            "auto": as few as fit into the device's memory (`plan_checkpointing`).
        loader_workers: processes that pack forests and prepare images ahead of the step; 0: none, all is done in line.
    """

    epochs: int = 1
    micro_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    token_budget: int = 8192
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.03
    min_learning_rate_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    optimizer: OptimizerName = "adamw"
    activation_checkpointing: int | Literal["auto"] = 0
    loader_workers: int = 0

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps


@dataclass
class TrainingState:
    """All that changes: the optimizer (with it the trainable weights) and the number of updates done.

    The place in the data follows from `step`.
    """

    optimizer: AdamW
    step: int = 0


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation `[count]` of the items in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def num_steps(count: int, settings: TrainingSettings) -> int:
    """Updates that `count` items make; an epoch's last global batch may be smaller."""
    return settings.epochs * math.ceil(count / settings.global_batch_size)


def global_batch(count: int, step: int, settings: TrainingSettings) -> list[int]:
    """Indices of the items of update `step`."""
    epoch, within = divmod(step, math.ceil(count / settings.global_batch_size))
    begin = within * settings.global_batch_size
    return epoch_order(count, settings.seed, epoch)[begin : begin + settings.global_batch_size].tolist()


def train(
    model: Any,
    items: Sequence[TrainingItem],
    *,
    loss: Loss,
    denominator: Callable[[Sequence[TrainingItem]], Any],
    settings: TrainingSettings,
    features: Features | None = None,
    on_step: Callable[[Metrics], None] | None = None,
    before_update: Callable[[Metrics], None] | None = None,
    rows: Callable[[Forest], Tensor] | None = None,
    head_rows: Callable[[Forest], int] | None = None,
    profiler: StepProfiler | None = None,
) -> list[Metrics]:
    """Train the model's parameters that require gradients; the others stay as they are.

    Args:
        model: `model(forest, features)` (without `features`: `model(forest)`) gives hidden states `[T, D]`;
            `model.decoder.head_weight` is `[V, D]`.
        items: what to train on.
        loss: loss and metrics of one forest, see `Loss`.
        denominator: of a global batch's items; handed to `loss`.
        settings: see there.
        features: image keys to embeddings; called once a step with the step's distinct keys. With `missing` and
            `prepare` (see `packed_steps`) also with the images that the workers prepared.
        on_step: called after each update with its metrics; on a GPU one step late.
        before_update: called with the step's metrics before the weights change; what it raises stops the run
            there. On a GPU that holds for step 0; later steps' are called together with `on_step`.
        rows: the rows `[M]` of a forest, ascending, int64, on the host, whose hidden states the loss reads; default: all. A
            model whose `forward` takes `rows` then computes its last layer for these alone, and the loss is given
            `[M, D]`. Kept in the forest's cache by the caller: it is asked for by a worker first.
        head_rows: how many rows of a forest meet the head, for MFU; default: all tokens below the roots.
        profiler: of some steps.

    Returns:
        One dict a step: step, loss, learning_rate, grad_norm (before clipping), tokens, tokens_per_second,
        wasted_tokens, forests, mfu, peak_memory_bytes (see `StepMeter`), and the loss function's own.

    Raises:
        SrcfastError: nothing to train on, or a loss or gradient that is not finite, by step and keys: that step's
            update, and every later one, has not been made.
        InputError: an item larger than the token budget, by its key, before anything is trained.
    """
    if not items:
        raise SrcfastError("nothing to train on: expected at least one training item, found none")
    # An item that is too large is refused before anything is trained.
    keys, trees = [item.tree.key for item in items], [item.tree for item in items]
    pack_sizes([tree.num_tokens for tree in trees], settings.token_budget, keys=keys)
    device = next(model.parameters()).device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trainable, weight_decay=settings.weight_decay, name=settings.optimizer)
    state = TrainingState(optimizer)
    total = num_steps(len(items), settings)
    late = reads_late(device) and optimizer.skips_on_device
    if rows is not None and not takes_rows(model):
        rows = None
    was_training, decoder = model.training, model.decoder
    model.train()
    decoder.checkpoint_layers = checkpoint_layers(model, trees, settings)
    meter = StepMeter(model, head_rows)
    history: list[Metrics] = []
    pending: StepNumbers | None = None

    def check(numbers: StepNumbers) -> Metrics:
        metrics = numbers.read()
        if before_update is not None:
            before_update(metrics)
        return metrics

    def report(numbers: StepNumbers, metrics: Metrics) -> None:
        history.append(meter.measure(metrics, numbers.forests))
        if on_step is not None:
            on_step(history[-1])

    packed = packed_steps(
        trees,
        range(state.step, total),
        partial(global_batch, len(items), settings=settings),
        token_budget=settings.token_budget,
        most_trees=settings.micro_batch_size,
        features=features,
        plan=rows,
        workers=settings.loader_workers,
        pin=device.type == "cuda",
    )
    try:
        for step in packed:
            if profiler is not None:
                profiler.begin(step.step, total)
            batch = [items[i] for i in step.indices]
            numbers = accumulate(model, step, batch, loss, denominator(batch), state, features, rows, device)
            numbers.learning_rate = learning_rate_at(
                step.step, total, settings.learning_rate, settings.warmup_ratio, settings.min_learning_rate_ratio
            )
            if pending is not None:
                report(pending, check(pending))
                pending = None
            if late and step.step > 0:
                optimizer.clip(numbers.norm, settings.max_grad_norm)
                optimizer.step(numbers.learning_rate, numbers.finite)
                pending = numbers
            else:
                metrics = check(numbers)
                optimizer.clip(metrics["grad_norm"], settings.max_grad_norm)
                optimizer.step(numbers.learning_rate)
                report(numbers, metrics)
            state.step += 1
        if pending is not None:
            report(pending, check(pending))
    finally:
        if profiler is not None:
            profiler.end()
        model.train(was_training)
        decoder.checkpoint_layers = 0
    return history


def reads_late(device: torch.device) -> bool:
    """Whether the numbers of a step are read after its update: where work is queued on a device."""
    return device.type == "cuda"


def checkpoint_layers(model: Any, trees: Sequence[Tree], settings: TrainingSettings) -> int:
    """Layers a group whose activations are recomputed: what the settings say, or as few as the memory asks for."""
    if settings.activation_checkpointing != "auto":
        return settings.activation_checkpointing
    return plan_checkpointing(
        model,
        trees,
        token_budget=settings.token_budget,
        micro_batch_size=settings.micro_batch_size,
        optimizer=settings.optimizer,
        images_a_step=settings.global_batch_size,
    )


@dataclass
class StepNumbers:
    """The numbers of a global batch, on their way from the device.

    Attributes:
        step: its number.
        forests: on the host.
        names: of the loss function's metrics, the last of `values`.
        norm: of the gradients, a scalar on the device.
        finite: on the device, whether loss and norm are.
        values: on the host: each forest's loss, the norm, the metrics; complete once `arrived` is.
        arrived: None where nothing is waited for.
        learning_rate: of the update.
    """

    step: int
    forests: list[Forest]
    names: list[str]
    norm: Tensor
    finite: Tensor
    values: Tensor
    arrived: torch.cuda.Event | None
    learning_rate: float = 0.0

    @classmethod
    def of(cls, step: PackedStep, losses: list[Tensor], norm: Tensor, totals: dict[str, Tensor]) -> StepNumbers:
        """Sends all numbers of a step to the host, in one transfer that isn't waited for."""
        stacked = torch.stack([scalar.double() for scalar in (*losses, norm, *totals.values())])
        finite = torch.isfinite(stacked[: len(losses) + 1]).all()
        arrived = None
        if stacked.is_cuda:
            host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True).copy_(stacked, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            stacked = host
        return cls(step.step, step.forests, list(totals), norm, finite, stacked, arrived)

    def read(self) -> Metrics:
        """The step's metrics, once they are here. Raises SrcfastError where loss or norm is not finite."""
        if self.arrived is not None:
            self.arrived.synchronize()
        values, count = self.values.tolist(), len(self.forests)
        losses, norm, rest = values[:count], values[count], values[count + 1 :]
        _check_finite(self.step, losses, norm, self.forests)
        return {
            "step": self.step,
            "loss": sum(losses),
            "grad_norm": norm,
            "tokens": sum(forest.num_tokens for forest in self.forests),
            "wasted_tokens": sum(forest.wasted_tokens for forest in self.forests),
            "forests": count,
            "learning_rate": self.learning_rate,
            **dict(zip(self.names, rest, strict=True)),
        }


def accumulate(
    model: Any,
    step: PackedStep,
    batch: Sequence[TrainingItem],
    loss: Loss,
    normaliser: Any,
    state: TrainingState,
    features: Features | None,
    rows: Callable[[Forest], Tensor] | None,
    device: torch.device,
) -> StepNumbers:
    """Gradients of one global batch, forest by forest, into the optimizer's buffer; its numbers are not waited for."""
    inputs: tuple[Mapping[str, Tensor], ...] = ()
    if features is not None:
        given = (step.prepared,) if step.prepared else ()
        inputs = (features(step.images, *given),)
    state.optimizer.zero_grad()
    losses: list[Tensor] = []
    totals: dict[str, Tensor] = {}
    for forest in step.forests:
        moved = forest.to(device)
        wanted = {} if rows is None else {"rows": rows(forest)}
        hidden = model(moved, *inputs, **wanted)  # [T, D], or [M, D]
        inside = [batch[i] for i in forest.indices]
        part, measured = loss(hidden, moved, model.decoder.head_weight, inside, normaliser)
        part.backward()
        losses.append(part.detach())
        for name, value in measured.items():
            if name not in totals:
                totals[name] = value.detach()
            elif name.startswith("max_"):
                totals[name] = torch.maximum(totals[name], value.detach())
            else:
                totals[name] = totals[name] + value.detach()
    return StepNumbers.of(step, losses, state.optimizer.gradient_norm(), totals)


def _check_finite(step: int, losses: Sequence[float], norm: float, forests: Sequence[Forest]) -> None:
    if math.isfinite(norm) and all(map(math.isfinite, losses)):
        return
    bad = [forest for forest, value in zip(forests, losses, strict=True) if not math.isfinite(value)]
    what = "the loss" if bad else "the gradient"
    keys = [str(tree.key) for forest in bad or forests for tree in forest.trees]
    shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    raise SrcfastError(
        f"step {step}: {what} is not finite (loss {sum(losses)}, gradient norm {norm}) among the samples "
        f"{shown}; this step has not changed the weights. Mend: lower learning_rate, or look at the samples "
        "with `inspect`"
    )
