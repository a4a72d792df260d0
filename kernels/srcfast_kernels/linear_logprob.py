"""Log-probabilities of targets under a linear head, without the [T, V] logits of all rows at once.

    logps_t = x_{t y_t} - log sum_v exp x_tv,        x = cap(scale (h W^T + bias))

With a frozen head the gradient of each log-probability with respect to its hidden state,

    d logp_t / d h_t = w_{y_t} - sum_v p_tv w_v        (times the chain of scale and softcap),

scales with one number a token, so the forward pass forms it chunk by chunk, and backward is a row scaling: two GEMMs in
all. `onehot - p` is formed in fp32 before any rounding; two rounded products are never subtracted from each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels.homes import Home, accumulator, home_of

CHUNK_ELEMENTS = 1 << 22  # logits alive at a time on a CPU, 16 MiB in fp32: near its caches
GPU_CHUNK_ELEMENTS = 7 << 23  # 224 MiB: the head is read once a chunk, so chunks are as tall as memory allows
BLOCK = 4096  # columns that a row's program handles at a time


class HeadSettings(NamedTuple):
    """What a head does to its logits, and the target that doesn't count."""

    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """log softmax(logits)[target] for logits = scale * (hidden W^T + bias), soft-capped as softcap * tanh(x / softcap).

    Args:
        hidden: [T, D].
        weight: [V, D]; its gradient, and the bias's, is computed only where required.
        targets: [T] int64; rows of `ignore_index` give 0 and no gradient.
        bias: [V].
        logit_scale: factor on the logits, before the cap.
        softcap: Gemma's cap on logits; None for none.

    Returns:
        [T] fp32 (fp64 for fp64 inputs), never above 0.
    """
    settings = HeadSettings(logit_scale, softcap, ignore_index)
    home = home_of(hidden)
    with torch.autocast(hidden.device.type, enabled=False):  # its own casts decide what is rounded
        if home == "reference":
            return linear_logprob_reference(hidden, weight, targets, bias=bias, **settings._asdict())
        return _LinearLogprob.apply(hidden, weight, targets, bias, settings, home)


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """`linear_logprob` in plain PyTorch, with all logits at once."""
    dtype = _compute_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    logits = logit_scale * (logits if bias is None else logits + bias.to(dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = targets != ignore_index
    logps = logits.log_softmax(-1).gather(-1, targets.where(kept, 0)[:, None])[:, 0]
    return logps.where(kept, 0.0)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        settings: HeadSettings,
        home: Home,
    ) -> Tensor:
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        ctx.settings, ctx.home = settings, home
        logps = torch.empty(len(targets), dtype=_compute_dtype(hidden), device=hidden.device)  # [T]
        ctx.frozen_head = not (needs_weight or needs_bias)
        stash = hidden.new_empty(hidden.shape) if needs_hidden and ctx.frozen_head else None  # [T, D] unit gradients
        wide = _wide(weight, hidden)
        for rows in _chunks(len(targets), weight):
            logits = _logits(hidden[rows], wide)  # [n, V]
            logps[rows], residual = _rows(
                home, logits, targets[rows], bias, settings, None if stash is None else weight.dtype
            )
            if stash is not None and residual is not None:
                stash[rows] = (residual @ weight).to(stash.dtype)
        ctx.save_for_backward(*((hidden, weight, targets, bias) if stash is None else (stash,)))
        return logps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]  # [T]
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.frozen_head:
                (stash,) = ctx.saved_tensors
                return ((gradient[:, None] * stash).to(stash.dtype), *[None] * 5)
            return _backward(ctx, gradient)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """With a head that is trained: logits once more, and every gradient that is asked for; the head's in fp32."""
    hidden, weight, targets, bias = ctx.saved_tensors
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    dtype = _compute_dtype(hidden)
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_weight else None
    grad_bias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if needs_bias else None
    wide = _wide(weight, hidden)
    for rows in _chunks(len(targets), weight):
        logits = _logits(hidden[rows], wide)
        _, residual = _rows(ctx.home, logits, targets[rows], bias, ctx.settings, dtype, gradient[rows])
        assert residual is not None
        if grad_hidden is not None:
            grad_hidden[rows] = (residual.to(weight.dtype) @ weight).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight.addmm_(residual.T, hidden[rows].to(dtype))
        if grad_bias is not None:
            grad_bias += residual.sum(0)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None,
        None if grad_bias is None else grad_bias.to(bias.dtype),
        None,
        None,
    )


def _rows(
    home: Home,
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    settings: HeadSettings,
    residual_dtype: torch.dtype | None,
    coefficient: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Of logits h W^T [n, V] the logps [n] and, written over them, coefficient_t d logp_t / d (h_t W^T) [n, V]."""
    launch = _rows_triton if home == "triton" else _rows_torch
    return launch(logits, targets, bias, settings, residual_dtype, coefficient)


def _rows_torch(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    settings: HeadSettings,
    residual_dtype: torch.dtype | None,
    coefficient: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    logit_scale, softcap, ignore_index = settings
    if bias is not None:
        logits += bias.to(logits.dtype)
    if logit_scale != 1.0:
        logits *= logit_scale
    slope = None
    if softcap is not None:
        capped = torch.tanh(logits / softcap)
        slope = 1.0 - capped * capped
        logits = capped * softcap
    kept = targets != ignore_index
    lse = logits.logsumexp(-1, keepdim=True)  # [n, 1]
    logps = (logits.gather(-1, targets.where(kept, 0)[:, None]) - lse)[:, 0]
    # Rounding may put a certain token a hair above 0; a log-probability never is.
    logps = logps.clamp(max=0.0).where(kept, 0.0)
    if residual_dtype is None:
        return logps, None
    residual = logits.sub_(lse).exp_().neg_()
    residual[torch.arange(len(targets), device=targets.device), targets.where(kept, 0)] += 1.0
    if slope is not None:
        residual *= slope
    factor = kept.to(logits.dtype) * logit_scale
    residual *= (factor if coefficient is None else factor * coefficient)[:, None]
    return logps, residual.to(residual_dtype)


@triton.jit
def logprob_rows_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    coefficient_ptr,
    logps_ptr,
    residual_ptr,
    logits_stride,
    residual_stride,
    vocabulary,
    ignore_index,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0 for none
    HAS_BIAS: tl.constexpr,
    HAS_COEFFICIENT: tl.constexpr,
    WRITE_RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: an online maximum and sum a column of the block, then the residual over the logits."""
    row = tl.program_id(0).to(tl.int64)  # rows x V may exceed 2^31
    logits_ptr += row * logits_stride
    target = tl.load(targets_ptr + row)
    kept = target != ignore_index
    largest = tl.full((BLOCK,), float("-inf"), ACC)
    total = tl.zeros((BLOCK,), ACC)
    at_target = tl.zeros((BLOCK,), ACC)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        x = _logit(logits_ptr, bias_ptr, columns, inside, LOGIT_SCALE, SOFTCAP, HAS_BIAS, ACC)
        at_target += tl.where(columns == target, x, 0.0)
        x = tl.where(inside, x, float("-inf"))
        new = tl.maximum(largest, x)
        shift = tl.where(new == float("-inf"), 0.0, new)  # of a column that is outside in every block
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = new
    top = tl.max(largest, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    # Rounding may put a certain token a hair above 0; a log-probability never is.
    logp = tl.minimum(tl.sum(at_target, 0) - lse, 0.0)
    tl.store(logps_ptr + row, tl.where(kept, logp, 0.0))
    if WRITE_RESIDUAL:
        residual_ptr += row * residual_stride
        factor = tl.where(kept, 1.0, 0.0).to(ACC) * LOGIT_SCALE
        if HAS_COEFFICIENT:
            factor *= tl.load(coefficient_ptr + row).to(ACC)
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            x = _logit(logits_ptr, bias_ptr, columns, inside, LOGIT_SCALE, SOFTCAP, HAS_BIAS, ACC)
            residual = (tl.where(columns == target, 1.0, 0.0) - tl.exp(x - lse)) * factor
            if SOFTCAP != 0.0:
                residual *= 1.0 - (x / SOFTCAP) * (x / SOFTCAP)
            # In bf16 the residual takes the first half of its own logits' bytes: all threads have read before one writes.
            tl.debug_barrier()
            tl.store(residual_ptr + columns, residual.to(residual_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _logit(
    logits_ptr,
    bias_ptr,
    columns,
    inside,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
):
    x = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(ACC)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(ACC)
    x *= LOGIT_SCALE
    if SOFTCAP != 0.0:
        x = SOFTCAP * (2.0 / (1.0 + tl.exp(-2.0 / SOFTCAP * x)) - 1.0)  # tanh; where exp overflows, -1
    return x


def _rows_triton(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    settings: HeadSettings,
    residual_dtype: torch.dtype | None,
    coefficient: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    rows, vocabulary = logits.shape
    logps = logits.new_empty(rows)
    residual = logits if residual_dtype is None else logits.view(residual_dtype)[:, :vocabulary]
    logprob_rows_kernel[(rows,)](
        logits,
        bias,
        targets,
        coefficient,
        logps,
        residual,
        logits.stride(0),
        residual.stride(0),
        vocabulary,
        settings.ignore_index,
        LOGIT_SCALE=settings.logit_scale,
        SOFTCAP=settings.softcap or 0.0,
        HAS_BIAS=bias is not None,
        HAS_COEFFICIENT=coefficient is not None,
        WRITE_RESIDUAL=residual_dtype is not None,
        ACC=accumulator(logits.dtype),
        BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=8,
    )
    return logps, None if residual_dtype is None else residual


def _logits(hidden: Tensor, wide: Tensor) -> Tensor:
    """h W^T [n, V] in fp32 (fp64): on GPUs products of half precision, summed and kept in fp32."""
    if wide.is_cuda and wide.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden.to(wide.dtype), wide.T, out_dtype=torch.float32)
    return hidden.to(wide.dtype) @ wide.T


def _wide(weight: Tensor, hidden: Tensor) -> Tensor:
    """The head as `_logits` takes it: as it is on a GPU that multiplies its type, else cast once a call, not once a chunk."""
    return weight if weight.is_cuda and weight.dtype == hidden.dtype else weight.to(_compute_dtype(hidden))


def _chunks(rows: int, weight: Tensor) -> list[slice]:
    size = max(1, (GPU_CHUNK_ELEMENTS if weight.is_cuda else CHUNK_ELEMENTS) // max(1, len(weight)))
    if size > 128:
        size -= size % 128  # whole tiles of the GEMM
    return [slice(start, start + size) for start in range(0, rows, size)]


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
