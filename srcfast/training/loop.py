"""The training loop: global batches of trees, packed into forests, one update each.

A global batch is `micro_batch_size * gradient_accumulation_steps` items. Its order is a pure function of
(seed, epoch), and the loss's denominator is taken over all of it before the first backward; how it is then
dealt over the ranks and cut into forests (micro-batches, token budget) changes nothing but rounding.

A GPU is never waited for but for one step back: the update is skipped on the device where loss or norm is not finite,
and the numbers of a step are read while the device computes the next one, before that one's update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from srcfast import distributed
from srcfast.config.settings import TrainingConfig
from srcfast.data.batching import global_batch, num_steps, rank_batch_indices
from srcfast.data.forest import Forest, Tree, pack_sizes
from srcfast.data.jsonl import json_hash
from srcfast.data.logit_rows import supports_row_selection
from srcfast.errors import InputError, Interrupted, SrcfastError
from srcfast.memory.forecast import plan_checkpointing
from srcfast.memory.model_sizes import memory_for
from srcfast.models.dropout_keys import dropping, drops, step_keys
from srcfast.models.sharding import empty_step, is_sharded
from srcfast.run import signals
from srcfast.training.checkpoint import TrainingCheckpoints, weights_hash
from srcfast.training.determinism import deterministic_algorithms
from srcfast.training.loader import PackedStep, packed_steps
from srcfast.training.meter import StepMeter
from srcfast.training.optimizer import AdamW, learning_rate_at
from srcfast.training.pipelining import reads_late
from srcfast.training.profiler import StepProfiler
from srcfast_kernels.transfers import Fetched, fetch, to_device

Metrics = dict[str, Any]
Features = Callable[[Iterable[str]], Mapping[str, Tensor]]  # image keys -> [n, D] each
# (hidden [T, D] or [M, D] of the rows asked for, forest, head weight [V, D], items in the forest's order, denominator) ->
# (loss, metrics). The losses of a global batch's forests are added, and so are their metrics, but for those named max_*, of
# which the greatest counts. A loss that waits for the device makes every step wait.
Loss = Callable[[Tensor, Forest, Tensor, Sequence["TrainingItem"], Any], tuple[Tensor, dict[str, Tensor]]]


class NotFinite(SrcfastError):
    """A loss or gradient of this step is not finite; the weights are those before it."""

    def __init__(self, step: int, message: str) -> None:
        self.step = step
        super().__init__(message)


@dataclass(frozen=True)
class TrainingItem:
    """A tree to train on.

    Attributes:
        tree: its positions.
        meta: what the loss function needs to know of it.
        images: names of its images wherever their folder lies; the tree's image keys then are the files. None: there are no
            files, the keys say all.
    """

    tree: Tree
    meta: Any = None
    images: tuple[str, ...] | None = None


@dataclass
class TrainingState:
    """All that changes: the optimizer (with it the trainable weights) and the number of updates done.

    The place in the data follows from `step`.
    """

    optimizer: AdamW
    step: int = 0


def train(
    model: Any,
    items: Sequence[TrainingItem],
    *,
    loss: Loss,
    denominator: Callable[[Sequence[TrainingItem]], Any],
    settings: TrainingConfig,
    features: Features | None = None,
    on_step: Callable[[Metrics], None] | None = None,
    before_update: Callable[[Metrics], None] | None = None,
    rows: Callable[[Forest], Tensor] | None = None,
    head_rows: Callable[[Forest], int] | None = None,
    profiler: StepProfiler | None = None,
    checkpoints: TrainingCheckpoints | None = None,
) -> list[Metrics]:
    """Train the model's parameters that require gradients; the others stay as they are.

    On several ranks all call this with the same model and items. Each runs its share of every global batch, the gradients are
    added up over the ranks once a step, and all make the same update: the metrics are of the whole batch on every rank.

    Args:
        model: `model(forest, features)` (without `features`: `model(forest)`) gives hidden states `[T, D]`;
            `model.decoder.head_weight` is `[V, D]`.
        items: what to train on.
        loss: loss and metrics of one forest, see `Loss`.
        denominator: of a global batch's items; handed to `loss`.
        settings: see there.
        features: image keys to embeddings; called once a step with the step's distinct keys. Where it has
            `for_training(deterministic)`, what that gives is called. With `missing` and `prepare` (see `packed_steps`) also
            with the images that the workers prepared.
        on_step: called after each update with its metrics; on a GPU one step late.
        before_update: called with the step's metrics before the weights change; what it raises stops the run
            there. On a GPU that holds for step 0; later steps' are called together with `on_step`.
        rows: the rows `[M]` of a forest, ascending, int64, on the host, whose hidden states the loss reads; default: all. A
            model whose `forward` takes `rows` then computes its last layer for these alone, and the loss is given
            `[M, D]`. Stored in the forest's cache by the caller: it is asked for by a worker first.
        head_rows: how many rows of a forest meet the head, for MFU; default: all tokens below the roots.
        profiler: of some steps.
        checkpoints: where the training is saved, and continued from: bit for bit on a CPU, and on a GPU where the settings
            say `deterministic`. `on_step` is called for the steps that are still to be done. A signal that asks to stop is
            then obeyed after a step, see `interrupt`.

    Returns:
        One dict a step: step, loss, learning_rate, grad_norm (before clipping), tokens, tokens_per_second,
        wasted_tokens, forests, mfu, peak_memory_bytes (see `StepMeter`; these two are of this rank), and the loss
        function's own.

    Raises:
        NotFinite: a loss or gradient is not finite, by step and keys: that step's update, and every later one, has not been
            made.
        SrcfastError: nothing to train on. Or a rank that stays away, or that began with other weights
            or items. Or a checkpoint can't be written.
        ConfigError: the checkpoint is another training's.
        Interrupted: a signal asked to stop; all steps so far are saved.
        InputError: an item larger than the token budget, or without a token to predict, by its key, before anything is
            trained.
    """
    if not items:
        raise SrcfastError("nothing to train on: expected at least one training item, found none")
    for item in items:
        if len(item.tree.segments) < 2:  # a segment is never empty
            raise InputError(
                sample_id=str(item.tree.key),
                field="response",
                expected="at least one token to predict after the prompt",
                found="none",
                fix="drop this sample: nothing can be learnt from it",
            )
    if (for_training := getattr(features, "for_training", None)) is not None:
        features = for_training(settings.deterministic)
    # An item that is too large is refused before anything is trained.
    keys, trees = [item.tree.key for item in items], [item.tree for item in items]
    pack_sizes([tree.num_tokens for tree in trees], settings.token_budget, keys=keys)
    device = next(model.parameters()).device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trainable, weight_decay=settings.weight_decay, name=settings.optimizer)
    checkpoint_every = checkpoint_layers(model, trees, settings)  # before moments are read: the forecast counts them
    state, history = TrainingState(optimizer), list[Metrics]()
    total = num_steps(len(items), settings)
    check_same_start(optimizer.weights, trees)
    if checkpoints is not None:
        state.step, history = checkpoints.begin(optimizer, settings.loop(), items)
    late = reads_late(device) and optimizer.skips_on_device
    if rows is not None and not supports_row_selection(model):
        rows = None
    was_training, decoder, has_dropout = model.training, model.decoder, drops(model)
    model.train()
    decoder.checkpoint_layers = checkpoint_every
    meter = StepMeter(model, head_rows)
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
        partial(
            rank_batch_indices,
            len(items),
            settings=settings,
            sizes=[tree.num_tokens for tree in trees],
            rank=distributed.rank(),
            ranks=distributed.world_size(),
        ),
        token_budget=settings.token_budget,
        max_trees=settings.micro_batch_size,
        features=features,
        plan=rows,
        workers=settings.loader_workers,
        pin=device.type == "cuda",
    )
    try:
        with (
            deterministic_algorithms(settings.deterministic and device.type == "cuda"),
            nullcontext() if checkpoints is None else signals.at_boundaries(),
        ):
            for step in packed:
                if profiler is not None:
                    profiler.begin(step.step, total)
                batch, chosen = [items[i] for i in step.indices], global_batch(len(items), step.step, settings)
                whole, drop_by = denominator([items[i] for i in chosen]), None
                if has_dropout:
                    drop_by = step_keys(settings.seed, step.step, [chosen.index(i) for i in step.indices])
                numbers = accumulate(model, step, batch, loss, whole, state, features, rows, drop_by, device)
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
                distributed.end_startup_timeout()
                if checkpoints is None:
                    continue
                stop, save = checkpoints.asked(state.step)
                if save or state.step == total:  # whatever stops the process before the result is on disk costs no step
                    if pending is not None:  # what is saved has no step whose numbers weren't looked at
                        report(pending, check(pending))
                        pending = None
                    checkpoints.save(state.step, optimizer, history)
                if stop:
                    raise Interrupted(stop, f"step {state.step} of {total}")
        if pending is not None:
            report(pending, check(pending))
    finally:
        packed.close()
        if profiler is not None:
            profiler.end()
        model.train(was_training)
        decoder.checkpoint_layers = 0
    return history


def run_again(
    model: Any,
    batch: Sequence[TrainingItem],
    step: int,
    *,
    loss: Loss,
    denominator: Callable[[Sequence[TrainingItem]], Any],
    settings: TrainingConfig,
    features: Features | None = None,
    rows: Callable[[Forest], Tensor] | None = None,
) -> Metrics:
    """The numbers of one step of `train`, with its global batch and the weights before it; no weight changes.

    Raises:
        NotFinite: loss or gradient is not finite.
    """
    device = next(model.parameters()).device
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    packed = packed_steps(
        [item.tree for item in batch],
        [step],
        lambda number: list(range(len(batch))),
        token_budget=settings.token_budget,
        max_trees=settings.micro_batch_size,
        features=features,
        plan=rows,
    )
    model.train()
    wanted = rows if supports_row_selection(model) else None
    drop_by = step_keys(settings.seed, step, range(len(batch))) if drops(model) else None
    state, whole = TrainingState(optimizer, step), denominator(batch)
    with deterministic_algorithms(settings.deterministic and device.type == "cuda"):
        return accumulate(model, next(packed), batch, loss, whole, state, features, wanted, drop_by, device).read()


def checkpoint_layers(model: Any, trees: Sequence[Tree], settings: TrainingConfig) -> int:
    """Layers a group whose activations are recomputed: what the settings say, or as few as the memory asks for."""
    if settings.activation_checkpointing != "auto":
        return settings.activation_checkpointing
    planned = plan_checkpointing(
        model,
        trees,
        token_budget=settings.token_budget,
        micro_batch_size=settings.micro_batch_size,
        optimizer=settings.optimizer,
        images_a_step=settings.global_batch_size,
    )
    if not is_sharded(model.decoder):
        return planned
    return min(distributed.gather([memory_for(model), planned]))[
        1
    ]  # all alike, as the one with the least memory needs it


def check_same_start(weights: Tensor, trees: Sequence[Tree]) -> None:
    """Raises SrcfastError where ranks begin to train with other weights or items than rank 0: their sum would mean nothing."""
    if distributed.world_size() == 1:
        return
    own = [weights_hash(weights), json_hash([(str(tree.key), tree.num_tokens) for tree in trees])]
    every = distributed.gather(own)
    for rank, other in enumerate(every):
        for what, expected, found in zip(("weights", "items"), every[0], other, strict=True):
            if found != expected:
                raise SrcfastError(
                    f"training: expected the same {what} on all ranks, found others on rank {rank} than on rank 0. "
                    "Fix: start all ranks with the same command, files and versions"
                )


@dataclass
class StepNumbers:
    """The numbers of a global batch, on their way from the device.

    Attributes:
        step: its number.
        forests: of this rank, on the host.
        shared: of each rank what its host knows of its share: tokens, wasted_tokens, forests, names of its metrics.
        names: of the metrics of all ranks.
        norm: of the gradients, a scalar on the device.
        finite: on the device, whether all losses and the norm are.
        values: on their way to the host: this rank's forests' losses, the norm, then of each rank its loss and its metrics
            by `names`.
        learning_rate: of the update.
    """

    step: int
    forests: list[Forest]
    shared: list[dict[str, Any]]
    names: list[str]
    norm: Tensor
    finite: Tensor
    values: Fetched
    learning_rate: float = 0.0

    @classmethod
    def of(
        cls, step: PackedStep, losses: list[Tensor], optimizer: AdamW, totals: dict[str, Tensor], device: torch.device
    ) -> StepNumbers:
        """Adds up the gradients over the ranks, and sends all numbers to the host in one transfer that isn't waited for."""
        added = distributed.all_reduce_async(optimizer.gradients)
        shared = distributed.gather(
            {
                "tokens": sum(forest.num_tokens for forest in step.forests),
                "wasted_tokens": sum(forest.wasted_tokens for forest in step.forests),
                "forests": len(step.forests),
                "names": list(totals),
            }
        )
        names = list(dict.fromkeys(name for own in shared for name in own["names"]))
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        scalars = [sum(losses, nothing), *(totals.get(name, nothing) for name in names)]
        every = distributed.gather_tensor(torch.stack([scalar.double() for scalar in scalars]))  # [ranks, 1 + names]
        added()
        norm = optimizer.gradient_norm()
        stacked = torch.cat([torch.stack([loss.double() for loss in (*losses, norm)]), every.flatten()])
        finite = torch.isfinite(norm) & torch.isfinite(every[:, 0]).all()
        return cls(step.step, step.forests, shared, names, norm, finite, fetch(stacked))

    def read(self) -> Metrics:
        """The step's metrics, once they are here. Raises SrcfastError where loss or norm is not finite, or a rank is away."""
        if self.values.arrived is not None:
            distributed.wait_for(self.values.arrived)
        values, count, width = self.values.tensor.tolist(), len(self.forests), 1 + len(self.names)
        losses, norm, rest = values[:count], values[count], values[count + 1 :]
        every = [rest[start : start + width] for start in range(0, len(rest), width)]  # a list for each rank
        loss = sum(own[0] for own in every)
        _check_finite(self.step, loss, losses, norm, self.forests)
        return {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            **{name: sum(own[name] for own in self.shared) for name in ("tokens", "wasted_tokens", "forests")},
            "learning_rate": self.learning_rate,
            **{
                name: self._over_ranks(name, [own[1 + place] for own in every]) for place, name in enumerate(self.names)
            },
        }

    def _over_ranks(self, name: str, values: Sequence[float]) -> float:
        """A metric of the whole batch from those of the ranks that have it."""
        known = [value for value, own in zip(values, self.shared, strict=True) if name in own["names"]]
        return max(known) if name.startswith("max_") else sum(known)


def accumulate(
    model: Any,
    step: PackedStep,
    batch: Sequence[TrainingItem],
    loss: Loss,
    normaliser: Any,
    state: TrainingState,
    features: Features | None,
    rows: Callable[[Forest], Tensor] | None,
    drop_by: Callable[[Forest], Tensor] | None,
    device: torch.device,
) -> StepNumbers:
    """Gradients of one global batch into the optimizer's buffer; its numbers are not waited for.

    Forest by forest of this rank's share, then added up over the ranks. A rank whose share is empty adds nothing, and takes
    part in the same exchanges; where the ranks share out the layers, also in the passes that others have more of. `drop_by`
    are the keys [T] of a forest's dropout, where there is any.
    """
    inputs: tuple[Mapping[str, Tensor], ...] = ()
    if features is not None and step.forests:
        given = (step.prepared,) if step.prepared else ()
        inputs = (features(step.images, *given),)
    state.optimizer.zero_grad()
    # No exchange comes between the passes of ranks that need each other for every layer.
    passes = max(distributed.gather(len(step.forests))) if is_sharded(model.decoder) else 0
    losses: list[Tensor] = []
    totals: dict[str, Tensor] = {}
    for forest in step.forests:
        moved = forest.to(device)
        wanted = {} if rows is None else {"rows": rows(forest)}
        with dropping(model.decoder, None if drop_by is None else to_device(drop_by(forest), device)):
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
    for _ in range(passes - len(step.forests)):
        empty_step(model.decoder)
    return StepNumbers.of(step, losses, state.optimizer, totals, device)


def _check_finite(step: int, loss: float, losses: Sequence[float], norm: float, forests: Sequence[Forest]) -> None:
    """All ranks see the same `loss` and `norm` and so stop alike; then each tells of its own forests and their `losses`."""
    if math.isfinite(norm) and math.isfinite(loss):
        return
    bad = [forest for forest, value in zip(forests, losses, strict=True) if not math.isfinite(value)]
    keys = [[str(tree.key) for forest in some for tree in forest.trees] for some in (bad, forests)]
    told = distributed.gather(keys)
    culprits = [key for own, _ in told for key in own]
    what = "the gradient" if math.isfinite(loss) else "the loss"
    keys_of_all = culprits or [key for _, own in told for key in own]
    shown = ", ".join(keys_of_all[:8]) + (f" and {len(keys_of_all) - 8} more" if len(keys_of_all) > 8 else "")
    raise NotFinite(
        step,
        f"step {step}: {what} is not finite (loss {loss}, gradient norm {norm}) among the samples "
        f"{shown}; this step has not changed the weights. Fix: lower learning_rate, or look at the samples "
        "with `inspect`",
    )
