"""Read a study's file: the settings that all arms share, and what each arm changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from srcfast.config.datasets import DatasetConfig
from srcfast.config.load import config_of
from srcfast.config.section import Section
from srcfast.config.settings import Config
from srcfast.config.yaml import read_yaml
from srcfast.data.file_names import check_file_name
from srcfast.errors import ConfigError, InputError, shorten
from srcfast.run.directory import iteration_of

JUDGED = ("pairwise", "independent")  # modes of an R-Scorer
SEED = "{seed}"  # in a study's settings: the number of the seed


class Arm(Section):
    """What an arm of a study changes, and the model whose answers count."""

    settings: dict[str, Any] = {}
    """Sections with settings, as in a config file; they win over the study's"""
    model: str = Field("", pattern=r"^(base|rationale|iteration-[1-9][0-9]{0,2})?$")
    """`base`, `rationale` or `iteration-K`; default: the last one of the arm's calibration"""


class StudySettings(Section):
    """A study: arms that are calibrated over the same seeds, and evaluated on the same samples.

    `{seed}` within a text of the settings stands for the number of the seed: `seed: "{seed}"`, `path: judges/{seed}`. A text
    that is then a whole number is read as one.
    """

    name: str
    """Of the study's directory, output/name"""
    output: str = Field("runs", min_length=1)
    """Directory of results"""
    seeds: int = Field(1, ge=1, le=10_000)
    """Number of seeds, from 0"""
    resamples: int = Field(2000, ge=100, le=100_000)
    """Bootstrap resamples of an interval"""
    settings: dict[str, Any] = {}
    """Sections with settings, as in a config file, of all arms"""
    arms: dict[str, Arm] = Field(min_length=1)
    """By name; the stages that arms have in common are run once"""
    differences: tuple[str, ...] = ()
    """Arms to compare, each as `A - B`, paired by seed and sample"""
    judges: str | None = None
    """File of another study's results on R-Scorers, whose figures the summary contains as well; default: none"""

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        return check_file_name(value)

    @field_validator("arms")
    @classmethod
    def _check_arms(cls, value: dict[str, Arm]) -> dict[str, Arm]:
        for name in value:
            check_file_name(name)
        return value

    @property
    def path(self) -> Path:
        """The study's directory, which holds a run's directory for each arm and seed."""
        return Path(self.output) / self.name

    def pairs(self) -> list[tuple[str, str]]:
        """Return the arms of each difference. Raises ConfigError where one is no arm."""
        pairs = []
        for text in self.differences:
            first, minus, second = (part.strip() for part in text.partition(" - "))
            for arm in (first, second):
                if not minus or arm not in self.arms:
                    arms = ", ".join(self.arms)
                    raise ConfigError(f"differences: expected `A - B` of the arms {arms}, found {shorten(repr(text))}")
            pairs.append((first, second))
        return pairs


class Study:
    """A study's settings, with the settings of each arm's calibration under each seed."""

    def __init__(self, settings: StudySettings, sources: Mapping[str, str]) -> None:
        self.settings = settings
        self._sources = sources
        self.pairs = settings.pairs()
        # All of them, before the first one runs for hours.
        self.configs = {(arm, seed): self._config(arm, seed) for arm in settings.arms for seed in range(settings.seeds)}
        first = next(iter(self.configs.values())).data.evaluation
        for (arm, _), config in self.configs.items():
            self._check(arm, config, first)
        self.judges = {} if settings.judges is None else read_judges(Path(settings.judges))

    def model(self, arm: str) -> str:
        """Return the name of the model whose answers are the arm's."""
        iterations = self.configs[arm, 0].iterations
        return self.settings.arms[arm].model or (f"iteration-{iterations}" if iterations else "rationale")

    def _check(self, arm: str, config: Config, evaluation: tuple[DatasetConfig, ...]) -> None:
        """Raise ConfigError where an arm would have no answers that can be compared with the others'."""
        if not config.data.evaluation or config.data.evaluation != evaluation:
            expected = (
                "the same evaluation sets, one at least, of every arm under every seed: answers are compared by sample"
            )
            raise ConfigError(
                f"arm {arm}: data.evaluation: expected {expected}, found {len(config.data.evaluation)} others"
            )
        if iteration_of(self.model(arm)) > config.iterations:
            expected = f"a model of its {config.iterations} iterations"
            raise ConfigError(f"arm {arm}: model: expected {expected}, found {self.model(arm)}")

    def _config(self, arm: str, seed: int) -> Config:
        shared, changed = self.settings.settings, self.settings.arms[arm].settings
        sources: dict[str, str] = {}
        for prefix in ("settings.", f"arms.{arm}.settings."):
            sources |= {
                key.removeprefix(prefix): where for key, where in self._sources.items() if key.startswith(prefix)
            }
        for name in ("name", "output"):
            if name in (shared | changed):
                raise ConfigError(f"{sources.get(name, name)}: expected {name} of the study alone, found one of an arm")
        named = {"name": f"{arm}-{seed}", "output": str(self.settings.path)}
        try:
            return config_of([_numbered(shared, seed), _numbered(changed, seed), named], sources)
        except ConfigError as error:
            raise ConfigError(f"arm {arm}: {error}") from error


def read_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        ConfigError: the file, or the settings of an arm, can't be used; by line.
    """
    sources: dict[str, str] = {}
    tree = read_yaml(path, sources)
    try:
        settings = StudySettings.model_validate(tree)
    except ValidationError as error:
        texts = []
        for entry in error.errors():
            key = ".".join(map(str, entry["loc"]))
            where = sources.get(key, str(path))
            texts.append(f"{where}: {key}: {entry['msg']}, found {shorten(repr(entry['input']))}")
        raise ConfigError("\n".join(texts)) from None
    return Study(settings, sources)


def _numbered(value: Any, seed: int) -> Any:
    """Write the seed's number into the texts of a tree of settings."""
    if isinstance(value, dict):
        return {key: _numbered(inner, seed) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbered(inner, seed) for inner in value]
    if not isinstance(value, str) or SEED not in value:
        return value
    text = value.replace(SEED, str(seed))
    return int(text) if text.isdecimal() else text


def read_judges(file: Path) -> dict[str, Any]:
    """Read the figures of R-Scorers from a result file's `judges`: size -> quality -> mode -> [mean, low, high].

    Raises:
        InputError: the file can't be read, or has another form.
    """
    try:
        judges = json.loads(file.read_bytes())["judges"]
        modes = [each for qualities in judges.values() for each in qualities.values()]
        if not all(len([float(value) for value in each[name]]) == 3 for each in modes for name in JUDGED):
            raise ValueError("other than three numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = "judges: {SIZE: {QUALITY: {pairwise: [mean, low, high], independent: [mean, low, high]}}}"
        raise InputError(file=file, field="judges", expected=expected, found=error) from error
    return dict(judges)
