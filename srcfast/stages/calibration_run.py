"""Hold what the stages of a calibration share: settings, run directory, samples, and the models in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from srcfast import distributed
from srcfast.config.settings import Config
from srcfast.data.jsonl import write_jsonl
from srcfast.data.records import Sample
from srcfast.memory.measure import measured
from srcfast.memory.out_of_memory import explain_out_of_memory
from srcfast.memory.plan import forecast_stage
from srcfast.models.checkpoint import model_hash
from srcfast.models.scorer import Scorer
from srcfast.run.artifacts import RunArtifacts
from srcfast.run.chunks import remove_chunks
from srcfast.run.directory import RunDirectory, StageMetrics
from srcfast.run.progress import peak_rss_bytes, track
from srcfast.stages.datasets import (
    EvaluationSet,
    draw_round,
    read_evaluation_sets,
    read_training_samples,
    training_sets,
)
from srcfast.stages.headroom import headroom_samples
from srcfast.stages.policy import Policy, load_scorer_for
from srcfast.stages.stage_run import StageRun

Work = Callable[[StageRun], dict[str, Any]]  # does a stage's work and returns what the manifest records of it


class CalibrationRun:
    """What the stages of a calibration share.

    Attributes:
        config: of the run.
        directory: of the run.
        artifacts: what finished stages have written.
        policy: the LVLM in memory.
        scorer: the R-Scorer while a stage uses it.
        rationale_samples, calibration_samples, evaluation_sets: the data.
        samples: those of the rounds, by id.
        num_samples: of all sets, each once.
        num_rejected: bad samples that were left out.
    """

    def __init__(self, config: Config, profile: range | None = None) -> None:
        self.config, self.profile = config, profile
        self.directory = RunDirectory(config.run_path)
        distributed.run_on_rank_zero(self._write_config)
        images, rejected = Path(config.output) / "images", list[dict[str, Any]]()
        self.rationale_samples = read_training_samples(training_sets(config, "rationale"), config, images, rejected)
        self.calibration_samples = read_training_samples(training_sets(config, "calibration"), config, images, rejected)
        self.evaluation_sets = read_evaluation_sets(config.data.evaluation, config, images, rejected)
        distributed.run_on_rank_zero(lambda: write_jsonl(self.directory.rejected_file, rejected))
        self.num_rejected = len(rejected)
        groups = (
            self.rationale_samples,
            self.calibration_samples,
            *(dataset.samples for dataset in self.evaluation_sets),
        )
        # By id those that pairs are made of alone: another set may use the same ids.
        self.samples = {sample.id: sample for sample in self.calibration_samples}
        self.num_samples = len({(s.id, s.image_root, s.images) for group in groups for s in group})
        self.artifacts = RunArtifacts(self.directory, self.samples)
        self.policy = Policy(config, [sample for group in groups for sample in group])
        self.scorer: Scorer | None = None

    def _write_config(self) -> None:
        """Write the settings, unless a stage was finished with others: then the files of that run stay."""
        self.directory.check_finished(self.config.identity())
        self.directory.write_config(self.config)

    def stage(
        self,
        name: str,
        sections: Sequence[str],
        total: int,
        work: Work,
        *,
        unit: str = "samples",
        adapted: bool = True,
        checkpoint_sections: Sequence[str] = (),
    ) -> None:
        """Run a stage unless the manifest lists it, and list it once all that it wrote is on disk.

        All ranks run it, or all skip it as rank 0 reads the manifest; none returns before rank 0 has written the manifest.

        Args:
            name: in the manifest: `KIND` or `iteration-K/KIND`.
            sections: settings that the stage depends on, beside those of all stages.
            total: units of the stage, for its progress.
            work: does the stage's work; the manifest's entry holds what it returns.
            unit: what is counted.
            adapted: whether the policy has an adapter.
            checkpoint_sections: settings that the stage's chunks and checkpoints depend on as well. (A finished stage needs no
                check of them: the manifest checks them with the stage before.)

        Raises:
            ConfigError: the stage was finished with other settings.
        """
        resolved, directory = self.config.identity(), self.directory
        settings = {key: resolved[key] for key in dict.fromkeys(("seed", "model", "data", *sections))}
        if distributed.run_on_rank_zero(lambda: directory.stage_done(name, settings) is not None):
            remove_chunks(directory.checkpoint(name))
            return
        kind = name.rpartition("/")[2]
        forecast = forecast_stage(self.config, kind, images=self.num_samples)
        with (
            explain_out_of_memory(self.config, kind),
            measured(self.config.model.device, self._parameters) as measurement,
            track(name, total, unit, quiet=self.config.quiet) as progress,
        ):
            stage = StageRun(
                kind=kind,
                config=self.config,
                output=directory.path,
                checkpoint_dir=directory.checkpoint(name),
                settings=settings | {key: resolved[key] for key in checkpoint_sections},
                progress=progress,
                metrics=StageMetrics(directory.metrics_file, name),
                profile_dir=directory.path / "profile" / name,
                profile=self.profile,
                forecast=forecast if adapted else replace(forecast, adapter=0.0),
            )
            entry = work(stage)
            distributed.barrier_with_heartbeat()  # rank 0 removes nothing that another rank still reads
        assert stage.forecast is not None
        entry["memory"] = measurement.record(stage.forecast, self._models())
        self.scorer = None
        self.policy.end_stage()
        entry["peak_rss_bytes"] = peak_rss_bytes()  # of this process alone: a run that was continued had others before
        distributed.run_on_rank_zero(
            lambda: directory.finish_stage(name, settings, progress.seconds, progress.tokens, **entry)
        )
        remove_chunks(directory.checkpoint(name))
        distributed.end_startup_timeout()

    def load_scorer(self) -> tuple[Scorer, Callable[[], str]]:
        """Load the R-Scorer for the rest of the stage; return it and a function that computes its hash.

        Where policy and R-Scorer do not fit into memory together, the policy is freed.
        """
        self.policy.offload()
        self.scorer = load_scorer_for(self.config)
        return self.scorer, partial(model_hash, self.scorer.text_model.path)

    def samples_of(self, iteration: int) -> list[Sample]:
        """Return the samples of a round."""
        return draw_round(self.calibration_samples, self.config.candidates.samples, iteration, self.config.seed)

    def headroom_sets(self) -> list[tuple[EvaluationSet, list[Sample]]]:
        """Return the evaluation sets of which the oracle can verify samples, with the first of these samples."""
        max_samples = self.config.evaluation.headroom_samples
        subsets = [(dataset, headroom_samples(dataset.samples, max_samples)) for dataset in self.evaluation_sets]
        return [(dataset, samples) for dataset, samples in subsets if samples]

    def _models(self) -> list[nn.Module]:
        """Return the models in memory."""
        policy = [self.policy.model] if self.policy.in_memory else []
        return [*policy, *([] if self.scorer is None else [self.scorer])]

    def _parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the models in memory."""
        return [parameter for model in self._models() for parameter in model.parameters()]
