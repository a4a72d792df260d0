"""Quantise to NF4: four bits a weight, and eight bits of every block's scale (QLoRA: Dettmers et al., 2023, arXiv 2305.14314).

A weight is cut into blocks; each is divided by its largest magnitude `absmax` and every value becomes the nearest of 16
quantiles of the normal distribution. Double quantisation then writes the `absmax` of 256 blocks, less the mean of all,
in 8 bits of a dynamic exponent (Dettmers et al., 2022, arXiv 2110.02861): 4.127 bits a weight in all.

Bit for bit bitsandbytes' layout and rounding, so that either reads what the other wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from srcfast_kernels import native
from srcfast_kernels.backends import Backend, backend_for

DEFAULT_BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
BLOCK = 2048  # bytes that a program of the dequantising kernel takes
QUANTIZED_VALUES = 4096  # that a program of the quantising kernel takes, in whole blocks
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class NF4Weight:
    """A quantised weight; `nested_absmax` and `offset` are None without double quantisation.

    packed: [ceil(numel / 2)] uint8, the earlier value in the high half. absmax: [blocks] uint8, or fp32 without double
    quantisation. nested_absmax: [ceil(blocks / 256)] fp32. offset: scalar fp32, the mean absmax.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int

    @property
    def num_bytes(self) -> int:
        """Return the memory that it takes."""
        tensors = [self.packed, self.absmax, self.nested_absmax, self.offset]
        return sum(part.numel() * part.element_size() for part in tensors if part is not None)


def nf4_quantize(weight: Tensor, *, blocksize: int = DEFAULT_BLOCKSIZE, double_quant: bool = True) -> NF4Weight:
    """Quantise a weight of any shape in row-major order.

    Args:
        weight: fp32, bf16 or fp16; `nf4_dequantize` gives this dtype back.
        blocksize: values that share a scale.
        double_quant: quantise the scales too.

    Raises:
        ValueError: another dtype or blocksize, or no values.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weight: expected float32, bfloat16 or float16, found {weight.dtype}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, found {blocksize}")
    if weight.numel() == 0:
        raise ValueError(f"weight: expected at least one value, found shape {tuple(weight.shape)}")
    weight = weight.detach()
    backend = backend_for(weight)
    if backend == "triton":
        packed, absmax = _quantize_triton(weight, blocksize)
    elif _is_native(weight, backend):
        packed, absmax = _quantize_native(weight, blocksize)
    else:
        packed, absmax = _quantize_torch(weight, blocksize)
    nested_absmax = offset = None
    if double_quant:
        offset = absmax.mean()
        absmax, nested_absmax = _quantize_scales(absmax - offset)
    return NF4Weight(packed, absmax, nested_absmax, offset, weight.shape, weight.dtype, blocksize)


def _is_native(tensor: Tensor, backend: Backend) -> bool:
    return backend == "torch" and tensor.device.type == "cpu" and native.available()


def _quantize_native(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    packed = torch.empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(math.ceil(weight.numel() / blocksize), dtype=torch.float32)
    torch.ops.srcfast.nf4_quantize(weight.contiguous(), _nf4_codes(weight.device), blocksize, packed, absmax)
    return packed, absmax


def nf4_dequantize_native(weight: NF4Weight) -> Tensor:
    """Compute `nf4_dequantize` by csrc/, on a CPU: vector instructions and threads."""
    device = weight.packed.device
    values = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    codes, scale_codes = _nf4_codes(device), dynamic_codes(device)
    scales = (weight.absmax, scale_codes, weight.nested_absmax, weight.offset)
    torch.ops.srcfast.nf4_dequantize(weight.packed, codes, *scales, weight.blocksize, values)
    return values


def _quantize_torch(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return packed codes [ceil(n / 2)] uint8 and absmax [blocks] fp32."""
    scaled, absmax = _blocks(weight, blocksize)
    codes = _nearest(scaled, _nf4_codes(weight.device)).view(-1)[: weight.numel()]  # [n]
    codes = F.pad(codes, (0, codes.numel() % 2), value=7)  # the code of 0 fills the last byte of an odd count
    return codes[::2] << 4 | codes[1::2], absmax


@triton.jit
def nf4_quantize_kernel(
    weight_ptr,
    middles_ptr,
    packed_ptr,
    absmax_ptr,
    num_values,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Quantise BLOCKS blocks (a program): the weight is read once, nothing but codes and scales is written."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None]
    x = tl.load(weight_ptr + at, mask=at < num_values, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(x), 1)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < num_values)
    # A product with the reciprocal, as in bitsandbytes: a division rounds differently. A block of zeros stays zero.
    # 1e-38 lies below fp32's normal numbers: by itself Triton 3.6 takes it for fp64.
    smallest = tl.full((BLOCKS,), 1e-38, tl.float32)
    x = x * tl.div_rn(1.0, tl.maximum(absmax, smallest))[:, None]
    code = tl.zeros((BLOCKS, BLOCKSIZE), tl.int32)
    for middle in tl.static_range(15):  # of two codes as near the lower one
        code += (x > tl.load(middles_ptr + middle)).to(tl.int32)
    high, low = tl.split(tl.reshape(code, (BLOCKS, BLOCKSIZE // 2, 2)))
    byte_at = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None]
    tl.store(packed_ptr + byte_at, (high << 4 | low).to(tl.uint8), mask=2 * byte_at < num_values)


def _quantize_triton(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    count, codes = weight.numel(), _nf4_codes(weight.device)
    blocks = triton.cdiv(count, blocksize)
    packed = torch.empty(triton.cdiv(count, 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    a_program = QUANTIZED_VALUES // blocksize
    nf4_quantize_kernel[(triton.cdiv(blocks, a_program),)](
        weight.contiguous(),
        (codes[:-1] + codes[1:]) / 2.0,
        packed,
        absmax,
        count,
        BLOCKSIZE=blocksize,
        BLOCKS=a_program,
        num_warps=8,
    )
    return packed, absmax


def nf4_state_dict(weight: NF4Weight) -> dict[str, Tensor]:
    """Return a weight as bitsandbytes stores it in a checkpoint; the empty name is the weight's, the others are suffixes."""
    settings = {
        "quant_type": "nf4",
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {"": weight.packed[:, None], "absmax": weight.absmax, "quant_map": _nf4_codes(weight.packed.device)}
    if weight.nested_absmax is not None and weight.offset is not None:
        settings |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        settings["nested_offset"] = weight.offset.item()
        tensors["nested_absmax"] = weight.nested_absmax
        tensors["nested_quant_map"] = dynamic_codes(weight.packed.device)
    text = torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8)
    return tensors | {"quant_state.bitsandbytes__nf4": text.to(weight.packed.device)}


def nf4_from_state_dict(tensors: Mapping[str, Tensor]) -> NF4Weight:
    """Read what `nf4_state_dict` or bitsandbytes wrote.

    Raises:
        ValueError: a tensor is missing, or the weight isn't NF4 as written here.
    """
    names = {"", "absmax", "quant_state.bitsandbytes__nf4"}
    if missing := sorted(names - set(tensors)):
        raise ValueError(
            f"expected NF4 tensors {', '.join(sorted(names - {''}))} beside a weight, missing: {missing[0]}"
        )
    settings = json.loads(bytes(tensors["quant_state.bitsandbytes__nf4"].tolist()))
    codes = {"quant_map": _nf4_codes, "nested_quant_map": dynamic_codes}
    for name, known in codes.items():
        if name in tensors and not torch.equal(tensors[name].cpu(), known(torch.device("cpu"))):
            raise ValueError(f"{name}: expected bitsandbytes' own codes, found others")
    nested = "nested_absmax" in tensors
    if nested and settings["nested_blocksize"] != NESTED_BLOCKSIZE:
        raise ValueError(f"nested_blocksize: expected {NESTED_BLOCKSIZE}, found {settings['nested_blocksize']}")
    device = tensors[""].device
    return NF4Weight(
        packed=tensors[""].reshape(-1),
        absmax=tensors["absmax"],
        nested_absmax=tensors["nested_absmax"] if nested else None,
        offset=torch.tensor(settings["nested_offset"], dtype=torch.float32, device=device) if nested else None,
        shape=torch.Size(settings["shape"]),
        dtype=getattr(torch, settings["dtype"]),
        blocksize=settings["blocksize"],
    )


def nf4_flat_size(count: int) -> int:
    """Return the number of words of `nf4_flat` for `count` weights."""
    return sum(_flat_parts(count)) // 4


def nf4_flat(weight: NF4Weight) -> Tensor:
    """Flatten a weight in blocks of 64 with double quantisation, and all that belongs to it, to one row: [nf4_flat_size] fp32.

    Nothing in it but the scales is a number: the type is one that parameters may have.

    Raises:
        ValueError: other blocks, or scales that are not quantised.
    """
    if weight.blocksize != DEFAULT_BLOCKSIZE or weight.nested_absmax is None or weight.offset is None:
        found = f"blocks of {weight.blocksize}, scales in {str(weight.absmax.dtype).removeprefix('torch.')}"
        raise ValueError(f"expected NF4 in blocks of {DEFAULT_BLOCKSIZE} with double quantisation, found {found}")
    parts = (
        weight.packed,
        weight.absmax,
        weight.nested_absmax.view(torch.uint8),
        weight.offset[None].view(torch.uint8),
    )
    sizes = _flat_parts(math.prod(weight.shape))
    filled = [F.pad(part, (0, size - len(part))) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(filled).view(torch.float32)


def nf4_from_flat(flat: Tensor, shape: torch.Size, dtype: torch.dtype) -> NF4Weight:
    """Return a weight [shape] that is a view of its row [nf4_flat_size] fp32."""
    packed, absmax, nested, offset = flat.view(torch.uint8).split(_flat_parts(math.prod(shape)))
    blocks = math.ceil(math.prod(shape) / DEFAULT_BLOCKSIZE)
    return NF4Weight(
        packed=packed[: math.ceil(math.prod(shape) / 2)],
        absmax=absmax[:blocks],
        nested_absmax=nested.view(torch.float32)[: math.ceil(blocks / NESTED_BLOCKSIZE)],
        offset=offset.view(torch.float32)[0],
        shape=shape,
        dtype=dtype,
        blocksize=DEFAULT_BLOCKSIZE,
    )


def _flat_parts(count: int) -> list[int]:
    """Return the bytes of packed codes, absmax, nested absmax and offset; each begins where a GPU reads it 16 bytes at a time."""
    blocks = math.ceil(count / DEFAULT_BLOCKSIZE)
    sizes = (math.ceil(count / 2), blocks, 4 * math.ceil(blocks / NESTED_BLOCKSIZE), 4)
    return [math.ceil(size / 16) * 16 for size in sizes]


def nf4_dequantize(weight: NF4Weight) -> Tensor:
    """Return the weight in the shape and dtype that it had; products are rounded once, from fp32."""
    backend = backend_for(weight.packed)
    if backend == "triton":
        return _nf4_dequantize_triton(weight)
    if _is_native(weight.packed, backend):
        return nf4_dequantize_native(weight)
    absmax = weight.absmax
    if weight.nested_absmax is not None and weight.offset is not None:
        scales = dynamic_codes(absmax.device)[absmax.int()]
        absmax = _scale_blocks(scales, weight.nested_absmax, NESTED_BLOCKSIZE) + weight.offset
    values = _pairs_of_codes(weight.packed.device)[weight.packed.int()].view(-1)[: math.prod(weight.shape)]
    return _scale_blocks(values, absmax, weight.blocksize).to(weight.dtype).view(weight.shape)


@triton.jit
def nf4_dequantize_kernel(
    packed_ptr,
    codes_ptr,
    absmax_ptr,
    scale_codes_ptr,
    nested_absmax_ptr,
    offset_ptr,
    weight_ptr,
    num_bytes,
    num_values,
    DOUBLE_QUANT: tl.constexpr,
    HALF_BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Dequantise scales and values in one pass: 16 bytes of packed codes a thread, 32 values of the weight."""
    block = tl.program_id(0).to(tl.int64) * BLOCK
    bytes_at = block + tl.arange(0, BLOCK)
    inside = bytes_at < num_bytes
    packed = tl.load(packed_ptr + bytes_at, mask=inside, other=0).to(tl.int32)
    scale_at = bytes_at // HALF_BLOCKSIZE
    if DOUBLE_QUANT:
        code = tl.load(absmax_ptr + scale_at, mask=inside, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_ptr + scale_at // NESTED_BLOCKSIZE, mask=inside, other=0.0)
        absmax = tl.load(scale_codes_ptr + code) * nested + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + scale_at, mask=inside, other=0.0)
    high, low = tl.load(codes_ptr + (packed >> 4)), tl.load(codes_ptr + (packed & 15))
    values_at = 2 * block + tl.arange(0, 2 * BLOCK)
    values = tl.interleave(high * absmax, low * absmax).to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + values_at, values, mask=values_at < num_values)


def _nf4_dequantize_triton(weight: NF4Weight) -> Tensor:
    device = weight.packed.device
    values = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    nf4_dequantize_kernel[(triton.cdiv(weight.packed.numel(), BLOCK),)](
        weight.packed,
        _nf4_codes(device),
        weight.absmax,
        dynamic_codes(device),
        weight.nested_absmax,
        weight.offset,
        values,
        weight.packed.numel(),
        values.numel(),
        DOUBLE_QUANT=weight.nested_absmax is not None,
        HALF_BLOCKSIZE=weight.blocksize // 2,
        NESTED_BLOCKSIZE=NESTED_BLOCKSIZE,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,  # scale times scale, plus offset: bitsandbytes rounds in between
    )
    return values


def _blocks(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Divide values [blocks, blocksize] by the largest magnitude of their block; return them and that, [blocks]; fp32."""
    flat = values.reshape(-1).float()
    blocks = F.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    # A product with the reciprocal, as in bitsandbytes: a division rounds differently. A block of zeros stays zero.
    return (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1.0, 1.0), absmax


def _nearest(scaled: Tensor, codes: Tensor) -> Tensor:
    """Return the index of the nearest code, of two as near the lower; uint8."""
    return torch.bucketize(scaled, (codes[:-1] + codes[1:]) / 2.0, out_int32=True).to(torch.uint8)


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise scales [blocks] to 8 bits; return them and the absmax of each 256 of them."""
    scaled, absmax = _blocks(scales, NESTED_BLOCKSIZE)
    if scales.device.type == "cpu":
        # bitsandbytes on a CPU looks values up on a grid of 2^16 points; its fused multiply-add rounds once, hence fp64.
        grid = 65535
        point = ((scaled + 1.0).double() * 0.5 * grid + 0.5).float().int()
        scaled = 2.0 * point / grid - 1.0
    codes = _nearest(scaled, dynamic_codes(scales.device)).where(absmax[:, None] > 0.0, 0)
    return codes.view(-1)[: scales.numel()], absmax


def _scale_blocks(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Multiply values [n] by the absmax of their block, in place where n fills its blocks."""
    blocks = F.pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize)
    return blocks.mul_(absmax[:, None]).view(-1)[: values.numel()]


@cache
def _nf4_codes(device: torch.device) -> Tensor:
    return torch.tensor(CODES, dtype=torch.float32, device=device)


@cache
def _pairs_of_codes(device: torch.device) -> Tensor:
    """Return the two values of every byte, [256, 2]."""
    codes = _nf4_codes(device)
    return torch.stack((codes.repeat_interleave(16), codes.repeat(16)), dim=-1)


@cache
def dynamic_codes(device: torch.device) -> Tensor:
    """Return the values of 8-bit scales, [256] ascending.

    They are 0, 1, and for each of 7 decades 2^i values either side, at the middles of equal parts of [0.1, 1].
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        decade = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += decade.tolist() + (-decade).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)
