"""From hidden states to the confidence-weighted DPO loss and back: how fast, in how much memory, against its peers?

Eight pairs of responses of one length, which is what padded peers can be given without waste. They compute the reference's
log-probabilities themselves or take none; here all are handed stored ones, or zeros where they can't take them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srcfast_benchmarks.harness import Benchmark, Inputs, Run, Shape, generator, main, normal
from srcfast_kernels import linear_logprob, linear_weighted_dpo, weighted_dpo_loss
from srcfast_kernels.weighted_dpo import sum_pairs

BETA = 0.1
SHAPES: dict[str, list[Shape]] = {
    "cpu": [
        {"pairs": 8, "tokens": 128, "hidden_size": 1024, "vocabulary": 32_064, "dtype": "float32"},
        {"pairs": 8, "tokens": 32, "hidden_size": 576, "vocabulary": 49_152, "dtype": "float32"},
    ],
    "cuda": [
        {"pairs": pairs, "tokens": 192, "hidden_size": 4096, "vocabulary": vocabulary, "dtype": "bfloat16"}
        for vocabulary in (32_064, 151_936)
        for pairs in (8, 16)
    ],
}


def inputs(shape: Shape, device: str) -> Inputs:
    """Tokens of chosen and rejected responses, pair by pair."""
    pairs, tokens, hidden_size = shape["pairs"], shape["tokens"], shape["hidden_size"]
    common: dict[str, Any] = {"device": device, "dtype": shape["dtype"]}
    rows = 2 * pairs * tokens
    return {
        "hidden": normal(rows, hidden_size, **common).requires_grad_(),
        "weight": normal(shape["vocabulary"], hidden_size, scale=hidden_size**-0.5, seed=1, **common),
        "targets": torch.randint(shape["vocabulary"], (rows,), generator=generator(device), device=device),
        "sequence_ids": torch.arange(2 * pairs, device=device).repeat_interleave(tokens),
        "references": torch.zeros(2, pairs, device=device),
        "confidence": torch.ones(pairs, device=device),
    }


def full_logits(inputs: Inputs) -> Run:
    """PyTorch as it is usually written: all logits, in fp32 from there on."""
    hidden, weight, targets, _, references, confidence = inputs.values()

    def run() -> Tensor:
        logps = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return _loss_of_tokens(logps, references, confidence)

    return run


def srcfast(inputs: Inputs) -> Run:
    """The loss head and the loss, without a [T, V] tensor."""
    hidden, weight, targets, sequence_ids, references, confidence = inputs.values()
    return lambda: linear_weighted_dpo(hidden, weight, targets, sequence_ids, *references, confidence, beta=BETA).loss


def srcfast_two_calls(inputs: Inputs) -> Run:
    """The same operations in two calls: on a GPU every step from log-probabilities of tokens to the loss is a kernel."""
    hidden, weight, targets, sequence_ids, references, confidence = inputs.values()

    def run() -> Tensor:
        sums = sum_pairs(linear_logprob(hidden, weight, targets), sequence_ids, len(confidence))
        return weighted_dpo_loss(*sums, *references, confidence, beta=BETA).loss

    return run


def trl_chunked(inputs: Inputs) -> Run:
    """TRL's chunked log-probabilities, and the same loss."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    hidden, weight, targets, _, references, confidence = inputs.values()
    settings = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())

    def run() -> Tensor:
        logps = ChunkedLogProbFunction.apply(hidden, weight, None, targets, *settings)[0]
        return _loss_of_tokens(logps, references, confidence)

    return run


def liger(inputs: Inputs) -> Run:
    """Liger's chunks of pairs, compiled on a GPU; it can't weigh pairs nor take stored references."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, weight, targets, _, references, _ = inputs.values()
    pairs = references.shape[1]
    loss = LigerFusedLinearDPOLoss(beta=BETA, compiled=hidden.is_cuda, use_ref_model=False)
    # It wants all chosen responses first.
    order = torch.cat((torch.arange(0, 2 * pairs, 2), torch.arange(1, 2 * pairs, 2))).to(hidden.device)

    def run() -> Tensor:
        stacked = hidden.view(2 * pairs, -1, hidden.shape[-1])[order]
        return loss(weight, stacked, targets.view(2 * pairs, -1)[order])[0]

    return run


def _loss_of_tokens(logps: Tensor, references: Tensor, confidence: Tensor) -> Tensor:
    sums = logps.view(len(confidence), 2, -1).sum(-1)
    return weighted_dpo_loss(*sums.unbind(1), *references, confidence, beta=BETA).loss


BENCHMARK = Benchmark(
    name="weighted_dpo",
    shapes=SHAPES,
    inputs=inputs,
    implementations={
        "torch": full_logits,
        "srcfast": srcfast,
        "srcfast in two calls": srcfast_two_calls,
        "trl": trl_chunked,
        "liger": liger,
    },
)

if __name__ == "__main__":
    main(BENCHMARK)
