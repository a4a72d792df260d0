"""The world and easy-VQA as data sets: files, ids, splits, facts, and rationales that the oracle confirms."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from srcfast.data.easy_vqa import read_easy_vqa
from srcfast.data.rationale_format import format_response, parse_response, tagged_rationale
from srcfast.data.records import Sample
from srcfast.errors import InputError, SrcfastError
from srcfast.stages.rationale import build_raps
from srcfast.world.oracle import judge_sample
from srcfast.world.questions import ABILITIES
from srcfast.world.samples import world_samples


def aligned(sample: Sample) -> bool:
    response = format_response(sample.extra["see"], sample.extra["think"], sample.answer, "tagged")
    judgement = judge_sample(sample, parse_response(response))
    return judgement is not None and judgement.aligned


def test_world_samples_are_complete_records(tmp_path: Path) -> None:
    samples = world_samples("test", 121, seed=5, image_dir=tmp_path)
    assert len({sample.id for sample in samples}) == 121
    assert samples[7].id == "world-test-5-000007"
    abilities = Counter(sample.extra["ability"] for sample in samples)
    assert set(abilities) == set(ABILITIES) and max(abilities.values()) - min(abilities.values()) <= 4
    for sample in samples:
        assert aligned(sample)
        assert sample.rationale == tagged_rationale(sample.extra["see"], sample.extra["think"])
        assert sample.facts and sample.image_root == tmp_path
        assert json.loads(json.dumps(sample.extra)) == sample.extra
        with Image.open(tmp_path / sample.images[0]) as image:
            assert image.size == (72, 72)
    images = {sample.images[0] for sample in samples}
    assert 121 / 4 <= len(images) <= 121 / 2 + 1
    assert {path.name for path in tmp_path.iterdir()} == images


def test_world_samples_are_repeatable_and_images_are_drawn_once(tmp_path: Path) -> None:
    first = world_samples("train", 30, seed=1, image_dir=tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = world_samples("train", 30, seed=1, image_dir=tmp_path, with_rationale=False)
    assert [(s.id, s.question, s.answer, s.images) for s in first] == [
        (s.id, s.question, s.answer, s.images) for s in again
    ]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    assert all(sample.rationale is None for sample in again)
    other = tmp_path / "other"
    world_samples("train", 30, seed=1, image_dir=other)
    for sample in first:
        assert (other / sample.images[0]).read_bytes() == (tmp_path / sample.images[0]).read_bytes()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5])
def test_as_many_world_samples_come_as_were_asked_for(n: int, tmp_path: Path) -> None:
    assert len(world_samples("generalisation", n, seed=n, image_dir=tmp_path)) == n


def test_the_tags_part_what_is_seen_from_what_is_concluded(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    samples = [*world_samples("train", 60, seed=2, image_dir=tmp_path), *read_easy_vqa("train", 60, seed=2)]
    samples = [sample for sample in samples if sample.rationale]
    raps, dropped = build_raps(samples)
    assert len(raps) == len(samples) > 100 and not dropped
    for sample, text in raps:
        parsed = parse_response(text)
        assert [*parsed.perception] == sample.extra["see"] and [*parsed.reasoning] == sample.extra["think"]


def test_a_sample_without_a_scene_is_not_judged(tmp_path: Path) -> None:
    sample = Sample("a", ("a.png",), "What?", "red", None, (), {}, tmp_path)
    assert judge_sample(sample, parse_response("red")) is None


# --- easy-VQA ---


def test_easy_vqa_rationales_agree_with_every_answer_of_the_package() -> None:
    pytest.importorskip("easy_vqa")
    samples = read_easy_vqa("test")
    assert len(samples) == 9673
    assert all("program" in sample.extra for sample in samples)
    assert all(aligned(sample) for sample in samples)
    shapes = [sample.extra["scene"]["objects"][0] for sample in samples]
    assert sum(o["shape"] is not None and o["color"] is not None for o in shapes) > 0.9 * len(samples)
    assert {sample.extra["ability"] for sample in samples} == {"fine_grained_perception", "logical_reasoning"}


def test_easy_vqa_questions_read_as_the_package_means_them() -> None:
    easy_vqa = pytest.importorskip("easy_vqa")
    from srcfast.data.easy_vqa import parse_question, read_easy_vqa

    assert parse_question("is there not a teal shape in the image?") == {
        "op": "none",
        "of": {"color": "teal"},
    }
    assert parse_question("what color is the shape?") == {"op": "query", "attribute": "color", "of": {}}
    assert parse_question("how many shapes are there?") is None
    texts, answers, images = easy_vqa.get_train_questions()
    limited = read_easy_vqa("train", limit=57, seed=3)
    assert [s.id for s in limited] == [s.id for s in read_easy_vqa("train", limit=57, seed=3)]
    assert [s.id for s in limited] != [s.id for s in read_easy_vqa("train", limit=57, seed=4)]
    for sample in limited:
        index = int(sample.id.rsplit("-", 1)[1])
        assert (sample.question, sample.answer) == (texts[index], answers[index])
        assert sample.images == (f"train/images/{images[index]}.png",)
        assert (sample.image_root / sample.images[0]).is_file()


def test_easy_vqa_facts_come_from_the_same_image_alone() -> None:
    from srcfast.data.easy_vqa import derive_scene

    red = {"color": "red"}
    known = derive_scene([({"op": "query", "attribute": "shape", "of": red}, "circle")])
    assert (known.objects[0].shape, known.objects[0].color) == ("circle", "red")
    absent = derive_scene([({"op": "none", "of": red}, "yes"), ({"op": "exists", "of": {"shape": "circle"}}, "no")])
    assert absent.objects[0].shape is None and {o.color or o.shape for o in absent.absent} == {
        "red",
        "circle",
    }
    both = [({"op": "exists", "of": {"shape": shape}}, "no") for shape in ("circle", "triangle")]
    assert derive_scene(both).objects[0].shape == "rectangle"  # the only one left
    assert derive_scene([({"op": "none", "of": red}, "no")]).objects[0].color == "red"


def test_easy_vqa_refuses_an_unknown_split_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from srcfast.data.easy_vqa import read_easy_vqa

    with pytest.raises(InputError, match="validation"):
        read_easy_vqa("validation")
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(SrcfastError, match="pip install easy-vqa"):
        read_easy_vqa("test")
