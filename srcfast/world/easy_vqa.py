"""Read easy-VQA (Victor Zhou, 2019): 5,000 images of one shape and 48,248 questions, from its installed package.

It has no rationales. An image's scene is derived from the package's questions about that image in the same
split, and rationales are built from that scene alone; so some rationales name a shape but no color.

The package has the splits `train` and `test`. `validation` has a tenth of the training images, chosen by a hash of
their files, and `fit` the others: to choose settings on one, train on the other, not on `train`. `-reworded` after the
name of a split asks its questions in the world's wordings, on which the embedded base was trained.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import regular
from srcfast.data.rationale_format import tagged_rationale
from srcfast.data.records import Sample
from srcfast.errors import InputError
from srcfast.world.packages import package_folder
from srcfast.world.programs import Program, matches
from srcfast.world.questions import noun, predicate, question_text, with_article
from srcfast.world.rationales import facts
from srcfast.world.scenes import COLORS, Object, Scene, check_split

FOLDERS = {"train": "train", "fit": "train", "validation": "train", "test": "test"}  # by split, the package's folder
REWORDED = "-reworded"
SPLITS = (*FOLDERS, *[split + REWORDED for split in FOLDERS])
_REINSTALL = "reinstall it: pip install --force-reinstall easy-vqa"
VALIDATION_SHARE = 10  # percent of the training images
SHAPES = ("circle", "rectangle", "triangle")

_COLOR, _SHAPE = f"(?P<color>{'|'.join(COLORS)})", f"(?P<shape>{'|'.join(SHAPES)})"
_WHAT = f"(?:{_COLOR} shape|{_SHAPE})"
# Patterns of questions, and their programs without `of`, which is what the pattern's groups match.
_QUESTIONS: tuple[tuple[str, Program], ...] = (
    (rf"is there an? {_WHAT}(?: in the image)?\?", {"op": "exists"}),
    (rf"does the image contain an? {_WHAT}\?", {"op": "exists"}),
    (rf"is an? {_WHAT} present\?", {"op": "exists"}),
    (rf"is there not an? {_WHAT}(?: in the image)?\?", {"op": "none"}),
    (rf"does the image not contain an? {_WHAT}\?", {"op": "none"}),
    (rf"is no {_WHAT} present\?", {"op": "none"}),
    (rf"what (?:color is|is the color of) the (?:{_SHAPE}|shape)\?", {"op": "query", "attribute": "color"}),
    (rf"what is the {_COLOR} shape\?", {"op": "query", "attribute": "shape"}),
    (r"what shape (?:is in the image|does the image contain|is present)\?", {"op": "query", "attribute": "shape"}),
)


def read_easy_vqa(split: str, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """Read a split, all of it or `limit` questions drawn by `seed`, the same ones reworded or not.

    Images are read from the package's data directory, which is `image_root`. Each sample has facts, a
    rationale in the grammar that the oracle parses, and in `extra` ability, program, scene (with `None` for
    unknown attributes), `see` and `think`.

    Raises:
        SrcfastError: the package is not installed.
        InputError: the split is unknown, or a file of the package is malformed or missing.
    """
    check_split(split, SPLITS)
    asked = split.removesuffix(REWORDED)
    folder = FOLDERS[asked]
    root = data_folder()
    file = root / folder / "questions.json"
    try:
        rows = json.loads(regular(file).read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not rows:
            raise ValueError("no list of questions")
        questions = [_parse_row(*row) for row in rows]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            file=file, expected="a JSON list of [question, answer, image number]", found=error, fix=_REINSTALL
        ) from error
    images = {image for _, _, image in questions}
    if asked != folder:
        images = {image for image in images if _is_validation(root / folder, image) == (asked == "validation")}
    programs = [parse_question(text) for text, _, _ in questions]
    answers_of: dict[int, list[tuple[Program, str]]] = {}  # by image
    for (_, answer, image), program in zip(questions, programs, strict=True):
        if program is not None:
            answers_of.setdefault(image, []).append((program, answer))
    scenes = {image: derive_scene(answers) for image, answers in answers_of.items()}
    chosen = [index for index, (_, _, image) in enumerate(questions) if image in images]
    if limit is not None and limit < len(chosen):
        chosen = sorted(random.Random(f"easy-vqa/{asked}/{seed}").sample(chosen, limit))
    return [_sample(split, index, questions[index], programs[index], scenes, root) for index in chosen]


def _parse_row(text: object, answer: object, image: object) -> tuple[str, str, int]:
    if not isinstance(text, str) or not text.strip() or not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"question {text!r} with answer {answer!r}")
    if type(image) is not int or not 0 <= image < 1 << 31:
        raise ValueError(f"image number {image!r} of question {text!r}")
    return text, answer, image


def _is_validation(folder: Path, image: int) -> bool:
    """Return whether a training image is in the split `validation`, a function of its file's content. Raises InputError."""
    file = folder / "images" / f"{image}.png"
    try:
        digest = hashlib.sha256(regular(file).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(file=file, expected="an image of the package", found=error, fix=_REINSTALL) from error
    return int(digest[:12], 16) % 100 < VALIDATION_SHARE


def data_folder() -> Path:
    """Return the data directory of the installed package. Raises SrcfastError if it is not installed."""
    return package_folder("easy_vqa", "easy-vqa", "easy_vqa") / "data"


def parse_question(text: str) -> Program | None:
    """Parse one of the package's questions into a program. Returns None for any other question.

    "shape" stands for any object in its questions ("is there a red shape?").
    """
    text = " ".join(text.lower().split())
    for pattern, program in _QUESTIONS:
        if match := re.fullmatch(pattern, text):
            return program | {"of": {name: value for name, value in match.groupdict().items() if value is not None}}
    return None


def derive_scene(answers: list[tuple[Program, str]]) -> Scene:
    """Derive the scene of an image, its one object and what is absent, from the answers about that image.

    An attribute is known from a question about it, from what another question presumes ("what is the blue
    shape?"), from a yes to its existence, or because every other value is ruled out.
    """
    known: dict[str, str] = {}
    ruled_out: dict[tuple[str, str], None] = {}
    for program, answer in answers:
        op = program["op"]
        if op == "query":
            known |= {**program["of"], program["attribute"]: answer}
        elif (op == "exists") == (answer == "yes"):
            known |= program["of"]
        else:
            [(name, value)] = program["of"].items()
            ruled_out[name, value] = None
    for name, values in (("shape", SHAPES), ("color", COLORS)):
        remaining = [value for value in values if (name, value) not in ruled_out]
        if name not in known and len(remaining) == 1:
            known[name] = remaining[0]
    absent = [Object(**{name: value}) for name, value in ruled_out if name not in known]
    return Scene((Object(**known),), None, tuple(absent))


def _sample(
    split: str,
    index: int,
    question: tuple[str, str, int],
    program: Program | None,
    scenes: dict[int, Scene],
    root: Path,
) -> Sample:
    text, answer, image = question
    if program is not None and split.endswith(REWORDED):
        text = reworded(program)
    extra: dict[str, Any] = {"dataset": "easy_vqa", "split": split, "ability": "fine_grained_perception"}
    known_facts: tuple[str, ...] = ()
    rationale = None
    if program is not None:
        scene = scenes[image]
        see, think = rationale_of(scene, program, answer)
        known_facts = facts(scene)
        rationale = tagged_rationale(see, think)
        if program["op"] == "none":
            extra["ability"] = "logical_reasoning"
        extra |= {"kind": program["op"], "program": program, "scene": scene.to_json()}
        extra |= {"see": list(see), "think": list(think)}
    return Sample(
        id=f"easy-vqa-{split}-{index:05d}",
        images=(f"{FOLDERS[split.removesuffix(REWORDED)]}/images/{image}.png",),
        question=text,
        answer=answer,
        rationale=rationale,
        facts=known_facts,
        extra=extra,
        image_root=root,
    )


def reworded(program: Program) -> str:
    """Write a question in the world's words; whether something is absent is asked as "Is there an object and no circle?"."""
    if program["op"] == "none":
        program = {"op": "and_not", "present": {}, "absent": program["of"]}
    return question_text(program)


def rationale_of(scene: Scene, program: Program, answer: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Build the sentences of what is seen (the object, as far as known) and of what follows for the question."""
    [o] = scene.objects
    see = (f"There is {with_article(noun(o))}.",)
    of = program["of"]
    if program["op"] == "query":
        return see, (f"The {noun(of)} is {predicate({program['attribute']: answer})}.",)
    if matches(o, of):
        return see, ()
    return see, (f"There is no {noun(of)}.",)
