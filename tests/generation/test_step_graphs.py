"""Steps as graphs: on a CPU with a stand-in for the capture, on a GPU against the same steps without graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_lvlm import SmallLVLM, load_image
from torch import Tensor

from srcfast.models import ImageFeatures, load_lvlm
from srcfast.runtime import decoding
from srcfast.runtime.beam_search import BeamSettings, Search, sentence_beam_search
from srcfast.runtime.decoding import Sampling
from srcfast.runtime.step_graphs import POSITIONS, StepGraphs, bucket_of

SETTINGS = BeamSettings(num_candidates=6, num_beams=4, proposals=3, max_sentence_tokens=12, max_new_tokens=90)


def test_buckets_hold_their_rows_and_are_few() -> None:
    for rows in range(1, 600):
        assert rows <= bucket_of(rows) <= max(8, 2 * rows) and bucket_of(bucket_of(rows)) == bucket_of(rows)
    assert len({bucket_of(rows) for rows in range(1, 257)}) == 10


class StandIn:
    """Captures as CUDA does, seen from outside: results' places first, the work at each replay; `state` is what it changes."""

    def __init__(self, state: Tensor) -> None:
        self.state = state
        self.captures = self.replays = 0

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.captures += 1
        before = self.state.clone()
        outputs = work()
        self.state.copy_(before)

        def replay() -> None:
            self.replays += 1
            for kept, new in zip(outputs, work(), strict=True):
                kept.copy_(new)

        return outputs, replay


def test_a_replay_gives_what_the_step_gives_and_keeps_to_its_buckets() -> None:
    shapes = set()

    def step(places: Tensor, positions: Tensor, uniform: Tensor, lengths: Tensor, longest: int) -> Any:
        shapes.add((len(places), longest))
        return places * 1000 + positions + lengths[places], uniform * longest

    stand_in = StandIn(torch.zeros(1))
    graphs = StepGraphs(step, spare=40, most=100, capture=stand_in)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rows, longest = (int(torch.randint(1, most, (), generator=generator)) for most in (40, 101))
        places = torch.randperm(40, generator=generator)[:rows]
        positions, lengths = torch.randint(0, 900, (rows,)), torch.randint(0, longest, (41,))
        uniform = torch.rand(rows, dtype=torch.float64)
        tokens, logprobs = graphs(places, positions, uniform, lengths, longest)
        assert torch.equal(tokens, places * 1000 + positions + lengths[places])
        assert torch.equal(logprobs, uniform * min(100, -(-longest // POSITIONS) * POSITIONS))
    assert shapes == {(bucket, longest) for bucket in (8, 16, 32, 64) for longest in (64, 100)}
    assert stand_in.captures == len(shapes) and stand_in.replays == 200 - len(shapes)


def test_a_search_by_graphs_finds_the_same_candidates(exact: SmallLVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StandIn] = []

    def graphs(step: Any, spare: int, most: int) -> StepGraphs:
        made.append(StandIn(step.func.__self__.pending))
        return StepGraphs(step, spare, most, made[-1])

    monkeypatch.setattr(decoding, "StepGraphs", graphs)
    searches = [Search(prompt, SETTINGS, 0, exact.model.end_token_id) for prompt in exact.prompts()]
    with torch.inference_mode():
        decoding._Decoding(exact.model, searches, exact.features, 3, SETTINGS.width, 110, Sampling(), True).run(None)
    assert made[0].captures > 2 and made[0].replays > 20
    expected = [Search(prompt, SETTINGS, 0, exact.model.end_token_id) for prompt in exact.prompts()]
    decoding.decode(
        exact.model, expected, exact.features, slots=3, width=SETTINGS.width, limit=110, sampling=Sampling()
    )
    assert sum(len(one.finished) for one in expected) > 20
    for one, other in zip(searches, expected, strict=True):
        assert [beam.tokens for beam in one.finished] == [beam.tokens for beam in other.finished]


@pytest.mark.parametrize("late", [1, 2])
def test_a_host_that_looks_late_finds_the_same_candidates(late: int, exact: SmallLVLM) -> None:
    """As on a GPU, where the next step is under way by then: what rows drew past their end is dropped."""
    made = []
    for steps in (0, late):
        searches = [Search(prompt, SETTINGS, 0, exact.model.end_token_id) for prompt in exact.prompts()]
        with torch.inference_mode():
            run = decoding._Decoding(exact.model, searches, exact.features, 2, SETTINGS.width, 110, Sampling(), False)
            run.late = steps
            counted = run.run(None)
        made.append((counted, [[beam.tokens for beam in one.finished] for one in searches]))
    assert made[0] == made[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_on_the_gpu_graphs_change_nothing(written: tuple[Path, Any], dtype: torch.dtype, top_p: float) -> None:
    model = load_lvlm(written[0], dtype=dtype, device="cuda")
    features = ImageFeatures(model, load_image)
    prompts = SmallLVLM(written[0], torch.float64).prompts()
    settings = BeamSettings(**{**vars(SETTINGS), "top_p": top_p})
    found = [
        sentence_beam_search(model, prompts, features, settings, 1, slots=3, graphs=graphs)[0]
        for graphs in (True, False)
    ]
    assert sum(map(len, found[0])) > 8
    for own, other in zip(*found, strict=True):
        if dtype == torch.float64:
            assert [one.token_ids for one in own] == [one.token_ids for one in other]
        else:  # a rounding more or less may change a draw: then another candidate, with its own log-probability
            known = {one.token_ids: one.logprob for one in other}
            shared = [(one.logprob, known[one.token_ids]) for one in own if one.token_ids in known]
            assert all(one == pytest.approx(two, rel=2e-2, abs=2e-2) for one, two in shared)
