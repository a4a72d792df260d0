"""Charts of real tables: what the tables say, how rows are split, literal first samples, pictures, missing packages."""

from __future__ import annotations

import hashlib
import random
from fractions import Fraction
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srcfast.errors import InputError, SrcfastError
from srcfast.world.chart_tables import TABLES, read_table, series_of, split_of
from srcfast.world.charts import CHARTS
from srcfast.world.number_samples import Picture, number_samples
from srcfast.world.numbers import Numbers
from srcfast.world.scenes import SPLITS

missing = [package for package in ("statsmodels", "vega_datasets") if find_spec(package) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {missing}")

HELD_OUT = {"grunfeld", "wheat", "barley"}


@pytest.mark.parametrize(
    ("table", "unit", "category", "value"),
    [
        ("statecrime", "murders per 100,000 people", "Alaska", "3.2"),
        ("statecrime", "percent of people who live in cities", "Arizona", "80.07"),
        ("fertility", "births per woman in 1960", "Aruba", "4.82"),
        ("elnino", "degrees Celsius in the Pacific Ocean in 1951", "March", "25.600"),
        ("sunspots", "sunspots", "1702", "16"),
        ("nile", "cubic meters of water in the Nile", "1873", "96300000000"),
        ("macrodata", "percent of unemployed people", "1959 Q3", "5.3"),
        ("grunfeld", "dollars of investment in 1937", "General Motors", "410600000"),
        ("wheat", "shillings for a quarter of wheat", "1585", "41.5"),
        ("wheat", "shillings of weekly wages", "1810", "30"),
        ("barley", "bushels per acre of Manchuria barley in 1931", "Waseca", "48.86667"),
    ],
)
def test_the_values_are_those_of_the_packages_files(table: str, unit: str, category: str, value: str) -> None:
    rows = [series_of(table, split).get(unit, ()) for split in SPLITS]
    assert [number for row in rows for name, number in row if name == category] == [Fraction(value)]


def test_a_row_is_in_one_split_and_held_out_tables_in_generalisation_alone() -> None:
    assert {name for name, table in TABLES.items() if table.is_held_out} == HELD_OUT
    uppers = (("base", 48), ("train", 72), ("scorer", 82), ("validation", 90), ("test", 100))
    for name in TABLES:
        for row in {point.row for point in read_table(name)}:
            percent = int(hashlib.sha256(f"{name}/{row}".encode()).hexdigest()[:12], 16) % 100
            expected = next(split for split, upper in uppers if percent < upper)
            assert split_of(name, row) == ("generalisation" if name in HELD_OUT else expected)
        for split in SPLITS:
            assert bool(series_of(name, split)) == ((split == "generalisation") == (name in HELD_OUT))


def test_no_two_splits_have_a_value_of_one_row(tmp_path: Path) -> None:
    """Of tables in which a bar is a row, no category of a split occurs in another one's charts."""
    shown: dict[str, dict[str, set[str]]] = {}
    for split in SPLITS:
        for picture in islice(CHARTS.pictures(split, 0), 400):
            names = set(picture.numbers.categories.values())
            shown.setdefault(picture.about["table"], {}).setdefault(split, set()).update(names)
    assert set(shown) == set(TABLES)
    for table in ("statecrime", "fertility", "sunspots", "nile", "macrodata"):
        splits = list(shown[table].values())
        assert len(splits) == 5 and sum(map(len, splits)) == len(set().union(*splits))
    assert all(set(shown[table]) == {"generalisation"} for table in HELD_OUT)


def test_a_chart_shows_the_table_s_values_in_the_power_of_ten_that_it_names() -> None:
    powers = {"": 0, "tens of ": 1, "hundreds of ": 2, "thousands of ": 3, "tens of thousands of ": 4}
    powers |= {"hundreds of thousands of ": 5, "millions of ": 6, "tens of millions of ": 7}
    powers |= {"hundreds of millions of ": 8, "billions of ": 9, "tens of billions of ": 10}
    used = set()
    for split in SPLITS:
        for picture in islice(CHARTS.pictures(split, 1), 200):
            series = series_of(picture.about["table"], split)
            unit = max((unit for unit in series if picture.about["unit"].endswith(unit)), key=len)
            power = powers[picture.about["unit"].removesuffix(unit)]
            numbers = picture.numbers
            used.add((power, int(numbers.axis or 0)))
            assert 3 <= len(numbers.values) <= 5 and list(numbers.values) == list("ABCDE")[: len(numbers.values)]
            assert max(numbers.values.values()) <= numbers.axis and numbers.axis in (10, 20, 50, 100)
            for letter, value in numbers.values.items():
                real = dict(series[unit])[numbers.categories[letter]] / 10**power
                assert abs(real - value) <= Fraction(1, 20 if numbers.axis == 10 else 2)
                assert value * (10 if numbers.axis == 10 else 1) % 1 == 0
    assert {axis for _, axis in used} == {10, 20, 50, 100} and {power for power, _ in used} >= {0, 1, 2, 7, 8, 10}


def test_charts_of_one_content_are_the_same_whatever_seed_draws_them() -> None:
    """Their file is drawn once for all seeds."""
    contents: dict[str, tuple[Numbers, dict[str, Any]]] = {}
    repeated = 0
    for seed in range(6):
        for picture in islice(CHARTS.pictures("validation", seed), 400):
            shown = (picture.numbers, picture.about)
            repeated += picture.content in contents
            assert contents.setdefault(picture.content, shown) == shown
    assert repeated > 20


def test_numbers_that_are_compared_differ_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srcfast.world.number_samples.draw_missing", lambda *_: None)
    checked = set()
    for sample in number_samples(CHARTS, "train", 700, random.randrange(10**6), image_dir=tmp_path):
        numbers, program = Numbers.from_json(sample.extra["numbers"]), sample.extra["program"]
        values = sorted(numbers.values.values())
        gap = {
            "where": lambda v=values: v[-1] - v[-2] if program["which"] == "largest" else v[1] - v[0],  # noqa: B023
            "count": lambda v=values: min(abs(value - program["than"]) for value in v),  # noqa: B023
            "larger": lambda: abs(numbers.values[program["of"][0]] - numbers.values[program["of"][1]]),  # noqa: B023
        }
        if program["op"] in gap:
            checked.add(program["op"])
            assert gap[program["op"]]() >= numbers.axis / 20
    assert checked == {"where", "count", "larger"}


def test_the_first_samples_are_literal_ones(tmp_path: Path) -> None:
    samples = number_samples(CHARTS, "test", 4, 3, image_dir=tmp_path)
    countries = (
        "A stands for Iceland, B stands for Slovak Republic, C stands for Zimbabwe, D stands for United Kingdom, "
        "E stands for Sierra Leone. Values are in births per woman in 1990."
    )
    difference = "What is the difference between the values for United Kingdom and Zimbabwe?"
    years = (
        "A stands for 1739, B stands for 1796, C stands for 1815, D stands for 1849, E stands for 1998. "
        "Values are in tens of sunspots."
    )
    assert [(s.id, s.question, s.answer) for s in samples] == [
        ("charts-test-3-000000", f"{countries} Is the value for Slovak Republic higher than that for Zimbabwe?", "no"),
        ("charts-test-3-000001", f"{countries} {difference}", "3.4"),
        (
            "charts-test-3-000002",
            f"{countries} What do the values for United Kingdom and Slovak Republic add up to?",
            "3.9",
        ),
        ("charts-test-3-000003", f"{years} How high is the value of 1739?", "10"),
    ]
    assert samples[1].rationale == (
        "<see> D is 1.8. C is 5.2. </see> <think> D stands for United Kingdom. C stands for Zimbabwe. "
        "5.2 minus 1.8 is 3.4. </think>"
    )
    assert samples[0].facts == ("A is 2.3.", "B is 2.1.", "C is 5.2.", "D is 1.8.", "E is 6.5.")
    assert samples[3].images == ("charts-test-41598f0a6cf50158.png",)


@pytest.mark.parametrize(
    ("program", "wordings"),
    [
        ({"op": "value", "of": ["B"]}, ("What is the value for Chile?", "How high is the value of Chile?")),
        (
            {"op": "sum", "of": ["A", "B"]},
            ("What is the sum of the values for Peru and Chile?", "What do the values for Peru and Chile add up to?"),
        ),
        ({"op": "average"}, ("What is the average of all values?", "What is the mean of all values?")),
        (
            {"op": "where", "which": "smallest"},
            ("Which has the lowest value?", "For which is the value lowest?"),
        ),
        (
            {"op": "larger", "of": ["A", "B"]},
            ("Is the value for Peru higher than that for Chile?", "Is the value for Chile lower than that for Peru?"),
        ),
        (
            {"op": "count", "test": "smaller", "than": 30},
            ("How many values are below 30?", "What is the number of values below 30?"),
        ),
    ],
)
def test_questions_are_worded_in_english(program: dict[str, Any], wordings: tuple[str, str]) -> None:
    numbers = Numbers({"A": Fraction(3), "B": Fraction(4)}, {"A": "Peru", "B": "Chile"}, Fraction(10))
    picture = Picture("", numbers, {"unit": "tens of llamas"})
    before = "A stands for Peru, B stands for Chile. Values are in tens of llamas. "
    assert tuple(CHARTS.question(picture, program, wording) for wording in (0, 1)) == tuple(
        before + w for w in wordings
    )


def chart(values: list[float], axis: int, shape: str) -> np.ndarray:
    """Pixels of a chart in which all that is red is bar or line."""
    letters = "ABCDE"[: len(values)]
    numbers = Numbers({k: Fraction(str(v)) for k, v in zip(letters, values, strict=True)}, {}, Fraction(axis))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srcfast.world.charts.COLORS", ("#ff0000",))
        picture = CHARTS.draw(Picture("", numbers, {"shape": shape}), random.randrange(2**40))
    assert picture.size == (144, 144) and picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def red(pixels: np.ndarray) -> np.ndarray:
    return (pixels[..., 0] > 200) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)


@pytest.mark.parametrize("axis", [10, 20, 50, 100])
def test_bars_are_as_high_as_their_values(axis: int) -> None:
    """0 is drawn at 87 % of the height from the top, the axis' end at 5 %: 118 pixels apart, each within one."""
    values = [axis * share for share in (0.25, 1.0, 0.5, 0.05)]
    pixels = red(chart(values, axis, "bars"))
    columns = np.flatnonzero(pixels[124])  # just above the axis
    bars = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    assert len(bars) == 4
    for bar, value in zip(bars, values, strict=True):
        height = pixels[:, bar[len(bar) // 2]].sum()
        assert abs(height - 118 * value / axis) <= 1.5


def test_a_line_has_its_points_where_the_values_are() -> None:
    pixels = red(chart([10, 40, 25], 50, "line"))
    for position, value in ((0, 10), (1, 40), (2, 25)):
        x = 0.18 * 144 + 0.79 * 144 * (position + 0.6) / 3.2
        rows = np.flatnonzero(pixels[:, round(x - 0.5)])
        y = 144 * (0.05 + 0.82 * (1 - value / 50))
        assert len(rows) >= 3 and abs(rows.mean() + 0.5 - y) <= 1


def test_the_axis_s_numbers_and_letters_are_drawn_and_nothing_else_changes_with_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import matplotlib

    random.seed(5)
    before = chart([3, 4, 5], 10, "bars")
    random.seed(5)
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "xtick.color": "red", "figure.dpi": 40}):
        again = chart([3, 4, 5], 10, "bars")
        assert matplotlib.rcParams["font.size"] == 30  # a user's settings are as they were
    assert (before == again).all()
    dark = before.max(-1) < 120
    assert dark[:, :24].sum() > 60 and dark[128:, 26:].sum() > 30  # numbers beside the axis, letters below it
    random.seed(5)
    other_axis = chart([6, 8, 10], 20, "bars")  # the same heights under other numbers
    assert (other_axis[:, 26:] == before[:, 26:]).all() and (other_axis[:, :26] != before[:, :26]).any()


@pytest.mark.parametrize("split", ["tset", "", "held_out"])
def test_an_unknown_split_is_an_error(split: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="split.*one of base, train, scorer, validation, test, generalisation"):
        number_samples(CHARTS, split, 3, 0, image_dir=tmp_path)


@pytest.mark.parametrize(("table", "package"), [("nile", "statsmodels"), ("wheat", "vega_datasets")])
def test_without_a_package_the_error_says_what_to_install(
    table: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        SrcfastError, match=f"the data set charts needs the package {package}. Fix: pip install {package}"
    ):
        read_table.__wrapped__(table)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(
        SrcfastError, match="the data set charts needs the package matplotlib. Fix: pip install matplotlib"
    ):
        chart([1, 2, 3], 10, "bars")


def test_names_that_a_sentence_can_not_hold_are_left_out() -> None:
    names = {point.category for point in read_table("fertility")}
    assert "Norway" in names and "Cote d'Ivoire" in names and len(names) > 150
    assert not names & {"Egypt, Arab Rep.", "St. Lucia", "Bahamas, The"}
