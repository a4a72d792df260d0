"""The commands that run a stage: read the input, run the stage, write its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial, wraps
from pathlib import Path
from typing import Any

from rich.console import Console

from srcfast import calibrate as calibration
from srcfast import distributed
from srcfast.cli.hub_inputs import from_hub
from srcfast.cli.inputs import (
    Source,
    check_output,
    datasets,
    read_all,
    read_candidates,
    read_preference_file,
    rejected_records,
    require_option,
)
from srcfast.cli.table import results_table
from srcfast.cli.teach import asked_directory, rejected_file, write_taught
from srcfast.config.settings import Config, LoRAConfig
from srcfast.data.batching import num_updates
from srcfast.data.jsonl import write_json, write_jsonl, write_shards
from srcfast.data.rationale_pairs import read_teacher, with_teacher
from srcfast.data.readers import read_logprob_rows
from srcfast.data.verdicts import read_verdicts
from srcfast.errors import ConfigError
from srcfast.hub.names import shown_model
from srcfast.hub.pins import Data, Model, pinned
from srcfast.memory.out_of_memory import explain_out_of_memory
from srcfast.models.scorer import scorer_hash
from srcfast.models.text_model import save_text_model
from srcfast.models.verdict_temperature import CALIBRATION
from srcfast.run.chunks import remove_chunks
from srcfast.run.lock import exclusive_lock
from srcfast.run.progress import track
from srcfast.stages import fitting
from srcfast.stages.adaptive_pairs import AdaptivePairs
from srcfast.stages.candidates import search_candidates
from srcfast.stages.datasets import draw, read_evaluation_sets, read_vocabulary
from srcfast.stages.dpo import tune_preferences
from srcfast.stages.endpoint_scoring import scores_by_endpoint
from srcfast.stages.evaluation import answers_in_chunks, write_evaluation
from srcfast.stages.local_teaching import draws_in_chunks, taught_by
from srcfast.stages.logprobs import logprob_chunks, logprobs_in_chunks, logprobs_of
from srcfast.stages.policy import Policy, load_scorer_for
from srcfast.stages.rationale import rationale_pairs, tune_rationale
from srcfast.stages.references import with_references
from srcfast.stages.scorer_calibration import calibrate_confidence
from srcfast.stages.scorer_training import ScorerExample, evaluate_scorer, split_examples, train_scorer
from srcfast.stages.scoring import scores_in_chunks
from srcfast.stages.stage_inputs import COMMAND, InputRecord
from srcfast.stages.stage_run import sampling_stage, training_stage
from srcfast.stages.teaching import Drawing, instructed, needs_no_teacher
from srcfast.stages.verdict_examples import with_verdicts
from srcfast.trackers.tracking import check_installed


@contextmanager
def on_all_ranks(config: Config) -> Iterator[Config]:
    """Join the ranks that `torchrun` has started, and yield this rank's settings: all ranks but 0 are quiet."""
    with distributed.process_group(timedelta(seconds=config.distributed.timeout_seconds), config.model.device):
        yield config if distributed.is_rank_zero() else config.replace(quiet=True)


def on_ranks(
    stage: str,
    reads: Model = "model",
    data: Data | None = "train",
    record: Callable[[Path], Path | None] = lambda output: output,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command, whose first argument is the settings, to run on all ranks and to explain errors of memory.

    What settings and options name of the Hub is downloaded first.

    Args:
        stage: whose memory errors explain.
        reads: the model of the settings that the command loads.
        data: the datasets of the settings that it reads where it is given no --data; None: none.
        record: returns the directory for the commits, by the command's output; None: they are not recorded.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(config: Config, **options: Any) -> None:
            with on_all_ranks(config) as local, explain_out_of_memory(local, stage):
                output: Path | None = options.get("output")
                directory = None if output is None else record(output)
                local, options = from_hub(local, options, models=[reads], data=data, directory=directory)
                command(local, **options)

        return run

    return decorate


def say_what_servers_take(config: Config, lora: LoRAConfig) -> None:
    """Print that an adapter of projector or tower is merged before it is served."""
    if (lora.projector or lora.tower_layers) and not config.quiet:
        print("to serve: srcfast merge first; vLLM and SGLang take adapters of the language model alone")


def calibrate(config: Config, profile: range | None = None) -> None:
    """Run all stages, then print the results and the path of the page.

    Args:
        profile: steps to profile of each training stage.
    """
    check_output(config, config.run_path, option="output and name")
    with on_all_ranks(config) as local:
        judged = config.iterations and config.scorer.endpoint is None
        models: tuple[Model, ...] = ("model", "scorer") if judged else ("model",)
        local = pinned(local, config.run_path, models=models, data=("train", "evaluation"))
        page = calibration.calibrate(local, profile)
        if not distributed.is_rank_zero():
            return
    if not config.quiet:
        summary = json.loads((config.run_path / "summary.json").read_text(encoding="utf-8"))
        Console().print(results_table(summary))
    print(f"page: {page}")
    say_what_servers_take(config, config.lora)


@on_ranks("rationale")
def rationale(config: Config, source: Source, output: Path | None, profile: range | None = None) -> None:
    """Train an adapter on rationale-answer pairs, and save it in `output`."""
    output = require_option(output, "--output", "a folder for the adapter")
    check_output(config, output, source.paths)
    check_installed(config, output)
    with rejected_records(output) as rejected:
        samples = read_all(config, source, "rationale", rejected)
        policy = Policy(config, samples)
        samples = fitting.split_fitting(samples, fitting.check_lesson(policy.model, config), config, rejected)
    pairs, dropped = rationale_pairs(config, samples)
    loop = config.rationale.seeded(config.seed, config.deterministic)
    steps = num_updates(len(pairs), loop)
    with training_stage("rationale", config, output, steps, lambda: [policy.model], profile) as stage:
        tune_rationale(stage, policy, pairs, loop)
        policy.save(output)
        say_what_servers_take(config, policy.model.lora_config)
        stage.result = {
            "model": shown_model(policy.model.path),
            "samples": len(pairs) + dropped.total(),
            "pairs": len(pairs),
            "dropped": dict(dropped),
        }


@on_ranks("candidates")
def candidates(config: Config, source: Source, adapter: Path | None, output: Path | None) -> None:
    """Search candidates of each sample, and write them into shards in `output`."""
    output = require_option(output, "--output", "a folder for the candidates")
    check_output(config, output, source.paths, adapter)
    with rejected_records(output) as rejected:
        samples = read_all(config, source, "calibration", rejected)
        policy = Policy(config, samples, adapter)
        samples = fitting.split_fitting(samples, fitting.check_fits(policy.model), config, rejected)
    if config.candidates.samples:
        samples = draw(samples, config.candidates.samples, f"candidates/{config.seed}")
    made_of = InputRecord(output, {COMMAND: samples})
    with sampling_stage("candidates", config, output, len(samples), ("candidates",), made_of) as stage:
        files = search_candidates(stage, policy, samples, config.seed)
        distributed.run_on_rank_zero(lambda: write_outputs(made_of, files.rows()))


@on_ranks("candidates", record=asked_directory)
def teach_here(config: Config, source: Source, adapter: Path | None, output: Path, drawing: Drawing) -> None:
    """Sample rationales of each sample that has none, and write those that reach its answer to `output`."""
    directory = asked_directory(output)
    with rejected_records(directory, rejected_file(output)) as rejected:
        samples = read_all(config, source, "rationale", rejected)
        asked = [sample for sample in samples if needs_no_teacher(sample) is None]
        shown = asked if adapter is not None else list(map(instructed, asked))
        policy = Policy(config, shown, adapter)
        shown = fitting.split_fitting(shown, fitting.check_fits(policy.model), config, rejected)
    fits = {sample.id for sample in shown}
    asked = [sample for sample in asked if sample.id in fits]
    made_of = InputRecord(directory, {COMMAND: shown})
    with sampling_stage("teach", config, directory, len(shown), (), made_of) as stage:
        chunks = stage.chunks(policy=policy.hash, drawing=partial(asdict, drawing))
        files = draws_in_chunks(
            chunks,
            policy.model,
            shown,
            drawing,
            config.candidates,
            features=policy.features,
            seed=config.seed,
        )

        def write() -> None:
            taught = taught_by(asked, files.rows())
            write_taught(config, output, samples, taught, {"rejected": len(rejected), **files.counts()})

        distributed.run_on_rank_zero(write)


@on_ranks("scores", "scorer")
def score(config: Config, source: Source, candidates: Path | None, output: Path | None) -> None:
    """Score candidates, and write the scores into shards in `output`."""
    output = require_option(output, "--output", "a folder for the scores")
    check_output(config, output, source.paths, candidates)
    directory, adaptive = require_option(candidates, "--candidates", "a folder"), AdaptivePairs.of(config.scorer)
    if config.scorer.endpoint is not None:
        return score_by_endpoint(config, source, directory, output)
    with rejected_records(output) as rejected:
        samples, scorer = read_all(config, source, "calibration", rejected), load_scorer_for(config)
        longest = fitting.longest_candidates(scorer, read_candidates(directory).rest())
        samples = fitting.split_fitting(samples, fitting.check_judged(scorer, config, longest), config, rejected)
    made_of = InputRecord(output, {COMMAND: samples})
    distributed.run_on_rank_zero(lambda: made_of.check_made_of(directory))
    with sampling_stage("score", config, output, len(samples), ("scorer",), made_of) as stage:
        chunks = stage.chunks(scorer=partial(scorer_hash, scorer))
        files = scores_in_chunks(chunks, scorer, samples, lambda: read_candidates(directory), config.scorer, adaptive)
        distributed.run_on_rank_zero(lambda: write_outputs(made_of, files.rows()))
        if adaptive is not None:
            report = replace(adaptive, counts=files.counts()).report()
            distributed.run_on_rank_zero(lambda: write_json(output / "adaptive.json", report))


def score_by_endpoint(config: Config, source: Source, candidates: Path, output: Path) -> None:
    """Have an endpoint's model compare candidates, and write the scores into shards in `output`."""
    with rejected_records(output) as rejected:
        samples = read_all(config, source, "calibration", rejected)
    made_of = InputRecord(output, {COMMAND: samples})
    distributed.run_on_rank_zero(lambda: made_of.check_made_of(candidates))
    with sampling_stage("score", config, output, len(samples), ("scorer",), made_of) as stage:
        groups, log_file = read_candidates(candidates).rest(), output / "judge" / "answers.jsonl"
        report = scores_by_endpoint(config, samples, groups, log_file, stage.progress, partial(write_outputs, made_of))
        distributed.run_on_rank_zero(lambda: write_json(output / "endpoint.json", report))


def write_outputs(made_of: InputRecord, rows: Iterable[dict[str, Any]]) -> None:
    """Write shards, and before them which records they are made of."""
    made_of.write()
    write_shards(made_of.directory, rows)


@on_ranks("dpo", data=None)
def dpo(
    config: Config, source: Source, adapter: Path | None, output: Path | None, profile: range | None = None
) -> None:
    """Train `adapter`, or a new one, on preference pairs, and save it in `output`."""
    if config.dpo.rehearsal_weight:
        raise ConfigError(
            "dpo.rehearsal_weight: expected 0, since this command is given no rationale-answer pairs to rehearse, "
            f"found {config.dpo.rehearsal_weight}. Fix: leave it out, or use `srcfast calibrate`"
        )
    output = require_option(output, "--output", "a folder for the adapter")
    check_output(config, output, source.paths, adapter)
    check_installed(config, output)
    with rejected_records(output) as rejected:
        pairs = read_preference_file(config, source, rejected)
        policy = Policy(config, pairs)
        pairs = fitting.split_fitting(
            pairs, fitting.check_pair(policy.model, config.dpo.token_budget), config, rejected
        )
    if source.data is not None and source.data.is_dir():
        distributed.run_on_rank_zero(partial(InputRecord(output, {COMMAND: pairs}).check_made_of, source.data))
    if adapter is None:
        policy.fresh()
    else:
        policy.use(adapter, to_train=True)
    settings = config.dpo.seeded(config.seed, config.deterministic)
    pairs, missing = with_references(config, policy, pairs, output)
    steps = num_updates(len(pairs), settings)
    with training_stage("dpo", config, output, steps, lambda: [policy.model], profile) as stage:
        tune_preferences(stage, policy, pairs, settings)
        policy.save(output)
        say_what_servers_take(config, policy.model.lora_config)
        stage.result = {"model": shown_model(policy.model.path), "pairs": len(pairs), "references_computed": missing}


@on_ranks("evaluation", data="evaluation")
def evaluate(config: Config, source: Source, adapter: Path | None, output: Path | None) -> None:
    """Answer each evaluation dataset greedily, and write `predictions/` and `summary.json` in `output`."""
    output = require_option(output, "--output", "a folder for predictions and summary")
    check_output(config, output, source.paths, adapter)
    with rejected_records(output) as rejected:
        evaluation_sets = read_evaluation_sets(
            datasets(config, source, "evaluation"), config, Path(config.output) / "images", rejected
        )
        policy = Policy(config, [sample for each in evaluation_sets for sample in each.samples], adapter)
        check = fitting.check_fits(policy.model)
        evaluation_sets = [
            replace(each, samples=fitting.split_fitting(each.samples, check, config, rejected))
            for each in evaluation_sets
        ]
    total = sum(len(evaluation_set.samples) for evaluation_set in evaluation_sets)
    made_of = InputRecord(output, {dataset.label: dataset.samples for dataset in evaluation_sets})
    with sampling_stage("evaluate", config, output, total, ("evaluation",), made_of) as stage:
        entries = []
        for evaluation_set in evaluation_sets:
            name = evaluation_set.label
            answers = answers_in_chunks(
                stage.chunks(name, policy=policy.hash),
                policy.model,
                evaluation_set.samples,
                config.evaluation,
                features=policy.features,
            )
            path, model = output / "predictions" / name, "base" if adapter is None else shown_model(adapter)
            write = partial(write_evaluation, path, answers, evaluation_set, model, config)
            entries.append(distributed.run_on_rank_zero(write))
        summary = {"evaluations": entries, "rejected": len(rejected)}
        distributed.run_on_rank_zero(lambda: write_json(output / "summary.json", summary))
    if not config.quiet and distributed.is_rank_zero():
        print(json.dumps(entries, indent=2))


@on_ranks("preferences", data=None, record=lambda output: None)  # a file, whose chunks name the weights
def logprob(
    config: Config, adapter: Path | None, data: Path | None, image_root: Path | None, output: Path | None
) -> None:
    """Write {logprob, tokens} for each line of {images, turns?, prompt, response}; a bad line stops the command.

    Finished chunks are stored in a directory beside `output` until `output` is written.
    """
    path = require_option(data, "--data", "JSON lines of {images, prompt, response}")
    output = require_option(output, "--output", "a file for the log-probabilities")
    if not output.name or output.is_dir():
        raise ConfigError(
            f"--output: expected a file for the log-probabilities, found the folder {output}. Fix: name a file"
        )
    check_output(config, output, path, adapter, is_file=True)
    rows = read_logprob_rows(path, image_root or path.parent)
    policy, directory = Policy(config, rows, adapter), output.with_name(f"{output.name}.checkpoint")
    check = fitting.check_response(policy.model, config.dpo.token_budget)
    distributed.run_on_rank_zero(lambda: fitting.check_each(rows, check))
    with exclusive_lock(directory), track("logprob", len(rows), "responses", config.quiet) as progress:
        files = logprobs_in_chunks(
            logprob_chunks(config, policy, rows, directory, progress),
            policy.model,
            rows,
            features=policy.features,
            token_budget=config.dpo.token_budget,
        )
        distributed.run_on_rank_zero(lambda: write_jsonl(output, logprobs_of(rows, files)))
        remove_chunks(directory)


@on_ranks("scorer_training", "scorer")
def scorer(config: Config, source: Source, output: Path | None, profile: range | None = None) -> None:
    """Train the R-Scorer, and write its checkpoint and, in `summary.json`, its held-out accuracy."""
    output = require_option(output, "--output", "a folder for the R-Scorer")
    check_output(config, output, source.paths)
    check_installed(config, output)
    settings = config.scorer_training
    words = read_vocabulary(settings.vocabulary)
    train: list[ScorerExample] = []
    held_out: dict[str, list[ScorerExample]] = {}  # corruptions, by quality
    if settings.verdict_share != 1.0:
        with rejected_records(output) as rejected:
            samples = read_all(config, source, "rationale", rejected)
        if config.rationale.teacher is not None:
            samples = with_teacher(samples, read_teacher(config.rationale.teacher))
        train, held_out = split_examples(config, samples, words)
    judged: dict[str, list[ScorerExample]] = {}  # verdicts held out, by quality
    if settings.verdicts is not None:
        train, judged = with_verdicts(config, read_verdicts(settings.verdicts), train, held_out, words)
    model, loop = load_scorer_for(config, to_train=True), settings.seeded(config.seed, config.deterministic)
    steps = num_updates(len(train), loop)
    with training_stage("scorer", config, output, steps, lambda: [model], profile) as stage:
        with stage.training(model, train, loop) as hooks:
            on_step, profiler, checkpoints = hooks["on_step"], hooks["profiler"], hooks["checkpoints"]
            train_scorer(model, train, loop, on_step=on_step, profiler=profiler, checkpoints=checkpoints)
        stage.stop_timing()
        if distributed.is_rank_zero():
            save_text_model(model.text_model, output)
            results, agreement = (
                {name: evaluate_scorer(model, of, loop.token_budget, config.seed) for name, of in by_quality.items()}
                for by_quality in (held_out, judged)
            )
            # Verdicts are shares of a side, and no grades: a temperature of grades is not fitted on them beside corruptions.
            fitted = {} if config.scorer.verdict == "graded" and held_out else judged
            both: dict[str, list[ScorerExample]] = {
                name: [*held_out.get(name, ()), *fitted.get(name, ())] for name in settings.qualities
            }
            calibration = calibrate_confidence(model, both, loop.token_budget)
            write_json(output / CALIBRATION, calibration)
            first = (results or agreement)[settings.qualities[0]]
            stage.result = {"model": config.scorer.path, "examples": len(train), "held_out": first}
            stage.result |= {"held_out_by_quality": results, "calibration": calibration}
            if judged:
                count = sum(bool(example.verdicts) for example in train)
                stage.result["verdicts"] = {"examples": count, "held_out_by_quality": agreement}
            if not config.quiet:
                is_plain = len(results) == 1 and not judged
                print(json.dumps({**first, "calibration": calibration} if is_plain else stage.result, indent=2))
