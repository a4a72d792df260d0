"""What the page's plots draw, the gallery shows and the summary holds, by literal values."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.made_up_run import make_run
from PIL import Image

from srcfast.data.in_order import InOrder
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.errors import InputError
from srcfast.report import plots, run_results
from srcfast.report.gallery import MAX_PIXELS, SMALL, cards, embedded_image
from srcfast.report.run_files import read_run
from srcfast.report.shapes import Histogram, check_shape

matplotlib_axes = pytest.importorskip("matplotlib.axes")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of what is drawn, by the axes' method."""
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
    for name in ("errorbar", "barh", "plot", "stairs"):
        method = getattr(matplotlib_axes.Axes, name)

        def recorded(self: Any, *given: Any, _name: str = name, _method: Any = method, **options: Any) -> Any:
            calls.setdefault(_name, []).append((given, options))
            return _method(self, *given, **options)

        monkeypatch.setattr(matplotlib_axes.Axes, name, recorded)
    return calls


def changed_run(path: Path, **changes: Any) -> Any:
    run = make_run(path, seed=1, gallery=1)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | changes))
    return read_run(run)


def evaluation(model: str, accuracy: float, interval: list[float], **more: Any) -> dict[str, Any]:
    cases = {
        "both_right": 5,
        "right_answer_wrong_rationale": 3,
        "right_rationale_wrong_answer": 2,
        "both_wrong": 10,
    }
    entry = {"model": model, "dataset": "d", "split": "s", "n": 20, "accuracy": accuracy, "accuracy_ci95": interval}
    return entry | {"unparsed": 0, "by_ability": {}, "cases": cases} | more


def test_a_model_s_point_has_its_interval_below_and_above(tmp_path: Path, drawn: dict[str, list[Any]]) -> None:
    rows = [evaluation("base", 0.5, [0.25, 0.625]), evaluation("rationale", 0.75, [0.5, 0.875])]
    plots.progress_plot(changed_run(tmp_path / "run", evaluations=rows))
    (((x, y, errors), options),) = drawn["errorbar"]
    assert options["label"] == "accuracy"
    assert np.round(x).tolist() == [0, 1] and y.tolist() == [50.0, 75.0]
    assert errors.tolist() == [[25.0, 25.0], [12.5, 12.5]]  # downwards, then upwards


def test_the_cases_are_stacked_shares(tmp_path: Path, drawn: dict[str, list[Any]]) -> None:
    plots.cases_plot(changed_run(tmp_path / "run", evaluations=[evaluation("base", 0.4, [0.3, 0.5])]))
    bars = [(given[0], given[1], options["left"]) for given, options in drawn["barh"]]
    assert bars == [(0, 25.0, 0.0), (0, 15.0, 25.0), (0, 10.0, 40.0), (0, 50.0, 50.0)]


def test_histograms_are_shares_in_percent(tmp_path: Path, drawn: dict[str, list[Any]]) -> None:
    histogram = {"edges": [0.0, 0.5, 1.0], "counts": [1, 3]}
    funnels = {"iteration-1": {"score_histogram": histogram, "confidence_histogram": histogram}}
    plots.histograms_plot(changed_run(tmp_path / "run", funnel=funnels))
    assert [given[0].tolist() for given, _ in drawn["stairs"]] == [[25.0, 75.0]] * 4


def test_headroom_s_marks_are_in_percent(tmp_path: Path, drawn: dict[str, list[Any]]) -> None:
    row = {"iteration": 1, "dataset": "d", "split": "s", "n": 4, "n_candidates": 3.0}
    row |= {"pass_at_1": 0.25, "best_of_n": 0.5, "pass_at_n": 0.75, "next_pass_at_1": None}
    plots.headroom_plot(changed_run(tmp_path / "run", headroom=[row]))
    values = [given[0] for given, _ in drawn["plot"]]
    assert values[:4] == [[25.0, 75.0], [25.0], [50.0], [75.0]] and np.isnan(values[4][0])


def test_a_curve_ends_with_its_stage_and_is_a_running_mean(drawn: dict[str, list[Any]]) -> None:
    figure, axes = plots._axes(1, 1, 2.0, "test")
    rows = [{"loss": float(value)} for value in range(40)]
    plots._curve(axes[0, 0], [*rows, {"loss": None}], "loss", plots.BLUE, "loss", scale=10)
    (raw, _), (smooth, _) = drawn["plot"]
    assert raw[0].tolist() == [(k + 1) / 40 for k in range(40)]
    assert raw[1].tolist() == [10.0 * k for k in range(40)]
    # A window of 40 / 20 = 2 steps to each side, the step itself counted in both: means of three.
    assert smooth[1].tolist() == pytest.approx([5.0, *(10.0 * k for k in range(1, 39)), 385.0])
    assert plots._smooth(np.array([1.0, 2.0, 6.0]), 1).tolist() == [1.0, 2.0, 6.0]


def test_others_than_the_pair_are_shown_by_descending_score(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", seed=2, gallery=1)
    (entry,) = json.loads((run / "gallery.json").read_text())
    texts = [
        {"text": f"Answer: {letter}", "score": score}
        for letter, score in zip("abcde", (0.1, 0.9, 0.5, 0.7, 0.3), strict=True)
    ]
    entry |= {"candidates": texts, "chosen": 3, "rejected": 0}
    (run / "gallery.json").write_text(json.dumps([entry]))
    (card,) = cards(read_run(run))
    assert [(one.answer, one.mark) for one in card.pair] == [("d", "chosen"), ("a", "rejected")]
    assert [(one.answer, one.mark) for one in card.others] == [("b", ""), ("c", ""), ("e", "")]


@pytest.mark.parametrize(
    ("size", "shown", "small"),
    [
        ((SMALL, SMALL), (SMALL, SMALL), True),
        ((SMALL + 1, 20), (SMALL + 1, 20), False),  # by the longer side
        ((20, SMALL + 1), (20, SMALL + 1), False),
        ((2 * MAX_PIXELS, MAX_PIXELS), (MAX_PIXELS, MAX_PIXELS // 2), False),
    ],
)
def test_a_picture_is_small_by_its_longer_side(
    size: tuple[int, int], shown: tuple[int, int], small: bool, tmp_path: Path
) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "picture.png")
    picture = embedded_image(tmp_path / "picture.png")
    assert picture is not None and picture.small == small
    kind, _, data = picture.uri.partition(",")
    assert kind == f"data:image/{'png' if small else 'jpeg'};base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == shown


def test_a_summary_of_a_literal_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_results, "write_report", lambda path, roots: None)
    head = {"iteration": 1, "dataset": "d", "split": "s", "pass_at_1": 0.25, "best_of_n": 0.75}
    manifest = {
        "base/evaluation": {"entries": [{"model": "base"}], "seconds": 4.0, "tokens": 100, "peak_rss_bytes": 7},
        "iteration-1/candidates": {"diversity": {"x": 0.5}, "seconds": 2.0, "tokens": 50, "peak_rss_bytes": 30},
        "iteration-1/headroom": {"entries": [head], "seconds": 1.0, "tokens": 0, "peak_rss_bytes": 9},
        "iteration-1/scores": {"adaptive": {"pairs_share": 0.5}, "seconds": 0.0, "tokens": 0, "peak_rss_bytes": 9},
        "iteration-1/preferences": {"funnel": {"kept": 3}, "seconds": 0.5, "tokens": 5, "peak_rss_bytes": 9},
        "iteration-1/evaluation": {
            "entries": [{"model": "iteration-1"}],
            "seconds": 4.0,
            "tokens": 8,
            "peak_rss_bytes": 9,
        },
    }
    asked = []

    def aligned(model: str, dataset: str, split: str, samples: list[Any]) -> list[bool]:
        asked.append((model, dataset, split, samples))
        return [True, False]

    run: Any = SimpleNamespace(
        directory=SimpleNamespace(manifest=lambda: manifest, path=tmp_path, summary_file=tmp_path / "summary.json"),
        artifacts=SimpleNamespace(aligned=aligned),
        headroom_sets=lambda: [(SimpleNamespace(name="d", split="s"), ["samples"])],
        num_rejected=2,
        samples={},
    )
    run_results.write_summary(run)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "calibration" not in summary  # of an R-Scorer without one
    manifest["iteration-1/scores"]["calibration"] = {"ece_after": 0.25}
    asked.clear()
    run_results.write_summary(run)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary | {
        "calibration": {"iteration-1": {"ece_after": 0.25}}
    }
    assert asked == [("iteration-1", "d", "s", ["samples"])]
    assert summary["evaluations"] == [{"model": "base"}, {"model": "iteration-1"}]
    assert summary["headroom"] == [head | {"next_pass_at_1": 0.5, "recovered": 0.5}]
    assert summary["funnel"] == {"iteration-1": {"kept": 3}} and summary["diversity"] == {"iteration-1": {"x": 0.5}}
    assert summary["adaptive"] == {"iteration-1": {"pairs_share": 0.5}} and summary["rejected"] == 2
    assert [(row["name"], row["seconds"], row["tokens_per_second"]) for row in summary["stages"]] == [
        ("base/evaluation", 4.0, 25.0),
        ("iteration-1/candidates", 2.0, 25.0),
        ("iteration-1/headroom", 1.0, 0.0),
        ("iteration-1/scores", 0.0, 0.0),
        ("iteration-1/preferences", 0.5, 10.0),
        ("iteration-1/evaluation", 4.0, 2.0),
    ]
    assert summary["peak_rss_bytes"] == 30 and summary["seconds"] == 11.5


def test_the_gallery_shows_the_first_pair_of_each_of_the_first_twelve_samples(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(15)]
    texts = ("A. Answer: 1", "B. Answer: 2", "C. Answer: 3")
    candidates = {
        name: [Candidate(f"{name}#{index}", name, text, "", "1", -1.0) for index, text in enumerate(texts)]
        for name in names
    }

    def pair(name: str, chosen: int, rejected: int) -> Preference:
        extra = {"chosen_id": f"{name}#{chosen}", "rejected_id": f"{name}#{rejected}"}
        return Preference(name, (), "Why?", texts[chosen], texts[rejected], 0.25, extra=extra)

    pairs = [pair(name, *sides) for name in names for sides in ((2, 0), (1, 0))]  # two of each sample
    run: Any = SimpleNamespace(
        artifacts=SimpleNamespace(
            candidates=lambda iteration: InOrder(iter(candidates.items())),
            scores=lambda iteration: ({"sample_id": name, "scores": [0.1, 0.4, 0.9]} for name in names),
        ),
        samples={name: Sample(name, (), "Why?", "1") for name in names},
        directory=SimpleNamespace(path=tmp_path / "run"),
        config=SimpleNamespace(output=str(tmp_path)),
    )
    entries = run_results._gallery(run, 3, pairs)
    assert [entry["sample_id"] for entry in entries] == names[:12]
    for entry in entries:
        assert (entry["iteration"], entry["chosen"], entry["rejected"], entry["confidence"]) == (3, 2, 0, 0.25)
        assert [one["score"] for one in entry["candidates"]] == [0.1, 0.4, 0.9]


@pytest.mark.parametrize("edges", [[0.0, 1.0], [0.0, 0.3, 0.6, 1.0]])
def test_a_histogram_has_one_edge_more_than_counts(tmp_path: Path, edges: list[float]) -> None:
    check_shape({"counts": [1.0, 2.0], "edges": [0.0, 0.5, 1.0]}, Histogram, tmp_path)
    with pytest.raises(InputError, match=f"{len(edges)} edges for 2 counts"):
        check_shape({"counts": [1.0, 2.0], "edges": edges}, Histogram, tmp_path)
