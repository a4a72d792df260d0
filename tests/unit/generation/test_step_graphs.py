"""Steps as graphs: on a CPU with a stand-in for the capture, on a GPU against the same steps without graphs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_lvlm import SmallLVLM, load_image
from helpers.stand_in_graphs import SharedPool, decode_by_graphs
from torch import Tensor

from srcfast.config.settings import CandidatesConfig
from srcfast.generation import decode
from srcfast.generation.beam_search import Search, sentence_beam_search
from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.cuda_graphs import StepGraphs, position_buckets, row_buckets
from srcfast.generation.kv_store import LANES, Layout
from srcfast.generation.sampling import Sampling
from srcfast.models import ImageFeatures, load_lvlm

SETTINGS = CandidatesConfig(
    num_candidates=6, num_beams=4, proposals=3, max_sentence_tokens=12, max_new_tokens=90, top_p=1.0, max_sentences=12
)


def test_buckets_hold_their_rows_and_positions_and_are_few() -> None:
    for most in range(1, 513):
        buckets = row_buckets(most)
        assert most <= buckets[0] < most + 8 and buckets[-1] == 8 and len(buckets) <= 5
        for larger, smaller in zip(buckets, buckets[1:], strict=False):
            # At most half of the rows are fillers where a product's time grows with them; a quarter takes as long else.
            assert smaller < larger <= (2 if larger > 128 else 4) * smaller
    for most in range(LANES, 2000, LANES):
        rooms = position_buckets(most)
        assert rooms[0] == most and len(rooms) <= 4 and rooms == sorted(set(rooms), reverse=True)
        assert all(room % LANES == 0 for room in rooms)
        assert rooms[-1] <= most / 4 + LANES and max(np.diff(rooms[::-1]), default=0) <= most / 4 + LANES


def test_a_replay_gives_what_the_step_gives_and_keeps_to_its_buckets() -> None:
    shapes = []

    def step(numbers: Tensor, rows: int, used: int, longest: int) -> Any:
        shapes.append((rows, longest))
        places, positions, lengths = numbers[:rows], numbers[rows : 2 * rows], numbers[3 * rows :]
        assert used == 10 and len(lengths) == 41
        return places * 1000 + positions + lengths[places], numbers[2 * rows : 3 * rows].view(torch.float64) * longest

    pool = SharedPool()
    graphs = StepGraphs(step, Layout(10, 4, 64, 112, spare=True, fixed=True), torch.device("cpu"), pool)
    assert shapes[:3] == [(40, 112)] * 3  # the largest one's warm-up, its capture, its first replay
    random = np.random.default_rng(0)
    for _ in range(300):
        rows, longest = int(random.integers(1, 41)), int(random.integers(1, 113))
        places = np.sort(random.permutation(40)[:rows])
        positions, lengths = random.integers(0, 900, rows), np.append(random.integers(0, longest, 40), 0)
        uniform = random.random(rows)
        tokens, logprobs = graphs(places, positions, uniform, lengths, longest)
        assert tokens.tolist() == (places * 1000 + positions + lengths[places]).tolist()
        room = next(room for room in (32, 64, 96, 112) if room >= longest)
        assert logprobs.tolist() == (uniform * room).tolist()
    assert set(shapes) == {(rows, room) for rows in (40, 16, 8) for room in (32, 64, 96, 112)}
    assert pool.captures == 12 and pool.replays == 301 - 11  # all but the first of each bucket


def test_what_one_graph_gave_outlives_the_replay_of_another() -> None:
    """Graphs of one pool write over each other's results."""

    def step(numbers: Tensor, rows: int, used: int, longest: int) -> Any:
        return numbers[:rows] + longest, numbers[:rows].double()

    graphs = StepGraphs(step, Layout(10, 4, 64, 112, spare=True, fixed=True), torch.device("cpu"), SharedPool())
    few, many = np.arange(3), np.arange(20)
    run = {len(places): partial(graphs, places, places, places / 40, np.zeros(41, dtype=int)) for places in (few, many)}
    for _ in range(2):
        run[3](10), run[20](100)
    first, second = run[3](10), run[20](100)
    assert first[0].tolist() == (few + 32).tolist() and first[1].tolist() == few.tolist()
    assert second[0].tolist() == (many + 112).tolist() and second[1].tolist() == many.tolist()


def searches_of(lvlm: SmallLVLM) -> list[Search]:
    return [Search(prompt, SETTINGS, 0, lvlm.model.end_tokens) for prompt in lvlm.prompts()]


def test_a_search_by_graphs_finds_the_same_candidates(exact: SmallLVLM) -> None:
    searches, expected, pool = searches_of(exact), searches_of(exact), SharedPool()
    decode_by_graphs(exact, searches, pool, slots=3, width=SETTINGS.width, limit=110)
    assert pool.captures > 2 and pool.replays > 20
    decode.decode(exact.model, expected, exact.features, slots=3, width=SETTINGS.width, limit=110, sampling=Sampling())
    assert sum(len(one.finished) for one in expected) > 20
    for one, other in zip(searches, expected, strict=True):
        assert [beam.tokens for beam in one.finished] == [beam.tokens for beam in other.finished]


@pytest.mark.parametrize("late", [1, 2])
def test_a_host_that_looks_late_finds_the_same_candidates(late: int, exact: SmallLVLM) -> None:
    """As on a GPU, where the next step is under way by then: what rows drew past their end is dropped."""
    made = []
    for steps in (0, late):
        searches = searches_of(exact)
        longest = max(len(one.prompt.token_ids) for one in searches)
        layout = Layout.of(2, SETTINGS.width, longest, 110, on_gpu=False)
        with torch.inference_mode(), DecodingMemory() as memory:
            run = decode._Decoding(exact.model, searches, exact.features, layout, 110, Sampling(), memory)
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
    settings = SETTINGS.replace(top_p=top_p)
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
