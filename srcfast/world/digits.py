"""Mosaics of handwritten digits: two to six of scikit-learn's 1,797 on a 3x3 grid, with questions of exact arithmetic.

Each digit's image is used in one split alone, by a hash of its index. The split `generalisation` shows mosaics of the test
split's digits, and asks what no other split asks: compositions of the others' operations. So perception is the test split's.
"""

from __future__ import annotations

import gzip
import hashlib
import random
import zlib
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, permutations

from PIL import Image

from srcfast.data.jsonl import regular
from srcfast.errors import InputError
from srcfast.world.number_samples import Family, Kind, Picture
from srcfast.world.numbers import Numbers, Program, selected
from srcfast.world.packages import package_folder
from srcfast.world.scenes import COLUMN, PLACES, ROW, check_split, share_of

IMAGE_SIZE = 72  # pixels; three cells of 24 a side
CELL = IMAGE_SIZE // 3
SIDE = 8  # pixels of a digit's image

Digit = tuple[int, bytes]  # the digit and its pixels, row by row, 0 (paper) to 255 (ink)
Mosaic = tuple[tuple[str, int], ...]  # places in reading order, each with the index of a digit's image


@lru_cache(maxsize=1)
def read_digits() -> tuple[Digit, ...]:
    """Read the digits from the file of the installed scikit-learn.

    Raises:
        SrcfastError: the package is not installed.
        InputError: its file is malformed.
    """
    file = package_folder("sklearn", "scikit-learn", "digits") / "datasets" / "data" / "digits.csv.gz"
    try:
        lines = gzip.decompress(regular(file).read_bytes()).decode("ascii").splitlines()
        rows = [[int(float(number)) for number in line.split(",")] for line in lines]
        if len(rows) != 1797 or any(len(row) != 65 or not 0 <= row[-1] <= 9 for row in rows):
            raise ValueError("another number of rows or columns")
        return tuple([(row[-1], bytes([value * 255 // 16 for value in row[:-1]])) for row in rows])
    except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        raise InputError(
            file=file,
            expected="1,797 rows of 64 pixels from 0 to 16 and a digit",
            found=error,
            fix="reinstall it: pip install --force-reinstall scikit-learn",
        ) from error


def indices_of(split: str) -> list[int]:
    """Return the indices of a split's digits. Raises InputError for an unknown split."""
    check_split(split)
    share = "test" if split == "generalisation" else split
    digests = (hashlib.sha256(f"digit {index}".encode()).hexdigest() for index in range(len(read_digits())))
    return [index for index, digest in enumerate(digests) if share_of(digest) == share]


def _pictures(split: str, seed: int) -> Iterator[Picture]:
    """Yield distinct mosaics of a split, without end."""
    digits, indices = read_digits(), indices_of(split)
    rng = random.Random(f"digits/{split}/{seed}")
    drawn: set[Mosaic] = set()
    while True:
        count = rng.randint(2, 6)
        places = sorted(rng.sample(range(9), count))
        mosaic = tuple(zip([PLACES[place] for place in places], rng.sample(indices, count), strict=True))
        if mosaic not in drawn:
            drawn.add(mosaic)
            numbers = Numbers({place: Fraction(digits[index][0]) for place, index in mosaic})
            yield Picture(repr(mosaic), numbers, {"digits": [index for _, index in mosaic]})


def _draw(picture: Picture, seed: int) -> Image.Image:
    """Draw a mosaic as a 72x72 RGB image, with jitter in extent, position and shades; the same seed gives the same pixels."""
    rng = random.Random(seed)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), tuple([rng.randint(225, 255) for _ in range(3)]))
    for place, index in zip(picture.numbers.values, picture.about["digits"], strict=True):
        extent = rng.randint(19, 23)
        ink = tuple([rng.randint(0, 90) for _ in range(3)])
        corner = [line[place] * CELL + rng.randint(0, CELL - extent) for line in (COLUMN, ROW)]
        mask = Image.frombytes("L", (SIDE, SIDE), read_digits()[index][1]).resize(
            (extent, extent), Image.Resampling.BICUBIC
        )
        image.paste(ink, (corner[0], corner[1], corner[0] + extent, corner[1] + extent), mask)
    return image


# --- Questions ----------------------------------------------------------------------------------------------


def _of_each(numbers: Numbers) -> list[Program]:
    return [{"op": "value", "of": [place]} for place in numbers.values]


def _of_two(op: str, numbers: Numbers) -> list[Program]:
    return [{"op": op, "of": list(pair)} for pair in permutations(numbers.values, 2)]


def _extremes(op: str) -> list[Program]:
    return [{"op": op, "which": which} for which in ("largest", "smallest")]


def _counts(_: Numbers) -> list[Program]:
    tests: list[Program] = [{}, {"test": "even"}, {"test": "odd"}]
    tests += [{"test": test, "than": than} for test in ("larger", "smaller", "equal") for than in range(10)]
    return [{"op": "count", **test} for test in tests]


def _of_three(numbers: Numbers) -> list[Program]:
    return [{"op": "sum", "of": list(places)} for places in combinations(numbers.values, 3)]


def _of_some(numbers: Numbers) -> list[Program]:
    tests: list[Program] = [{"test": "even"}, {"test": "odd"}]
    tests += [{"test": test, "than": than} for test in ("larger", "smaller") for than in range(1, 9)]
    programs: list[Program] = [{"op": "sum", **test} for test in tests]
    return [program for program in programs if len(selected(program, numbers.values) or ()) >= 2]


_KINDS = {
    "value": Kind("fine_grained_perception", _of_each),
    "sum_of_two": Kind("counting_arithmetic", lambda numbers: _of_two("sum", numbers)),
    "sum_of_all": Kind("counting_arithmetic", lambda numbers: [{"op": "sum"}]),
    "difference": Kind("counting_arithmetic", lambda numbers: _of_two("difference", numbers)),
    "count": Kind("counting_arithmetic", _counts),
    "extreme": Kind("instance_reasoning", lambda numbers: _extremes("extreme")),
    "place_of_extreme": Kind("spatial_relation", lambda numbers: _extremes("where")),
    "larger": Kind("logical_reasoning", lambda numbers: _of_two("larger", numbers)),
}
_COMPOSED = {
    "sum_of_three": Kind("counting_arithmetic", _of_three),
    "sum_of_some": Kind("logical_reasoning", _of_some),
    "range": Kind("instance_reasoning", lambda numbers: [{"op": "range"}]),
}
_WORDINGS = {
    "value": ("What digit is at the {0}?", "Which digit can you see at the {0}?"),
    "sum": ("What is the sum of {these}?", "What do {these} add up to?"),
    "difference": ("What is the difference between {these}?",),
    "range": ("What is the difference between the largest and the smallest digit?",),
    "extreme": ("What is the {which} digit?",),
    "where": ("Where is the {which} digit?", "At which place is the {which} digit?"),
    "larger": (
        "Is the digit at the {0} larger than the digit at the {1}?",
        "Is the digit at the {1} smaller than the digit at the {0}?",
    ),
    "count": ("How many {these} are there?",),
}


def _question(_: Picture, program: Program, wording: int) -> str:
    """Write a program as a question; `wording` is 0 or 1."""
    wordings = _WORDINGS[program["op"]]
    places = program.get("of", [])
    return wordings[wording % len(wordings)].format(*places, these=_these(program), which=program.get("which"))


def _these(program: Program) -> str:
    """Write which digits a program is about: "the even digits", "digits larger than 5", "the digits at the left and the top"."""
    test, places = program.get("test"), program.get("of")
    article = "" if program["op"] == "count" else "the "
    if places:
        return f"the digits {', '.join(f'at the {place}' for place in places[:-1])} and at the {places[-1]}"
    if test in ("even", "odd"):
        return f"{article}{test} digits"
    if test is not None:
        return f"{article}digits {test} {'to' if test == 'equal' else 'than'} {program['than']}"
    return "digits" if program["op"] == "count" else "all digits"


def _kinds(split: str) -> dict[str, Kind]:
    return _COMPOSED if split == "generalisation" else _KINDS


DIGITS = Family("digits", _pictures, _draw, _kinds, _question)
