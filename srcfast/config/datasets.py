"""Settings of the datasets that a run trains and evaluates on."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from srcfast.config.section import MOST, Section
from srcfast.data.file_names import as_stored, check_file_name
from srcfast.data.records import ReferenceQuality

# Settings that are younger than version 0.1, whose runs and checkpoints still continue.
YOUNGER_OF_DATASETS = ("follow_links", "duplicate_ids", "images", "rationales", "reference", "rule")
DRAWN = ("world", "clips", "digits", "charts")  # formats whose samples are drawn, as many as are asked for


class DatasetConfig(Section):
    """One dataset to train or to evaluate on."""

    name: str = Field(min_length=1)
    """Name in results"""
    format: Literal[
        "auto", "world", "clips", "digits", "charts", "easy_vqa", "jsonl", "llava", "messages", "alpaca", "vlmeval_tsv"
    ] = "auto"
    """`auto`: determined by the first records; `world`: samples of the embedded world; `clips`: its clips of three frames;
    `digits`: mosaics of handwritten digits; `charts`: charts of real tables; `easy_vqa`: that package's; `jsonl`: srcfast's
    records; `llava`: LLaVA's; `messages`: chat messages; `alpaca`: LLaMA-Factory's; `vlmeval_tsv`: VLMEvalKit's TSV"""
    path: str | tuple[str, ...] | None = None
    """File to read, a glob, or a list of these; none for the formats world, clips, digits, charts and easy_vqa"""
    image_root: str | tuple[str, ...] | None = None
    """Directory that the records' image paths are relative to, or a list: the first that has an image; default: the file's"""
    follow_links: bool = False
    """Let symbolic links lead out of the image root"""
    duplicate_ids: Literal["reject", "rename"] = "reject"
    """A sample whose id has occurred in the dataset: `reject` it, or `rename` it (`id-2`) and warn"""
    split: str = "train"
    """Split of the formats world, clips, digits, charts and easy_vqa; for a file a label in results"""
    limit: int = Field(0, ge=0, le=MOST)
    """Number of samples to draw; 0 = all. The formats world, clips, digits and charts have no end and need a number above 0"""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of this draw"""
    check_images: bool = True
    """Decode every image at the start, so that a broken one is reported before anything runs. Costs one reading of all images"""
    images: Literal["given", "shuffled", "blank"] = "given"
    """`shuffled`: each sample with another one's images; `blank`: plain gray ones. Of an evaluation set, these controls show what
    a model answers without seeing"""
    rationales: Literal["given", "none"] = "given"
    """`none`: leave out the samples' rationales and facts, as in data of questions and answers alone, for which
    `srcfast teach` has rationales written"""
    reference: ReferenceQuality = "complete"
    """What of a sample's facts, or else of its rationale, the R-Scorer sees: `complete`: all; `noisy`: one word or number is
    wrong; `partial`: half is left out; `answer`: all but the answer is. For studies of judging; stage 1 and the oracle see all"""
    rule: Literal["auto", "exact", "choice", "relaxed", "yes_no", "anls", "judge"] = "auto"
    """Of an evaluation set: which answers are right (docs/data.md); `auto`: `choice`, `yes_no` or `judge` where all samples
    are so"""
    use: tuple[Literal["rationale", "calibration"], ...] = ("rationale", "calibration")
    """For a training dataset: `rationale`: stage 1 trains on it; `calibration`: stages 2 to 4 draw their samples from it"""

    @property
    def label(self) -> str:
        """The name of the dataset's files and directories in a run."""
        return f"{self.name}-{self.split}"

    @property
    def paths(self) -> tuple[str, ...]:
        """The files and globs of `path`."""
        return _listed(self.path)

    @property
    def image_roots(self) -> tuple[str, ...]:
        """The directories of `image_root`."""
        return _listed(self.image_root)

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.format not in (*DRAWN, "easy_vqa") and not self.path:
            raise ValueError(f"the dataset {self.name!r} of format {self.format} needs a path")
        if self.format in DRAWN and not self.limit:
            raise ValueError(f"the dataset {self.name!r} of format {self.format} has no end: set its limit")
        return self


def _listed(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value or ()


class DataConfig(Section):
    """Datasets of a run."""

    train: tuple[DatasetConfig, ...] = ()
    """Datasets to calibrate on"""
    evaluation: tuple[DatasetConfig, ...] = ()
    """Datasets to evaluate on; no training dataset should share samples with them"""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        owners: dict[str, str] = {}
        for dataset in self.evaluation:
            label = check_file_name(f"{check_file_name(dataset.name)}-{dataset.split}")
            for name in (label, f"{label}-scores"):  # the latter while the headroom is measured
                if other := owners.get(as_stored(name)):
                    files = f"{label!r} (name-split){'' if other == label else f', or {other!r}, which is one to some disks'}"
                    raise ValueError(f"evaluation has two datasets whose files are named {files}. Fix: rename one")
            owners |= {as_stored(name): label for name in (label, f"{label}-scores")}
        return self
