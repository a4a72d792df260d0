"""The checkpoints that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from srcfast.hub.names import local_model

_ASSETS = Path(__file__).parents[1] / "world" / "assets"


def checkpoint_directory(path: str | Path, kind: Literal["base", "scorer"]) -> Path:
    """Return the directory that a setting names; `embedded` is the shipped LVLM or R-Scorer.

    A name of the Hub is the directory that it was downloaded to; nothing is downloaded here.
    """
    return _ASSETS / kind if str(path) == "embedded" else local_model(path)
