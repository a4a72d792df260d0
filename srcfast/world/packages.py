"""Find the data files of installed packages, without importing the packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from srcfast.errors import SrcfastError


def package_folder(package: str, distribution: str, data_set: str) -> Path:
    """Return the directory of an installed package. Raises SrcfastError if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SrcfastError(f"the data set {data_set} needs the package {distribution}. Fix: pip install {distribution}")
    return Path(spec.origin).parent
