"""How far two computations of a response's log-probability may be apart if one model made both.

Packing, batching and decoding change the order of sums and the shapes of products, hence the rounding of each token's
log-probability. A response's is the sum of its tokens', whose errors are nearly independent: it grows with the root of their
number. So a difference is measured in nats a root token,

    z = (log pi(y) - log pi'(y)) / sqrt(|y|)

and bounded by multiples of the dtype's unit roundoff u. A share of the log-probability itself would be too strict for a short
certain answer, and would let another model's long response pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Unit roundoff, half of the distance from 1 to the next number. In fp32 and fp64 the sums of thousands of terms count, not the
# rounding of what is stored: 16 times as much, and in fp64 `linear_logprob`'s references in fp64 alone keep it, hence more.
ROUNDOFF = {torch.float64: 2.0**-36, torch.float32: 2.0**-20, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}
# Root of the mean square of z, in roundoffs. Measured on the CPU, 3 seeds each: SmolLM2-135M (30 layers), forests against
# another implementation's steps: 29 in bf16, 31 in fp16, 7 in fp32, one response at most 75. The embedded model (5 layers),
# decoding against training: 1 in all. The same model after one more round of preferences: 270 in bf16.
MOST = 64.0


@dataclass(frozen=True)
class Drift:
    """Of some responses.

    Attributes:
        root_mean_square: of z.
        greatest: |z| of the worst response.
        responses: how many.
        dtype: of the products.
    """

    root_mean_square: float
    greatest: float
    responses: int
    dtype: torch.dtype

    @property
    def is_rounding(self) -> bool:
        """Whether one model may have made both. False where a difference isn't finite."""
        return self.root_mean_square <= most_drift(self.dtype, self.responses) and self.greatest <= most_drift(
            self.dtype, 1
        )


def most_drift(dtype: torch.dtype, responses: int) -> float:
    """The root mean square of z, in nats a root token, that rounding can make over so many responses.

    A mean square of n values scatters by about 1 / sqrt(n) of itself: the fewer there are, the more is allowed.
    """
    return ROUNDOFF[dtype] * MOST * (1.0 + 3.0 / math.sqrt(responses))


def drift(value: float, exact: float, tokens: int) -> float:
    """|z| of one response."""
    return abs(value - exact) / math.sqrt(tokens)


def drift_of(drifts: Sequence[float], dtype: torch.dtype) -> Drift | None:
    """Of the |z| of some responses; None of none."""
    if not len(drifts):
        return None
    z = np.asarray(drifts, dtype=np.float64)
    return Drift(float(np.sqrt(np.mean(z * z))), float(z.max()), len(z), dtype)
