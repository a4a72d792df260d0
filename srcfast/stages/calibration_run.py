"""Hold what the stages of a calibration share: settings, run directory, samples, and the models in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from srcfast import distributed
from srcfast.config.settings import Config
from srcfast.data.jsonl import file_hash, json_hash, write_jsonl
from srcfast.data.records import Sample
from srcfast.memory.measure import measured
from srcfast.memory.model_sizes import release_unused
from srcfast.memory.out_of_memory import explain_out_of_memory
from srcfast.memory.plan import forecast_stage
from srcfast.models.checkpoint import checkpoint_hash
from srcfast.models.embedded import checkpoint_directory
from srcfast.models.lora import check_targets
from srcfast.models.scorer import Scorer, scorer_hash
from srcfast.run.artifacts import RunArtifacts
from srcfast.run.chunks import remove_chunks
from srcfast.run.directory import SINGLE_SETTINGS, RunDirectory, StageMetrics, iteration_of, settings_of
from srcfast.run.progress import PROGRESS_FILE, peak_rss_bytes, track
from srcfast.stages.datasets import (
    EvaluationSet,
    draw_round,
    read_evaluation_sets,
    read_training_samples,
    training_sets,
)
from srcfast.stages.fitting import check_fits, check_judged, check_lesson, split_fitting
from srcfast.stages.headroom import headroom_samples
from srcfast.stages.policy import Policy, load_scorer_for
from srcfast.stages.stage_inputs import FIELDS, JUDGED, PROMPT, InputRecord, StageInputs
from srcfast.stages.stage_run import StageRun
from srcfast.trackers.tracking import Trackers, results_of

Work = Callable[[StageRun], dict[str, Any]]  # does a stage's work and returns what the manifest records of it
# Names of the training sets among the inputs.
RATIONALE = "data.train, use rationale"
CALIBRATION = "data.train, use calibration"
# The fields of the round's samples that a kind of stage reads.
READS: Mapping[str, Sequence[str]] = {
    "candidates": PROMPT,
    "scores": JUDGED,
    "preferences": (*PROMPT, "answer"),
    "dpo": PROMPT,
}


class CalibrationRun:
    """What the stages of a calibration share.

    Attributes:
        config: of the run.
        trackers: to which steps and the results of stages are logged.
        directory: of the run.
        artifacts: what finished stages have written.
        policy: the LVLM in memory.
        scorer: the R-Scorer while a stage uses it.
        rationale_samples, calibration_samples, evaluation_sets: the data.
        samples: those of the rounds, by id.
        num_samples: of all sets, each once.
        num_rejected: bad samples that were left out.
    """

    def __init__(self, config: Config, profile: range | None = None, trackers: Trackers | None = None) -> None:
        self.config, self.profile, self.trackers = config, profile, Trackers({}) if trackers is None else trackers
        self.directory = RunDirectory(config.run_path)
        distributed.run_on_rank_zero(self._write_config)
        images, rejected = Path(config.output) / "images", list[dict[str, Any]]()
        uses = {"rationale"} | {use for dataset in config.data.train for use in dataset.use}
        if config.iterations:
            uses.add("calibration")
        self.rationale_samples, self.calibration_samples = (
            read_training_samples(training_sets(config, use), config, images, rejected, use) if use in uses else []
            for use in ("rationale", "calibration")
        )
        self.evaluation_sets = read_evaluation_sets(config.data.evaluation, config, images, rejected)
        if config.iterations and config.scorer.endpoint is None:
            self._check_judged(rejected)
        # A model's images are those of all records, as they were before some were set aside.
        groups = [self.rationale_samples, self.calibration_samples, *(each.samples for each in self.evaluation_sets)]
        self.policy = Policy(config, [sample for group in groups for sample in group])
        check_targets(self.policy.model, config.lora)
        self._set_aside(rejected)
        distributed.run_on_rank_zero(lambda: write_jsonl(self.directory.rejected_file, rejected))
        self.num_rejected = len(rejected)
        # By id those that pairs are made of alone: another set may use the same ids.
        self.samples = {sample.id: sample for sample in self.calibration_samples}
        self.num_samples = len({(s.id, s.image_root, s.images) for group in groups for s in group})
        self.artifacts = RunArtifacts(self.directory, self.samples)
        sets = {_evaluation(dataset): dataset.samples for dataset in self.evaluation_sets}
        sets |= {RATIONALE: self.rationale_samples, CALIBRATION: self.calibration_samples}
        self.inputs = InputRecord(self.directory.path, sets)
        self.scorer: Scorer | None = None

    def _check_judged(self, rejected: list[dict[str, Any]]) -> None:
        """Read the R-Scorer, which no stage needs before training, and set samples aside that it has no room for."""
        scorer = load_scorer_for(self.config)
        check = check_judged(scorer, self.config)
        self.calibration_samples = split_fitting(self.calibration_samples, check, self.config, rejected, "references")
        del scorer, check
        release_unused(self.config.model.device)

    def _set_aside(self, rejected: list[dict[str, Any]]) -> None:
        """Set samples aside of which the model can't take the prompt, or stage 1 the response."""
        config, model = self.config, self.policy.model
        of_prompt, of_lesson = check_fits(model), check_lesson(model, config)
        self.rationale_samples = split_fitting(self.rationale_samples, of_lesson, config, rejected, "rationales")
        self.calibration_samples = split_fitting(self.calibration_samples, of_prompt, config, rejected, "prompts")
        self.evaluation_sets = [
            replace(each, samples=split_fitting(each.samples, of_prompt, config, rejected, each.label))
            for each in self.evaluation_sets
        ]

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
            sections: settings that the stage depends on, beside those of all stages and `SINGLE_SETTINGS`.
            total: units of the stage, for its progress.
            work: does the stage's work; the manifest's entry holds what it returns.
            unit: what is counted.
            adapted: whether the policy has an adapter.
            checkpoint_sections: settings that the stage's chunks and checkpoints depend on as well. (A finished stage needs no
                check of them: the manifest checks them with the stage before.)

        Raises:
            ConfigError: the stage was finished with other settings.
            InputError: it was finished with other samples, images, models or files of earlier stages.
        """
        resolved, directory = self.config.identity(), self.directory
        single = SINGLE_SETTINGS.get(name.rpartition("/")[2], ())
        settings = settings_of(resolved, dict.fromkeys(("seed", "model", "data", *sections, *single)))
        settings = {key: value for key, value in settings.items() if value is not None}
        if distributed.run_on_rank_zero(lambda: self._is_finished(name, settings)):
            remove_chunks(directory.checkpoint(name))
            self._track_finished(name)
            return
        kind = name.rpartition("/")[2]
        forecast = forecast_stage(self.config, kind, images=self.num_samples)
        checkpoint = directory.checkpoint(name)
        progress_file = checkpoint / PROGRESS_FILE if distributed.is_rank_zero() else None
        with (
            explain_out_of_memory(self.config, kind),
            measured(self.config.model.device, self._parameters) as measurement,
            track(name, total, unit, quiet=self.config.quiet, file=progress_file) as progress,
        ):
            stage = StageRun(
                name=name,
                kind=kind,
                config=self.config,
                output=directory.path,
                checkpoint_dir=checkpoint,
                settings=settings | {key: resolved[key] for key in checkpoint_sections},
                progress=progress,
                metrics=StageMetrics(directory.metrics_file, name),
                trackers=self.trackers,
                profile_dir=directory.path / "profile" / name,
                profile=self.profile,
                forecast=forecast if adapted else replace(forecast, adapter=0.0),
                inputs=lambda: self.inputs.of(self._inputs_of(name)),
            )
            entry = work(stage)
            distributed.barrier_with_heartbeat()  # rank 0 removes nothing that another rank still reads
        tracked = results_of(name, entry)
        assert stage.forecast is not None
        entry["memory"] = measurement.record(stage.forecast, self._models())
        self.scorer = None
        self.policy.end_stage()
        entry["peak_rss_bytes"] = peak_rss_bytes()  # of this process alone: a run that was continued had others before

        def finish() -> None:
            self.trackers.log(*tracked)  # before the manifest: a finished stage does not run again
            entry["inputs"] = self.inputs.of(self._inputs_of(name))
            directory.finish_stage(name, settings, progress.seconds, progress.tokens, **entry)

        distributed.run_on_rank_zero(finish)
        remove_chunks(checkpoint)
        distributed.end_startup_timeout()

    def _track_finished(self, name: str) -> None:
        """Log what a finished stage gave: a tracker may lack some of it, or all where it is new to the run."""
        if self.trackers:
            for row in self.directory.metrics(name):
                self.trackers.log(name, row["step"], row)
                distributed.heartbeat()  # logged one by one, thousands of steps take long
            self.trackers.log(*results_of(name, self.directory.manifest()[name]))

    def _is_finished(self, name: str, settings: dict[str, Any]) -> bool:
        """Return whether the manifest lists a stage; before the first that it does not list, write `inputs.jsonl`."""
        entry = self.directory.stage_done(name, settings)
        if entry is None:
            self.inputs.write()
            return False
        self.inputs.check(name, entry.get("inputs", {}), self._inputs_of(name))
        return True

    def _inputs_of(self, name: str) -> StageInputs:
        """Return what a stage reads: samples with the fields that count, earlier stages' files, models."""
        of, _, kind = name.rpartition("/")
        number = iteration_of(name)
        before = (
            "rationale" if number == 1 else f"iteration-{number - 1}/dpo"
        )  # trained the adapter that a round begins with
        earlier = {
            "evaluation": {"base": [], "rationale": ["rationale"]}.get(of, [f"{of}/dpo"]),
            "candidates": [before],
            "headroom": [before],
            "scores": [f"{of}/candidates"],
            "preferences": [before, f"{of}/candidates", f"{of}/scores"],
            "dpo": [before, f"{of}/preferences"],
        }
        samples: dict[str, tuple[Sequence[Sample], Sequence[str]]] = {}
        if kind in ("evaluation", "headroom"):
            samples = {_evaluation(dataset): (dataset.samples, FIELDS) for dataset in self.evaluation_sets}
        elif kind in READS:
            samples = {CALIBRATION: (self.samples_of(number), READS[kind])}
        hashes: dict[str, Callable[[], str]] = {}
        if kind == "rationale" or (kind == "dpo" and self.config.dpo.rehearsal_weight):
            samples[RATIONALE] = (self.rationale_samples, FIELDS)
            if (teacher := self.config.rationale.teacher) is not None:
                hashes["rationale.teacher"] = partial(file_hash, teacher)
        if kind != "scores":
            hashes["model.path"] = partial(checkpoint_hash, checkpoint_directory(self.config.model.path, "base"))
        if kind in ("scores", "headroom") and self.config.scorer.endpoint is None:
            hashes["scorer.path"] = partial(checkpoint_hash, checkpoint_directory(self.config.scorer.path, "scorer"))
        for stage in earlier.get(kind, []):
            hashes[f"files of {stage}"] = partial(self._hash_of_files, stage)
        return StageInputs(samples, hashes)

    def _hash_of_files(self, stage: str) -> str:
        """Hash the hashes of the files that a finished stage has written."""
        return json_hash(self.directory.manifest().get(stage, {}).get("files"))

    def load_scorer(self) -> tuple[Scorer, Callable[[], str]]:
        """Load the R-Scorer for the rest of the stage; return it and a function that computes its hash.

        Where policy and R-Scorer do not fit into memory together, the policy is freed.
        """
        self.policy.offload()
        self.scorer = load_scorer_for(self.config)
        return self.scorer, partial(scorer_hash, self.scorer)

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


def _evaluation(dataset: EvaluationSet) -> str:
    """Name an evaluation set among the inputs."""
    return f"data.evaluation, {dataset.label}"
