"""What an estimate counts, and what a calibration hands to its stages, by literal numbers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from srcfast import calibrate
from srcfast.cli import estimate
from srcfast.cli.estimate import StageEstimate, _count, _estimate_stage, _known, _summary, sample_flops
from srcfast.config.datasets import DatasetConfig
from srcfast.config.settings import Config
from srcfast.data.forest import Forest
from srcfast.memory.activations import ForestSizes, activation_bytes
from srcfast.memory.plan import Lengths, policy_sizes, typical_tree
from srcfast.run.chunks import Chunks
from srcfast.run.progress import StageProgress


def dataset(limit: int, *use: str) -> dict[str, Any]:
    return {"name": f"d{limit}", "format": "world", "limit": limit or 1, **({"use": use} if use else {})}


@pytest.mark.parametrize(("limits", "known"), [((3, 4), 7), ((3, 0), 0), ((0,), 0), ((), 0), ((5,), 5)])
def test_sets_are_counted_where_each_has_a_limit(limits: tuple[int, ...], known: int) -> None:
    sets = [DatasetConfig(name="a", format="jsonl", path="a.jsonl", limit=limit) for limit in limits]
    assert _known(sets) == known


@pytest.mark.parametrize(
    ("stage", "count"),
    [("rationale", 30), ("candidates", 20), ("scores", 20), ("preferences", 60), ("dpo", 60), ("evaluation", 7)],
)
def test_a_stage_s_samples_follow_from_the_sets_and_the_pairs_a_sample(stage: str, count: int) -> None:
    data = {"train": [dataset(10, "rationale"), dataset(20)], "evaluation": [dataset(3), dataset(4)]}
    config = Config(data=data, curation={"pairs_per_sample": 3})
    assert _count(config, stage) == count
    fewer = config.replace(candidates={"samples": 5}, rationale={"samples": 6})
    expected = {"rationale": 6, "candidates": 5, "scores": 5, "preferences": 15, "dpo": 15, "evaluation": 7}
    assert _count(fewer, stage) == expected[stage]
    # Each pair with one of its rationales, and each chosen response with two sentences left out.
    derived = {"rationale_pairs": True, "left_out_negatives": 2, "pairs_per_sample": 3}
    for choice, pairs in (("disjoint", 3 * 2 + 3 * 2), ("best_against_worst", 3 * 2 + 2)):
        more = fewer.replace(curation=derived | {"pair_choice": choice})
        assert _count(more, stage) == (5 * pairs if stage in ("preferences", "dpo") else expected[stage])


@pytest.mark.parametrize(
    ("stage", "times"),
    [("rationale", 1), ("candidates", 3), ("scores", 3), ("preferences", 3), ("dpo", 3), ("evaluation", 5)],
)
def test_a_stage_runs_once_a_round_and_an_evaluation_twice_more(
    stage: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base and the tuned model are evaluated before the first round."""
    monkeypatch.setattr(estimate, "advice", lambda *given, **options: [])
    monkeypatch.setattr(estimate, "largest_value", lambda *given, **options: 1)
    config = Config(iterations=3, candidates={"samples": 4}, rationale={"samples": 4})
    found: StageEstimate = _estimate_stage(config, stage, 1e12, 2e9, Lengths())
    samples = found.samples
    assert found.times == times and samples == (1000 if stage == "evaluation" else 4)
    assert found.samples_known == (stage != "evaluation")
    assert found.flops == pytest.approx(times * samples * sample_flops(config, stage, Lengths()))
    assert found.seconds == pytest.approx(found.flops / 2e9)


def image_flops(config: Config) -> float:
    model = policy_sizes(config)
    assert model.vision is not None
    return 2.0 * (model.parameters["vision"] + model.parameters["projector"]) * model.vision.patches


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("stage", ["rationale", "dpo"])
def test_a_training_s_flops_are_those_of_all_epochs_and_of_each_image_once(stage: str, epochs: int) -> None:
    config = Config(**{stage: {"epochs": epochs}})
    model, tree = policy_sizes(config), typical_tree(config, stage, Lengths())
    assert model.lora is not None
    sizes = [segment.tokens.size for segment in tree.segments]
    attended = sizes[0] * (sizes[0] + 1) / 2 + sum(n * sizes[0] + n * (n + 1) / 2 for n in sizes[1:])
    s, below = model.shapes, sum(sizes[1:])
    a_pass = sum(sizes) * (4 * s.linear_weights + 6 * model.lora.parameters)
    a_pass += 12 * s.query * s.layers * attended + 4 * s.hidden * s.vocabulary * below
    assert sample_flops(config, stage, Lengths()) == pytest.approx(epochs * a_pass + image_flops(config))


def test_decoding_s_flops_are_those_of_the_prompt_and_of_each_row() -> None:
    config, lengths = Config(candidates={"num_beams": 3, "proposals": 2}), Lengths(10, 7)
    model = policy_sizes(config)
    assert model.lora is not None
    prompt, s, a = typical_tree(config, "candidates", lengths).num_tokens, model.shapes, model.lora.parameters

    def forward(tokens: float, attended: float, rows: float) -> float:
        linear = tokens * 2 * (s.linear_weights + a)
        return linear + 4 * s.query * s.layers * attended + 2 * s.hidden * s.vocabulary * rows

    for stage, rows in (("candidates", 6), ("evaluation", 1)):
        expected = forward(prompt, prompt * (prompt + 1) / 2, 1) + image_flops(config)
        expected += forward(7 * rows, rows * (7 * prompt + 28), 7 * rows)
        assert sample_flops(config, stage, lengths) == pytest.approx(expected)
    # Nine plain samples: in tasks of six rows, and of three, which run the prompt again.
    expected = 3 * forward(prompt, prompt * (prompt + 1) / 2, 1) + image_flops(config)
    expected += forward(7 * 15, 15 * (7 * prompt + 28), 7 * 15)
    sampled = Config(candidates={"num_beams": 3, "proposals": 2, "plain_samples": 9})
    assert sample_flops(sampled, "candidates", lengths) == pytest.approx(expected)


def test_a_summary_s_bytes_add_up() -> None:
    config = Config(dpo={"optimizer": "adamw"})
    model = policy_sizes(config)
    assert model.lora is not None
    summary, a, s = _summary(config, model, 1e12, Lengths()), model.lora.parameters, model.shapes
    assert summary["weight_bytes"] == 4 * sum(model.parameters.values())
    assert (summary["adapter_parameters"], summary["adapter_bytes"], summary["optimizer_bytes"]) == (a, 4 * a, 12 * a)
    assert summary["fixed_bytes"] == summary["weight_bytes"] + 16 * a
    assert summary["kv_bytes_per_token"] == 2 * s.layers * s.key * 4


def test_activations_of_a_token_leave_out_what_does_not_grow_with_the_tokens() -> None:
    """In 16 bits a copy of the adapter is kept whatever the number of tokens."""
    config = Config(model={"dtype": "bfloat16"}, lora={"r": 64})
    model = policy_sizes(config)
    pair = ForestSizes.of(Forest.of([typical_tree(config, "dpo", Lengths())]), model.device_type)
    one, two = (activation_bytes(model, pair.times(count)).peak for count in (1, 2))
    found = _summary(config, model, 1e12, Lengths())["activation_bytes_per_token"]
    assert found == pytest.approx((two - one) / pair.tokens)
    assert found < 0.99 * one / pair.tokens


def test_keys_and_values_are_those_of_layers_with_attention() -> None:
    model = policy_sizes(Config())
    hybrid = replace(model, shapes=replace(model.shapes, kv_layers=1))
    summary = _summary(Config(), hybrid, math.inf, Lengths())
    assert model.shapes.layers > 1 and summary["kv_bytes_per_token"] == 2 * model.shapes.key * 4


# A calibration's story ------------------------------------------------------------------------------------------------


class Story:
    """Records what the stages of a calibration are handed, in order, without running a model."""

    def __init__(self, config: Config) -> None:
        self.config, self.used, self.stages = config, [], []
        self.artifacts: Any = SimpleNamespace(
            candidates=lambda iteration: f"candidates {iteration}",
            scores=lambda iteration: f"scores {iteration}",
            preferences=lambda iteration: ["pair"] * 5,
        )
        self.directory: Any = SimpleNamespace(adapter=lambda iteration: f"adapter {iteration}")
        self.policy: Any = SimpleNamespace(
            use=lambda adapter: self.used.append(("use", adapter)), save=lambda to: self.used.append(("save", to))
        )
        self.rationale_samples, self.samples = ["rationale"] * 3, {"s": "sample"}

    def samples_of(self, iteration: int) -> list[str]:
        return [f"sample of {iteration}"]

    def stage(self, name: str, sections: Any, total: int, work: Any, **options: Any) -> None:
        self.stages.append((name, tuple(sections), total, options.get("checkpoint_sections", ())))
        stage = SimpleNamespace(config=self.config, progress=SimpleNamespace(advance=lambda count: None))
        work(stage)


@pytest.mark.parametrize("iteration", [1, 2])
@pytest.mark.parametrize("rehearsal", [0.0, 0.5])
def test_a_round_trains_from_the_adapter_before_it_under_a_seed_of_its_own(
    iteration: int, rehearsal: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(
        seed=10, dpo={"rehearsal_weight": rehearsal, "micro_batch_size": 2, "gradient_accumulation_steps": 1}
    )
    story, given = Story(config), []
    monkeypatch.setattr(calibrate, "rationale_pairs", lambda config, samples: (["rap"] * 3, {}))
    monkeypatch.setattr(calibrate, "tune_preferences", lambda stage, policy, *more: given.append(more))
    calibrate.dpo(story, iteration)  # type: ignore[arg-type]
    ((pairs, settings, rehearsed),) = given
    assert pairs == ["pair"] * 5 and rehearsed == (["rap"] * 3 if rehearsal else [])
    assert (settings.seed, settings.rehearsal_weight) == (10 + iteration, rehearsal)
    assert story.used == [("use", f"adapter {iteration - 1}"), ("save", f"adapter {iteration}")]
    steps = 4 if rehearsal else 3  # of 8 or 5 items, 2 at a time
    assert story.stages == [(f"iteration-{iteration}/dpo", ("dpo",), steps, ("curation",))]


@pytest.mark.parametrize("iteration", [1, 2])
def test_a_round_s_search_and_curation_have_their_seeds(iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    story, given = Story(Config(seed=10)), []

    def search(stage: Any, policy: Any, samples: Any, seed: int, *more: Any) -> Any:
        given.append(("search", samples, seed, *more))
        return SimpleNamespace(rows=lambda: iter(()))

    def curated(samples: Any, candidates: Any, scores: Any, settings: Any, seed: int, fits: Any) -> Any:
        given.append(("curate", samples, candidates, scores, seed))
        return ["pair"], {"dropped": {}}

    def references(stage: Any, policy: Any, pairs: Any, samples: Any, candidates: Any, seed: int) -> Any:
        given.append(("references", pairs, candidates, seed))
        return pairs, SimpleNamespace(to_json=dict)

    story.artifacts.shards = lambda iteration, kind: Path("unused")
    story.artifacts.candidates = lambda iteration: SimpleNamespace(rest=lambda: iter(()), number=iteration)
    monkeypatch.setattr(calibrate, "search_candidates", search)
    monkeypatch.setattr(calibrate, "write_shards", lambda path, rows: None)
    monkeypatch.setattr(calibrate, "write_preferences", lambda run, iteration, pairs: None)
    monkeypatch.setattr(calibrate.curation, "curate", curated)
    monkeypatch.setattr(calibrate, "stage_references", references)
    calibrate.candidates(story, iteration)  # type: ignore[arg-type]
    calibrate.curate(story, iteration)  # type: ignore[arg-type]
    searched, curation, stated = given
    assert searched == ("search", [f"sample of {iteration}"], 10 + iteration)
    assert (curation[1], curation[2].number, curation[3], curation[4]) == (
        [f"sample of {iteration}"],
        iteration,
        f"scores {iteration}",
        10,
    )
    assert (stated[1], stated[2].number, stated[3]) == (["pair"], iteration, 10 + iteration)
    assert story.used == [("use", f"adapter {iteration - 1}")] * 2
    assert [(name, sections, total) for name, sections, total, _ in story.stages] == [
        (f"iteration-{iteration}/candidates", ("candidates",), 1),
        (f"iteration-{iteration}/preferences", ("curation",), 1),
    ]


def test_what_a_stage_has_finished_holds_for_the_weights_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    story, sets, seen = Story(Config(seed=10)), [], []
    for name in ("a", "b"):
        sets.append(SimpleNamespace(label=f"{name}-test", name=name, split="test", samples=["s"]))
    story.evaluation_sets, story.headroom_sets = sets, lambda: [(dataset, ["s"]) for dataset in sets]
    story.policy = SimpleNamespace(use=lambda adapter: "model", hash=lambda: "policy", features=None)
    story.load_scorer = lambda: (SimpleNamespace(calibration={}), lambda: "R-Scorer")
    for name in ("predictions", "shards", "aligned", "candidates", "candidates_in"):
        setattr(story.artifacts, name, lambda *_: [])

    def chunks(name: str = "", **depends_on: Any) -> Chunks:
        values = {key: value() for key, value in depends_on.items()}
        return Chunks(Path(name), lambda: values, StageProgress("x", 0, quiet=True))

    def run(*given: Any, **options: Any) -> Any:
        seen.extend((str(one.directory), dict(one.depends_on())) for one in given if isinstance(one, Chunks))
        return SimpleNamespace(rows=lambda: [], counts=Counter)

    def stage(name: str, sections: Any, total: int, work: Any, **options: Any) -> None:
        work(SimpleNamespace(config=story.config, checkpoint_dir=Path("pieces"), chunks=chunks))

    story.stage = stage  # type: ignore[method-assign]
    for name in ("answers_in_chunks", "scores_in_chunks", "search_candidates"):
        monkeypatch.setattr(calibrate, name, run)
    for name in ("write_evaluation", "write_shards", "measure_headroom"):
        monkeypatch.setattr(calibrate, name, lambda *_, **__: {})
    for name, work, expected in (
        (
            "evaluate",
            lambda: calibrate.evaluate(story, "base", None),
            [(n, {"policy": "policy"}) for n in ("a-test", "b-test")],
        ),
        ("score", lambda: calibrate.score(story, 1), [(".", {"scorer": "R-Scorer"})]),
        (
            "headroom",
            lambda: calibrate.headroom(story, 1),
            [(f"{n}-test-scores", {"scorer": "R-Scorer"}) for n in "ab"],
        ),
    ):
        seen.clear()
        work()
        assert seen == expected, name
