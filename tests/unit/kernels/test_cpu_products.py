"""Products by oneDNN against PyTorch's in double, for every layout that the passes hand over."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from srcfast_kernels.cpu_products import add_product, linear, product, thin_product


@pytest.fixture(params=[True, False], ids=["onednn", "without"])
def onednn(request):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    with torch.backends.mkldnn.flags(enabled=request.param):
        yield


def laid_out(rows: int, columns: int, transposed: bool) -> torch.Tensor:
    return torch.randn(columns, rows).T if transposed else torch.randn(rows, columns)


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize(("n", "k", "m"), [(67, 33, 51), (129, 40, 8), (8, 130, 24), (1, 5, 3), (0, 4, 6)])
def test_products_are_those_of_double_precision(onednn, n, k, m, a_transposed, b_transposed):
    a, b, bias = laid_out(n, k, a_transposed), laid_out(k, m, b_transposed), torch.randn(m)
    exact = a.double() @ b.double()
    # fp32 sums of k terms of about 1.
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * k**0.5}
    torch.testing.assert_close(product(a, b).double(), exact, **tolerance)
    torch.testing.assert_close(thin_product(a, b).double(), exact, **tolerance)
    total = torch.ones(n, m)
    assert add_product(total, a, b) is total
    torch.testing.assert_close(total.double(), exact + 1.0, **tolerance)
    torch.testing.assert_close(linear(a, b.T, bias).double(), exact + bias, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorch_s(onednn, dtype):
    a, b = torch.randn(19, 7).to(dtype), torch.randn(7, 5).to(dtype)
    torch.testing.assert_close(product(a, b), a @ b)
    torch.testing.assert_close(linear(a, b.T), a @ b)


def test_a_column_s_slice_is_read_where_it_lies(onednn):
    whole = torch.randn(40, 24)
    part, gradient = whole[:, 8:16], torch.randn(40, 13)
    exact = gradient.double().T @ part.double()
    torch.testing.assert_close(thin_product(gradient.T, part).double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(product(part, torch.eye(8)), part)


def test_autocast_decides_the_dtype(onednn):
    a, b = torch.randn(19, 7), torch.randn(7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(a, b).dtype == linear(a, b.T).dtype == torch.bfloat16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
def test_products_of_ever_new_shapes_do_not_fill_memory() -> None:
    code = (
        "import torch\n"
        "from srcfast_kernels.cpu_products import linear\n"
        "def resident():\n"
        "    line = next(line for line in open('/proc/self/status') if line.startswith('VmRSS'))\n"
        "    return int(line.split()[1]) / 1024\n"
        "weight, held = torch.randn(688, 256), []\n"
        "for rows in range(1000, 1240):\n"
        "    linear(torch.randn(rows, 256), weight)\n"
        "    held.append(resident())\n"
        "print(held[-1] - held[40])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100.0  # MiB over 200 shapes; measured: 40 to 60, without the bound 198
