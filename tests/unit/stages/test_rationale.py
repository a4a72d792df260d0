"""Rationale-answer pairs, and fine-tuning on them with images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.plain_training import raps, response_logprob
from helpers.small_model import END, IMAGE, TOKENS_PER_IMAGE, SmallModel, image_embedding
from PIL import Image

from srcfast.config.settings import TrainingConfig
from srcfast.data.forest import Forest
from srcfast.data.rationale_format import parse_response
from srcfast.data.rationale_pairs import TeacherRationale, build_raps, read_teacher, with_teacher
from srcfast.data.records import Sample
from srcfast.errors import InputError
from srcfast.stages.prompts import image_loader
from srcfast.stages.rationale import fine_tune_rationale, rationale_loss, rationale_trees, response_tokens
from srcfast.training.checkpoint import identity_of


def sample(name: str = "a", answer: str = "red", rationale: str | None = None, facts: tuple[str, ...] = (), **more):
    return Sample(
        id=name,
        images=more.get("images", ()),
        question="What colour is it?",
        answer=answer,
        rationale=rationale,
        facts=facts,
        extra={},
        image_root=more.get("root", Path(".")),
    )


@pytest.mark.parametrize("format", ["tagged", "plain"])
def test_facts_become_what_is_seen(format: str) -> None:
    (rap,), dropped = build_raps([sample(facts=("There is a cube", "It is red."))], format)
    parsed = parse_response(rap[1])
    assert parsed.perception + parsed.reasoning == ("There is a cube.", "It is red.")
    assert parsed.answer == "red" and not dropped
    assert (parsed.perception == ()) == (format == "plain")


@pytest.mark.parametrize(
    "rationale",
    [
        "<see> A cube is red. It is large. </see> <think> So red is right. </think> <answer> Red </answer>",
        "<see> A cube is red. It is large. </see> <think> So red is right. </think>",
        "A cube is red. It is large. So red is right. Answer: red.",
        "A cube is red. It is large. So red is right.",
    ],
)
def test_a_rationale_is_read_with_or_without_tags_and_answer(rationale: str) -> None:
    (rap,), dropped = build_raps([sample(rationale=rationale, facts=("Not this.",))])
    parsed = parse_response(rap[1])
    assert parsed.perception == ("A cube is red.", "It is large.")
    assert parsed.reasoning == ("So red is right.",)
    assert parsed.answer == "red" and not dropped


def test_a_teacher_s_entry_goes_before_the_sample_s_own() -> None:
    teacher = {"b": TeacherRationale("The ball shines. It is blue.", "blue")}
    samples = [sample("a", rationale="It is red."), sample("b", "Blue", rationale="It is red.")]
    raps, dropped = build_raps(samples, teacher=teacher)
    assert [parse_response(text).rationale for _, text in raps] == [
        "It is red.",
        "The ball shines. It is blue.",
    ]
    assert not dropped


def test_what_cannot_become_a_pair_is_counted_by_reason() -> None:
    teacher = {"other": TeacherRationale("It looks blue.", "blue")}
    samples = [
        sample("fine", "3", facts=("x",)),
        sample("empty", answer=" ", facts=("x",)),
        sample("bare"),
        sample("other", facts=("x",)),
        sample("own", rationale="It is blue. Answer: blue"),
        sample("broken", rationale="<see> It is red. <think> so </see>"),
        sample("number", "3", rationale="I count three. Answer: three"),
    ]
    raps, dropped = build_raps(samples, teacher=teacher)
    assert [one.id for one, _ in raps] == ["fine", "number"]
    assert dropped == {
        "no_answer": 1,
        "no_rationale_or_facts": 1,
        "answer_contradicts_rationale": 2,
        "unreadable_rationale": 1,
    }


def test_a_baseline_without_rationales_learns_the_answer_alone() -> None:
    answers = ["red", "3", "at the top left", "it is to the left of the red star", "a\nb"]
    samples = [sample(answer=answer) for answer in answers]
    raps, dropped = build_raps([*samples, sample(answer=" ")], "answer")
    assert [text for _, text in raps] == [
        "red",
        "3",
        "at the top left",
        "Answer: it is to the left of the red star",
        "a b",
    ]
    assert [parse_response(text).answer for _, text in raps] == [" ".join(answer.split()) for answer in answers]
    assert dropped == {"no_answer": 1}


def test_a_teacher_s_file_is_read_and_its_faults_are_placed(tmp_path: Path) -> None:
    path = tmp_path / "teacher.jsonl"
    rows = [{"id": "a", "rationale": "It is red.", "answer": "red"}, {"id": "b", "rationale": "It is blue."}]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert read_teacher(path) == {
        "a": TeacherRationale("It is red.", "red"),
        "b": TeacherRationale("It is blue."),
    }
    for bad, field in (({"id": "c"}, "rationale"), ({"id": "a", "rationale": "Again."}, "id")):
        path.write_text("\n".join(json.dumps(row) for row in [*rows, bad]), encoding="utf-8")
        with pytest.raises(InputError) as caught:
            read_teacher(path)
        assert (caught.value.file, caught.value.line, caught.value.field) == (str(path), 3, field)


def test_fine_tuning_with_images_lowers_the_loss(tmp_path: Path) -> None:
    model, raps = SmallModel(), []
    for number in range(6):
        Image.new("RGB", (5, 4), (40 * number, 0, 0)).save(tmp_path / f"{number % 3}.png")
        one = sample(str(number), facts=(f"Fact {number}",), images=(f"{number % 3}.png",), root=tmp_path)
        raps += build_raps([one])[0]
    items = rationale_trees(model, raps)
    for item, (_, response) in zip(items, raps, strict=True):
        prompt, answer = item.tree.segments
        assert (prompt.tokens == IMAGE).sum() == TOKENS_PER_IMAGE
        assert len(answer.tokens) == len(response) + 1 and answer.tokens[-1] == END
    load = image_loader([one for one, _ in raps])

    def features(keys: list[str]) -> dict:
        assert all(load(key).size == (5, 4) for key in keys)
        return {key: image_embedding(key) for key in keys}

    settings = TrainingConfig(
        epochs=15,
        micro_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=0.005,
        token_budget=8192,
        activation_checkpointing=0,
    )
    history = fine_tune_rationale(model, raps, settings, features=features)
    assert len(history) == 15 and history[-1]["loss"] < 0.85 * history[0]["loss"]


def test_a_training_s_images_are_known_by_name_and_contents_wherever_they_lie(tmp_path: Path) -> None:
    def identity(folder: Path, name: str = "a.png", id: str = "1", facts: tuple[str, ...] = ("It is red",)) -> str:
        raps, _ = build_raps([sample(id, facts=facts, images=(name,), root=folder)])
        items = rationale_trees(SmallModel(), raps)
        return identity_of({}, {}, items, torch.zeros(3))["items"]

    for folder, color in (("one", 1), ("two", 1), ("three", 2)):
        (tmp_path / folder).mkdir()
        for name in ("a.png", "b.png"):
            Image.new("RGB", (5, 4), (color, 0, 0)).save(tmp_path / folder / name)
    first = identity(tmp_path / "one")
    assert identity(tmp_path / "two") == first
    assert identity(tmp_path / "three") != first  # other contents under the same name
    assert identity(tmp_path / "one", name="b.png") != first  # the same contents under another name
    assert identity(tmp_path / "one", id="2") != first
    assert identity(tmp_path / "one", facts=("It is blue",)) != first


def test_forests_of_a_batch_add_up_to_the_mean_over_all_its_tokens() -> None:
    """The mean of means would weigh the tokens of a short response more."""
    model, rows = SmallModel(seed=1), raps(5, seed=6)
    items = rationale_trees(model, rows)
    total = response_tokens(items)
    losses, counted, greatest = [], 0.0, []
    for part in (items[:1], items[1:]):
        forest = Forest.of([item.tree for item in part])
        loss, metrics = rationale_loss(model(forest), forest, model.decoder.head, part, total)
        losses.append(loss.item())
        counted += metrics["response_tokens"].item()
        greatest.append(metrics["max_logprob"].item())
    found = [response_logprob(model, sample.question, response) for sample, response in rows]
    assert total == counted == sum(tokens for _, tokens in found)
    assert len({tokens for _, tokens in found}) > 1
    assert sum(losses) == pytest.approx(-sum(logprob.item() for logprob, _ in found) / total, rel=1e-10)
    assert max(greatest) < 0.0


def test_a_teacher_s_entry_is_taken_unless_it_contradicts_the_answer() -> None:
    samples = [Sample(str(n), (), "Which?", "red", rationale="Own.") for n in range(4)]
    entries = {
        "0": TeacherRationale("It is red.", "Red."),
        "1": TeacherRationale("It is blue.", "blue"),
        "2": TeacherRationale("It is red."),
    }
    assert [sample.rationale for sample in with_teacher(samples, entries)] == [
        "It is red.",
        "Own.",
        "It is red.",
        "Own.",
    ]
