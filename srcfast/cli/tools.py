"""The commands that need no PyTorch: config, convert, export, bench, report, watch, world."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from srcfast.cli import inputs
from srcfast.cli.hub_inputs import from_hub
from srcfast.cli.inputs import Source, is_rank_zero, read_candidates, require_option
from srcfast.config.load import load_with_sources
from srcfast.config.settings import Config
from srcfast.config.show import annotated_yaml, json_schema
from srcfast.data.convert import convert as convert_records
from srcfast.data.evaluator_files import FORMATS, write_lmms_eval, write_vlmevalkit
from srcfast.data.jsonl import write_json, write_jsonl, write_shards
from srcfast.data.stage_rows import read_scores
from srcfast.errors import ConfigError, Interrupted, SrcfastError, printable
from srcfast.report.page import write_report
from srcfast.report.watch import ADDRESS, live_server
from srcfast.run.lock import lock_directory
from srcfast.stages.curation import curate as curate_pairs
from srcfast.stages.stage_inputs import COMMAND, JUDGED, InputRecord
from srcfast.world.samples import world_samples
from srcfast_benchmarks import BENCHMARKS, GENERAL_STAGES, HOST, STAGES

ENDINGS = {".jsonl": "jsonl", ".json": "llava", ".tsv": "vlmeval_tsv"}  # of what `convert` writes


def config(words: Sequence[str] | None, as_json: bool, schema: bool) -> None:
    """Print the resolved settings as a config file with the source of each, or the JSON schema of config files."""
    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    settings, sources = load_with_sources(*inputs.split_words(words))
    if as_json:
        print(json.dumps({"settings": settings.model_dump(mode="json"), "sources": sources}, indent=2))
        return
    print(annotated_yaml(settings, sources), end="")


def convert(source: Path, target: Path, from_format: str | None, to_format: str | None, root: Path | None) -> None:
    """Convert records, and write the bad ones with their errors to `rejected.jsonl` beside the target."""
    if (target_format := to_format or ENDINGS.get(target.suffix.lower())) is None:
        raise ConfigError(
            f"--to: expected a format, found none, nor an ending that stands for one ({target.name}). Fix: name it"
        )
    for output in (target, rejected_file := target.with_name("rejected.jsonl")):
        inputs.check_output(None, output, source, option="target", is_file=True)
    lost: Counter[str] = Counter()
    rejected: list[dict[str, Any]] = []
    try:
        count = convert_records(
            source,
            target,
            source_format=from_format or "auto",
            target_format=target_format,
            image_root=root,
            rejected=rejected,
            lost=lost,
        )
    finally:  # where no record is good, too
        if rejected:
            write_jsonl(rejected_file, rejected)
    print(f"{target}: {count} records, {len(rejected)} rejected")
    if lost:
        names = ", ".join(f"{name} ({times})" for name, times in sorted(lost.items()))
        print(f"fields that {target_format} can't carry and that were left out: {printable(names)}")


def export(predictions: Path, to: str, model: str, dataset: str, format: str, output: Path | None) -> None:
    """Write predictions as files of VLMEvalKit or lmms-eval below `output`, and print their paths."""
    output = require_option(output, "--output", "a folder for the files")
    inputs.check_output(None, output, predictions)
    if format not in FORMATS:
        raise ConfigError(f"--format: expected {', '.join(FORMATS)}, found {format!r}")
    if to == "vlmevalkit":
        print(write_vlmevalkit(predictions, output, model, dataset, format))
    elif to == "lmms_eval":
        print(*write_lmms_eval(predictions, output, model, dataset), sep="\n")
    else:
        raise ConfigError(f"--to: expected vlmevalkit or lmms_eval, found {to!r}")


def curate(config: Config, source: Source, candidates: Path | None, scores: Path | None, output: Path | None) -> None:
    """Choose preference pairs, and write them into shards and `funnel.json` in `output`, on rank 0 alone."""
    output = require_option(output, "--output", "a folder for the preferences")
    directory = require_option(candidates, "--candidates", "the folder that `srcfast candidates` wrote")
    if config.curation.pairing == "score":
        scores = require_option(scores, "--scores", "the folder that `srcfast score` wrote")
    inputs.check_output(config, output, source.paths, candidates, scores)
    if not is_rank_zero():
        return
    config, options = from_hub(config, {"source": source}, data="train", directory=output)
    with inputs.rejected_records(output) as rejected:
        samples = inputs.read_all(config, options["source"], "calibration", rejected)
    with lock_directory(output):
        made_of = InputRecord(output, {COMMAND: samples})
        made_of.check_made_of(directory)
        if scores is not None:
            made_of.check_made_of(scores, JUDGED)
        rows = iter(()) if scores is None else read_scores(scores)
        pairs, funnel = curate_pairs(samples, read_candidates(directory), rows, config.curation, config.seed)
        made_of.write()
        # The images' absolute directory is stored with each pair: the shards may be read from another working directory.
        write_shards(output, (pair.to_json() | {"image_root": str(pair.image_root.resolve())} for pair in pairs))
        write_json(output / "funnel.json", funnel)
    if not config.quiet:
        print(json.dumps({"pairs": len(pairs), "dropped": funnel["dropped"]}))


def bench(name: str | None, device: str | None, output: Path | None) -> None:
    """Run one benchmark or all, each in a process of its own.

    Results go to `output`; by default to benchmarks/results of a source tree, else to `benchmarks` in the working directory.
    """
    known = (*STAGES, *GENERAL_STAGES, *BENCHMARKS, *HOST)
    if name is not None and name not in known:
        raise ConfigError(f"benchmark: expected one of {', '.join(known)}, found {name!r}")
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    output = output or (results if results.is_dir() else Path("benchmarks"))
    inputs.check_output(None, output)
    failed = []
    for benchmark in (name,) if name else known:
        on = "cpu" if benchmark in GENERAL_STAGES else device
        options = ["--output", str(output)] + ([] if on is None else ["--device", on])
        if subprocess.run([sys.executable, "-m", f"srcfast_benchmarks.{benchmark}", *options]).returncode:
            failed.append(benchmark)
    if failed:
        raise SrcfastError(f"benchmarks that did not finish: {', '.join(failed)}")
    print(f"results and plots: {output}")


def report(run: Path, image_roots: Sequence[Path]) -> None:
    """Write the page of a run directory, and print its path, and how to have images shown that are not."""
    page = write_report(run, image_roots)
    print(page)
    if count := page.read_text(encoding="utf-8").count("image not available: gone"):
        print(f"images that are gone, broken or outside of {run}: {count}. Fix: --image-root DIR shows those below DIR")


def watch(run: Path, port: int) -> None:
    """Serve the live page of a run directory until SIGINT, which ends the command without an error.

    Raises:
        ConfigError: the port can't be used.
        Interrupted: by another signal.
    """
    try:
        server = live_server(run, port)
    except OSError as error:
        raise ConfigError(
            f"--port: expected a free port, found {port} ({error.strerror}). Fix: leave it out"
        ) from error
    with server:
        try:
            print(f"http://{ADDRESS}:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
            server.serve_forever()
        except Interrupted as stop:
            if stop.status != 128 + signal.SIGINT:
                raise


def world(output: Path | None, split: str, count: int, seed: int) -> None:
    """Write samples of the embedded world as JSON lines, and their images to `images/`."""
    output = require_option(output, "--output", "a folder for the samples")
    inputs.check_output(None, output)
    samples = world_samples(split, count, seed, image_dir=output / "images")
    file = output / f"{split}.jsonl"
    write_jsonl(file, (replace(s, images=tuple(f"images/{name}" for name in s.images)).to_json() for s in samples))
    print(f"{file}: {len(samples)} samples")
