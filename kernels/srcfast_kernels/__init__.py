"""srcfast's operations: each with a plain PyTorch reference beside it. Imported as `srcfast_kernels`."""

from srcfast_kernels.layers import lora_linear, rms_norm, rope, swiglu
from srcfast_kernels.linear_logprob import linear_logprob
from srcfast_kernels.pairwise_verdict import VerdictOutput, pairwise_verdict
from srcfast_kernels.weighted_dpo import DPOOutput, linear_weighted_dpo, weighted_dpo_loss

__all__ = [
    "DPOOutput",
    "VerdictOutput",
    "linear_logprob",
    "linear_weighted_dpo",
    "lora_linear",
    "pairwise_verdict",
    "rms_norm",
    "rope",
    "swiglu",
    "weighted_dpo_loss",
]
