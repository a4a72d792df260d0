"""The world and easy-VQA as data sets: files, ids, splits, facts, and rationales that the oracle confirms."""

import errno
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from srcfast.data.rationale_format import format_response, parse_response, tagged_rationale
from srcfast.data.rationale_pairs import build_raps
from srcfast.data.records import Sample
from srcfast.errors import InputError, SrcfastError
from srcfast.world.easy_vqa import read_easy_vqa
from srcfast.world.questions import ABILITIES
from srcfast.world.render import render
from srcfast.world.samples import world_samples
from srcfast.world.scenes import Scene, scene_digest
from srcfast.world.verification import verify_sample


def aligned(sample: Sample) -> bool:
    response = format_response(sample.extra["see"], sample.extra["think"], sample.answer, "tagged")
    judgement = verify_sample(sample, parse_response(response))
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


def in_processes(work: Callable[[], object], count: int) -> list[int | None]:
    """Do this in so many processes at once; their exit codes."""
    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]


def assert_drawn(samples: list[Sample], folder: Path, elsewhere: Path) -> None:
    """All images are in the folder, as they are drawn elsewhere, and nothing else is."""
    undisturbed = world_samples("train", len(samples), seed=3, image_dir=elsewhere)
    assert [sample.images for sample in samples] == [sample.images for sample in undisturbed]
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {path.name: path.read_bytes() for path in elsewhere.iterdir()}


def test_what_a_killed_process_has_half_drawn_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, replace = tmp_path / "images", os.replace

    def draw_and_die() -> None:
        def kill_at_the_fifth(source: Path, target: Path) -> None:
            if len([path for path in folder.iterdir() if path.suffix == ".png"]) == 4:
                os.truncate(source, 9)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        monkeypatch.setattr(os, "replace", kill_at_the_fifth)
        world_samples("train", 30, seed=3, image_dir=folder)

    assert in_processes(draw_and_die, 1) == [-signal.SIGKILL]
    assert len(list(folder.iterdir())) == 5
    assert_drawn(world_samples("train", 30, seed=3, image_dir=folder), folder, tmp_path / "other")


def test_a_picture_that_a_power_cut_has_cut_short_is_drawn_again(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    samples = world_samples("train", 12, seed=3, image_dir=folder)
    for number, file in enumerate(sorted(folder.iterdir())):
        os.truncate(file, (0, 3, file.stat().st_size - 1)[number % 3])
    assert_drawn(world_samples("train", len(samples), seed=3, image_dir=folder), folder, tmp_path / "other")


def test_processes_that_draw_into_one_folder_draw_each_picture_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, drawn = tmp_path / "images", tmp_path / "drawn.txt"

    def render_and_tell(scene: Scene, seed: int) -> Image.Image:
        with open(drawn, "a", encoding="utf-8") as file:
            file.write(f"{scene_digest(scene)}\n")
        return render(scene, seed)

    monkeypatch.setattr("srcfast.world.samples.render", render_and_tell)
    assert in_processes(lambda: world_samples("train", 120, seed=3, image_dir=folder), 4) == [0, 0, 0, 0]
    told = drawn.read_text(encoding="utf-8").splitlines()
    assert len(told) == len(set(told)) == len(list(folder.iterdir()))
    assert_drawn(world_samples("train", 120, seed=3, image_dir=folder), folder, tmp_path / "other")


@pytest.mark.parametrize("error", [errno.EBADF, errno.ENOLCK])
def test_without_locks_processes_draw_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", refuse)
    folder = tmp_path / "images"
    assert in_processes(lambda: world_samples("train", 60, seed=3, image_dir=folder), 3) == [0, 0, 0]
    assert_drawn(world_samples("train", 60, seed=3, image_dir=folder), folder, tmp_path / "other")


@pytest.mark.parametrize("locks", ["none", "of one machine"])
def test_what_another_machine_or_container_is_drawing_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str
) -> None:
    folder, replace, drawn = tmp_path / "images", os.replace, []

    def lock(*_: object) -> None:
        if locks == "none":
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def draw_meanwhile(source: Path, target: Path) -> None:
        if not drawn:  # by a process of this one's number, while this one's first picture has no name yet
            drawn.append(target)
            with monkeypatch.context() as patch:
                if locks != "none":
                    patch.setattr("srcfast.world.samples._machine", lambda: "another")
                world_samples("train", 30, seed=3, image_dir=folder)
        replace(source, target)

    monkeypatch.setattr("fcntl.flock", lock)
    monkeypatch.setattr(os, "replace", draw_meanwhile)
    samples = world_samples("train", 30, seed=3, image_dir=folder)
    assert drawn
    assert_drawn(samples, folder, tmp_path / "other")


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
    assert verify_sample(sample, parse_response("red")) is None


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
    from srcfast.world.easy_vqa import parse_question, read_easy_vqa

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
    from srcfast.world.easy_vqa import derive_scene

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
    from srcfast.world.easy_vqa import read_easy_vqa

    with pytest.raises(InputError, match="generalisation"):
        read_easy_vqa("generalisation")
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(SrcfastError, match="pip install easy-vqa"):
        read_easy_vqa("test")
