"""The command line: commands, arguments and options.

`inputs` reads the arguments; `commands`, `model_tools` and `tools` do the work. All are imported within the commands, so that
`srcfast --help` imports neither torch nor pydantic; `commands`, which imports torch, after the settings are read, so that errors
in the settings are immediate.
"""

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
from srcfast.errors import ConfigError, InputError, Interrupted, SrcfastError, printable
from srcfast.memory.allocator import allocator_variables
from srcfast.run import signals


class Commands(TyperGroup):
    """Group of commands that prints srcfast's errors as text and exits with `exit_status`."""

    def invoke(self, ctx: Any) -> Any:
        os.environ.update(
            allocator_variables(os.environ)
        )  # torch reads these when it is imported, and `recorded` may import it
        try:
            with signals.listening(), report_disk_errors(), escape_warnings():
                return recorded(super().invoke)(ctx)
        except (SrcfastError, Interrupted) as error:
            who = f"srcfast rank {os.environ['RANK']}" if under_torchrun() else "srcfast"
            typer.echo(f"{who}: {printable(str(error))}", err=True)
            raise typer.Exit(exit_status(error)) from None


@contextmanager
def report_disk_errors() -> Iterator[None]:
    """Turn ENOSPC, EDQUOT and EROFS into a SrcfastError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise SrcfastError(
            f"{where}{error.strerror}. Finished work is saved. Fix: free disk space, or repair the file system; "
            "the same command continues"
        ) from error


@contextmanager
def escape_warnings() -> Iterator[None]:
    """Escape control characters in warnings, which may quote damaged files."""
    original = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(original(*args, **kwargs))
    try:
        yield
    finally:
        warnings.formatwarning = original


def exit_status(error: SrcfastError | Interrupted) -> int:
    """Return 128 + the signal's number for an interrupted command, 2 for bad settings and input, 1 for all other errors."""
    if isinstance(error, Interrupted):
        return error.status
    return 2 if isinstance(error, ConfigError | InputError) else 1


def under_torchrun() -> bool:
    """Return whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def recorded(work: Callable[..., Any]) -> Callable[..., Any]:
    """Under torchrun, also write errors to the file from which torchrun shows the first error of all ranks."""
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


def complete_words(incomplete: str) -> list[str]:
    """Return what a shell may complete a word to: `key=` of every setting, and YAML files."""
    from srcfast.cli import inputs

    return inputs.complete_words(incomplete)


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
        help="settings: a YAML file, then single settings, which win over the file",
        show_default=False,
        autocompletion=complete_words,
    ),
]
Model = Annotated[str | None, typer.Option(help="LLaVA checkpoint directory, or 'embedded' (model.path)")]
Adapter = Annotated[Path | None, typer.Option(help="directory of a LoRA adapter in PEFT's format")]
ScorerPath = Annotated[
    str | None, typer.Option("--scorer", help="R-Scorer checkpoint directory, or 'embedded' (scorer.path)")
]
Data = Annotated[Path | None, typer.Option(help="file of records, used instead of the config's datasets")]
Format = Annotated[
    str | None,
    typer.Option(help="format of --data: jsonl, llava, vlmeval_tsv, trl, easy_vqa; default: by the file's ending"),
]
ImageRoot = Annotated[
    Path | None, typer.Option(help="directory that image paths are relative to; default: the file's directory")
]
Output = Annotated[Path | None, typer.Option(help="file or directory to write")]
Quiet = Annotated[bool, typer.Option("--quiet", help="show no progress and no tables")]
Candidates = Annotated[Path | None, typer.Option(help="directory that `srcfast candidates` wrote")]
Profile = Annotated[
    str | None,
    typer.Option(
        help="training steps to profile, such as 3:6 (from 0, without the last): writes a trace, allocations and a summary"
        " to profile/ in the output directory"
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="print JSON")]


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
    from srcfast.cli import inputs

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
    from srcfast.cli import inputs

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
    """Stage 2: generate diverse candidates by sentence-level beam search."""
    from srcfast.cli import inputs

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
    """Stage 3: score the candidates pairwise by the R-Scorer."""
    from srcfast.cli import inputs

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
    scores: Annotated[Path | None, typer.Option(help="directory that `srcfast score` wrote")] = None,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Stage 4a: choose preference pairs among scored candidates, and count what is dropped and why."""
    from srcfast.cli import inputs, tools

    config = inputs.settings(words, "curation", quiet=quiet)
    tools.curate(config, inputs.Source(data, format, image_root), candidates, scores, output)


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
    """Stage 4b: train a LoRA adapter by confidence-weighted DPO on preference pairs."""
    from srcfast.cli import inputs

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
    """Measure accuracy and rationale-answer alignment of greedy answers, with 95 % intervals."""
    from srcfast.cli import inputs

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
    """Compute log-probabilities: reads lines of {images, prompt, response}, writes {logprob, tokens} in the same order."""
    from srcfast.cli import inputs

    config = inputs.settings(words, "dpo", model=model, quiet=quiet)
    from srcfast.cli import commands

    commands.logprob(config, inputs.Source(data, "jsonl", image_root), adapter, output)


@app.command()
def estimate(
    words: Words = None,
    model: Model = None,
    scorer: ScorerPath = None,
    memory: Annotated[str | None, typer.Option(help="memory to fit into, such as 12GiB; default: the device's")] = None,
    flops: Annotated[
        float | None,
        typer.Option(min=1, help="floating-point operations a second that the run reaches, such as 400e12"),
    ] = None,
    mfu: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="share of the device's peak rate that the run reaches, unless --flops is given"
        ),
    ] = 0.4,
    text_tokens: Annotated[int, typer.Option(min=1, help="text tokens of a typical prompt, without its image")] = 64,
    response_tokens: Annotated[int, typer.Option(min=1, help="tokens of a typical response")] = 192,
    json: AsJSON = False,
) -> None:
    """Forecast memory and time by stage, and advise what to change; reads config.json and file headers alone."""
    from srcfast.cli import inputs
    from srcfast.cli.estimate import estimate as print_estimate
    from srcfast.memory.plan import Lengths

    config = inputs.settings(words, None, model=model, scorer=scorer)
    print_estimate(config, memory, flops, mfu, Lengths(text_tokens, response_tokens), json)


@app.command()
def inspect(
    words: Words = None,
    model: Model = None,
    data: Data = None,
    format: Format = None,
    image_root: ImageRoot = None,
    index: Annotated[int, typer.Option(min=0, help="index of the sample, from 0")] = 0,
) -> None:
    """Print one sample as the model sees it: decoded tokens, their number, the loss mask in colours."""
    from srcfast.cli import inputs, model_tools

    config = inputs.settings(words, "rationale", model=model)
    model_tools.inspect(config, inputs.Source(data, format, image_root), index)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="file to read")],
    target: Annotated[Path, typer.Argument(help="file to write")],
    from_format: Annotated[
        str | None, typer.Option("--from", help="format to read: jsonl, llava, trl, vlmeval_tsv")
    ] = None,
    to_format: Annotated[
        str | None, typer.Option("--to", help="format to write: jsonl, llava, trl, vlmeval_tsv")
    ] = None,
    image_root: ImageRoot = None,
) -> None:
    """Convert records among JSON lines, LLaVA JSON, TRL preference JSON and VLMEvalKit TSV."""
    from srcfast.cli import tools

    tools.convert(source, target, from_format, to_format, image_root)


@app.command()
def merge(
    words: Words = None,
    model: Model = None,
    adapter: Adapter = None,
    output: Output = None,
) -> None:
    """Merge an adapter into its base and write a checkpoint that transformers reads."""
    from srcfast.cli import inputs, model_tools

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
    """Train an R-Scorer on rationale-answer pairs and their corruptions, and report its held-out accuracy."""
    from srcfast.cli import inputs

    config = inputs.settings(words, "scorer_training", scorer=scorer, quiet=quiet)
    from srcfast.cli import commands

    commands.scorer(config, inputs.Source(data, format, image_root), output, inputs.steps(profile))


@app.command()
def config(
    words: Words = None,
    json: AsJSON = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON schema of config files, for editors")
    ] = False,
) -> None:
    """Print the resolved settings as a config file with the source of each; or the schema of config files."""
    from srcfast.cli import tools

    tools.config(words, json, schema)


@app.command()
def doctor(json: AsJSON = False) -> None:
    """Print versions, available backends, and optional packages that are missing, with what each adds."""
    from srcfast.cli import model_tools

    model_tools.doctor(json)


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(help="name of a benchmark; default: all")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is a GPU")] = None,
    output: Output = None,
) -> None:
    """Time operations against PyTorch and installed peers; writes tables of ratios, CSV files and plots."""
    from srcfast.cli import tools

    tools.bench(name, device, output)


@app.command()
def replay(
    directory: Annotated[Path, typer.Argument(help="the not-finite/ directory that the error of a training names")],
) -> None:
    """Run a saved batch again whose loss or gradient was not finite, and say whether that is reproduced."""
    from srcfast.cli import model_tools

    model_tools.replay(directory)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run directory, such as runs/demo")]) -> None:
    """Write a run's page again."""
    from srcfast.cli import tools

    tools.report(run)


@app.command()
def world(
    output: Output = None,
    split: Annotated[str, typer.Option(help="train, validation, test, generalisation, base or scorer")] = "train",
    samples: Annotated[int, typer.Option(min=1, help="number of samples")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="seed of the draw")] = 0,
) -> None:
    """Write samples of the embedded world: SPLIT.jsonl, and the images in images/."""
    from srcfast.cli import tools

    tools.world(output, split, samples, seed)
