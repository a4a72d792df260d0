"""Forest attention's CUDA backends on the simulated device against the dense reference on the CPU, values and gradients.

`tests/unit/attention/test_forest_attention_gpu.py` holds their errors against PyTorch's, with torch_varlen alone where no other
is installed; here flash-attn and xformers have stand-ins with their signatures and restrictions.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import simulated_cuda
import torch
from torch import Tensor

from srcfast.attention.forest_attention import available_backends, forest_attention, set_backend
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import ConfigError

pytestmark = pytest.mark.simulated
STAND_INS = {"flash_attn": simulated_cuda.stand_in_flash_attn, "xformers": simulated_cuda.stand_in_xformers}
HALVES = {"torch_varlen", "flash_attn", "xformers"}  # FlashAttention's kernels, for 16 bits alone
SHAPES = [(4, 4, 8), (6, 2, 24), (3, 1, 40)]  # heads, heads of keys, their size


def forest_of(seed: int) -> Forest:
    """Two trees of odd lengths: a tree four deep, and a chain; and a root alone."""
    rng = np.random.default_rng(seed)

    def tree(parents: list[int]) -> Tree:
        return Tree(tuple(Segment(rng.integers(0, 99, rng.integers(1, 18)), parent) for parent in parents))

    return Forest.of([tree([-1, 0, 0, 1, 1, 3, 2]), tree([-1, 0, 1]), tree([-1])])


def values_and_gradients(
    device: str,
    dtype: torch.dtype,
    backend: str | None,
    forest: Forest,
    shape: tuple[int, int, int],
    rows: Tensor | None,
) -> list[Tensor]:
    """Output and the gradients of q, k and v, in fp32 on the host; the inputs are the same for all, exact in 16 bits."""
    generator = torch.Generator().manual_seed(7)
    heads, kv_heads, size = shape
    queries = forest.num_tokens if rows is None else len(rows)
    counts = [(queries, heads), (forest.num_tokens, kv_heads), (forest.num_tokens, kv_heads), (queries, heads)]
    drawn = [torch.randn(*count, size, generator=generator).bfloat16() for count in counts]
    *leaves, outer = (x.to(device, dtype) for x in drawn)
    leaves = [x.requires_grad_() for x in leaves]
    out = forest_attention(*leaves, forest.to(device), backend, rows)
    out.backward(outer)
    assert out.dtype == dtype and out.device.type == device
    return [x.detach().float().cpu() for x in (out, *(leaf.grad for leaf in leaves))]


def close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """In 16 bits each value is rounded once, and a gradient of a key that several segments see once for each, of at most 7."""
    eps = torch.finfo(dtype).eps
    for name, one, other in zip("oqkv", found, expected, strict=True):
        allowed = (64 if dtype == torch.float32 else 4) * eps * float(other.abs().max())
        distance = float((one - other).abs().max())
        assert distance <= allowed, f"{name}: {distance:.2e}, at most {allowed:.2e}"


@pytest.mark.parametrize("part", [False, True], ids=["all", "rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(name, dtype) for name in sorted(HALVES) for dtype in (torch.bfloat16, torch.float16)]
    + [("blocks", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)],
    ids=str,
)
def test_each_backend_gives_what_the_reference_gives(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int], part: bool
) -> None:
    forest = forest_of(1)
    rows = torch.arange(0, forest.num_tokens, 3) if part else None
    expected = values_and_gradients("cpu", torch.float32, "reference", forest, shape, rows)
    with STAND_INS.get(backend, nullcontext)(), simulated_cuda.recording() as record:
        found = values_and_gradients("cuda", dtype, backend, forest, shape, rows)
    close(found, expected, dtype)
    assert record.attention_calls == ({"forward": 1, "backward": 1} if backend in HALVES else {})


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 32), (torch.bfloat16, 20), (torch.float16, 264)], ids=str)
@pytest.mark.parametrize("installed", ["neither", "flash_attn", "xformers"])
def test_what_flash_attention_refuses_is_computed_by_blocks(installed: str, dtype: torch.dtype, size: int) -> None:
    forest, shape = forest_of(2), (4, 2, size)
    expected = values_and_gradients("cpu", torch.float32, "reference", forest, shape, None)
    with STAND_INS.get(installed, nullcontext)(), simulated_cuda.recording() as record:
        found = values_and_gradients("cuda", dtype, None, forest, shape, None)
    close(found, expected, dtype)
    assert not record.attention_calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", sorted(HALVES))
def test_a_backend_that_is_forced_refuses_what_its_kernels_do(backend: str, dtype: torch.dtype) -> None:
    shape = (4, 2, 32 if dtype == torch.float32 else 20)
    with (
        STAND_INS.get(backend, nullcontext)(),
        pytest.raises(RuntimeError, match="only support fp16 and bf16|head size 20"),
    ):
        values_and_gradients("cuda", dtype, backend, forest_of(2), shape, None)


def test_packages_are_taken_in_this_order_where_they_can_be_imported() -> None:
    assert available_backends()[0] == "torch_varlen"
    with simulated_cuda.stand_in_xformers():
        assert available_backends()[:2] == ["torch_varlen", "xformers"]
        with simulated_cuda.stand_in_flash_attn():
            assert available_backends()[:3] == ["flash_attn", "torch_varlen", "xformers"]
    with pytest.raises(ConfigError, match="flash_attn.*not available"):
        set_backend("flash_attn")
