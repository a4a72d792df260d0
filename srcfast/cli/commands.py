"""What each command does, from its settings to its files."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from srcfast import distributed
from srcfast.config.settings import Config, DatasetConfig, load_config
from srcfast.config.yaml import read_yaml
from srcfast.data.in_order import InOrder
from srcfast.data.jsonl import json_hash, read_shards, write_json, write_jsonl, write_shards
from srcfast.data.readers import check_rejected, read_logprob_rows
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.data.stage_rows import read_scores
from srcfast.errors import ConfigError, InputError
from srcfast.run.progress import track
from srcfast.stages.policy import (
    draw,
    features_of,
    load_judge,
    load_model,
    on_all_ranks,
    policy_hash,
    rationale_pairs,
    read_dataset,
)

REFERENCES_LOOKED_AT = 32  # of those that a file states without saying whose they are
ENDINGS = {".jsonl": "jsonl", ".json": "llava", ".tsv": "vlmeval_tsv"}


@dataclass(frozen=True)
class Source:
    """The file named on the command line, if any."""

    data: Path | None
    format: str | None
    image_root: Path | None


# Settings ---------------------------------------------------------------------------------------------------


def settings(
    words: Sequence[str] | None,
    section: str | None,
    *,
    model: str | None = None,
    scorer: str | None = None,
    output: Path | None = None,
    quiet: bool = False,
) -> Config:
    """The settings of a command line: its file, then its single settings, then its options."""
    files = [word for word in words or () if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"expected one CONFIG.yaml and key=value settings, found {' and '.join(files)}")
    named = {"model.path": model, "scorer.path": scorer, "output": output}
    single = [word for word in words or () if "=" in word]
    config = load_config(files[0] if files else None, single, section)
    # An option comes last and wins. Its full name is in no section, so it is read from the root.
    single += [f"{key}={json.dumps(str(value))}" for key, value in named.items() if value is not None]
    single += ["quiet=true"] if quiet else []
    config = load_config(files[0] if files else None, single, section)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    return config


def need(value: Path | None, option: str, what: str) -> Path:
    """An option's value. Raises ConfigError where it is not given."""
    if value is None:
        raise ConfigError(f"{option}: expected {what}, found nothing. Mend: name it")
    return value


def steps(profile: str | None) -> range | None:
    """The steps that `--profile` names."""
    from srcfast.training.profiler import parse_steps

    return None if profile is None else parse_steps(profile)


# Reading ----------------------------------------------------------------------------------------------------


def datasets(config: Config, source: Source, use: str) -> tuple[DatasetConfig, ...]:
    """The dataset named on the command line, else the config's for rationale, calibration or evaluation."""
    if source.data is not None or source.format == "easy_vqa":
        format = source.format or ENDINGS.get("" if source.data is None else source.data.suffix.lower(), "jsonl")
        path = None if source.data is None else str(source.data)
        root = None if source.image_root is None else str(source.image_root)
        values = {
            "name": source.data.stem if source.data else format,
            "format": format,
            "path": path,
            "image_root": root,
        }
        if format not in ("jsonl", "llava", "vlmeval_tsv", "easy_vqa"):
            raise ConfigError(f"--format: expected jsonl, llava, vlmeval_tsv or easy_vqa, found {format!r}")
        return (DatasetConfig.model_validate(values | {"split": "test" if use == "evaluation" else "train"}),)
    found = config.data.evaluation
    if use != "evaluation":
        found = tuple(one for one in config.data.train if use in one.use)
    if not found:
        where = "data.evaluation" if use == "evaluation" else "data.train"
        raise ConfigError(f"no data: expected --data FILE, or datasets under {where} in the config. Mend: name one")
    return found


def read_all(config: Config, source: Source, use: str, output: Path) -> list[Sample]:
    """The samples of all datasets for a use; what was rejected lies beside the output."""
    rejected: list[dict[str, Any]] = []
    samples = [
        sample
        for dataset in datasets(config, source, use)
        for sample in read_dataset(dataset, Path(config.output) / "images", rejected)
    ]
    set_aside(rejected, len(samples), config.max_rejected, output)
    return samples


def set_aside(rejected: Sequence[dict[str, Any]], kept: int, limit: int | float, output: Path) -> None:
    """Write `rejected.jsonl` into the folder `output`, if anything was rejected.

    Raises:
        InputError: more was rejected than `max_rejected` allows, or nothing is left.
    """
    if not rejected and kept:
        return
    file = output / "rejected.jsonl"
    if rejected and distributed.is_main():
        write_jsonl(file, rejected)
    check_rejected(rejected, len(rejected) + kept, limit)
    if not kept:
        raise InputError(expected="at least one sample", found="none", mend="name data that holds some")


def read_preference_file(config: Config, source: Source, output: Path) -> list[Preference]:
    """Preferences from a file (JSON lines, or TRL's JSON) or from a folder of shards."""
    path = need(source.data, "--data", "a file of preferences, or the folder that `srcfast curate` wrote")
    root = source.image_root or path.parent
    if path.is_dir():
        recorded: set[str] = set()  # asked for only where a folder is to stand for those that are gone
        if source.image_root is not None:
            recorded = {str(row["image_root"]) for *_, row in read_shards(path) if "image_root" in row}
        return [
            Preference.from_json(
                row, file=file, line=line, image_root=_own_root(row, file, line, root, source, recorded)
            )
            for file, line, row in read_shards(path)
        ]
    from srcfast.data.readers import read_preferences

    rejected: list[dict[str, Any]] = []
    format = source.format or ("trl" if path.suffix == ".json" else "jsonl")
    preferences = read_preferences(path, format=format, image_root=root, rejected=rejected)
    set_aside(rejected, len(preferences), config.max_rejected, output)
    return preferences


def _own_root(row: dict[str, Any], file: Path, line: int, root: Path, source: Source, recorded: set[str]) -> Path:
    """The folder of a pair's images that travels with it; `root` where it names none.

    One that is no longer there is where the images were before they were moved: then it is the --image-root that is given,
    and without one it is returned as it is, so that the first image says what is missing.

    Args:
        recorded: all folders that the shards name.

    Raises:
        InputError: it is no path, or lies outside of the --image-root that is given; or it is no longer there and is one of
            several, for which one --image-root can't stand.
    """
    own = row.pop("image_root", str(root))
    if isinstance(own, str) and "\0" not in own:
        if source.image_root is not None and not os.path.lexists(own):
            if len(recorded) < 2:
                return source.image_root
            raise InputError(
                file=file,
                line=line,
                field="image_root",
                expected=f"images where they were, since one --image-root can't stand for each of {', '.join(sorted(recorded))}",
                found=f"no folder {own}",
                mend="put them back, or curate the samples again where they are now",
            )
        if source.image_root is None or Path(own).resolve().is_relative_to(source.image_root.resolve()):
            return Path(own)
    expected = "a path" if source.image_root is None else f"a path below --image-root ({source.image_root})"
    mend = "name another --image-root, or none where the shards are your own"
    raise InputError(file=file, line=line, field="image_root", expected=expected, found=repr(own), mend=mend)


def _read_candidates(directory: Path | None) -> InOrder[list[Candidate]]:
    from srcfast.data.in_order import samples_in_order

    place = need(directory, "--candidates", "the folder that `srcfast candidates` wrote")
    return samples_in_order(
        Candidate.from_json(row, file=file, line=line, image_root=place) for file, line, row in read_shards(place)
    )


# Stages ---------------------------------------------------------------------------------------------------------------


def on_ranks(stage: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command, of which the settings are the first argument, on all ranks; it says what to change where memory runs out."""

    def of(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(config: Config, *arguments: Any) -> None:
            from srcfast.memory.plan import out_of_memory_is_met

            with on_all_ranks(config) as own, out_of_memory_is_met(own, stage):
                command(own, *arguments)

        return run

    return of


def calibrate(config: Config, profile: range | None = None) -> None:
    """Run everything; show the results and say where the page is. `profile`: steps of each training stage."""
    from rich.console import Console

    from srcfast.calibrate import calibrate as run
    from srcfast.report.table import results_table

    with on_all_ranks(config) as own:
        page = run(own, profile)
        if not distributed.is_main():
            return
    if not config.quiet:
        summary = json.loads((config.run_path / "summary.json").read_text(encoding="utf-8"))
        Console().print(results_table(summary))
    print(f"page: {page}")


@on_ranks("rationale")
def rationale(config: Config, source: Source, output: Path | None, profile: range | None = None) -> None:
    """Train an adapter on RAPs into `output`."""
    from srcfast.models.lora import save_adapter
    from srcfast.stages.rationale import fine_tune_rationale
    from srcfast.stages.replay import kept_if_not_finite
    from srcfast.stages.stage_run import TrainingRun

    output = need(output, "--output", "a folder for the adapter")
    samples = read_all(config, source, "rationale", output)
    raps, dropped = rationale_pairs(config, samples)
    model = load_model(config, config.lora.seeded(config.seed))
    features = features_of(model, [sample for sample, _ in raps])
    loop = config.rationale.seeded(config.seed, config.deterministic)
    with (
        TrainingRun("rationale", len(raps), loop, output, config, model, profile) as run,
        kept_if_not_finite("rationale", config, model, raps, loop, output),
    ):
        fine_tune_rationale(
            model,
            raps,
            loop,
            features=features,
            on_step=run.step,
            on_items=run.expect,
            profiler=run.profiler,
            checkpoints=run.checkpoints,
        )
    if distributed.is_main():
        save_adapter(model, output)
    run.write_summary(
        model=str(model.path), samples=len(raps) + dropped.total(), pairs=len(raps), dropped=dict(dropped)
    )


@on_ranks("candidates")
def candidates(config: Config, source: Source, adapter: Path | None, output: Path | None) -> None:
    """Search candidates of every sample into shards under `output`; stopped, the same command continues."""
    from srcfast.run.chunks import forget
    from srcfast.run.directory import alone_in
    from srcfast.stages.pieces import candidates_in_pieces

    output = need(output, "--output", "a folder for the candidates")
    samples = read_all(config, source, "calibration", output)
    if config.candidates.samples:
        samples = draw(samples, config.candidates.samples, f"candidates/{config.seed}")
    model, place = load_model(config, adapter), output / "checkpoint"
    with alone_in(output), track("candidates", len(samples), quiet=config.quiet) as progress:
        found = candidates_in_pieces(
            place,
            lambda: _depends_on(config, "candidates", policy=policy_hash(config, model, adapter)),
            model,
            samples,
            config.candidates,
            features=features_of(model, samples),
            seed=config.seed,
            batch_size=config.candidates.batch_size,
            progress=progress,
            graphs=config.candidates.cuda_graphs,
        )
        distributed.from_main(lambda: write_shards(output, found.rows()))
        forget(place)


@on_ranks("scores")
def score(config: Config, source: Source, candidates: Path | None, output: Path | None) -> None:
    """Judge candidates into shards under `output`; stopped, the same command continues."""
    from srcfast.models.checkpoint import model_hash
    from srcfast.run.chunks import forget
    from srcfast.run.directory import alone_in
    from srcfast.stages.adaptive_pairs import AdaptivePairs
    from srcfast.stages.pieces import scores_in_pieces

    output = need(output, "--output", "a folder for the scores")
    samples = read_all(config, source, "calibration", output)
    own, section = need(candidates, "--candidates", "a folder"), config.scorer
    adaptive = AdaptivePairs.of(section)
    judge, place = load_judge(config), output / "checkpoint"
    with alone_in(output), track("score", len(samples), quiet=config.quiet) as progress:
        found = scores_in_pieces(
            place,
            lambda: _depends_on(config, "scorer", scorer=model_hash(judge.text_model.path)),
            judge,
            samples,
            lambda: _read_candidates(own).rest(),
            section.token_budget,
            section.mode,
            progress,
            adaptive,
        )
        distributed.from_main(lambda: write_shards(output, found.rows()))
        if adaptive is not None and distributed.is_main():
            write_json(output / "adaptive.json", replace(adaptive, counts=found.counts()).report())
        forget(place)


def _depends_on(config: Config, section: str, **names: str) -> dict[str, Any]:
    """What a stage's pieces depend on beside their samples: settings, and whose weights they are computed with."""
    resolved = config.model_dump(mode="json")
    return {key: resolved[key] for key in ("seed", "model", section)} | names


def _logprobs_depend_on(config: Config, policy: str, records: Sequence[Sample | Preference]) -> dict[str, Any]:
    """What log-probabilities depend on beside the records' text: their images' contents, and of `dpo` the budget alone."""
    from srcfast.stages.rationale import image_prints

    own = _depends_on(config, "dpo", policy=policy, images=json_hash(image_prints(records)))
    return own | {"dpo": {"token_budget": config.dpo.token_budget}}


@on_ranks("preferences")
def curate(config: Config, source: Source, candidates: Path | None, scores: Path | None, output: Path | None) -> None:
    """Choose pairs into shards under `output`, with `funnel.json` beside them; rank 0 does it alone."""
    from srcfast.stages.curation import curate as choose

    if not distributed.is_main():
        return
    output = need(output, "--output", "a folder for the preferences")
    samples = read_all(config, source, "calibration", output)
    rows = iter(()) if scores is None else read_scores(scores)
    if scores is None and config.curation.pairing == "score":
        raise ConfigError("--scores: expected the folder that `srcfast score` wrote, found nothing. Mend: name it")
    pairs, funnel = choose(samples, _read_candidates(candidates), rows, config.curation, config.seed)
    # The absolute root travels with the pair: the shards may be read from anywhere.
    write_shards(output, (pair.to_json() | {"image_root": str(pair.image_root.resolve())} for pair in pairs))
    write_json(output / "funnel.json", funnel)
    if not config.quiet:
        print(json.dumps({"pairs": len(pairs), "dropped": funnel["dropped"]}))


@on_ranks("dpo")
def dpo(
    config: Config, source: Source, adapter: Path | None, output: Path | None, profile: range | None = None
) -> None:
    """Preference-tune an adapter (a given one, or a new one) into `output`."""
    from srcfast.models.lora import save_adapter
    from srcfast.run.directory import alone_in
    from srcfast.stages.dpo import check_references, train_preference
    from srcfast.stages.pieces import references_in_pieces
    from srcfast.stages.replay import kept_if_not_finite
    from srcfast.stages.stage_run import TrainingRun

    output = need(output, "--output", "a folder for the adapter")
    if config.dpo.rehearsal_weight:
        raise ConfigError(
            "dpo.rehearsal_weight: expected 0, since this command is given no rationale-answer pairs to rehearse, "
            f"found {config.dpo.rehearsal_weight}. Mend: leave it out, or use `srcfast calibrate`"
        )
    preferences = read_preference_file(config, source, output)
    model = load_model(config, adapter or config.lora.seeded(config.seed), to_train=True)
    features = features_of(model, preferences)
    name = policy_hash(config, model, adapter)
    unsigned = [pair for pair in preferences if "reference_hash" not in pair.extra and _has_reference(pair)]
    preferences = [replace(pair, extra={"reference_hash": name} | pair.extra) for pair in preferences]
    missing = [index for index, pair in enumerate(preferences) if not _has_reference(pair)]
    # A reference that came without a hash is taken at its word, but for some that are looked at, and those of the first step.
    some = random.Random(f"references/{config.seed}").sample(unsigned, min(REFERENCES_LOOKED_AT, len(unsigned)))
    check_references(model, some, config.dpo.token_budget, features)
    if missing:
        # Kept until the adapter is written: beside the training's checkpoints, and removed with these.
        place = output / "checkpoint" / "references"
        with alone_in(output), track("reference", len(missing), "pairs", config.quiet) as progress:
            asked = [preferences[index] for index in missing]
            logprobs = references_in_pieces(place, lambda: _logprobs_depend_on(config, name, asked), progress)
            done = logprobs(
                model,
                asked,
                reference_hash=name,
                token_budget=config.dpo.token_budget,
                features=features,
                on_forest=lambda forest: progress.advance(len(forest.trees), tokens=forest.num_tokens),
            )
        for index, pair in zip(missing, done, strict=True):
            preferences[index] = pair
    loop = config.dpo.seeded(config.seed, config.deterministic)
    with (
        TrainingRun("dpo", len(preferences), loop, output, config, model, profile) as run,
        kept_if_not_finite("dpo", config, model, preferences, loop, output),
    ):
        train_preference(
            model,
            preferences,
            loop,
            weighting=config.curation.weighting,
            expected_reference_hash=name,
            features=features,
            on_step=run.step,
            on_items=run.expect,
            profiler=run.profiler,
            checkpoints=run.checkpoints,
        )
    if distributed.is_main():
        save_adapter(model, output)
    run.write_summary(model=str(model.path), pairs=len(preferences), references_computed=len(missing))


def _has_reference(pair: Preference) -> bool:
    return pair.reference_chosen_logprob is not None and pair.reference_rejected_logprob is not None


@on_ranks("evaluation")
def evaluate(config: Config, source: Source, adapter: Path | None, output: Path | None) -> None:
    """Greedy answers to every evaluation dataset: `predictions/` and `summary.json` under `output`."""
    from srcfast.run.chunks import forget
    from srcfast.run.directory import alone_in
    from srcfast.stages.evaluation import summarise, write_predictions
    from srcfast.stages.pieces import answers_in_pieces, predictions_of

    output = need(output, "--output", "a folder for predictions and summary")
    model = load_model(config, adapter)
    entries: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    settings = config.evaluation
    for dataset in datasets(config, source, "evaluation"):
        samples = read_dataset(dataset, Path(config.output) / "images", rejected)
        set_aside(rejected, len(samples), config.max_rejected, output)
        name, place = f"{dataset.name}-{dataset.split}", output / "checkpoint"
        with (
            alone_in(output),
            track(f"evaluate {dataset.name} {dataset.split}", len(samples), quiet=config.quiet) as progress,
        ):
            answers = answers_in_pieces(
                place / name,
                lambda: _depends_on(config, "evaluation", policy=policy_hash(config, model, adapter)),
                model,
                samples,
                features=features_of(model, samples),
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                progress=progress,
                graphs=settings.cuda_graphs,
            )
        if not distributed.is_main():
            continue
        path = output / "predictions" / name
        entries.append(
            summarise(
                write_predictions(path, samples, predictions_of(samples, answers)),
                model="base" if adapter is None else str(adapter),
                dataset=dataset.name,
                split=dataset.split,
                resamples=settings.bootstrap_resamples,
                seed=config.seed,
            )
        )
    if distributed.is_main():
        write_json(output / "summary.json", {"evaluations": entries, "rejected": len(rejected)})
        forget(output / "checkpoint")
    if not config.quiet and distributed.is_main():
        print(json.dumps(entries, indent=2))


@on_ranks("preferences")
def logprob(config: Config, source: Source, adapter: Path | None, output: Path | None) -> None:
    """{images, prompt, response} in, {logprob, tokens} out, line for line; a bad line stops it at once.

    Finished parts lie in a folder beside `output` until that is written; stopped, the same command continues.
    """
    from srcfast.run.chunks import forget
    from srcfast.run.directory import alone_in
    from srcfast.stages.pieces import logprobs_in_pieces, logprobs_of

    path = need(source.data, "--data", "JSON lines of {images, prompt, response}")
    output = need(output, "--output", "a file for the log-probabilities")
    if not output.name or output.is_dir():
        raise ConfigError(
            f"--output: expected a file for the log-probabilities, found the folder {output}. Mend: name a file"
        )
    rows = [
        Sample(f"request {number}", row.images, row.prompt, row.response, image_root=row.image_root)
        for number, row in enumerate(read_logprob_rows(path, source.image_root or path.parent), start=1)
    ]
    model, place = load_model(config, adapter), output.with_name(f"{output.name}.checkpoint")
    with alone_in(place), track("logprob", len(rows), "responses", config.quiet) as progress:
        found = logprobs_in_pieces(
            place,
            lambda: _logprobs_depend_on(config, policy_hash(config, model, adapter), rows),
            model,
            rows,
            features=features_of(model, rows),
            token_budget=config.dpo.token_budget,
            progress=progress,
        )
        distributed.from_main(lambda: write_jsonl(output, logprobs_of(rows, found)))
        forget(place)


@on_ranks("scorer_training")
def scorer(config: Config, source: Source, output: Path | None, profile: range | None = None) -> None:
    """Train the R-Scorer into a checkpoint directory, its held-out accuracy in `summary.json`."""
    from srcfast.data.rationale_format import parse_response
    from srcfast.models.text_model import save_text_model
    from srcfast.stages.rationale import build_raps
    from srcfast.stages.replay import kept_if_not_finite
    from srcfast.stages.scorer_training import evaluate_scorer, scorer_examples, train_scorer
    from srcfast.stages.stage_run import TrainingRun

    output = need(output, "--output", "a folder for the R-Scorer")
    samples = read_all(config, source, "rationale", output)
    form, own = config.rationale.format, config.scorer_training
    parsed = [(sample, parse_response(text)) for sample, text in build_raps(samples, form)[0]]
    raps = [(s, p.perception, p.reasoning, p.answer) for s, p in parsed if p.answer is not None]
    rng = random.Random(f"scorer/{config.seed}")
    rng.shuffle(raps)
    cut = max(1, round(own.held_out * len(raps)))
    words = _vocabulary(own.vocabulary)
    held_out, train = (
        scorer_examples(part, rng, words, variants=own.variants, format=form, is_faulty=_may_be_faulty)
        for part in (raps[:cut], raps[cut:])
    )
    if not held_out or not train:
        raise InputError(
            field="rationale",
            expected="enough samples with rationales in which faults can be made",
            found=f"{len(train)} to train on and {len(held_out)} held out",
            mend="add samples, or name the domain's words: scorer_training.vocabulary=FILE.yaml",
        )
    judge, loop = load_judge(config), own.seeded(config.seed, config.deterministic)
    with (
        TrainingRun("scorer", len(train), loop, output, config, judge, profile) as run,
        kept_if_not_finite("scorer", config, judge, train, loop, output),
    ):
        train_scorer(judge, train, loop, run.step, run.profiler, run.checkpoints)
    if not distributed.is_main():
        return
    save_text_model(judge.text_model, output)
    result = evaluate_scorer(judge, held_out, loop.token_budget, config.seed)
    run.write_summary(model=config.scorer.path, examples=len(train), held_out=result)
    if not config.quiet:
        print(json.dumps(result, indent=2))


def _may_be_faulty(sample: Sample, parts: tuple[tuple[str, ...], tuple[str, ...], str]) -> bool:
    """Where an oracle can check the corruption, whether it finds it faulty; True where none can."""
    from srcfast.data.rationale_format import ParsedResponse
    from srcfast.world.oracle import judge_sample

    judgement = judge_sample(sample, ParsedResponse(*parts))
    return judgement is None or not judgement.aligned


def _vocabulary(path: str | None) -> dict[str, Sequence[str]]:
    if path is None:
        from srcfast.world.claims import VOCABULARY

        return dict(VOCABULARY)
    try:
        found = read_yaml(Path(path), {})
    except ConfigError as error:
        raise ConfigError(f"scorer_training.vocabulary: {error}") from error
    if not found or not all(isinstance(words, list) and len(words) > 1 for words in found.values()):
        raise ConfigError(f"scorer_training.vocabulary: {path}: expected {{class: [word, word, ...]}}")
    return {str(name): tuple(str(word) for word in words) for name, words in found.items()}
