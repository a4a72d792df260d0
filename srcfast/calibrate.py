"""Self-Rationale Calibration on one page: rationale fine-tuning, then rounds of candidates, scores, curation and DPO.

Every stage reads files of the run directory and writes files there. A stage that is finished is never run again: the same
command continues a run that was stopped. On several ranks all go through all stages together; what a run has once (its
settings, manifest, metrics, adapters, summary, page) rank 0 writes. How stages read what others have written is in
`run.artifacts`, what a finished run comes to in `report.summary`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from srcfast import distributed
from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.batching import num_steps
from srcfast.data.in_order import InOrder
from srcfast.data.jsonl import write_json, write_jsonl, write_shards
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.errors import InputError
from srcfast.memory.measure import measured
from srcfast.memory.plan import forecast_items, forecast_stage, out_of_memory_is_met
from srcfast.models.checkpoint import model_hash
from srcfast.models.lora import save_adapter
from srcfast.models.scorer import Scorer
from srcfast.report.gallery import image_names
from srcfast.report.page import write_report
from srcfast.report.summary import gallery_of, summary_of
from srcfast.run.artifacts import RunRecords
from srcfast.run.chunks import Parts
from srcfast.run.directory import RunDirectory, alone_in
from srcfast.run.progress import Track, peak_rss_bytes, track
from srcfast.stages.adaptive_pairs import AdaptivePairs
from srcfast.stages.candidates import diversity
from srcfast.stages.curation import curate
from srcfast.stages.dpo import train_preference
from srcfast.stages.evaluation import summarise, write_predictions
from srcfast.stages.headroom import headroom_samples, measure_headroom, with_next
from srcfast.stages.pieces import (
    answers_in_pieces,
    candidates_in_pieces,
    predictions_of,
    references_in_pieces,
    scores_in_pieces,
)
from srcfast.stages.policy import (
    EvaluationSet,
    Policy,
    draw_round,
    load_judge,
    rationale_pairs,
    read_evaluation_sets,
    read_training_samples,
)
from srcfast.stages.rationale import fine_tune_rationale
from srcfast.stages.references import references_from_candidates
from srcfast.stages.replay import kept_if_not_finite
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.loop import TrainingItem
from srcfast.training.profiler import StepProfiler


def calibrate(config: Config, profile: range | None = None) -> Path:
    """Run, or continue, a whole calibration; returns the page that shows it.

    Args:
        config: its settings.
        profile: steps of each training stage, written to the run directory's `profile/STAGE/`.

    Raises:
        ConfigError: the run directory holds a stage that was finished, or begun, with other settings.
        SrcfastError: another process works in the run directory.
        Interrupted: a signal asked to stop; the same call continues.
        InputError: data that can't be used, by file, line and field.
    """
    with alone_in(config.run_path, whole=True):
        with out_of_memory_is_met(config, "evaluation"):
            run = Calibration(config, profile)
        run.evaluate("base", None)
        run.rationale()
        run.evaluate("rationale", run.directory.rationale_adapter)
        for iteration in range(1, config.iterations + 1):
            run.candidates(iteration)
            run.headroom(iteration)
            run.scores(iteration)
            run.preferences(iteration)
            run.preference_tuning(iteration)
            run.evaluate(f"iteration-{iteration}", run.directory.adapter(iteration))
        distributed.from_main(run.write_summary)
        return run.directory.report_file


class Calibration:
    """One run: its settings, its directory, its data, and the policy in memory."""

    def __init__(self, config: Config, profile: range | None = None) -> None:
        self.began = time.perf_counter()
        self.config, self.profile = config, profile
        self.directory = RunDirectory(config.run_path)
        distributed.from_main(lambda: self.directory.write_config(config))
        self.images = Path(config.output) / "images"
        rejected: list[dict[str, Any]] = []
        self.rationale_samples = read_training_samples(config, "rationale", self.images, rejected)
        self.calibration_samples = read_training_samples(config, "calibration", self.images, rejected)
        self.evaluation_sets = read_evaluation_sets(config, self.images, rejected)
        distributed.from_main(lambda: write_jsonl(self.directory.rejected_file, rejected))
        self.rejected = len(rejected)
        self.samples = {
            sample.id: sample
            for group in (self.rationale_samples, self.calibration_samples, *(e.samples for e in self.evaluation_sets))
            for sample in group
        }
        self.records = RunRecords(self.directory, self.samples)
        self.policy = Policy(config, list(self.samples.values()))
        self.judge: Scorer | None = None

    # Stages -----------------------------------------------------------------------------------------------

    def evaluate(self, model: str, adapter: Path | None) -> None:
        """Greedy answers to every evaluation set: predictions and the entry of the summary."""

        def work(progress: Track) -> dict[str, Any]:
            lvlm = self.policy.use(adapter)
            entries = []
            for one in self.evaluation_sets:
                answers = answers_in_pieces(
                    self.directory.checkpoint(stage) / f"{one.name}-{one.split}",
                    self._depends_on(sections, policy=True),
                    lvlm,
                    one.samples,
                    features=self.policy.features,
                    max_new_tokens=self.config.evaluation.max_new_tokens,
                    batch_size=self.config.evaluation.batch_size,
                    progress=progress,
                    graphs=self.config.evaluation.cuda_graphs,
                )
                entries.append(distributed.from_main(partial(self._sum_up, model, one, answers)))
            return {"entries": entries}

        stage, sections = f"{model}/evaluation", ("data", "evaluation")
        total = sum(len(one.samples) for one in self.evaluation_sets)
        self._stage(stage, sections, total, work, adapted=adapter is not None)

    def _sum_up(self, model: str, one: EvaluationSet, answers: Parts) -> dict[str, Any]:
        """Write the predictions; the entry of the summary."""
        path = self.records.predictions(model, one.name, one.split)
        return summarise(
            write_predictions(path, one.samples, predictions_of(one.samples, answers)),
            model=model,
            dataset=one.name,
            split=one.split,
            resamples=self.config.evaluation.bootstrap_resamples,
            seed=self.config.seed,
        )

    def rationale(self) -> None:
        """Stage 1: LoRA on rationale-answer pairs."""
        raps, dropped = rationale_pairs(self.config, self.rationale_samples)
        loop = self.config.rationale.seeded(self.config.seed, self.config.deterministic)

        def work(progress: Track) -> dict[str, Any]:
            lvlm = self.policy.fresh()
            profiler = self._profiler("rationale")
            with kept_if_not_finite("rationale", self.config, lvlm, raps, loop, self.directory.path):
                fine_tune_rationale(
                    lvlm,
                    raps,
                    loop,
                    features=self.policy.features,
                    on_step=self._step("rationale", progress),
                    on_items=self._expect("rationale", loop),
                    profiler=profiler,
                    checkpoints=self._checkpoints("rationale", ("lora", "rationale"), progress),
                )
            if profiler is not None:
                profiler.show()
            self._keep_adapter(self.directory.rationale_adapter)
            return {"pairs": len(raps), "dropped": dict(dropped)}

        self._stage("rationale", ("lora", "rationale"), num_steps(len(raps), loop), work, unit="steps")

    def candidates(self, iteration: int) -> None:
        """Stage 2: diverse candidates of this round's samples."""
        samples = self._samples_of(iteration)

        def work(progress: Track) -> dict[str, Any]:
            found = self._search(self.directory.checkpoint(stage), sections, samples, iteration, progress)
            distributed.from_main(lambda: write_shards(self.records.shards(iteration, "candidates"), found.rows()))
            return {"diversity": diversity(own for _, own in self.records.candidates(iteration).rest())}

        stage, sections = f"iteration-{iteration}/candidates", ("candidates",)
        self._stage(stage, sections, len(samples), work)

    def headroom(self, iteration: int) -> None:
        """What the round's starting model could reach on held-out samples: candidates and the R-Scorer's pick."""
        chosen = self._headroom_samples()
        before = "rationale" if iteration == 1 else f"iteration-{iteration - 1}"

        def work(progress: Track) -> dict[str, Any]:
            place = self.directory.checkpoint(stage)
            searched = [
                self._search(place / f"{one.name}-{one.split}", sections, samples, iteration, progress)
                for one, samples in chosen
            ]
            judge, quiet = self._load_judge(), Track("scores", 0, quiet=True)
            entries = []
            for (one, samples), parts in zip(chosen, searched, strict=True):
                found = partial(self.records.candidates_in, place, parts)
                scores = place / f"{one.name}-{one.split}-scores"
                rows = self._compare(scores, sections, judge, samples, found, quiet).rows()
                good = self.records.aligned(before, one.name, one.split, samples)
                entry = measure_headroom(samples, good, found(), rows)
                entries.append({"iteration": iteration, "dataset": one.name, "split": one.split} | entry)
            return {"entries": entries}

        stage, sections = f"iteration-{iteration}/headroom", ("candidates", "scorer", "evaluation")
        total = sum(len(samples) for _, samples in chosen)
        self._stage(stage, sections, total, work)

    def scores(self, iteration: int) -> None:
        """Stage 3: the R-Scorer compares every sample's candidates."""
        samples = self._samples_of(iteration)

        def work(progress: Track) -> dict[str, Any]:
            place, own = self.directory.checkpoint(stage), partial(self.records.candidates, iteration)
            adaptive = AdaptivePairs.of(self.config.scorer)
            found = self._compare(place, sections, self._load_judge(), samples, own, progress, adaptive)
            distributed.from_main(lambda: write_shards(self.records.shards(iteration, "scores"), found.rows()))
            return {} if adaptive is None else {"adaptive": replace(adaptive, counts=found.counts()).report()}

        stage, sections = f"iteration-{iteration}/scores", ("scorer",)
        self._stage(stage, sections, len(samples), work)

    def preferences(self, iteration: int) -> None:
        """Stage 4, first half: pairs, their confidences, and the reference's log-probabilities."""
        samples = self._samples_of(iteration)

        def work(progress: Track) -> dict[str, Any]:
            pairs, funnel = curate(
                samples,
                self.records.candidates(iteration),
                self.records.scores(iteration),
                self.config.curation,
                self.config.seed,
            )
            if not pairs:
                raise InputError(
                    field="curation",
                    expected="at least one preference pair",
                    found=f"dropped: {funnel['dropped']}",
                    mend="lower curation.min_margin or curation.min_confidence, or raise candidates.temperature",
                )
            reuse = self.config.dpo.reuse_generation_logprobs
            done, takeover = references_from_candidates(
                self.policy.use(self.directory.adapter(iteration - 1)),
                pairs,
                self.samples,
                self.records.candidates(iteration) if reuse else {},  # without candidates all are computed
                reference_hash=self.policy.hash(),
                features=self.policy.features,
                token_budget=self.config.dpo.token_budget,
                on_forest=lambda forest: progress.advance(0, tokens=forest.num_tokens),
                seed=self.config.seed + iteration,
                logprobs=references_in_pieces(
                    self.directory.checkpoint(stage), self._depends_on(sections, policy=True), progress
                ),
            )
            progress.advance(len(samples))
            distributed.from_main(partial(self._write_preferences, iteration, done))
            return {"funnel": funnel, "references": takeover.to_json()}

        stage, sections = f"iteration-{iteration}/preferences", ("curation",)
        self._stage(stage, sections, len(samples), work)

    def preference_tuning(self, iteration: int) -> None:
        """Stage 4, second half: confidence-weighted DPO from the round's starting policy, which is the reference."""
        pairs = self.records.preferences(iteration)
        rehearsal, _ = (
            rationale_pairs(self.config, self.rationale_samples) if self.config.dpo.rehearsal_weight else ([], {})
        )
        loop = self.config.dpo.seeded(self.config.seed + iteration, self.config.deterministic)

        def work(progress: Track) -> dict[str, Any]:
            lvlm = self.policy.use(self.directory.adapter(iteration - 1))
            profiler = self._profiler(f"iteration-{iteration}/dpo")
            with kept_if_not_finite("dpo", self.config, lvlm, [*pairs, *rehearsal], loop, self.directory.path):
                train_preference(
                    lvlm,
                    pairs,
                    loop,
                    weighting=self.config.curation.weighting,
                    expected_reference_hash=self.policy.hash(),
                    features=self.policy.features,
                    on_step=self._step(f"iteration-{iteration}/dpo", progress),
                    rehearsal=rehearsal,
                    on_items=self._expect("dpo", loop),
                    profiler=profiler,
                    checkpoints=self._checkpoints(f"iteration-{iteration}/dpo", ("curation", "dpo"), progress),
                )
            if profiler is not None:
                profiler.show()
            self._keep_adapter(self.directory.adapter(iteration))
            return {"pairs": len(pairs)}

        self._stage(
            f"iteration-{iteration}/dpo", ("dpo",), num_steps(len(pairs) + len(rehearsal), loop), work, unit="steps"
        )

    # The summary ------------------------------------------------------------------------------------------

    def write_summary(self) -> None:
        """`summary.json` from the manifest: what every stage found, how long it took, the headroom recovered; and the page."""
        manifest, headroom = self.directory.manifest(), []
        for entry in (e for name, stage in manifest.items() if name.endswith("/headroom") for e in stage["entries"]):
            name, split = entry["dataset"], entry["split"]
            samples = next(own for one, own in self._headroom_samples() if (one.name, one.split) == (name, split))
            after = self.records.aligned(f"iteration-{entry['iteration']}", name, split, samples)
            headroom.append(with_next(entry, after))
        write_json(self.directory.summary_file, summary_of(manifest, headroom, self.rejected))
        write_report(self.directory.path)

    def _write_preferences(self, iteration: int, pairs: list[Preference]) -> None:
        """A round's pairs, and `gallery.json`, which shows some of the last round's."""
        write_shards(self.records.shards(iteration, "preferences"), (pair.to_json() for pair in pairs))
        candidates, scores = self.records.candidates(iteration), self.records.scores(iteration)
        names = partial(image_names, run=self.directory.path, output=Path(self.config.output))
        shown = gallery_of(iteration, pairs, self.samples, candidates, scores, names)
        write_json(self.directory.path / "gallery.json", shown)

    # Helpers ----------------------------------------------------------------------------------------------

    def _stage(
        self,
        name: str,
        sections: tuple[str, ...],
        total: int,
        work: Callable[[Track], dict[str, Any]],
        unit: str = "samples",
        adapted: bool = True,
    ) -> None:
        """Run a stage unless the manifest has it, with a progress bar, and enter it when all it wrote is on disk.

        All ranks do it, as rank 0 finds it in the manifest; none leaves before rank 0 has entered it.

        Args:
            name: the manifest's.
            sections: settings that the stage depends on, beside those of all stages.
            total: units to do.
            work: does it; what it returns is entered.
            unit: what is counted.
            adapted: whether the policy has an adapter.
        """
        settings = self._settings(sections)
        if distributed.from_main(lambda: self.directory.stage_done(name, settings) is not None):
            distributed.from_main(lambda: self.directory.forget_checkpoint(name))
            return
        distributed.from_main(lambda: self.directory.forget_metrics(name))
        kind = name.rpartition("/")[2]
        self.forecast = forecast_stage(self.config, kind, images=len(self.samples))
        if not adapted:
            self.forecast = replace(self.forecast, adapter=0.0)
        with (
            out_of_memory_is_met(self.config, kind),
            measured(
                self.config.model.device, lambda: [p for model in self._models() for p in model.parameters()]
            ) as taken,
            track(name, total, unit, quiet=self.config.quiet) as progress,
        ):
            found = work(progress)
            distributed.meet()  # nothing that a rank still reads is removed
        found["memory"] = taken.record(self.forecast, self._models())
        self.judge = None
        self.policy.end_stage()
        found["peak_rss_bytes"] = peak_rss_bytes()  # of this process: a run that is continued has several
        distributed.from_main(
            lambda: self.directory.finish_stage(name, settings, progress.seconds, progress.tokens, **found)
        )
        distributed.from_main(lambda: self.directory.forget_checkpoint(name))
        distributed.under_way()

    def _settings(self, sections: tuple[str, ...]) -> dict[str, Any]:
        """Those of all stages, and of these sections."""
        resolved = self.config.model_dump(mode="json")
        return {key: resolved[key] for key in dict.fromkeys(("seed", "model", "data", *sections))}

    def _checkpoints(self, stage: str, sections: tuple[str, ...], progress: Track) -> TrainingCheckpoints:
        """Of a training stage, whose metrics and progress go on where it does."""

        def on_continue(history: list[dict[str, Any]], seconds: float) -> None:
            distributed.from_main(lambda: self.directory.forget_metrics(stage, history))
            progress.went_on(len(history), sum(metrics["tokens"] for metrics in history), seconds)

        often = self.config.checkpoint
        place, settings = self.directory.checkpoint(stage), self._settings(sections)
        return TrainingCheckpoints(place, settings, often.minutes, often.steps, on_continue)

    def _step(self, stage: str, progress: Track) -> Callable[[dict[str, Any]], None]:
        def on_step(metrics: dict[str, Any]) -> None:
            if distributed.is_main():
                with self.directory.metrics() as writer:
                    writer.write({"stage": stage} | metrics)
            progress.advance(1, tokens=metrics["tokens"])

        return on_step

    def _profiler(self, stage: str) -> StepProfiler | None:
        if self.profile is None or not distributed.is_main():
            return None
        return StepProfiler(self.profile, self.directory.path / "profile" / stage)

    def _keep_adapter(self, directory: Path) -> None:
        if distributed.is_main():
            directory.mkdir(parents=True, exist_ok=True)
            save_adapter(self.policy.model, directory)
        self.policy.adapter = directory
        self.policy.model.zero_grad(set_to_none=True)  # no later stage needs the gradients' memory

    def _models(self) -> list[torch.nn.Module]:
        """What is in memory."""
        return [
            model for model in (self.policy.model if self.policy.in_memory else None, self.judge) if model is not None
        ]

    def _load_judge(self) -> Scorer:
        """The R-Scorer, for the rest of the stage; the policy leaves where it has no place beside it."""
        self.policy.make_room()
        self.judge = load_judge(self.config)
        return self.judge

    def _expect(self, stage: str, loop: TrainingConfig) -> Callable[[Sequence[TrainingItem]], None]:
        """Told of a training stage's items, it forecasts their memory in place of typical ones'."""

        def forecast(items: Sequence[TrainingItem]) -> None:
            self.forecast = forecast_items(self.config, stage, [item.tree for item in items], loop)

        return forecast

    def _depends_on(self, sections: tuple[str, ...], policy: bool = False) -> Callable[[], dict[str, Any]]:
        """What a stage's pieces depend on beside their items: settings, and the policy as it is then or the R-Scorer."""

        def found() -> dict[str, Any]:
            if policy:
                return {**self._settings(sections), "policy": self.policy.hash()}
            assert self.judge is not None
            return {**self._settings(sections), "scorer": model_hash(self.judge.text_model.path)}

        return found

    def _search(
        self, place: Path, sections: tuple[str, ...], samples: list[Sample], iteration: int, progress: Track
    ) -> Parts:
        section = self.config.candidates
        return candidates_in_pieces(
            place,
            self._depends_on(sections, policy=True),
            self.policy.use(self.directory.adapter(iteration - 1)),
            samples,
            section,
            features=self.policy.features,
            seed=self.config.seed + iteration,
            batch_size=section.batch_size,
            progress=progress,
            graphs=section.cuda_graphs,
        )

    def _compare(
        self,
        place: Path,
        sections: tuple[str, ...],
        judge: Scorer,
        samples: list[Sample],
        candidates: Callable[[], InOrder[list[Candidate]]],
        progress: Track,
        adaptive: AdaptivePairs | None = None,
    ) -> Parts:
        section, depends_on = self.config.scorer, self._depends_on(sections)
        budget, mode = section.token_budget, section.mode
        return scores_in_pieces(
            place, depends_on, judge, samples, lambda: candidates().rest(), budget, mode, progress, adaptive
        )

    def _samples_of(self, iteration: int) -> list[Sample]:
        return draw_round(self.calibration_samples, self.config.candidates.samples, iteration, self.config.seed)

    def _headroom_samples(self) -> list[tuple[EvaluationSet, list[Sample]]]:
        """The evaluation sets of which the oracle can judge samples, with the first of these."""
        most = self.config.evaluation.headroom_samples
        chosen = [(one, headroom_samples(one.samples, most)) for one in self.evaluation_sets]
        return [(one, samples) for one, samples in chosen if samples]
