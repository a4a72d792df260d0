"""One training step: gradients of a global batch, added up over the ranks, and its numbers on their way to the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srcfast import distributed
from srcfast.data.forest import Forest
from srcfast.models.dropout_keys import dropping
from srcfast.models.protocols import HasDecoder
from srcfast.models.sharding import empty_step, is_sharded
from srcfast.training.items import Features, Metrics, NotFinite, Objective, TrainingItem
from srcfast.training.loader import PackedStep
from srcfast.training.optimizer import AdamW
from srcfast_kernels.transfers import Fetched, fetch, to_device


@dataclass
class StepNumbers:
    """The numbers of a global batch, on their way from the device to the host.

    Attributes:
        step: its number.
        forests: of this rank, on the host.
        shared: for each rank what its host knows of its forests: tokens, wasted_tokens, forests, names of its metrics.
        names: of the metrics of all ranks.
        norm: of the gradients, a scalar on the device.
        finite: whether all losses and the norm are finite, a boolean scalar on the device.
        values: the losses of this rank's forests, the norm, then for each rank its loss and its metrics by `names`.
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
        cls, step: PackedStep, losses: Sequence[Tensor], metrics: Mapping[str, Tensor], optimizer: AdamW
    ) -> StepNumbers:
        """Add up gradients, losses and metrics over the ranks, and start one copy of all numbers to the host."""
        wait_for_gradients = distributed.all_reduce_async(optimizer.gradients)
        shared = distributed.gather(
            {
                "tokens": sum(forest.num_tokens for forest in step.forests),
                "wasted_tokens": sum(forest.wasted_tokens for forest in step.forests),
                "forests": len(step.forests),
                "names": list(metrics),
            }
        )
        names = list(dict.fromkeys(name for counts in shared for name in counts["names"]))
        zero = torch.zeros((), dtype=torch.float64, device=optimizer.gradients.device)
        scalars = [sum(losses, zero), *(metrics.get(name, zero) for name in names)]
        per_rank = distributed.gather_tensor(torch.stack([x.double() for x in scalars]))  # [ranks, 1 + names]
        wait_for_gradients()
        norm = optimizer.gradient_norm()
        stacked = torch.cat([torch.stack([x.double() for x in (*losses, norm)]), per_rank.flatten()])
        finite = torch.isfinite(norm) & torch.isfinite(per_rank[:, 0]).all()
        return cls(step.step, step.forests, shared, names, norm, finite, fetch(stacked))

    def read(self) -> Metrics:
        """Wait for the numbers and return the step's metrics.

        Raises:
            NotFinite: the loss or the norm is not finite.
            SrcfastError: a rank is missing.
        """
        if self.values.arrived is not None:
            distributed.wait_for(self.values.arrived)
        values = self.values.tensor.tolist()
        count, width = len(self.forests), 1 + len(self.names)
        losses, norm = values[:count], values[count]
        per_rank = [values[start : start + width] for start in range(count + 1, len(values), width)]
        loss = sum(numbers[0] for numbers in per_rank)
        _check_finite(self.step, loss, losses, norm, self.forests)
        return {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            **{name: sum(counts[name] for counts in self.shared) for name in ("tokens", "wasted_tokens", "forests")},
            "learning_rate": self.learning_rate,
            **{
                name: self._over_ranks(name, [numbers[column] for numbers in per_rank])
                for column, name in enumerate(self.names, start=1)
            },
        }

    def _over_ranks(self, name: str, values: Sequence[float]) -> float:
        """Combine a metric over the ranks that have it: the maximum for max_*, else the sum."""
        known = [value for value, counts in zip(values, self.shared, strict=True) if name in counts["names"]]
        return max(known) if name.startswith("max_") else sum(known)


def accumulate(
    model: HasDecoder,
    step: PackedStep,
    items: Sequence[TrainingItem],
    objective: Objective,
    denominator: Any,
    optimizer: AdamW,
    features: Features | None = None,
    dropout_keys: Callable[[Forest], Tensor] | None = None,
) -> StepNumbers:
    """Accumulate the gradients of one global batch in the optimizer's buffer, without waiting for the device.

    This rank runs its own forests one after the other; then gradients are added up over the ranks. A rank without forests adds
    nothing, and takes part in the same exchanges.

    Args:
        model: to train.
        step: this rank's forests.
        items: of `step`, in its order.
        objective: see there.
        denominator: of the global batch.
        optimizer: holds the gradients of the model's trainable parameters.
        features: of images, see `train`.
        dropout_keys: `[T]` of a forest; None: no dropout.
    """
    device = optimizer.gradients.device
    inputs: tuple[Mapping[str, Tensor], ...] = ()
    if features is not None and step.forests:
        prepared = (step.prepared,) if step.prepared else ()
        inputs = (features(step.images, *prepared),)
    optimizer.zero_grad()
    # Ranks that share the layers need each other in every pass: no other exchange may come between the passes, and a rank with
    # fewer forests takes part in the others' passes.
    max_forests = max(distributed.gather(len(step.forests))) if is_sharded(model.decoder) else 0
    losses: list[Tensor] = []
    totals: dict[str, Tensor] = {}
    for host_forest in step.forests:
        forest = host_forest.to(device)
        selected = {} if objective.rows is None else {"rows": objective.rows(host_forest)}
        with dropping(model.decoder, None if dropout_keys is None else to_device(dropout_keys(host_forest), device)):
            hidden = model(forest, *inputs, **selected)  # [T, D], or [M, D]
        forest_items = [items[i] for i in host_forest.indices]
        loss, metrics = objective.loss(hidden, forest, model.decoder.head, forest_items, denominator)
        loss.backward()
        losses.append(loss.detach())
        _add_metrics(totals, metrics)
    for _ in range(max_forests - len(step.forests)):
        empty_step(model.decoder)
    return StepNumbers.of(step, losses, totals, optimizer)


def _add_metrics(totals: dict[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
    """Add a forest's metrics to those of the forests before, on the device."""
    for name, value in metrics.items():
        if name not in totals:
            totals[name] = value.detach()
        elif name.startswith("max_"):
            totals[name] = torch.maximum(totals[name], value.detach())
        else:
            totals[name] = totals[name] + value.detach()


def _check_finite(step: int, loss: float, losses: Sequence[float], norm: float, forests: Sequence[Forest]) -> None:
    """Raise NotFinite on all ranks, for `loss` and `norm` are the same on all; each names the samples of its own `losses`."""
    if math.isfinite(norm) and math.isfinite(loss):
        return
    bad = [forest for forest, value in zip(forests, losses, strict=True) if not math.isfinite(value)]
    per_rank = distributed.gather([_keys_of(bad), _keys_of(forests)])
    bad_keys = [key for rank_bad, _ in per_rank for key in rank_bad]
    keys = bad_keys or [key for _, rank_keys in per_rank for key in rank_keys]
    what = "the gradient" if math.isfinite(loss) else "the loss"
    shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    raise NotFinite(
        step,
        f"step {step}: {what} is not finite (loss {loss}, gradient norm {norm}) among the samples "
        f"{shown}; this step has not changed the weights. Fix: lower learning_rate, or look at the samples "
        "with `inspect`",
    )


def _keys_of(forests: Sequence[Forest]) -> list[str]:
    return [str(tree.key) for forest in forests for tree in forest.trees]
