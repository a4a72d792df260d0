"""The head of a language model: from hidden states to logits, and to log-probabilities of targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from srcfast.errors import InputError
from srcfast_kernels import head_logits, linear_logprob

if TYPE_CHECKING:
    from srcfast.models.protocols import HasDecoder


def check_numbers(model: HasDecoder, numbers: np.ndarray, keys: Sequence[object], field: str = "logits") -> None:
    """Raise InputError where one of a model's numbers [n], on the host, is not finite.

    The error names the model, its adapter, and by `keys` [n] the sample.
    """
    if not (finite := np.isfinite(numbers)).all():
        dtype = str(model.decoder.head_weight.dtype).removeprefix("torch.")
        adapter = "" if model.adapter_path is None else f" with the adapter {model.adapter_path}"
        raise InputError(
            file=model.path,
            sample_id=str(keys[int(np.flatnonzero(~finite)[0])]),
            field=field,
            expected="finite numbers",
            found=f"{numbers[~finite][0]}, computed in {dtype}{adapter}",
            fix="see whether weights are scaled, or set model.dtype or scorer.dtype to one of a larger range than float16's",
        )


@dataclass(frozen=True)
class Head:
    """A frozen head.

    Attributes:
        weight: [V, D].
        softcap: logits x become c tanh(x / c), as Gemma's do; None: they don't.
    """

    weight: Tensor
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Return what `linear_logprob`, `linear_weighted_dpo` and `pairwise_verdict` take beside the weight."""
        return {"softcap": self.softcap}

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Compute the log-probabilities [n] of targets [n] after hidden states [n, D]."""
        return linear_logprob(hidden, self.weight, targets, **self.options)

    def logits(self, hidden: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Compute logits in fp32 (fp64 for fp64) of hidden states [n, D]: [n, V], or [n, K] of some tokens [K]."""
        if token_ids is not None:
            logits = hidden.float() @ self.weight[token_ids].float().T
        else:
            logits = head_logits(hidden, self.weight)
        return self.capped(logits)

    def capped(self, logits: Tensor) -> Tensor:
        """Apply the soft cap."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
