"""Self-Rationale Calibration on one page: rationale fine-tuning, then rounds of candidates, scores, curation and DPO.

Each stage below hands its work to `CalibrationRun.stage`, which runs it unless the manifest lists it as finished: the same
command continues a stopped run. All ranks run all stages together; rank 0 writes what a run has once (manifest, adapters, page).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from srcfast import distributed
from srcfast.config.settings import Config
from srcfast.data.batching import num_updates
from srcfast.data.jsonl import write_shards
from srcfast.memory.out_of_memory import explain_out_of_memory
from srcfast.report.run_results import write_preferences, write_summary
from srcfast.run.lock import exclusive_lock
from srcfast.run.progress import StageProgress
from srcfast.stages import curation
from srcfast.stages.adaptive_pairs import AdaptivePairs
from srcfast.stages.calibration_run import CalibrationRun
from srcfast.stages.candidates import diversity, search_candidates
from srcfast.stages.dpo import tune_preferences
from srcfast.stages.endpoint_scoring import check_endpoints, scores_by_endpoint
from srcfast.stages.evaluation import answers_in_chunks, write_evaluation
from srcfast.stages.fitting import pair_fits
from srcfast.stages.headroom import measure_headroom
from srcfast.stages.rationale import rationale_pairs, tune_rationale
from srcfast.stages.references import stage_references
from srcfast.stages.scoring import scores_in_chunks
from srcfast.stages.stage_run import StageRun
from srcfast.trackers.tracking import check_installed, tracking


def calibrate(config: Config, profile: range | None = None) -> Path:
    """Run or continue a whole calibration; return the path of its page.

    Args:
        profile: the steps of each training stage to profile, into the run directory's `profile/STAGE/`.

    Raises:
        ConfigError: the run directory holds a stage that was finished, or begun, with other settings; or a tracker is not
            installed.
        SrcfastError: another process works in the run directory.
        Interrupted: a signal stopped the run; the same call continues.
        InputError: data that can't be used, by file, line and field.
    """
    check_endpoints(config)
    check_installed(config, config.run_path)
    with exclusive_lock(config.run_path, whole=True), tracking(config, config.run_path) as trackers:
        with explain_out_of_memory(config, "evaluation"):  # the first stage that needs the model
            run = CalibrationRun(config, profile, trackers)
        evaluate(run, "base", adapter=None)
        rationale(run)
        evaluate(run, "rationale", run.directory.adapter(0))
        for iteration in range(1, config.iterations + 1):
            candidates(run, iteration)
            headroom(run, iteration)
            score(run, iteration)
            curate(run, iteration)
            dpo(run, iteration)
            evaluate(run, f"iteration-{iteration}", run.directory.adapter(iteration))
        distributed.run_on_rank_zero(lambda: write_summary(run))
        return run.directory.report_file


def evaluate(run: CalibrationRun, model: str, adapter: Path | None) -> None:
    """Answer every evaluation set greedily with `model` ("base", "rationale", "iteration-K"); write its predictions."""

    def work(stage: StageRun) -> dict[str, Any]:
        lvlm, entries = run.policy.use(adapter), []
        for dataset in run.evaluation_sets:
            chunks = stage.chunks(dataset.label, policy=run.policy.hash)
            answers = answers_in_chunks(
                chunks, lvlm, dataset.samples, run.config.evaluation, features=run.policy.features
            )
            path = run.artifacts.predictions(model, dataset.name, dataset.split)
            write = partial(write_evaluation, path, answers, dataset, model, run.config)
            entries += [distributed.run_on_rank_zero(write)]
        return {"entries": entries}

    total = sum(len(dataset.samples) for dataset in run.evaluation_sets)
    run.stage(f"{model}/evaluation", ("data", "evaluation"), total, work, adapted=adapter is not None)


def rationale(run: CalibrationRun) -> None:
    """Stage 1: train a LoRA adapter on rationale-answer pairs: adapter 0. Round K trains adapter K - 1 on to adapter K."""
    pairs, dropped = rationale_pairs(run.config, run.rationale_samples)
    loop = run.config.rationale.seeded(run.config.seed, run.config.deterministic)

    def work(stage: StageRun) -> dict[str, Any]:
        tune_rationale(stage, run.policy, pairs, loop)
        run.policy.save(run.directory.adapter(0))
        return {"pairs": len(pairs), "dropped": dict(dropped)}

    run.stage("rationale", ("lora", "rationale"), num_updates(len(pairs), loop), work, unit="steps")


def candidates(run: CalibrationRun, iteration: int) -> None:
    """Stage 2: generate diverse candidates of this round's samples."""
    samples = run.samples_of(iteration)

    def work(stage: StageRun) -> dict[str, Any]:
        run.policy.use(run.directory.adapter(iteration - 1))
        files = search_candidates(stage, run.policy, samples, run.config.seed + iteration)
        distributed.run_on_rank_zero(lambda: write_shards(run.artifacts.shards(iteration, "candidates"), files.rows()))
        return {"diversity": diversity(group for _, group in run.artifacts.candidates(iteration).rest())}

    run.stage(f"iteration-{iteration}/candidates", ("candidates",), len(samples), work)


def headroom(run: CalibrationRun, iteration: int) -> None:
    """Measure what the round's starting model could reach on held-out samples: by its candidates, and by the R-Scorer's pick."""
    sets, seed = run.headroom_sets(), run.config.seed + iteration
    previous = "rationale" if iteration == 1 else f"iteration-{iteration - 1}"

    def work(stage: StageRun) -> dict[str, Any]:
        run.policy.use(run.directory.adapter(iteration - 1))
        # Candidates of all sets first: the R-Scorer may have to take the policy's memory.
        searched = [search_candidates(stage, run.policy, samples, seed, dataset.label) for dataset, samples in sets]
        if not sets:
            return {"entries": []}
        scorer, scorer_hash = run.load_scorer()
        adaptive = AdaptivePairs.of(run.config.scorer) if run.config.scorer.finalists else None
        entries, quiet = [], StageProgress("scores", 0, quiet=True)  # the stage's progress counts samples once
        for (dataset, samples), files in zip(sets, searched, strict=True):
            groups = partial(run.artifacts.candidates_in, stage.checkpoint_dir, files)
            chunks = replace(stage.chunks(f"{dataset.label}-scores", scorer=scorer_hash), progress=quiet)
            score_files = scores_in_chunks(chunks, scorer, samples, groups, run.config.scorer, adaptive)
            aligned = run.artifacts.aligned(previous, dataset.name, dataset.split, samples)
            labels = {"iteration": iteration, "dataset": dataset.name, "split": dataset.split}
            measured = measure_headroom(samples, aligned, groups(), score_files.rows())
            entries.append(labels | measured | {"tokens": files.counts()["tokens"]})
        return {"entries": entries}

    total = sum(len(samples) for _, samples in sets)
    run.stage(f"iteration-{iteration}/headroom", ("candidates", "scorer", "evaluation"), total, work)


def score(run: CalibrationRun, iteration: int) -> None:
    """Stage 3: compare every sample's candidates with the R-Scorer."""
    samples, adaptive = run.samples_of(iteration), AdaptivePairs.of(run.config.scorer)

    def ask(stage: StageRun) -> dict[str, Any]:
        groups, log_file = run.artifacts.candidates(iteration).rest(), run.directory.path / "judge" / "answers.jsonl"
        write = partial(write_shards, run.artifacts.shards(iteration, "scores"))
        return {"endpoint": scores_by_endpoint(run.config, samples, groups, log_file, stage.progress, write)}

    def work(stage: StageRun) -> dict[str, Any]:
        scorer, scorer_hash = run.load_scorer()
        chunks, groups = stage.chunks(scorer=scorer_hash), partial(run.artifacts.candidates, iteration)
        files = scores_in_chunks(chunks, scorer, samples, groups, run.config.scorer, adaptive)
        distributed.run_on_rank_zero(lambda: write_shards(run.artifacts.shards(iteration, "scores"), files.rows()))
        errors = {name: scorer.calibration[name] for name in ("ece_before", "ece_after") if name in scorer.calibration}
        result = {"calibration": errors} if errors else {}
        return result if adaptive is None else {**result, "adaptive": replace(adaptive, counts=files.counts()).report()}

    by_endpoint = run.config.scorer.endpoint is not None
    run.stage(f"iteration-{iteration}/scores", ("scorer",), len(samples), ask if by_endpoint else work)


def curate(run: CalibrationRun, iteration: int) -> None:
    """Stage 4, first half: choose preference pairs with their confidences, and add the reference's log-probabilities."""
    samples, artifacts, seed = run.samples_of(iteration), run.artifacts, run.config.seed

    def work(stage: StageRun) -> dict[str, Any]:
        candidates, scores = artifacts.candidates(iteration), artifacts.scores(iteration)
        # The reference is the policy that the round starts from, whose candidates these are.
        policy = run.policy.use(run.directory.adapter(iteration - 1))
        fits = partial(pair_fits, policy, run.config.dpo.token_budget)
        pairs, funnel = curation.curate(samples, candidates, scores, run.config.curation, seed, fits)
        curation.check_pairs_left(pairs, funnel)
        generated: Any = artifacts.candidates(iteration) if run.config.dpo.reuse_generation_logprobs else {}
        pairs, report = stage_references(stage, run.policy, pairs, run.samples, generated, seed + iteration)
        stage.progress.advance(len(samples))
        distributed.run_on_rank_zero(lambda: write_preferences(run, iteration, pairs))
        return {"funnel": funnel, "references": report.to_json()}

    run.stage(f"iteration-{iteration}/preferences", ("curation",), len(samples), work)


def dpo(run: CalibrationRun, iteration: int) -> None:
    """Stage 4, second half: train by confidence-weighted DPO from the round's starting policy, which is the reference."""
    settings = run.config.dpo.seeded(run.config.seed + iteration, run.config.deterministic)
    pairs = run.artifacts.preferences(iteration)
    rehearsal = rationale_pairs(run.config, run.rationale_samples)[0] if settings.rehearsal_weight else []

    def work(stage: StageRun) -> dict[str, Any]:
        run.policy.use(run.directory.adapter(iteration - 1))
        tune_preferences(stage, run.policy, pairs, settings, rehearsal)
        run.policy.save(run.directory.adapter(iteration))
        return {"pairs": len(pairs)}

    steps = num_updates(len(pairs) + len(rehearsal), settings)
    run.stage(f"iteration-{iteration}/dpo", ("dpo",), steps, work, unit="steps", checkpoint_sections=("curation",))
