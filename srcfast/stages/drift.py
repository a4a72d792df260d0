"""Measure how far two computations of a response's log-probability are apart, and bound what rounding may do.

Packing, batching and decoding change the order of sums and the shapes of products, hence the rounding of each token's
log-probability. A response's is the sum of its tokens', whose errors are nearly independent: it grows with the root of their
number. So a difference is measured in nats a root token,

    z = (log pi(y) - log pi'(y)) / sqrt(|y|)

and bounded by a multiple of the dtype's roundoff (`ROUNDOFF`). A share of the log-probability itself would be too strict for
a short certain answer, and would let another model's long response pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Half of the distance from 1 to the next smaller number in fp16 and bf16, in which products are stored. In fp32 and fp64 the
# sums of thousands of terms round more than what is stored: 16 times 2^-24 in fp32, and a wider margin still over fp64's 2^-53.
ROUNDOFF = {torch.float64: 2.0**-36, torch.float32: 2.0**-20, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}
# Root of the mean square of z, in roundoffs. Measured on the CPU, 3 seeds each: SmolLM2-135M (30 layers), forests against
# another implementation's steps: 29 in bf16, 31 in fp16, 7 in fp32, one response at most 75. The embedded model (5 layers),
# decoding against training: 1 in all. The same model after one more round of preferences: 270 in bf16.
MAX_ROUNDOFFS = 64.0


@dataclass(frozen=True)
class Drift:
    """The differences z of some responses, in nats a root token.

    Attributes:
        root_mean_square: of z.
        greatest: |z| of the response that differs most.
        responses: their number.
        dtype: in which the model's products are computed.
    """

    root_mean_square: float
    greatest: float
    responses: int
    dtype: torch.dtype

    @property
    def is_rounding(self) -> bool:
        """Whether rounding alone explains the differences, so that one model may have made both. False where one isn't finite."""
        bound, bound_of_one = rounding_bound(self.dtype, self.responses), rounding_bound(self.dtype, 1)
        return self.root_mean_square <= bound and self.greatest <= bound_of_one


def rounding_bound(dtype: torch.dtype, responses: int) -> float:
    """Return the greatest root mean square of z, in nats a root token, that rounding can make over so many responses.

    A mean square of n values scatters by about 1 / sqrt(n) of itself: the fewer there are, the more is allowed.
    """
    return ROUNDOFF[dtype] * MAX_ROUNDOFFS * (1.0 + 3.0 / math.sqrt(responses))


def drift(value: float, exact: float, tokens: int) -> float:
    """Return |z| of one response of so many tokens."""
    return abs(value - exact) / math.sqrt(tokens)


def drift_of(drifts: Sequence[float], dtype: torch.dtype) -> Drift | None:
    """Summarise the |z| of some responses; None where there are none."""
    if not len(drifts):
        return None
    z = np.asarray(drifts, dtype=np.float64)
    return Drift(float(np.sqrt(np.mean(z * z))), float(z.max()), len(z), dtype)
