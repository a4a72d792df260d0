"""The study of confidences: areas by their plain definitions, rows and findings by hand, and a small study that goes on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from helpers.seeds import fresh_rng

from srcfast.data.records import Candidate
from srcfast_benchmarks import confidence_study as study

ROOT = Path(__file__).parents[3]
QUALITIES = ("complete", "noisy", "partial", "answer")


# Areas ------------------------------------------------------------------------------------------------------


def plain_auroc(confidence: list[float], right: list[int]) -> float:
    """Of each right and each wrong answer: 1 if the right one is more confident, 1/2 if they tie."""
    won = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, of_a in zip(confidence, right, strict=True)
        for b, of_b in zip(confidence, right, strict=True)
        if of_a and not of_b
    ]
    return sum(won) / len(won)


def plain_area(confidence: list[float], right: list[int]) -> float:
    """The mean over all orders of falling confidence of the mean over k of the share of errors among the first k."""
    areas = []
    for order in itertools.permutations(range(len(right))):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            wrong = [1 - right[index] for index in order]
            areas.append(np.mean([sum(wrong[:k]) / k for k in range(1, len(wrong) + 1)]))
    return float(np.mean(areas))


def test_areas_are_their_plain_definitions_with_ties_and_repeated_samples() -> None:
    rng = fresh_rng()
    for _ in range(8):
        confidence = rng.integers(0, 3, 5) / 4 - 0.25  # many ties, and one of them at 0
        right = np.concatenate([[1, 0], rng.integers(0, 2, 3)])
        counts = rng.multinomial(4, np.full(3, 1 / 3), 3)  # of the last three
        counts = np.concatenate([np.ones((3, 2), dtype=int), counts], axis=1)  # one right, one wrong, four more
        drawn = [np.repeat(np.arange(5), times) for times in counts]
        for function, plain in ((study.auroc, plain_auroc), (study.risk_coverage_area, plain_area)):
            expected = [plain(confidence[rows].tolist(), right[rows].tolist()) for rows in drawn]
            assert function(counts, confidence, right) == pytest.approx(expected, abs=1e-12)


def test_areas_at_their_ends() -> None:
    once = np.ones((1, 4), dtype=int)
    right = np.array([1, 1, 0, 0])
    best, worst, even = np.array([4.0, 3.0, 2.0, 1.0]), np.array([1.0, 2.0, 3.0, 4.0]), np.zeros(4)
    assert [float(study.auroc(once, of, right)[0]) for of in (best, worst, even)] == [1.0, 0.0, 0.5]
    # Errors among the first 1, 2, 3, 4: 0, 0, 1, 2; or 1, 2, 2, 2; in random order half of them at every k.
    areas = [float(study.risk_coverage_area(once, of, right)[0]) for of in (best, worst, even)]
    assert areas == pytest.approx([(1 / 3 + 2 / 4) / 4, (1 + 1 + 2 / 3 + 2 / 4) / 4, 0.5])
    assert np.isnan(study.auroc(once, best, np.ones(4))).all() and np.isnan(study.auroc(once, best, np.zeros(4))).all()
    assert study.risk_coverage_area(once, best, np.ones(4)).tolist() == [0.0]
    assert np.isnan(study.risk_coverage_area(0 * once, best, right)).all()


# Rows and figures -------------------------------------------------------------------------------------------


def candidate(number: int, answer: str, logprob: float, tokens: int, aligned: bool) -> Candidate:
    return Candidate(
        f"s#{number}", "s", f"text {number}", "", answer, logprob, tuple(range(tokens)), {"aligned": aligned}
    )


def test_an_outcome_is_of_the_candidate_of_the_highest_score() -> None:
    of = [
        candidate(0, "red", np.log(0.5), 4, False),
        candidate(1, " Blue", np.log(0.2), 5, True),
        candidate(2, "red", np.log(0.2), 2, False),
        candidate(3, "blue", np.log(0.1), 3, False),
        candidate(4, "red", np.log(1.0), 3, True),
    ]
    confidence = np.arange(25).reshape(5, 5) / 100
    scored = {
        "scores": [0.4, 0.9, 0.2, 0.5, 0.5],
        "confidence": confidence.tolist(),
        "alone": [0.1, 0.7, 0.3, 0.2, 0.6],
    }
    assert study.outcome(of, scored) == {
        "candidates": 5,
        "aligned_candidates": 0.4,
        "aligned": True,
        "u": 0.07,  # of candidate 1 against 2
        "score": 0.9,
        "rating": 0.7,
        "likelihood": pytest.approx(np.log(0.2) / 5),
        "agreement": 0.6,
        "mass": pytest.approx(0.3 / 2.0),  # of both blue ones
    }
    one = {"scores": [0.5], "confidence": [[0.0]], "alone": [0.5]}
    assert study.outcome(of[1:2], one) == {"candidates": 1, "aligned_candidates": 1.0, "aligned": True}
    assert study.outcome([], None) == {"candidates": 0, "aligned_candidates": 0.0, "aligned": False}


def rows(u: list[float | None], aligned: list[int], **constant: float) -> list[dict[str, Any]]:
    """Rows of samples; None: a sample with one candidate."""
    made = []
    for value, right in zip(u, aligned, strict=True):
        row: dict[str, Any] = {"candidates": 1, "aligned_candidates": float(right), "aligned": bool(right)}
        if value is not None:
            row |= {name: constant.get(name, 0.5) for name in study.CONFIDENCES} | {"candidates": 2, "u": value}
        made.append(row)
    return made


def near(value: Any) -> Any:
    return pytest.approx(value, abs=1e-5)  # figures have five places


def test_figures_are_over_samples_with_a_pair_and_differences_are_paired() -> None:
    sound = [rows([0.9, 0.5, None, 0.7], [1, 0, 1, 1]), rows([0.8, 0.6, 0.4, 0.6], [1, 1, 0, 1])]
    worse = [rows([0.6, 0.2, 0.9, 0.4], [1, 0, 0, 0]), rows([0.5, 0.3, 0.1, 0.3], [1, 0, 0, 0])]
    worse = [[row | ({"likelihood": 0.6} if "u" in row else {}) for row in of] for of in worse]
    columns = {"sound": dict.fromkeys(QUALITIES, study.columns_of(sound))}
    columns["worse"] = dict.fromkeys(QUALITIES, study.columns_of(worse))
    result = study.summarise(columns)
    first, second = (result[name]["references"]["noisy"] for name in ("sound", "worse"))
    assert result["sound"]["compared"][0] == near(7 / 8) and result["worse"]["candidates"][0] == 2.0
    assert first["aligned"][0] == near(6 / 8) and first["risk"][0] == near((1 / 3 + 1 / 4) / 2)
    assert second["aligned_difference"][0] == near((-2 / 4 - 2 / 4) / 2)
    u = first["confidences"]["u"]
    assert u["mean"][0] == near((2.1 / 3 + 2.4 / 4) / 2)
    assert u["mean_aligned"][0] == near((1.6 / 2 + 2.0 / 3) / 2)
    assert u["mean_others"][0] == near((0.5 + 0.4) / 2)
    assert u["auroc"][0] == 1.0 and u["difference"] == [0.0, 0.0, 0.0]
    # Where both have a pair, u is 0.3 lower everywhere; the third sample of seed 0, which has none of sound pictures, is no part.
    assert second["confidences"]["u"]["difference"] == near([-0.3, -0.3, -0.3])
    assert second["confidences"]["score"]["auroc"][0] == 0.5  # all equal
    assert second["confidences"]["likelihood"]["difference_aligned"] == near([0.1, 0.1, 0.1])
    assert second["confidences"]["score"]["risk_coverage"] == near(second["risk"])
    found = study.findings(result)
    assert list(found) == list(QUALITIES)
    assert found["noisy"]["u"] == {"falls": ["worse"], "rises": [], "neither": []}
    assert found["noisy"]["likelihood"] == {"falls": [], "rises": ["worse"], "neither": []}
    assert found["noisy"]["score"] == {"falls": [], "rises": [], "neither": ["worse"]}
    pages = study.tables({"families": {"world": result}, "findings": {"world": found}}, "world")
    assert "| worse | 25.0 | 25.0 | 0.41 (**-0.30**) | 0.50 | 0.50 | 0.60 (**+0.10**) |" in pages["means"]
    assert "| worse | -0.30 (-0.30 to -0.30) | +0.00 (+0.00 to +0.00) |" in pages["aligned"]
    assert "| noisy | 1 / 0 / 0 | 0 / 0 / 1 | 0 / 0 / 1 | 0 / 1 / 0 |" in pages["findings"]


@pytest.mark.parametrize(
    ("interval", "direction"),
    [
        ([-0.2, -0.3, -0.1], "falls"),
        ([0.2, 0.1, 0.3], "rises"),
        ([-0.1, -0.2, 0.0], "neither"),
        ([0.1, 0.0, 0.2], "neither"),
        ([0.0, -0.1, 0.1], "neither"),
        (None, "neither"),
    ],
)
def test_a_confidence_falls_or_rises_where_its_interval_is_on_one_side_of_0(
    interval: list[float] | None, direction: str
) -> None:
    assert study.direction(interval) == direction


# Pictures ---------------------------------------------------------------------------------------------------


def test_worse_pictures_are_of_the_same_samples(tmp_path: Path) -> None:
    shown = study.draw_pictures("world", ["test", "test-covered-3"], 5, 77, tmp_path)
    for sound, worse in zip(shown["test"], shown["test-covered-3"], strict=True):
        assert (sound.id, sound.question, sound.facts, sound.extra) == (
            worse.id,
            worse.question,
            worse.facts,
            worse.extra,
        )
        names = [sample.images[0] for sample in (sound, worse)]
        assert names[0] != names[1] and (tmp_path / names[0]).read_bytes() != (tmp_path / names[1]).read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": ["test", "validation"]}, "--split validation: expected the questions of test again"),
        ({"split": ["test", "foggy"]}, "foggy"),
        ({"family": ["clips"], "split": ["test", "test-noisy-1"]}, "test-noisy-1"),
        ({"family": ["words"]}, "--family"),
    ],
)
def test_what_is_no_pair_of_pictures_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(typer.BadParameter, match=words):
        study.main(samples=4, work=tmp_path / "work", output=tmp_path / "result.json", threads=1, **options)
    assert not (tmp_path / "result.json").exists()


def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Any] = []
    tune = study.tuned_base
    monkeypatch.setattr(study, "tuned_base", lambda *words: (trained.append(words), tune(*words))[1])
    work, output = tmp_path / "work", tmp_path / "result.json"
    run: dict[str, Any] = {"samples": 6, "tuned": 8, "epochs": 1, "seeds": 1, "work": work, "output": output}
    run |= {"split": ["test", "test-noisy-3"], "threads": 1}
    study.main(**run)
    result = json.loads(output.read_text(encoding="utf-8"))
    folder = work / "world" / "seed-0"
    files = sorted(folder.iterdir())
    assert len(files) == 2 + 2 * 4 and len(trained) == 1
    assert list(result["families"]["world"]) == ["test", "test-noisy-3"]
    lines = [json.loads(line) for line in (folder / "test-noisy-3.jsonl").read_text(encoding="utf-8").splitlines()]
    aligned = {row["sample_id"]: [] for row in lines}
    for row in lines:
        aligned[row["sample_id"]].append(row["aligned"])
    entry = result["families"]["world"]["test-noisy-3"]
    assert entry["candidates"][0] == pytest.approx(len(lines) / 6)
    assert entry["aligned_candidates"][0] == pytest.approx(sum(np.mean(of) for of in aligned.values()) / 6)
    for figures in entry["references"]["partial"]["confidences"].values():
        mean, low, high = figures["mean"]
        assert low <= mean <= high

    times = {file: file.stat().st_mtime_ns for file in files}
    (folder / "test-answer.json").unlink()
    study.main(**run)
    assert len(trained) == 1  # no candidates were missing
    again = json.loads(output.read_text(encoding="utf-8"))
    assert again["families"] == result["families"] and again["findings"] == result["findings"]
    assert [file.name for file in files if file.stat().st_mtime_ns != times[file]] == ["test-answer.json"]
    with pytest.raises(typer.BadParameter, match="another recipe"):
        study.main(**run | {"tuned": 9})


# The page ---------------------------------------------------------------------------------------------------


def test_the_page_shows_the_committed_result() -> None:
    result = json.loads((ROOT / "benchmarks/results/study/confidence.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    tables = study.tables(result, "world")
    assert list(tables) == ["means", "findings", "aligned", "auroc", "risk_coverage"]
    assert [name for name, table in tables.items() if table not in page] == []
    assert study.findings(result["families"]["world"]) == result["findings"]["world"]


def test_the_page_s_sentences_are_what_the_result_says() -> None:
    result = json.loads((ROOT / "benchmarks/results/study/confidence.json").read_text(encoding="utf-8"))
    words = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    world, found = result["families"]["world"], result["findings"]["world"]
    strongest = [f"test-{kind}-3" for kind in ("blurred", "covered", "noisy")]

    def confidence(split: str, name: str, quality: str = "complete") -> dict[str, Any]:
        return world[split]["references"][quality]["confidences"][name]

    def of_u(split: str, quality: str, key: str = "mean") -> str:
        return f"{confidence(split, 'u', quality)[key][0]:.2f}"

    def aligned(split: str, quality: str) -> str:
        return f"{100 * world[split]['references'][quality]['aligned'][0]:.1f}"

    def listed(figures: list[str]) -> str:
        return f"{', '.join(figures[:-1])} and {figures[-1]}"

    falls = {quality: {name: len(of["falls"]) for name, of in found[quality].items()} for quality in QUALITIES}
    assert falls["complete"] == {"u": 7, "score": 7, "rating": 8, "likelihood": 5, "agreement": 0, "mass": 0}
    assert "u and score under 7 of 9 kinds, rating under 8" in words
    assert all("test-noisy-1" not in found["complete"][name]["falls"] for name in ("u", "score", "rating"))
    assert all(found[quality][name]["rises"] == [] for quality in QUALITIES for name in study.CONFIDENCES)
    assert (falls["partial"]["u"], falls["answer"]["u"]) == (3, 0)
    assert {falls[quality][name] for quality in QUALITIES for name in ("agreement", "mass")} == {0}
    assert f"u goes from {of_u('test', 'complete')} to {listed([of_u(s, 'complete') for s in strongest])}" in words
    assert f"where {aligned('test', 'complete')} % of the chosen" in words
    assert f"then {listed([aligned(s, 'complete') for s in strongest])} %" in words
    assert (
        f"is {of_u('test', 'answer')} under sound pictures and {listed([of_u(s, 'answer') for s in strongest])}"
        in words
    )
    assert f"from {aligned('test', 'answer')} % to {listed([aligned(s, 'answer') for s in strongest])} %" in words
    assert f"is {listed([of_u('test', quality, 'auroc') for quality in QUALITIES])} with complete" in words
    likelihood = [f"{confidence('test', 'likelihood', quality)['auroc'][0]:.2f}" for quality in QUALITIES]
    assert f"the likelihood's {listed(likelihood)}" in words
    right, wrong = (of_u("test", "complete", f"mean_{which}") for which in ("aligned", "others"))
    assert f"Under sound pictures u is {right} where the choice is aligned and {wrong} where it isn't" in words
    right, wrong = (of_u("test-blurred-3", "complete", f"mean_{which}") for which in ("aligned", "others"))
    assert f"under `test-blurred-3` {right} and {wrong}." in words
    both = {
        name: [study.direction(confidence(split, name)["difference_aligned"]) for split in list(world)[1:]]
        for name in study.CONFIDENCES
    }
    assert "falls" not in both["u"] + both["score"] + both["rating"] + both["agreement"]
    assert both["likelihood"].count("falls") == 6 and both["mass"].count("falls") == 1
    assert set(strongest) <= set(found["complete"]["likelihood"]["falls"])
