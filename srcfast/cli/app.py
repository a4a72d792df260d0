"""The command line: what may be said. `commands` and `tools` do it; nothing heavy is imported before."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from srcfast import __version__
from srcfast.cli import inputs
from srcfast.errors import ConfigError, InputError, Interrupted, SrcfastError, printable
from srcfast.memory.allocator import allocator_variables
from srcfast.run import signals


class Commands(TyperGroup):
    """Shows srcfast's own errors as text: exit status 2 for settings and input, 1 for the rest."""

    def invoke(self, ctx: Any) -> Any:
        os.environ.update(allocator_variables(os.environ))  # first of all: `recorded` may import torch
        try:
            with signals.listening(), report_disk_errors(), escape_warnings():
                return recorded(super().invoke)(ctx)
        except (SrcfastError, Interrupted) as error:
            who = f"srcfast rank {os.environ['RANK']}" if under_torchrun() else "srcfast"
            typer.echo(f"{who}: {printable(str(error))}", err=True)
            raise typer.Exit(exit_status(error)) from None


@contextmanager
def report_disk_errors() -> Iterator[None]:
    """A disk that is full, or can't be written, is told as srcfast's own errors are."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise SrcfastError(
            f"{where}{error.strerror}. What was finished is kept. Fix: make room, or see to the file system; "
            "the same command continues"
        ) from error


@contextmanager
def escape_warnings() -> Iterator[None]:
    """What warnings quote of damaged files is shown, never obeyed by the terminal."""
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *told, **more: printable(plain(*told, **more))
    try:
        yield
    finally:
        warnings.formatwarning = plain


def exit_status(error: SrcfastError | Interrupted) -> int:
    """128 + the signal's number where one has stopped the command, 2 for settings and input, 1 for the rest."""
    if isinstance(error, Interrupted):
        return error.status
    return 2 if isinstance(error, ConfigError | InputError) else 1


def under_torchrun() -> bool:
    """Whether this process is one of torchrun's ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def recorded(work: Callable[..., Any]) -> Callable[..., Any]:
    """Under torchrun an error is also written where torchrun looks for it, which then shows the first of all ranks'."""
    if not under_torchrun():
        return work
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(work)


app = typer.Typer(
    name="srcfast",
    cls=Commands,
    help="Self-Rationale Calibration of LVLMs. Commands take [CONFIG.yaml] key=value ... and options.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def show_version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        typer.echo(f"srcfast {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Self-Rationale Calibration of LVLMs. Commands take [CONFIG.yaml] key=value ... and options."""


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [KEY=VALUE]...",
        help="settings: a file, then single ones",
        show_default=False,
        autocompletion=inputs.complete_words,
    ),
]
Model = Annotated[str | None, typer.Option(help="LLaVA checkpoint directory, or 'embedded'")]
Adapter = Annotated[Path | None, typer.Option(help="LoRA adapter directory, as PEFT writes it")]
ScorerPath = Annotated[str | None, typer.Option("--scorer", help="R-Scorer directory, or 'embedded'")]
Data = Annotated[Path | None, typer.Option(help="file of records instead of the config's datasets")]
Format = Annotated[
    str | None,
    typer.Option(help="of --data: jsonl, llava, vlmeval_tsv, trl, easy_vqa; default: by its ending"),
]
ImageRoot = Annotated[Path | None, typer.Option(help="folder that image paths are relative to; default: the file's")]
Output = Annotated[Path | None, typer.Option(help="file or folder to write")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress, no tables")]
Candidates = Annotated[Path | None, typer.Option(help="folder that `srcfast candidates` wrote")]
Profile = Annotated[
    str | None,
    typer.Option(
        help="training steps to profile, such as 3:6 (from 0, the last one excluded): a trace, allocations and a summary"
        " in the output's profile/"
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="JSON on stdout")]


@app.command()
def calibrate(
    words: Words = None,
    model: Model = None,
    scorer: ScorerPath = None,
    output: Output = None,
    quiet: Quiet = False,
    profile: Profile = None,
) -> None:
    """Run everything: rationale fine-tuning, then rounds of candidates, scores, curation and DPO."""
    config = inputs.settings(words, None, model=model, scorer=scorer, output=output, quiet=quiet)
    from srcfast.cli import commands

    commands.calibrate(config, inputs.steps(profile))


@app.command()
def rationale(
    words: Words = None,
    model: Model = None,
    data: Data = None,
    format: Format = None,
    image_root: ImageRoot = None,
    output: Output = None,
    quiet: Quiet = False,
    profile: Profile = None,
) -> None:
    """Stage 1: fine-tune a LoRA adapter on rationale-answer pairs."""
    config = inputs.settings(words, "rationale", model=model, quiet=quiet)
    from srcfast.cli import commands

    commands.rationale(config, inputs.Source(data, format, image_root), output, inputs.steps(profile))


@app.command()
def candidates(
    words: Words = None,
    model: Model = None,
    adapter: Adapter = None,
    data: Data = None,
    format: Format = None,
    image_root: ImageRoot = None,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Stage 2: sentence-level beam search for diverse candidates."""
    config = inputs.settings(words, "candidates", model=model, quiet=quiet)
    from srcfast.cli import commands

    commands.candidates(config, inputs.Source(data, format, image_root), adapter, output)


@app.command()
def score(
    words: Words = None,
    scorer: ScorerPath = None,
    data: Data = None,
    format: Format = None,
    image_root: ImageRoot = None,
    candidates: Candidates = None,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Stage 3: the R-Scorer judges the candidates pairwise."""
    config = inputs.settings(words, "scorer", scorer=scorer, quiet=quiet)
    from srcfast.cli import commands

    commands.score(config, inputs.Source(data, format, image_root), candidates, output)


@app.command()
def curate(
    words: Words = None,
    data: Data = None,
    format: Format = None,
    image_root: ImageRoot = None,
    candidates: Candidates = None,
    scores: Annotated[Path | None, typer.Option(help="folder that `srcfast score` wrote")] = None,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Stage 4a: preference pairs from judged candidates, with a funnel of what was dropped and why."""
    config = inputs.settings(words, "curation", quiet=quiet)
    from srcfast.cli import commands

    commands.curate(config, inputs.Source(data, format, image_root), candidates, scores, output)


@app.command()
def dpo(
    words: Words = None,
    model: Model = None,
    adapter: Adapter = None,
    data: Data = None,
    format: Format = None,
    image_root: ImageRoot = None,
    output: Output = None,
    quiet: Quiet = False,
    profile: Profile = None,
) -> None:
    """Stage 4b: confidence-weighted DPO on preference pairs; writes a LoRA adapter."""
    config = inputs.settings(words, "dpo", model=model, quiet=quiet)
    from srcfast.cli import commands

    commands.dpo(config, inputs.Source(data, format, image_root), adapter, output, inputs.steps(profile))


@app.command()
def evaluate(
    words: Words = None,
    model: Model = None,
    adapter: Adapter = None,
    data: Data = None,
    format: Format = None,
    image_root: ImageRoot = None,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Accuracy and rationale-answer alignment of greedy answers, with 95 % intervals."""
    config = inputs.settings(words, "evaluation", model=model, quiet=quiet)
    from srcfast.cli import commands

    commands.evaluate(config, inputs.Source(data, format, image_root), adapter, output)


@app.command()
def logprob(
    words: Words = None,
    model: Model = None,
    adapter: Adapter = None,
    data: Data = None,
    image_root: ImageRoot = None,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Log-probabilities: {images, prompt, response} a line in, {logprob, tokens} out, in the same order."""
    config = inputs.settings(words, "dpo", model=model, quiet=quiet)
    from srcfast.cli import commands

    commands.logprob(config, inputs.Source(data, "jsonl", image_root), adapter, output)


@app.command()
def estimate(
    words: Words = None,
    model: Model = None,
    scorer: ScorerPath = None,
    memory: Annotated[str | None, typer.Option(help="to fit into, such as 12GiB; default: what the device has")] = None,
    flops: Annotated[float | None, typer.Option(min=1, help="that the run reaches a second, such as 400e12")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="share of the device's rate, without --flops")] = 0.4,
    text_tokens: Annotated[int, typer.Option(min=1, help="of a prompt, beside its image")] = 64,
    response_tokens: Annotated[int, typer.Option(min=1, help="of a response")] = 192,
    json: AsJSON = False,
) -> None:
    """Forecast memory and time by stage, what fits and what to change; from config.json and file headers alone."""
    from srcfast.cli.estimate import estimate as show
    from srcfast.memory.plan import Lengths

    config = inputs.settings(words, None, model=model, scorer=scorer)
    show(config, memory, flops, mfu, Lengths(text_tokens, response_tokens), json)


@app.command()
def inspect(
    words: Words = None,
    model: Model = None,
    data: Data = None,
    format: Format = None,
    image_root: ImageRoot = None,
    index: Annotated[int, typer.Option(min=0, help="which sample, from 0")] = 0,
) -> None:
    """One sample as the model sees it: decoded, counted, its loss mask coloured."""
    from srcfast.cli import model_tools

    config = inputs.settings(words, "rationale", model=model)
    model_tools.inspect(config, inputs.Source(data, format, image_root), index)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="file to read")],
    target: Annotated[Path, typer.Argument(help="file to write")],
    from_format: Annotated[str | None, typer.Option("--from", help="jsonl, llava, trl, vlmeval_tsv")] = None,
    to_format: Annotated[str | None, typer.Option("--to", help="jsonl, llava, trl, vlmeval_tsv")] = None,
    image_root: ImageRoot = None,
) -> None:
    """Among JSON lines, LLaVA JSON, TRL preference JSON and VLMEvalKit TSV."""
    from srcfast.cli import tools

    tools.convert(source, target, from_format, to_format, image_root)


@app.command()
def merge(
    words: Words = None,
    model: Model = None,
    adapter: Adapter = None,
    output: Output = None,
) -> None:
    """Add an adapter into its base and write a whole checkpoint that transformers reads."""
    from srcfast.cli import model_tools

    model_tools.merge(inputs.settings(words, None, model=model), adapter, output)


@app.command()
def scorer(
    words: Words = None,
    scorer: ScorerPath = None,
    data: Data = None,
    format: Format = None,
    image_root: ImageRoot = None,
    output: Output = None,
    quiet: Quiet = False,
    profile: Profile = None,
) -> None:
    """Train an R-Scorer on rationale-answer pairs and their corruptions; reports its held-out accuracy."""
    config = inputs.settings(words, "scorer_training", scorer=scorer, quiet=quiet)
    from srcfast.cli import commands

    commands.scorer(config, inputs.Source(data, format, image_root), output, inputs.steps(profile))


@app.command()
def config(
    words: Words = None,
    json: AsJSON = False,
    schema: Annotated[bool, typer.Option("--schema", help="JSON schema of config files, for editors")] = False,
) -> None:
    """Print the resolved settings and where each came from: a config file; or the schema of config files."""
    from srcfast.cli import tools

    tools.config(words, json, schema)


@app.command()
def doctor(json: AsJSON = False) -> None:
    """What is installed, which backends are live, what is missing and would bring what."""
    from srcfast.cli import model_tools

    model_tools.doctor(json)


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(help="one benchmark; default: all")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: what is here")] = None,
    output: Output = None,
) -> None:
    """Time the operations against PyTorch and the peers that are installed: tables of ratios, CSV and a plot each."""
    from srcfast.cli import tools

    tools.bench(name, device, output)


@app.command()
def replay(
    place: Annotated[Path, typer.Argument(help="the not-finite/ directory that a stopped training has named")],
) -> None:
    """Run a batch again whose loss or gradient was not finite: does it come out as before?"""
    from srcfast.cli import model_tools

    model_tools.replay(place)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run directory, such as runs/demo")]) -> None:
    """Draw a run's page anew."""
    from srcfast.cli import tools

    tools.report(run)


@app.command()
def world(
    output: Output = None,
    split: Annotated[str, typer.Option(help="train, validation, test, generalisation, base or scorer")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="how many")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="of the draw")] = 0,
) -> None:
    """Write samples of the embedded world: SPLIT.jsonl and its pictures in images/."""
    from srcfast.cli import tools

    tools.world(output, split, samples, seed)
