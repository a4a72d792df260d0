"""DPO and rationale fine-tuning on the simulated device: the CPU's numbers in the same dtype, and no memory outlives them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import simulated_cuda
import torch
from helpers.small_trainings import Case, Trained, assert_alike, train_on

from srcfast.data.records import Sample
from srcfast.errors import ConfigError
from srcfast.recipes.base_checkpoint import new_lvlm, train_tokenizer
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.optimizer import AdamW, OptimizerName
from srcfast.world.samples import world_samples
from srcfast_kernels import nf4_dequantize, nf4_quantize

pytestmark = pytest.mark.simulated
# Each two values of two settings meet in a case.
CASES = [
    Case("dpo", "bf16", checkpointing=2, dropout=0.2, vision_offload=True, workers=1),
    Case("rationale", "bf16", quantize="nf4", dropout=0.2, workers=1),
    Case("dpo", "bf16"),
    Case("rationale", "fp16", quantize="nf4", checkpointing=2, vision_offload=True),
    Case("dpo", "fp16", dropout=0.2, workers=1),
    Case("dpo", "fp32", quantize="nf4", dropout=0.2, vision_offload=True),
    Case("rationale", "fp32", checkpointing=2, workers=1),
]
OPTIMIZERS = [
    Case("dpo", "bf16", optimizer="adamw_8bit"),
    Case("rationale", "fp32", optimizer="paged_adamw"),
    Case("dpo", "fp32", optimizer="paged_adamw_8bit"),
]
OF_VISION = [
    Case("dpo", "bf16", vision_offload=True, workers=1, tower_layers=2),
    Case("rationale", "fp32", quantize="nf4", checkpointing=2, dropout=0.2, vision_offload=True, tower_layers=0),
    Case("dpo", "fp32", dropout=0.2, tower_layers=1),
]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return world_samples("train", 5, 3, image_dir=tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def on_cpu(samples: list[Sample]) -> Any:
    return cache(lambda case: train_on("cpu", samples, case))


@pytest.fixture(scope="module", autouse=True)
def _memory_as_it_stays() -> None:
    """The device's tables of 4-bit codes are made once in a process, and stay; what other tests left is collected."""
    if simulated_cuda.is_active():
        nf4_dequantize(nf4_quantize(torch.ones(64, 64, device="cuda")))
        gc.collect()


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """Memory of the device that was taken in a test is free after it, without a search for cycles."""
    before = torch.cuda.memory_allocated()
    gc.disable()
    yield
    after = torch.cuda.memory_allocated()
    gc.enable()
    assert after == before


def test_each_two_values_of_two_settings_meet_in_a_case() -> None:
    rows = [list(vars(case).values())[:-2] for case in CASES]
    for one, other in combinations(zip(*rows, strict=True), 2):
        assert len(set(zip(one, other, strict=True))) == len(set(one)) * len(set(other))


@pytest.mark.parametrize("case", CASES + OPTIMIZERS + OF_VISION, ids=str)
def test_a_training_gives_the_cpus_numbers_and_leaves_no_memory(
    case: Case, samples: list[Sample], on_cpu: Any, nothing_stays: None
) -> None:
    if case.optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = train_on("cuda", samples, case)
    assert len(ours.history) == 3
    assert torch.cuda.max_memory_allocated() > before + (2 << 20)  # it was there that the model lay
    assert_alike(ours, on_cpu(case.numbers()), case.dtype)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_an_optimizer_whose_library_does_not_load_is_refused_before_the_first_step(
    name: OptimizerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where bitsandbytes finds no library for the CUDA version: its import succeeds, each call of a kernel raises."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def missing(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA Setup failed: no library for this CUDA version.\nMuch advice.")

    for function in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit"):
        monkeypatch.setattr(bitsandbytes.functional, function, missing)
    weights = torch.nn.Parameter(torch.zeros(8, 8, device="cuda"))
    with pytest.raises(ConfigError, match=f"optimizer {name}: .*no library for this CUDA version.*optimizer=adamw"):
        AdamW([weights], name=name)


class Killed(Exception):
    pass


@pytest.mark.parametrize("case", [CASES[0], CASES[5], OF_VISION[0]], ids=str)
def test_a_training_that_was_stopped_continues_bit_for_bit(
    case: Case, samples: list[Sample], tmp_path: Path, nothing_stays: None
) -> None:
    """The simulated device adds in one order, as a GPU does not everywhere."""

    def trained(name: str, until: int) -> Trained:
        def count(metrics: dict[str, Any]) -> None:
            if metrics["step"] + 1 == until:
                raise Killed

        kept = TrainingCheckpoints(tmp_path / name, {}, steps=1)
        return train_on("cuda", samples, replace(case, workers=0), checkpoints=kept, on_step=count)

    undisturbed = trained("undisturbed", until=99)
    with pytest.raises(Killed):
        trained("stopped", until=2)
    assert [place.name for place in (tmp_path / "stopped").glob("step-*")] == ["step-00000001"]
    continued = trained("stopped", until=99)
    assert torch.equal(continued.update, undisturbed.update)
    timed = {"tokens_per_second", "mfu", "peak_memory_bytes"}
    for one, other in zip(continued.history, undisturbed.history, strict=True):
        assert {name: one[name] for name in one.keys() - timed} == {name: other[name] for name in other.keys() - timed}


# Few kernels, of few programs each: a launch takes the interpreter some 0.1 s.
SHORT = [
    Sample(f"short-{n}", (), "Is it red?", answer, f"It is {colour}.", (), {}, Path())
    for n, (colour, answer) in enumerate((("red", "Yes"), ("blue", "No")))
]


@pytest.mark.triton
def test_a_step_by_tritons_kernels_gives_the_cpus_numbers(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["Is it red? It is red. It is blue. Yes No"], 300)
    new_lvlm(tmp_path, tokenizer, hidden_size=32, num_layers=1, vision_layers=1, seed=0)
    case = Case("dpo", "bf16", quantize="nf4")
    with simulated_cuda.recording() as record:
        ours = train_on("cuda", SHORT, case, tmp_path)
    kernels = ("rms_norm", "rope", "nf4_dequantize", "swiglu", "gather_rows", "logprob_rows", "token_dpo")
    backward = ("rms_norm_backward", "swiglu_backward", "gather_rows_backward")
    assert set(record.launches) == {f"{name}_kernel" for name in kernels + backward}, record.text()
    assert record.attention_calls == {"forward": 2, "backward": 1}  # the reference and one step, one layer
    assert_alike(ours, train_on("cpu", SHORT, case, tmp_path), "bf16")
