"""How often an answer is right that is guessed from the question alone; docs/data.md has these shares."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from srcfast.data.answers import is_right
from srcfast.data.records import Sample
from srcfast.world.charts import CHARTS
from srcfast.world.digits import DIGITS
from srcfast.world.number_samples import Family, number_samples

ROOT = Path(__file__).parents[3]
Group = Callable[[Sample], tuple[object, ...]]


def by_kind(sample: Sample) -> tuple[object, ...]:
    return (sample.extra["kind"],)


def by_wording(sample: Sample) -> tuple[object, ...]:
    """The kind, the bound and the extreme that the question names, and the table that its unit tells."""
    program = sample.extra["program"]
    return (
        sample.extra["kind"],
        program.get("test"),
        program.get("than"),
        program.get("which"),
        sample.extra.get("table"),
    )


def guesses(sample: Sample) -> Iterator[str]:
    """What could be guessed: an answer as it is or, in a chart, what a letter stands for."""
    yield sample.answer
    for letter, category in sample.extra["numbers"].get("categories", {}).items():
        if category == sample.answer:
            yield f"letter {letter}"


def share_right(train: list[Sample], test: list[Sample], group: Group) -> float:
    """The percentage of test samples that are answered as is right most often in the group's training samples."""
    answers: dict[tuple[object, ...], Counter[str]] = defaultdict(Counter)
    for sample in train:
        answers[group(sample)].update(guesses(sample))
    right = 0
    for sample in test:
        [(guess, _)] = answers[group(sample)].most_common(1) or [("", 0)]
        category = sample.extra["numbers"].get("categories", {}).get(guess.removeprefix("letter "))
        right += is_right(sample, category if guess.startswith("letter ") else guess)
    return 100 * right / len(test)


@pytest.mark.parametrize(
    ("family", "package"), [(DIGITS, "sklearn"), (CHARTS, "statsmodels")], ids=["digits", "charts"]
)
def test_blind_guesses_are_right_as_often_as_the_docs_say(
    family: Family, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    monkeypatch.setattr("srcfast.world.number_samples.draw_missing", lambda *_: None)
    train, test = (number_samples(family, split, 4000, 0, image_dir=tmp_path) for split in ("train", "test"))
    kind, wording = (share_right(train, test, group) for group in (by_kind, by_wording))
    row = f"| {family.name} | {kind:.1f} | {wording:.1f} |"
    assert row in (ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines(), row
