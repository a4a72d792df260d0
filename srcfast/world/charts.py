"""Charts of real tables: three to five bars or points, with questions as in ChartQA (Masry et al., 2022).

A chart's numbers are the table's, in a power of ten that the question states, rounded to what can be read off: tenths on an axis
to 10, whole numbers on the others. Bars are labelled A to E; the question says what they stand for. So one has to read letters,
bars and an axis, and no long names. Numbers that a question compares are at least a twentieth of the axis apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from itertools import permutations
from typing import Any

from PIL import Image

from srcfast.errors import SrcfastError
from srcfast.world.chart_tables import TABLES, series_of
from srcfast.world.number_samples import Family, Kind, Picture
from srcfast.world.numbers import LETTERS, Numbers, Program
from srcfast.world.scenes import check_split

IMAGE_SIZE = 144  # pixels
AXES = (10, 20, 50, 100)
SHAPES = ("bars", "line")
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#555555")
_SCALES = {
    0: "",
    1: "tens of ",
    2: "hundreds of ",
    3: "thousands of ",
    4: "tens of thousands of ",
    5: "hundreds of thousands of ",
    6: "millions of ",
    7: "tens of millions of ",
    8: "hundreds of millions of ",
    9: "billions of ",
    10: "tens of billions of ",
}
_AS_THEY_ARE = ("percent", "degrees", "births", "shillings", "bushels")  # units that are not counted in powers of ten


def _pictures(split: str, seed: int) -> Iterator[Picture]:
    """Yield distinct charts of a split, without end; each table that has rows in it is as frequent as the others."""
    check_split(split)
    rng = random.Random(f"charts/{split}/{seed}")
    tables = [name for name in TABLES if series_of(name, split)]
    drawn: set[str] = set()
    while True:
        picture = _draw_chart(rng.choice(tables), split, rng)
        if picture is not None and picture.content not in drawn:
            drawn.add(picture.content)
            yield picture


def _draw_chart(name: str, split: str, rng: random.Random) -> Picture | None:
    """Draw three to five values of a table, and how they are shown; None: their axis is none of AXES."""
    table, series = TABLES[name], series_of(name, split)
    unit = rng.choice(list(series))
    points = series[unit]
    indices = rng.sample(range(len(points)), min(rng.randint(3, 5), len(points)))
    if table.is_ordered:
        indices.sort()
    shape = rng.choice(SHAPES) if table.is_ordered else "bars"
    largest = max(points[index][1] for index in indices)
    scales = (0,) if unit.startswith(_AS_THEY_ARE) else tuple(_SCALES)
    fitting = [(k, axis) for k in scales for axis in AXES if axis * Fraction(2, 5) < largest / 10**k <= axis]
    if not fitting:
        return None
    scale, axis = rng.choice(fitting)
    digits = 1 if axis == 10 else 0
    chosen = {LETTERS[bar]: points[index] for bar, index in enumerate(indices)}
    values = {letter: round(value / 10**scale, digits) for letter, (_, value) in chosen.items()}
    categories = {letter: category for letter, (category, _) in chosen.items()}
    about = {"table": name, "unit": _SCALES[scale] + unit, "shape": shape}
    content = f"{name}/{unit}/{scale}/{axis}/{shape}/{indices}"
    return Picture(content, Numbers(values, categories, Fraction(axis)), about)


def _draw(picture: Picture, seed: int) -> Image.Image:
    """Draw a chart as a 144x144 RGB image by matplotlib; the same seed gives the same pixels."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SrcfastError("the data set charts needs the package matplotlib. Fix: pip install matplotlib") from error
    numbers, rng = picture.numbers, random.Random(seed)
    assert numbers.axis is not None
    color = rng.choice(COLORS)
    values, axis = [float(value) for value in numbers.values.values()], int(numbers.axis)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change pictures
        figure = Figure(figsize=(1.44, 1.44), dpi=100)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.18, 0.13, 0.79, 0.82))
        if picture.about["shape"] == "line":
            axes.plot(
                range(len(values)),
                values,
                color=color,
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                clip_on=False,
            )
        else:
            axes.bar(range(len(values)), values, rng.uniform(0.5, 0.8), color=color)
        axes.set_xlim(-0.6, len(values) - 0.4)
        axes.set_ylim(0, axis)
        axes.set_xticks(range(len(values)), list(numbers.values))
        axes.set_yticks([axis * step // 5 for step in range(6)])
        axes.tick_params(labelsize=7, length=2, pad=1.5, width=0.6)
        if rng.random() < 0.5:
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        canvas.draw()
        return Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


# --- Questions ----------------------------------------------------------------------------------------------


def _margin(numbers: Numbers) -> Fraction:
    assert numbers.axis is not None
    return numbers.axis / 20


def _pairs(op: str, numbers: Numbers, margin: bool = False) -> list[Program]:
    """Return the programs of an operation over two bars; with `margin`, bars that differ clearly."""
    values = numbers.values
    pairs = permutations(values, 2)
    return [{"op": op, "of": [a, b]} for a, b in pairs if not margin or abs(values[a] - values[b]) >= _margin(numbers)]


def _extremes(numbers: Numbers) -> list[Program]:
    """Return the questions for the highest and the lowest bar that differ clearly from the others."""
    ordered = sorted(numbers.values.values())
    programs: list[Program] = []
    if ordered[-1] - ordered[-2] >= _margin(numbers):
        programs.append({"op": "where", "which": "largest"})
    if ordered[1] - ordered[0] >= _margin(numbers):
        programs.append({"op": "where", "which": "smallest"})
    return programs


def _counts(numbers: Numbers) -> list[Program]:
    """Return the questions for the bars above or below tenths of the axis from which all bars differ clearly.

    None of the bars, or all, are answers only where there are others, so that they are not too frequent.
    """
    assert numbers.axis is not None
    bounds = [numbers.axis * tenths / 10 for tenths in range(1, 10)]
    clear = [n for n in bounds if all(abs(value - n) >= _margin(numbers) for value in numbers.values.values())]
    if not any(min(numbers.values.values()) < n < max(numbers.values.values()) for n in clear):
        return []
    return [{"op": "count", "test": test, "than": int(n)} for test in ("larger", "smaller") for n in clear]


_KINDS = {
    "value": Kind(
        "fine_grained_perception", lambda numbers: [{"op": "value", "of": [name]} for name in numbers.values]
    ),
    "sum": Kind("counting_arithmetic", lambda numbers: _pairs("sum", numbers)),
    "difference": Kind("counting_arithmetic", lambda numbers: _pairs("difference", numbers, margin=True)),
    "average": Kind("counting_arithmetic", lambda numbers: [{"op": "average"}]),
    "count": Kind("counting_arithmetic", _counts),
    "extreme": Kind("instance_reasoning", _extremes),
    "larger": Kind("logical_reasoning", lambda numbers: _pairs("larger", numbers, margin=True)),
}
_WORDINGS = {
    "value": ("What is the value for {0}?", "How high is the value of {0}?"),
    "sum": ("What is the sum of the values for {0} and {1}?", "What do the values for {0} and {1} add up to?"),
    "difference": ("What is the difference between the values for {0} and {1}?",) * 2,
    "average": ("What is the average of all values?", "What is the mean of all values?"),
    "where": ("Which has the {highest} value?", "For which is the value {highest}?"),
    "larger": ("Is the value for {0} higher than that for {1}?", "Is the value for {1} lower than that for {0}?"),
    "count": ("How many values are {above} {than}?", "What is the number of values {above} {than}?"),
}


def _question(picture: Picture, program: Program, wording: int) -> str:
    """Write a program as a question, after what the letters stand for and the unit; `wording` is 0 or 1."""
    categories = picture.numbers.categories
    letters = [f"{letter} stands for {category}" for letter, category in categories.items()]
    words: dict[str, Any] = {
        "highest": {"largest": "highest", "smallest": "lowest"}.get(program.get("which", "")),
        "above": {"larger": "above", "smaller": "below"}.get(program.get("test", "")),
        "than": program.get("than"),
    }
    names = [categories[letter] for letter in program.get("of", [])]
    question = _WORDINGS[program["op"]][wording].format(*names, **words)
    return f"{', '.join(letters)}. Values are in {picture.about['unit']}. {question}"


CHARTS = Family("charts", _pictures, _draw, lambda split: _KINDS, _question, tolerance=0.05)
