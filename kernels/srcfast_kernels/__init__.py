"""srcfast's operations: each with a plain PyTorch reference beside it. Imported as `srcfast_kernels`."""

from srcfast_kernels.dropout import dropout
from srcfast_kernels.linear_logprob import head_logits, linear_logprob
from srcfast_kernels.lora_linear import lora_linear
from srcfast_kernels.nf4 import NF4Weight, nf4_dequantize, nf4_quantize
from srcfast_kernels.nf4_linear import nf4_linear
from srcfast_kernels.pairwise_verdict import VerdictOutput, pairwise_verdict
from srcfast_kernels.rms_norm import rms_norm
from srcfast_kernels.rope import rope
from srcfast_kernels.swiglu import swiglu
from srcfast_kernels.weighted_dpo import DPOOutput, LinearDPOOutput, linear_weighted_dpo, weighted_dpo_loss

__all__ = [
    "DPOOutput",
    "LinearDPOOutput",
    "NF4Weight",
    "VerdictOutput",
    "dropout",
    "head_logits",
    "linear_logprob",
    "linear_weighted_dpo",
    "lora_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "pairwise_verdict",
    "rms_norm",
    "rope",
    "swiglu",
    "weighted_dpo_loss",
]
