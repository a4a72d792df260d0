"""The real tables that charts show: files of the installed packages vega_datasets and statsmodels, read without importing these.

A table's rows (a state, a country, a year) are split by a hash of their names, so that the charts of no two splits share a row.
Whole tables are held out of every split but `generalisation`. Sources and licences: docs/data.md.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from srcfast.data.jsonl import regular
from srcfast.errors import InputError
from srcfast.world.packages import package_folder
from srcfast.world.scenes import share_of

Row = dict[str, str]
Series = tuple[tuple[str, Fraction], ...]  # what bars stand for, each with its value, in the table's order

_NAME = re.compile(r"[A-Z0-9][A-Za-z0-9 '-]{1,23}")  # names that a sentence can hold: without punctuation, in ASCII


@dataclass(frozen=True)
class Point:
    """A value of a table: its row, by which it is split, its unit, what a bar of this value stands for, the value as written."""

    row: str
    unit: str  # points of the same unit can be in one chart
    category: str
    value: str
    exponent: int = 0  # the value is in 10^exponent of the unit


@dataclass(frozen=True)
class Table:
    """A file of a package, and how its rows become points."""

    package: str
    file: str
    points: Callable[[Row], Iterator[Point]]
    is_ordered: bool = False  # what the bars stand for has an order, in time
    is_held_out: bool = False


def _states(row: Row) -> Iterator[Point]:
    units = {
        "violent": "violent crimes per 100,000 people",
        "murder": "murders per 100,000 people",
        "hs_grad": "percent of people who finished high school",
        "poverty": "percent of people below the poverty line",
        "single": "percent of families with a single parent",
        "urban": "percent of people who live in cities",
    }
    for column, unit in units.items():
        yield Point(row["state"], unit, row["state"].strip(), row[column])


def _fertility(row: Row) -> Iterator[Point]:
    country = row["Country Name"]
    for year in range(1960, 2011, 5):
        yield Point(country, f"births per woman in {year}", country, row[str(year)])


_MONTHS = "January February March April May June July August September October November December".split()


def _sea(row: Row) -> Iterator[Point]:
    year = row["YEAR"]
    for month in _MONTHS:
        yield Point(year, f"degrees Celsius in the Pacific Ocean in {year}", month, row[month[:3].upper()])


def _sunspots(row: Row) -> Iterator[Point]:
    yield Point(row["YEAR"], "sunspots", row["YEAR"], row["SUNACTIVITY"])


def _nile(row: Row) -> Iterator[Point]:
    yield Point(row["year"], "cubic meters of water in the Nile", row["year"], row["volume"], exponent=8)


def _economy(row: Row) -> Iterator[Point]:
    quarter = f"{row['year']} Q{row['quarter']}"
    yield Point(quarter, "percent of unemployed people", quarter, row["unemp"])
    yield Point(quarter, "percent of interest on treasury bills", quarter, row["tbilrate"])


def _firms(row: Row) -> Iterator[Point]:
    year = row["year"]
    for column, unit in (("invest", "dollars of investment"), ("capital", "dollars of capital")):
        yield Point(year, f"{unit} in {year}", row["firm"], row[column], exponent=6)


def _wheat(row: Row) -> Iterator[Point]:
    yield Point(row["year"], "shillings for a quarter of wheat", row["year"], row["wheat"])
    if "wages" in row:
        yield Point(row["year"], "shillings of weekly wages", row["year"], row["wages"])


def _barley(row: Row) -> Iterator[Point]:
    variety, year = row["variety"], row["year"]
    yield Point(f"{variety} {year}", f"bushels per acre of {variety} barley in {year}", row["site"], row["yield"])


TABLES = {
    "statecrime": Table("statsmodels", "datasets/statecrime/statecrime.csv", _states),
    "fertility": Table("statsmodels", "datasets/fertility/fertility.csv", _fertility),
    "elnino": Table("statsmodels", "datasets/elnino/elnino.csv", _sea, is_ordered=True),
    "sunspots": Table("statsmodels", "datasets/sunspots/sunspots.csv", _sunspots, is_ordered=True),
    "nile": Table("statsmodels", "datasets/nile/nile.csv", _nile, is_ordered=True),
    "macrodata": Table("statsmodels", "datasets/macrodata/macrodata.csv", _economy, is_ordered=True),
    "grunfeld": Table("statsmodels", "datasets/grunfeld/grunfeld.csv", _firms, is_held_out=True),
    "wheat": Table("vega_datasets", "_data/wheat.json", _wheat, is_ordered=True, is_held_out=True),
    "barley": Table("vega_datasets", "_data/barley.json", _barley, is_held_out=True),
}


@cache
def read_table(name: str) -> tuple[Point, ...]:
    """Read the points of a table whose values are numbers of at least 0 and whose names a sentence can hold.

    Raises:
        SrcfastError: the package is not installed.
        InputError: its file is malformed.
    """
    table = TABLES[name]
    file = package_folder(table.package, table.package, "charts") / table.file
    try:
        text = regular(file).read_text(encoding="utf-8")
        rows: Iterable[Row]
        if file.suffix == ".json":
            rows = json.loads(text, parse_int=str, parse_float=str)
        else:
            rows = csv.DictReader(io.StringIO(text))
        points = tuple(point for row in rows for point in table.points(row) if _NAME.fullmatch(point.category))
        points = tuple(point for point in points if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,20})?", point.value))
        if not points:
            raise ValueError("no values")
        return points
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise InputError(
            file=file,
            expected=f"the table {name}",
            found=error,
            fix=f"reinstall it: pip install --force-reinstall {table.package}",
        ) from error


@cache
def series_of(name: str, split: str) -> dict[str, Series]:
    """Return the values of a table's rows in a split, by unit; units with fewer than three are left out."""
    by_unit: dict[str, list[tuple[str, Fraction]]] = {}
    for point in read_table(name):
        if split_of(name, point.row) == split:
            value = Fraction(point.value) * 10**point.exponent
            by_unit.setdefault(point.unit, []).append((point.category, value))
    return {unit: tuple(values) for unit, values in by_unit.items() if len(values) >= 3}


def split_of(name: str, row: str) -> str:
    """Return the split of a table's row, by its name; a held-out table's rows are all in `generalisation`."""
    return (
        "generalisation" if TABLES[name].is_held_out else share_of(hashlib.sha256(f"{name}/{row}".encode()).hexdigest())
    )
