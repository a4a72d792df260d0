"""Packages that are not required, installed but broken: each is left out with its reason, nothing else is disturbed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from srcfast.attention import forest_attention
from srcfast.attention.options import CAUSAL
from srcfast.cli import model_tools
from srcfast.cli.app import app
from srcfast.errors import ConfigError
from srcfast.report import plots
from srcfast.training.optimizer import AdamW
from srcfast_kernels.nf4_linear import why_not_fused
from srcfast_kernels.optional import import_failure

WRONG_ABI = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E')\n"
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install("a.b", text)` writes the module a.b, in place of any that is installed; `version=` a distribution for it too."""
    monkeypatch.syspath_prepend(tmp_path)
    written: set[str] = set()

    def write(module: str, text: str, version: str | None = None, namespace: bool = False) -> None:
        top, *parts = module.split(".")
        written.add(top)
        for name in [name for name in sys.modules if name.split(".")[0] == top]:
            monkeypatch.delitem(sys.modules, name)
        folder = tmp_path.joinpath(top, *parts)
        folder.mkdir(parents=True, exist_ok=True)
        if not namespace:
            (tmp_path / top / "__init__.py").touch()
        (folder / "__init__.py").write_text(text)
        if version is not None:
            described = tmp_path / f"{top}-{version}.dist-info"
            described.mkdir()
            (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {top}\nVersion: {version}\n")

    import_failure.cache_clear()
    why_not_fused.cache_clear()
    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in written]:
        del sys.modules[name]  # what was there before comes back with monkeypatch
    import_failure.cache_clear()
    why_not_fused.cache_clear()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the choice of a backend asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("module", "text", "namespace", "reason"),
    [
        ("flash_attn", WRONG_ABI, False, "ImportError: .*undefined symbol"),
        (
            "flash_attn",
            "raise OSError('libcudart.so.12: cannot open\\nshared object')",
            False,
            "OSError: .*open shared",
        ),
        ("flash_attn", "raise RuntimeError('built for torch 2.4')", False, "RuntimeError: built"),
        ("flash_attn.cute", "", True, "AttributeError: .*no attribute 'flash_attn_varlen_func'"),  # flash-attn 4
    ],
)
def test_a_package_that_cannot_be_imported_is_not_available_and_the_reason_is_kept(
    module: str, text: str, namespace: bool, reason: str, install: Install, cuda: None
) -> None:
    install(module, text, namespace=namespace)
    assert forest_attention.available_backends()[0] == "torch_varlen"
    with pytest.raises(ConfigError, match=rf"'flash_attn' is not available here \({reason}"):
        forest_attention.set_backend("flash_attn")


def test_the_automatic_choice_takes_what_can_be_imported_and_imports_no_more(
    install: Install, cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forest_attention, "flash_takes", lambda q: True)
    install("xformers.ops", "raise SystemExit('imported')")
    install("flash_attn", WRONG_ABI)
    q = torch.zeros(3, 2, 8)
    assert forest_attention._automatic(q, None, CAUSAL) == "torch_varlen"
    install("flash_attn", "def flash_attn_varlen_func(): ...\n")
    assert forest_attention._automatic(q, None, CAUSAL) == "torch_varlen", "imported once a process"
    import_failure.cache_clear()
    assert forest_attention._automatic(q, None, CAUSAL) == "flash_attn"


def test_decoding_does_without_a_bitsandbytes_that_cannot_be_imported(install: Install) -> None:
    install("bitsandbytes", "raise OSError('libcudart.so.13: cannot open shared object file')\n")
    assert why_not_fused() == "OSError: libcudart.so.13: cannot open shared object file"


def test_decoding_does_without_a_bitsandbytes_whose_cuda_library_is_not_loaded(install: Install) -> None:
    pytest.importorskip("bitsandbytes")
    if torch.cuda.is_available():
        pytest.skip("its CUDA library may well be loaded here")
    assert "CUDA library is not loaded" in (why_not_fused() or "")


def test_an_optimizer_of_a_broken_bitsandbytes_is_refused_by_name(install: Install) -> None:
    install("bitsandbytes", "raise OSError('libcudart.so.13: cannot open shared object file')\n")
    with pytest.raises(ConfigError, match="adamw_8bit.*can't be imported.*libcudart.*Fix: pip install bitsandbytes"):
        AdamW([nn.Parameter(torch.ones(2))], name="adamw_8bit")


def test_a_matplotlib_built_for_another_numpy_costs_the_plots_alone(install: Install) -> None:
    install("matplotlib.figure", "raise ValueError('numpy.dtype size changed, may indicate binary incompatibility')\n")
    assert not plots.can_plot()


def test_the_doctor_tells_an_installed_package_that_cannot_be_used(install: Install) -> None:
    install("flash_attn", WRONG_ABI, version="2.8.3")
    install("xformers.ops", "def memory_efficient_attention(): ...\n", version="0.0.35")
    assert model_tools.unusable().keys() == {"flash-attn"}
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert found["optional"]["flash-attn"] == "2.8.3" and found["optional"]["xformers"] == "0.0.35"
    assert "undefined symbol" in found["unusable"]["flash-attn"]
    table = " ".join(CliRunner().invoke(app, ["doctor"]).output.replace("│", " ").split())
    assert "2.8.3, can't be used: ImportError: flash_attn_2_cuda.so: undefined symbol" in table
