"""The host waits for the device once a decoding step, for one event; and never for a sample to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import simulated_cuda
import torch
from helpers.small_lvlm import SmallLVLM, load_image
from simulated_cuda import Record

from srcfast.config.settings import CandidatesConfig
from srcfast.generation import decode
from srcfast.generation.beam_search import sentence_beam_search
from srcfast.models import ImageFeatures, load_lvlm

pytestmark = pytest.mark.simulated
SETTINGS = CandidatesConfig(
    num_candidates=4, num_beams=3, proposals=2, max_sentence_tokens=9, max_new_tokens=40, top_p=1.0, max_sentences=12
)
WATCHED = ("_admit", "_step", "_drew", "_look", "_advance")


class Watched(decode._Decoding):
    """Records what each call of its parts does; `_look` makes the calls of `_advance`."""

    records: dict[str, list[Record]]

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in WATCHED:
            return found

        def recorded(*given: Any) -> Any:
            with simulated_cuda.recording() as record:
                result = found(*given)
            self.records[name].append(record)
            return result

        return recorded


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_waits_for_one_event_and_an_advance_for_nothing(
    written: tuple[Path, Any], dtype: torch.dtype, top_p: float, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: dict[str, list[Record]] = {name: [] for name in WATCHED}
    monkeypatch.setattr(Watched, "records", records, raising=False)
    monkeypatch.setattr(decode, "_Decoding", Watched)
    model = load_lvlm(written[0], dtype=dtype, device="cuda")
    prompts = SmallLVLM(written[0], torch.float64).prompts()
    settings = SETTINGS.replace(top_p=top_p)
    features = ImageFeatures(model, load_image)
    sentence_beam_search(model, prompts, features, settings, 3, slots=3, graphs=graphs)
    assert len(records["_advance"]) > 10 and len(records["_admit"]) > 1
    # Each step's tokens, and those that follow the prompts, are looked at once; of the last step nothing may be left to see.
    assert len(records["_drew"]) - 1 <= len(records["_look"]) <= len(records["_drew"])
    for record in [*records["_step"], *records["_look"], *records["_advance"]]:
        assert not record.waits and not record.pageable_copies, record.text()
    for record in records["_step"]:  # a capture alone waits for the device
        assert not record.event_waits and record.synchronizations.total() == record.captures.total(), record.text()
    assert any(record.replays for record in records["_step"]) == graphs
    for record in records["_look"]:
        assert record.event_waits.total() == 1 and not record.synchronizations, record.text()
    for record in [*records["_advance"], *records["_admit"]]:
        assert not record.event_waits and not record.synchronizations, record.text()
    for record in records["_admit"]:  # of prompts and their images
        assert not record.waits and not record.pageable_copies, record.text()
