"""Draw samples of a family of pictures that show numbers: questions with balanced answers, true rationales, facts, files."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from srcfast.data.records import Sample
from srcfast.world.numbers import ARITHMETIC, Numbers, Program, answer_text, true_rationale
from srcfast.world.questions import Question
from srcfast.world.samples import draw_missing, drawn_sample

QUESTIONS = 3  # at most, about one picture
MEASURED = ARITHMETIC | {"value"}  # operations whose answers are numbers read from an axis


@dataclass(frozen=True)
class Picture:
    """What a picture shows, before it is drawn."""

    content: str  # pictures of the same content are the same
    numbers: Numbers
    about: dict[str, Any] = field(
        default_factory=dict
    )  # where the numbers come from and how they are drawn, for `extra`


@dataclass(frozen=True)
class Kind:
    """A kind of question: the ability that it tests, and all programs of the kind for a picture."""

    ability: str
    programs: Callable[[Numbers], list[Program]]


@dataclass(frozen=True)
class Family:
    """A family of pictures with their questions."""

    name: str
    pictures: Callable[[str, int], Iterator[Picture]]  # of a split and a seed, without end
    draw: Callable[[Picture, int], Image.Image]  # by a seed
    kinds: Callable[[str], dict[str, Kind]]  # of a split, by name
    question: Callable[[Picture, Program, int], str]  # in the wording 0 or 1
    tolerance: float = 0.0  # of an answer that is a number read or computed, as a share of it


def number_samples(
    family: Family, split: str, n: int, seed: int, *, image_dir: Path, with_rationale: bool = True
) -> list[Sample]:
    """Draw `n` samples of a split, the kinds of question in equal parts, with up to three questions a picture.

    Fewer samples are the first ones of more.

    Images are written to `image_dir` as those of the world are. `extra` has `numbers` and `program`, ability and kind, what is
    known about the picture, and the true rationale's sentences (`see`, `think`).

    Raises:
        InputError: the split is unknown, or a package's file is malformed.
        SrcfastError: a package that the family needs is not installed.
    """
    image_dir.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{family.name}/{split}/{seed}/questions")
    kinds = family.kinds(split)
    counts = dict.fromkeys(kinds, 0)
    samples: list[Sample] = []
    drawings: dict[str, Callable[[], Image.Image]] = {}
    for picture in family.pictures(split, seed):
        if len(samples) == n:
            break
        digest = hashlib.sha256(picture.content.encode()).hexdigest()
        image = f"{family.name}-{split}-{digest[:16]}.png"
        for kind, program in _ask(picture, kinds, counts, rng)[: n - len(samples)]:
            drawings[image] = partial(family.draw, picture, int(digest[16:28], 16))
            text = family.question(picture, program, rng.randrange(2))
            answer = str(answer_text(program, picture.numbers))
            question = Question(text, kinds[kind].ability, kind, program, answer)
            truth = {"numbers": picture.numbers.to_json(), **picture.about}
            if family.tolerance and program["op"] in MEASURED:
                truth["tolerance"] = family.tolerance
            rationale, facts = true_rationale(program, picture.numbers), picture.numbers.facts()
            sample = drawn_sample(
                family.name, split, seed, len(samples), question, rationale, facts, truth, (image,), image_dir
            )
            samples.append(sample if with_rationale else replace(sample, rationale=None))
    draw_missing(drawings, image_dir)
    return samples


def _ask(
    picture: Picture, kinds: dict[str, Kind], counts: dict[str, int], rng: random.Random
) -> list[tuple[str, Program]]:
    """Draw up to QUESTIONS programs of different kinds, the rarest kinds first; count them."""
    asked: list[tuple[str, Program]] = []
    for kind in sorted(kinds, key=lambda kind: (counts[kind], rng.random())):
        if len(asked) < QUESTIONS and (
            program := _draw_program(kinds[kind].programs(picture.numbers), picture.numbers, rng)
        ):
            asked.append((kind, program))
            counts[kind] += 1
    return asked


def _draw_program(programs: list[Program], numbers: Numbers, rng: random.Random) -> Program | None:
    """Draw one of the programs that have an answer, uniformly over the answers; None: none has."""
    by_answer: dict[str, list[Program]] = {}
    for program in programs:
        answer = answer_text(program, numbers)
        if answer is not None:
            by_answer.setdefault(answer, []).append(program)
    return rng.choice(rng.choice(list(by_answer.values()))) if by_answer else None
