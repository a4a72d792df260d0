"""Draw samples of the embedded world: rendered scenes and clips with questions, answers, rationales and facts."""

from __future__ import annotations

import fcntl
import os
import random
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from srcfast.data.jsonl import is_temporary, remove_temporary, replacing, temporary_of
from srcfast.data.rationale_format import tagged_rationale
from srcfast.data.records import Sample
from srcfast.world.clip_questions import KINDS as CLIP_KINDS
from srcfast.world.clip_questions import ask_clip, clip_facts, clip_rationale
from srcfast.world.clips import FRAMES, clip_digest, clip_stream
from srcfast.world.other_pictures import LEVELS, Degradation, degrade, render_otherwise
from srcfast.world.questions import KINDS, NEW_KINDS, Question, ask
from srcfast.world.rationales import facts, true_rationale
from srcfast.world.render import render, render_frame
from srcfast.world.scenes import SPLITS, Scene, check_split, scene_digest, scene_stream

PNG_END = b"IEND\xaeB`\x82"  # name and checksum of the last chunk, the same in every PNG file


# Splits that draw the test split's scenes and questions again as blurred, covered or noisy pictures, and the two that ask
# other kinds of questions about these scenes, and draw them by another renderer.
DEGRADED = {f"test-{kind}-{level}": (kind, level) for kind in get_args(Degradation) for level in LEVELS}
TEST_VARIANTS = ("new_questions", "new_renderer", *DEGRADED)


def world_samples(split: str, n: int, seed: int, *, image_dir: Path, with_rationale: bool = True) -> list[Sample]:
    """Draw `n` samples of a split, the abilities in equal parts, with up to four questions a scene.

    Images are written to `image_dir`, which is the samples' image root, under names of split and scene, so
    that an image is rendered once for all its samples and runs. `extra` has the scene, program, ability and
    kind, and the true rationale's sentences (`see`, `think`) whether or not `rationale` has them as text.
    The splits of TEST_VARIANTS have the scenes of the split `test`; all but `new_questions` have its questions, too, so that
    with one seed their samples are pairs. Raises InputError for an unknown split.
    """
    image_dir.mkdir(parents=True, exist_ok=True)
    check_split(split, (*SPLITS, *TEST_VARIANTS))
    scenes_of = "test" if split in TEST_VARIANTS else split
    asked_as = split if split == "new_questions" else scenes_of
    kinds = NEW_KINDS if split == "new_questions" else KINDS
    rng = random.Random(f"{asked_as}/{seed}/questions")
    counts = dict.fromkeys(kinds, 0)
    samples: list[Sample] = []
    drawings: dict[str, Callable[[], Image.Image]] = {}
    for scene in scene_stream(scenes_of, seed):
        if len(samples) == n:
            break
        count = min(rng.choice((2, 3, 4)), n - len(samples))
        rarest = sorted(counts, key=lambda ability: (counts[ability], rng.random()))[:count]
        questions = ask(scene, rng, rarest, count, kinds)
        image = f"{split}-{scene_digest(scene)[:16]}.png"
        if questions:
            drawings[image] = partial(_picture, split, scene)
        for question in questions:
            counts[question.ability] += 1
            truth = {"scene": scene.to_json()}
            rationale = true_rationale(scene, question)
            sample = drawn_sample(
                "world", split, seed, len(samples), question, rationale, facts(scene), truth, (image,), image_dir
            )
            samples.append(sample if with_rationale else replace(sample, rationale=None))
    draw_missing(drawings, image_dir)
    return samples


def _picture(split: str, scene: Scene) -> Image.Image:
    """Draw a scene as a split shows it."""
    seed = int(scene_digest(scene)[16:28], 16)
    if split == "new_renderer":
        return render_otherwise(scene, seed)
    picture = render(scene, seed)
    return degrade(picture, *DEGRADED[split], seed) if split in DEGRADED else picture


def clip_samples(split: str, n: int, seed: int, *, image_dir: Path) -> list[Sample]:
    """Draw `n` samples of a split of the clips, the kinds of questions in equal parts, with up to four questions a clip.

    A sample has its clip's frames as images, in order. `extra` has the clip as a list of frames, and what those of
    `world_samples` have. Raises InputError for an unknown split.
    """
    image_dir.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"clips/{split}/{seed}/questions")
    counts = dict.fromkeys(CLIP_KINDS, 0)
    samples: list[Sample] = []
    drawings: dict[str, Callable[[], Image.Image]] = {}
    for clip in clip_stream(split, seed):
        if len(samples) == n:
            break
        rarest = sorted(counts, key=lambda kind: (counts[kind], rng.random()))
        questions = ask_clip(clip, rng, rarest, min(rng.choice((2, 3, 4)), n - len(samples)))
        digest = clip_digest(clip)
        images = tuple([f"clips-{split}-{digest[:16]}-{number}.png" for number in range(1, FRAMES + 1)])
        for image, frame in zip(images, clip, strict=True):
            drawings[image] = partial(render_frame, frame, int(digest[16:28], 16))
        for question in questions:
            counts[question.kind] += 1
            truth = {"clip": [frame.to_json() for frame in clip]}
            rationale = clip_rationale(clip, question)
            samples.append(
                drawn_sample(
                    "clips", split, seed, len(samples), question, rationale, clip_facts(clip), truth, images, image_dir
                )
            )
    draw_missing(drawings, image_dir)
    return samples


def drawn_sample(
    family: str,
    split: str,
    seed: int,
    number: int,
    question: Question,
    rationale: tuple[Sequence[str], Sequence[str]],
    facts: tuple[str, ...],
    truth: Mapping[str, Any],
    images: tuple[str, ...],
    image_dir: Path,
) -> Sample:
    """Build a sample of a family of drawn pictures.

    Args:
        family: of the pictures, which with split, seed and number names the sample.
        split, seed: of the draw.
        number: of the sample in it, from 0.
        question: with its answer and program.
        rationale: the true sentences of what is seen, and of what is concluded.
        facts: about the images.
        truth: about the images, by which an oracle verifies responses; keys of `extra`.
        images: files' names in `image_dir`, the image root.
    """
    see, think = rationale
    return Sample(
        id=f"{family}-{split}-{seed}-{number:06d}",
        images=images,
        question=question.text,
        answer=question.answer,
        rationale=tagged_rationale(see, think),
        facts=facts,
        extra={
            "dataset": family,
            "split": split,
            "ability": question.ability,
            "kind": question.kind,
            "program": question.program,
            **truth,
            "see": list(see),
            "think": list(think),
        },
        image_root=image_dir,
    )


def draw_missing(drawings: Mapping[str, Callable[[], Image.Image]], image_dir: Path) -> None:
    """Draw images into PNG files of these names, except files that are complete already.

    A lock on the directory serialises the processes of this machine: each one skips the files that others have written, and
    removes temporary files that a killed process of this machine has left. Processes of other machines, and all of them on a
    file system without locks, may write at the same time, so files are written under other names and renamed when complete.
    """
    missing = {name: draw for name, draw in drawings.items() if not _is_complete(image_dir / name)}
    if not missing:
        return
    machine = _machine()
    with _lock(image_dir) as locked:
        for path in list(image_dir.glob(".*.tmp")) if locked else ():
            if is_temporary(path) and f".{machine}." in path.name:
                remove_temporary(path)
        for name, draw in missing.items():
            if not _is_complete(image_dir / name):  # another process may have written it meanwhile
                _save(draw(), image_dir / name, machine)


def _save(picture: Image.Image, path: Path, machine: str) -> None:
    """Write an image under a temporary name, then rename it.

    The random part of the name separates processes of other machines and containers that have the same process id.
    """
    temporary = temporary_of(path.with_name(f"{path.name}.{machine}.{secrets.token_hex(4)}"))
    with replacing(path, durable=False, temporary=temporary) as file:  # an incomplete file is rendered again
        picture.save(file, format="PNG")


def _machine() -> str:
    """Return the id of the running kernel, beyond which a lock may not hold; on other systems than Linux the host's name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _is_complete(path: Path) -> bool:
    """Return whether a PNG file exists and ends as one must; after a power failure a file without fsync may not."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # no such file, or a shorter one
        return False


@contextmanager
def _lock(directory: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a directory; yield False if the file system has no locks."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        except OSError:  # over NFS, for example, a directory can't be locked
            locked = False
        yield locked
    finally:
        os.close(handle)  # releases the lock, as the end of the process does
