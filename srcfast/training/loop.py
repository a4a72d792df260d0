"""The training loop: global batches of trees, packed into forests, one update each.

A global batch is `micro_batch_size * gradient_accumulation_steps` items. Its order is a pure function of (seed, epoch), and the
loss's denominator is that of the whole batch. So how the batch is split across ranks and cut into forests (micro-batches, token
budget) changes rounding alone.

The host does not wait for a GPU's current step. The update is skipped on the device where loss or norm is not finite, and the
numbers of a step are read while the device computes the next one, before that one's update.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

from torch import Tensor, nn

from srcfast import distributed
from srcfast.config.settings import TrainingConfig
from srcfast.data.batching import global_batch, num_updates, rank_batch_indices
from srcfast.data.forest import Tree, pack_sizes
from srcfast.data.jsonl import json_hash
from srcfast.errors import InputError, Interrupted, SrcfastError
from srcfast.memory.forecast import plan_checkpointing
from srcfast.memory.model_sizes import memory_for
from srcfast.models.dropout_keys import drops, step_keys
from srcfast.models.protocols import HasDecoder
from srcfast.models.sharding import is_sharded
from srcfast.run import signals
from srcfast.training.checkpoint import TrainingCheckpoints, weights_hash
from srcfast.training.determinism import deterministic_algorithms
from srcfast.training.items import Features, Metrics, Objective, TrainingItem
from srcfast.training.loader import PackedStep, packed_steps
from srcfast.training.meter import StepMeter
from srcfast.training.optimizer import AdamW, learning_rate_at
from srcfast.training.pipelining import reads_late
from srcfast.training.profiler import StepProfiler
from srcfast.training.step import StepNumbers, accumulate


class TrainingOptions(TypedDict, total=False):
    """What a training takes beside items, objective and settings, see `train`."""

    features: Features | None
    on_step: Callable[[Metrics], None] | None
    profiler: StepProfiler | None
    checkpoints: TrainingCheckpoints | None


def train(
    model: HasDecoder,
    items: Sequence[TrainingItem],
    *,
    objective: Objective,
    settings: TrainingConfig,
    features: Features | None = None,
    on_step: Callable[[Metrics], None] | None = None,
    before_update: Callable[[Metrics], None] | None = None,
    profiler: StepProfiler | None = None,
    checkpoints: TrainingCheckpoints | None = None,
) -> list[Metrics]:
    """Train the model's parameters that require gradients; the others stay as they are.

    On several ranks all call this with the same model and items. Each runs its share of every global batch, the gradients are
    added up over the ranks once a step, and all make the same update: the metrics are of the whole batch on every rank.

    Args:
        model: `model(forest, features, rows=rows)` returns hidden states `[T, D]`, or those of the rows, `[M, D]`. One without
            images takes no `features`, one that computes all rows of its last layer no `rows`.
        items: what to train on.
        objective, settings: see there.
        features: image keys to embeddings; called once a step with the step's distinct keys. Where it has
            `for_training(deterministic)`, the result of that is called instead. With `missing` and `prepare` (see
            `packed_steps`) it is also given the images that the workers prepared.
        on_step: called after each update with its metrics; on a GPU one step late.
        before_update: called with the step's metrics before the weights change; an error that it raises ends the training
            there. On a GPU that holds for step 0; for later steps it is called together with `on_step`.
        profiler: of some steps.
        checkpoints: where the training is saved, and continued from: bit for bit on a CPU, and on a GPU where the settings
            say `deterministic`. `on_step` is called for the steps that are still to be done. A signal that asks to stop
            then ends the training after the current step, see `srcfast.run.signals`.

    Returns:
        One dict a step: step, loss, learning_rate, grad_norm (before clipping), tokens, tokens_per_second,
        wasted_tokens, forests, mfu, peak_memory_bytes (see `StepMeter`; these two are of this rank), and the loss
        function's metrics.

    Raises:
        NotFinite: a loss or gradient is not finite, by step and keys: that step's update, and every later one, has not been
            made.
        SrcfastError: there is nothing to train on; or a rank is missing, or began with other weights or items; or a
            checkpoint can't be written.
        ConfigError: the checkpoint is another training's.
        Interrupted: a signal asked to stop; all steps so far are saved.
        InputError: an item larger than the token budget, or without a token to predict, by its key, before anything is
            trained.
    """
    check_items(items, settings)
    if (for_training := getattr(features, "for_training", None)) is not None:
        features = for_training(settings.deterministic)
    objective = objective.supported_by(model)
    optimizer = AdamW(trainable(model), weight_decay=settings.weight_decay, name=settings.optimizer)
    trees = [item.tree for item in items]
    recomputed = checkpoint_layers(model, trees, settings)  # before moments are read: the forecast counts them
    check_same_start(optimizer.weights, trees)
    start, history = (0, []) if checkpoints is None else checkpoints.begin(optimizer, settings.loop(), items)
    reports = _Reports(StepMeter(model, objective.head_rows), history, before_update, on_step)
    total, has_dropout, device = num_updates(len(items), settings), drops(model), optimizer.weights.device
    late = reads_late(device) and optimizer.skips_on_device
    packed = _packed_steps(trees, range(start, total), settings, objective, features, pin=device.type == "cuda")
    with ExitStack() as stack:
        stack.enter_context(_training_mode(model, recomputed))
        if profiler is not None:
            stack.callback(profiler.end)
        stack.callback(packed.close)
        stack.enter_context(deterministic_algorithms(settings.deterministic and device.type == "cuda"))
        if checkpoints is not None:
            stack.enter_context(signals.at_boundaries())
        for step in packed:
            if profiler is not None:
                profiler.begin(step.step, total)
            batch = global_batch(len(items), step.step, settings)
            positions = [batch.index(i) for i in step.indices]
            numbers = accumulate(
                model,
                step,
                [items[i] for i in step.indices],
                objective,
                objective.denominator([items[i] for i in batch]),
                optimizer,
                features,
                step_keys(settings.seed, step.step, positions) if has_dropout else None,
            )
            numbers.learning_rate = learning_rate_at(
                step.step, total, settings.learning_rate, settings.warmup_ratio, settings.min_learning_rate_ratio
            )
            reports.finish_pending()  # of the step before, whose numbers have arrived by now
            _update(optimizer, numbers, settings.max_grad_norm, reports, late and step.step > 0)
            distributed.end_startup_timeout()
            if checkpoints is not None:
                _save_if_due(checkpoints, step.step + 1, total, optimizer, reports)
        reports.finish_pending()
    return reports.history


def rerun_step(
    model: HasDecoder,
    batch: Sequence[TrainingItem],
    step: int,
    *,
    objective: Objective,
    settings: TrainingConfig,
    features: Features | None = None,
) -> Metrics:
    """Compute one step of `train` again and return its metrics. No weight changes.

    Args:
        model: with the weights before the step.
        batch: the step's global batch.
        step: its number.
        objective, settings, features: as `train` was given them.

    Raises:
        NotFinite: loss or gradient is not finite.
    """
    objective = objective.supported_by(model)
    optimizer = AdamW(trainable(model))
    packed = packed_steps(
        [item.tree for item in batch],
        [step],
        lambda number: list(range(len(batch))),
        settings,
        features=features,
        plan=objective.rows,
    )
    model.train()
    dropout_keys = step_keys(settings.seed, step, range(len(batch))) if drops(model) else None
    with deterministic_algorithms(settings.deterministic and optimizer.weights.device.type == "cuda"):
        numbers = accumulate(
            model, next(packed), batch, objective, objective.denominator(batch), optimizer, features, dropout_keys
        )
        return numbers.read()


# Before the first step ------------------------------------------------------------------------------------------------


def check_items(items: Sequence[TrainingItem], settings: TrainingConfig) -> None:
    """Check that there are items, that each has a token to predict, and that each fits into the token budget.

    Raises:
        SrcfastError: there is no item.
        InputError: an item has no response, or is larger than the token budget; it is named by its key.
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
    sizes, keys = [item.tree.num_tokens for item in items], [item.tree.key for item in items]
    pack_sizes(sizes, settings.token_budget, keys=keys)  # raises InputError for an item that is too large


def trainable(model: HasDecoder) -> list[nn.Parameter]:
    """Return the parameters that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def checkpoint_layers(model: HasDecoder, trees: Sequence[Tree], settings: TrainingConfig) -> int:
    """Return how many layers a group has whose activations are recomputed, by the settings or by the memory forecast."""
    if settings.activation_checkpointing != "auto":
        return settings.activation_checkpointing
    planned = plan_checkpointing(model, trees, settings)
    if not is_sharded(model.decoder):
        return planned
    # Ranks that share the layers must recompute the same ones: those that the rank with the least memory plans.
    per_rank = distributed.gather([memory_for(model), planned])
    return min(per_rank)[1]


def check_same_start(weights: Tensor, trees: Sequence[Tree]) -> None:
    """Raise SrcfastError if a rank has other weights or items than rank 0: their sum of gradients would mean nothing."""
    if distributed.world_size() == 1:
        return
    hashes = [weights_hash(weights), json_hash([(str(tree.key), tree.num_tokens) for tree in trees])]
    per_rank = distributed.gather(hashes)
    for rank, rank_hashes in enumerate(per_rank):
        for what, expected, actual in zip(("weights", "items"), per_rank[0], rank_hashes, strict=True):
            if actual != expected:
                raise SrcfastError(
                    f"training: expected the same {what} on all ranks, found others on rank {rank} than on rank 0. "
                    "Fix: start all ranks with the same command, files and versions"
                )


def _packed_steps(
    trees: Sequence[Tree],
    steps: range,
    settings: TrainingConfig,
    objective: Objective,
    features: Features | None,
    pin: bool,
) -> Generator[PackedStep, None, None]:
    """Return the generator of this rank's forests of each step."""
    batch_of = partial(
        rank_batch_indices,
        len(trees),
        settings=settings,
        sizes=[tree.num_tokens for tree in trees],
        rank=distributed.rank(),
        ranks=distributed.world_size(),
    )
    return packed_steps(
        trees,
        steps,
        batch_of,
        settings,
        features=features,
        plan=objective.rows,
        workers=settings.loader_workers,
        pin=pin,
    )


@contextmanager
def _training_mode(model: HasDecoder, recomputed: int) -> Iterator[None]:
    """Put the model into training mode with activation checkpointing; restore its mode afterwards."""
    was_training = model.training
    model.train()
    model.decoder.checkpoint_layers = recomputed
    try:
        yield
    finally:
        model.train(was_training)
        model.decoder.checkpoint_layers = 0


# After a step's gradients ---------------------------------------------------------------------------------------------


@dataclass
class _Reports:
    """Reads each step's numbers once, checks them and reports them.

    Attributes:
        meter: measures throughput from one report to the next.
        history: metrics of each step that is reported.
        before_update, on_step: see `train`.
        pending: numbers of a step whose update is queued on the device, and which have not been read yet.
    """

    meter: StepMeter
    history: list[Metrics]
    before_update: Callable[[Metrics], None] | None
    on_step: Callable[[Metrics], None] | None
    pending: StepNumbers | None = None

    def check(self, numbers: StepNumbers) -> Metrics:
        """Read a step's metrics. Raises NotFinite, and what `before_update` raises."""
        metrics = numbers.read()
        if self.before_update is not None:
            self.before_update(metrics)
        return metrics

    def report(self, numbers: StepNumbers, metrics: Metrics) -> None:
        """Add a step's metrics to the history and hand them to `on_step`."""
        self.history.append(self.meter.measure(metrics, numbers.forests))
        if self.on_step is not None:
            self.on_step(self.history[-1])

    def finish_pending(self) -> None:
        """Check and report the step whose numbers have not been read yet, if there is one."""
        if self.pending is not None:
            self.report(self.pending, self.check(self.pending))
            self.pending = None


def _update(optimizer: AdamW, numbers: StepNumbers, max_norm: float, reports: _Reports, late: bool) -> None:
    """Clip the gradients and update the weights.

    Args:
        optimizer: with the gradients of the step.
        numbers: of the step.
        max_norm: of the gradients.
        reports: of the training.
        late: queue the update on the device, which skips it where loss or norm is not finite, and leave the numbers pending;
            else read and check them first.
    """
    if late:
        optimizer.clip(numbers.norm, max_norm)
        optimizer.step(numbers.learning_rate, numbers.finite)
        reports.pending = numbers
        return
    metrics = reports.check(numbers)
    optimizer.clip(metrics["grad_norm"], max_norm)
    optimizer.step(numbers.learning_rate)
    reports.report(numbers, metrics)


def _save_if_due(checkpoints: TrainingCheckpoints, done: int, total: int, optimizer: AdamW, reports: _Reports) -> None:
    """Save the training where that is due, and after the last step. Raises Interrupted where a signal asks to stop."""
    stop, save = checkpoints.due(done)
    # The last step is saved in any case: the process may be stopped before the stage's result is on disk.
    if save or done == total:
        reports.finish_pending()  # a checkpoint holds no step whose numbers have not been checked
        checkpoints.save(done, optimizer, reports.history)
    if stop:
        raise Interrupted(stop, f"step {done} of {total}")
