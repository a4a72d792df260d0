"""The training loop: global batches of trees, packed into forests, one update each.

A global batch is `micro_batch_size * gradient_accumulation_steps` items. Its order is a pure function of
(seed, epoch), and the loss's denominator is taken over all of it before the first backward; how it is then
cut into forests (micro-batches, token budget) changes nothing but rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srcfast.data.forest import Forest, Tree, pack_sizes
from srcfast.errors import SrcfastError
from srcfast.runtime.optimizer import AdamW, learning_rate_at

Metrics = dict[str, Any]
Features = Callable[[Iterable[str]], Mapping[str, Tensor]]  # image keys -> [n, D] each
# (hidden [T, D], forest, head weight [V, D], items in the forest's order, denominator) -> (loss, metrics).
# The losses of a global batch's forests are added, and so are their metrics, but for those named max_*, of
# which the greatest counts.
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
) -> list[Metrics]:
    """Train the model's parameters that require gradients; the others stay as they are.

    Args:
        model: `model(forest, features)` (without `features`: `model(forest)`) gives hidden states `[T, D]`;
            `model.decoder.head_weight` is `[V, D]`.
        items: what to train on.
        loss: loss and metrics of one forest, see `Loss`.
        denominator: of a global batch's items; handed to `loss`.
        settings: see there.
        features: image keys to embeddings; called once a step with the step's distinct keys.
        on_step: called after each update with its metrics.
        before_update: called with the step's metrics before the weights change; what it raises stops the run
            there.

    Returns:
        One dict a step: step, loss, learning_rate, grad_norm (before clipping), tokens, tokens_per_second,
        wasted_tokens, forests, and the loss function's own.

    Raises:
        SrcfastError: nothing to train on, or a loss or gradient that is not finite; before the update, by
            step and keys.
        InputError: an item larger than the token budget, by its key, before anything is trained.
    """
    if not items:
        raise SrcfastError("nothing to train on: expected at least one training item, found none")
    # An item that is too large is refused before anything is trained.
    keys = [item.tree.key for item in items]
    pack_sizes([item.tree.num_tokens for item in items], settings.token_budget, keys=keys)
    device = next(model.parameters()).device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = TrainingState(AdamW(trainable, weight_decay=settings.weight_decay))
    total = num_steps(len(items), settings)
    was_training = model.training
    model.train()
    history = []
    while state.step < total:
        batch = [items[i] for i in global_batch(len(items), state.step, settings)]
        began = time.perf_counter()
        metrics = accumulate(model, batch, loss, denominator, settings, state, features, device)
        metrics["learning_rate"] = learning_rate_at(
            state.step, total, settings.learning_rate, settings.warmup_ratio, settings.min_learning_rate_ratio
        )
        if before_update is not None:
            before_update(metrics)
        state.optimizer.clip(metrics["grad_norm"], settings.max_grad_norm)
        state.optimizer.step(metrics["learning_rate"])
        state.step += 1
        metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - began)
        history.append(metrics)
        if on_step is not None:
            on_step(metrics)
    model.train(was_training)
    return history


def accumulate(
    model: Any,
    batch: Sequence[TrainingItem],
    loss: Loss,
    denominator: Callable[[Sequence[TrainingItem]], Any],
    settings: TrainingSettings,
    state: TrainingState,
    features: Features | None,
    device: torch.device,
) -> Metrics:
    """Gradients of one global batch, forest by forest, into the optimizer's buffer.

    Returns the step's metrics, after checking that loss and gradients are finite.
    """
    forests = Forest.pack([item.tree for item in batch], settings.token_budget, max_trees=settings.micro_batch_size)
    normaliser = denominator(batch)
    images = list(dict.fromkeys(key for forest in forests for key in forest.images))  # distinct, in order
    inputs = () if features is None else (features(images),)
    state.optimizer.zero_grad()
    losses, totals = [], {}
    for forest in forests:
        forest = forest.to(device)
        hidden = model(forest, *inputs)  # [T, D]
        inside = [batch[i] for i in forest.indices]
        part, measured = loss(hidden, forest, model.decoder.head_weight, inside, normaliser)
        part.backward()
        losses.append(part.detach())
        for name, value in measured.items():
            if name not in totals:
                totals[name] = value.detach()
            elif name.startswith("max_"):
                totals[name] = torch.maximum(totals[name], value.detach())
            else:
                totals[name] = totals[name] + value.detach()
    # One transfer from the device for all numbers of the step.
    scalars = [*losses, state.optimizer.gradient_norm(), *totals.values()]
    values = torch.stack([scalar.double() for scalar in scalars]).tolist()
    loss_values, norm, rest = values[: len(losses)], values[len(losses)], values[len(losses) + 1 :]
    _check_finite(state.step, loss_values, norm, forests)
    return {
        "step": state.step,
        "loss": sum(loss_values),
        "grad_norm": norm,
        "tokens": sum(forest.num_tokens for forest in forests),
        "wasted_tokens": sum(forest.wasted_tokens for forest in forests),
        "forests": len(forests),
        **dict(zip(totals, rest, strict=True)),
    }


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
