"""Download what the settings and options of a command name of the Hub, before the command reads its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from srcfast.cli.inputs import Source
from srcfast.config.settings import Config
from srcfast.hub.pins import Data, Model, fetched_data, fetched_model, pinned


def from_hub(
    config: Config,
    options: dict[str, Any],
    *,
    models: Sequence[Model] = (),
    data: Data | None = None,
    directory: Path | None = None,
) -> tuple[Config, dict[str, Any]]:
    """Return the settings of a command with names at their commits, and its options with directories and files for names.

    Args:
        options: of the command; `adapter`, `source` and `data` may hold names.
        models: the models of the settings that it loads.
        data: the datasets of the settings that it reads where it is given no --data; None: none.
        directory: where the commits are recorded; None: nowhere.
    """
    changes: dict[str, Any] = {}
    if (source := options.get("source")) is not None:
        changes["source"] = source_from_hub(source, directory, config.quiet)
    sets = [data] if data is not None and (source is None or source.data is None) else []
    config = pinned(config, directory, models=models, data=sets)
    if options.get("adapter") is not None:
        changes["adapter"] = fetched_model(options["adapter"], directory, config.quiet)
    if options.get("data") is not None:
        [changes["data"]] = fetched_data([options["data"]], directory, config.quiet)
    return config, options | changes


def source_from_hub(source: Source, directory: Path | None, quiet: bool) -> Source:
    """Return the data options with files and folders for names."""
    if source.data is None:
        return source
    data, *more = fetched_data([source.data, *source.more], directory, quiet)
    root = source.image_root
    if root is not None:
        [root] = fetched_data([root], directory, quiet)
    return replace(source, data=data, more=tuple(more), image_root=root)
