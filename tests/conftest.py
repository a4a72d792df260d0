"""For the whole suite: no hub is ever asked, no test fails because another one holds the cores, Triton needs no GPU.

With the environment variable SIMULATED_CUDA=N the suite has N simulated CUDA devices: see simulated_cuda/README.md.
"""

import os
from collections.abc import Iterator

import pytest
import simulated_cuda
import torch
from helpers.seeds import VARIABLE, run_seed, seed_everything
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic trainings; read at the first product
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined
# Neither an example nor what draws it is too slow where others hold the cores.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

if simulated_cuda.VARIABLE in os.environ and simulated_cuda.unavailable_reason() is None:
    simulated_cuda.activate(int(os.environ[simulated_cuda.VARIABLE]))
    torch.set_num_threads(1)
    # Triton's interpreter takes some 0.2 s a launch: it runs where kernels are the subject, PyTorch's backend elsewhere.
    os.environ.setdefault("SRCFAST_KERNELS", "torch")


@pytest.fixture(autouse=True)
def _kernels_by_subject(request: pytest.FixtureRequest) -> Iterator[None]:
    # Not by the fixture `monkeypatch`: set up here, before a module's own fixtures, it would be undone after these.
    with pytest.MonkeyPatch.context() as patch:
        kernels = request.path.parent.name == "kernels" or request.node.get_closest_marker("triton")
        if simulated_cuda.is_active() and kernels:
            patch.setenv("SRCFAST_KERNELS", "auto")
        yield


def pytest_report_header() -> str:
    return f"random inputs: {VARIABLE}={run_seed()}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed all random draws of a test, those of its fixtures included."""
    seed_everything(item.nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs a simulated device where there is none, and what times a real one where there is none."""
    reason = simulated_cuda.unavailable_reason() or f"needs {simulated_cuda.VARIABLE}=1"
    for item in items:
        if not simulated_cuda.is_active() and item.get_closest_marker("simulated"):
            item.add_marker(pytest.mark.skip(reason=f"no simulated device: {reason}"))
        if simulated_cuda.is_active() and item.get_closest_marker("timing"):
            item.add_marker(pytest.mark.skip(reason="times a device, and this one is simulated"))
