"""The embedded world as a data set: scenes rendered to files and asked about, with rationales and facts."""

from __future__ import annotations

import fcntl
import os
import random
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

from srcfast.data.jsonl import is_temporary, naming, remove_temporary, temporary_of
from srcfast.data.rationale_format import tagged_rationale
from srcfast.data.records import Sample
from srcfast.world.questions import ABILITIES, ask
from srcfast.world.rationales import facts, true_rationale
from srcfast.world.render import render
from srcfast.world.scenes import Scene, scene_digest, scene_stream

PNG_END = b"IEND\xaeB`\x82"  # the last chunk of any PNG file: its name and checksum


def world_samples(split: str, n: int, seed: int, *, image_dir: Path, with_rationale: bool = True) -> list[Sample]:
    """Draw `n` samples of a split, the abilities in equal parts, two to four questions a scene.

    Images go to `image_dir` under names made of split and scene, so that a picture is drawn once however
    often it is asked for; `image_dir` is the samples' image root. `extra` holds the scene, the program,
    ability and kind, and the true rationale's sentences (`see`, `think`), whether or not `rationale` gives
    them as text. Raises InputError for an unknown split.
    """
    image_dir.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{split}/{seed}/questions")
    asked = dict.fromkeys(ABILITIES, 0)
    samples: list[Sample] = []
    scenes: dict[str, Scene] = {}
    for scene in scene_stream(split, seed):
        if len(samples) == n:
            break
        wanted = min(rng.choice((2, 3, 4)), n - len(samples))
        behind = sorted(ABILITIES, key=lambda ability: (asked[ability], rng.random()))[:wanted]
        questions = ask(scene, rng, behind, wanted)
        image = f"{split}-{scene_digest(scene)[:16]}.png"
        if questions:
            scenes[image] = scene
        for question in questions:
            asked[question.ability] += 1
            see, think = true_rationale(scene, question)
            samples.append(
                Sample(
                    id=f"world-{split}-{seed}-{len(samples):06d}",
                    images=(image,),
                    question=question.text,
                    answer=question.answer,
                    rationale=tagged_rationale(see, think) if with_rationale else None,
                    facts=facts(scene),
                    extra={
                        "dataset": "world",
                        "split": split,
                        "ability": question.ability,
                        "kind": question.kind,
                        "program": question.program,
                        "scene": scene.to_json(),
                        "see": list(see),
                        "think": list(think),
                    },
                    image_root=image_dir,
                )
            )
    _draw(scenes, image_dir)
    return samples


def _draw(scenes: Mapping[str, Scene], image_dir: Path) -> None:
    """Render scenes into files of these names, but for those that are there whole.

    Processes that draw into one folder take turns, so that each finds what the one before has drawn, and removes what a killed
    one of this machine has left half-drawn: a lock may hold on one machine only. Those of another machine, and where the file
    system has no locks all, draw at the same time: files are renamed when they are whole.
    """
    missing = {name: scene for name, scene in scenes.items() if not _is_whole(image_dir / name)}
    if not missing:
        return
    machine = _machine()
    with _turn(image_dir) as alone:
        for path in list(image_dir.glob(".*.tmp")) if alone else ():
            if is_temporary(path) and f".{machine}." in path.name:
                remove_temporary(path)
        for name, scene in missing.items():
            if not _is_whole(image_dir / name):
                picture = render(scene, seed=int(scene_digest(scene)[16:28], 16))
                _save(picture, image_dir / name, machine)


def _save(picture: Image.Image, path: Path, machine: str) -> None:
    """First under a name that no other process has, though it be of another machine or container and have this one's number."""
    temporary = temporary_of(path.with_name(f"{path.name}.{machine}.{secrets.token_hex(4)}"))
    try:
        with naming(path):
            with open(temporary, "xb") as file:  # not flushed to the disk: one cut short is drawn again
                picture.save(file, format="PNG")
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _machine() -> str:
    """Names the kernel that runs, which is what a lock may be confined to; elsewhere than on Linux, the host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _is_whole(path: Path) -> bool:
    """Whether a PNG file is there to its last byte, which without a flush a power cut doesn't leave."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:  # none, or shorter than that
        return False


@contextmanager
def _turn(directory: Path) -> Iterator[bool]:
    """Wait until no other process is within the same directory's turn; gives whether there is such a lock."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        except OSError:  # over NFS for one a directory has none
            alone = False
        yield alone
    finally:
        os.close(handle)  # which ends the turn; so does the end of the process, however it ends
