"""The native library against the plain PyTorch and Python that define its operations, and what it is built from."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srcfast.data import forest
from srcfast.data.forest import pack_sizes
from srcfast_kernels import native, nf4_dequantize, nf4_quantize
from srcfast_kernels.backends import use_backend

needs_library = pytest.mark.skipif(not native.available(), reason=f"native library: {native.why_not()}")


def packed(sizes: list[int], budget: int, most: int | None, natively: bool) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forest, "NATIVE_FROM", 0 if natively else 10**9)
        return pack_sizes(sizes, budget, most)


@needs_library
@given(
    st.integers(1, 300).flatmap(
        lambda budget: st.tuples(st.just(budget), st.lists(st.integers(0, budget), min_size=1))
    ),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_packing_is_the_same_natively(case: tuple[int, list[int]], most: int | None) -> None:
    budget, sizes = case
    assert packed(sizes, budget, most, natively=True) == packed(sizes, budget, most, natively=False)


@needs_library
@pytest.mark.parametrize("budget", [900, 4096, 8192, 300_000])
def test_packing_of_thousands_is_the_same_natively(budget: int) -> None:
    sizes = [random.Random(budget).randint(1, 900) for _ in range(20_000)]
    assert packed(sizes, budget, None, natively=True) == packed(sizes, budget, None, natively=False)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("budget", [8192, 1_000_000])
def test_ten_million_trees_pack_within_seconds(budget: int) -> None:
    sizes = torch.randint(50, 900, (10_000_000,), generator=torch.Generator().manual_seed(0)).tolist()
    began = time.process_time()
    bins = pack_sizes(sizes, budget)
    assert time.process_time() - began < 30.0  # about 5 s alone on a core; other tests share it
    assert sum(map(len, bins)) == len(sizes)
    assert len(bins) < 1.001 * sum(sizes) / budget + 1


@needs_library
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "blocksize"), [((301, 130), 64), ((7, 33), 32), ((3, 4097), 4096), ((1, 1), 64)])
def test_nf4_is_bit_for_bit_the_same_natively(
    shape: tuple[int, int], blocksize: int, dtype: torch.dtype, double_quant: bool
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(blocksize)).to(dtype)
    weight[0, : shape[1] // 2] = 0.0
    values = []
    for home in ("torch", "reference"):
        with use_backend(home):  # type: ignore[arg-type]
            quantised = nf4_quantize(weight, blocksize=blocksize, double_quant=double_quant)
            values.append((quantised.packed, quantised.absmax, nf4_dequantize(quantised)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*values, strict=True))


@needs_library
def test_threads_share_the_blocks() -> None:
    before = torch.get_num_threads()
    weight = nf4_quantize(torch.randn(513, 1024))
    values = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        values.append(nf4_dequantize(weight))
    torch.set_num_threads(before)
    assert torch.equal(*values)


def test_without_the_library_all_goes_on() -> None:
    code = (
        "import torch; from srcfast_kernels import native, nf4_dequantize, nf4_quantize\n"
        "print(native.why_not(), nf4_dequantize(nf4_quantize(torch.eye(8))).diagonal().sum().item())"
    )
    surroundings = os.environ | {"SRCFAST_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=surroundings)
    assert done.stdout.split() == ["SRCFAST_NATIVE=0", "8.0"], done.stderr


def test_a_library_that_does_not_load_is_named_and_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    assert "does not load" in (native.why_not.__wrapped__() or "")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "missing.so")
    assert "not built: pip install" in (native.why_not.__wrapped__() or "")


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_of_torch_only_the_stable_c_interface_is_used() -> None:
    printed = subprocess.run(
        ["nm", "-D", "--undefined-only", native.LIBRARY], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in printed.stdout.splitlines()]
    mangled = [
        name for name in names if re.search(r"torch|c10|at::|2at", name) and not re.match(r"(aoti_)?torch_", name)
    ]
    assert not mangled
    assert "torch_library_impl" in names
