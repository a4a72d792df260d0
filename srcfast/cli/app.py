"""The command line: commands, arguments and options.

`inputs` reads the arguments; `commands`, `estimate`, `model_tools` and `tools` do the work. All are imported when a command runs:
`srcfast --help` imports neither torch nor pydantic, and what imports torch comes after the settings, so that errors in these are
immediate.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from srcfast import __version__
from srcfast.cli.disk_errors import report_disk_errors
from srcfast.errors import ConfigError, InputError, Interrupted, SrcfastError, printable
from srcfast.launch import read_launch
from srcfast.memory.allocator import allocator_variables
from srcfast.run import signals

if TYPE_CHECKING:
    from srcfast.cli.inputs import Source
    from srcfast.config.settings import Config


class Commands(TyperGroup):
    """Group of commands that prints srcfast's errors as text and exits with `exit_status`."""

    def invoke(self, ctx: Any) -> Any:
        # torch reads these when it is imported, and `recorded` may import it.
        os.environ.update(allocator_variables(os.environ))
        who = "srcfast"
        try:
            if (launch := read_launch(os.environ)).by_torchrun:
                who = f"srcfast rank {launch.rank}"
            with signals.listening(), report_disk_errors(), escape_warnings():
                return recorded(super().invoke)(ctx)
        except (SrcfastError, Interrupted) as error:
            typer.echo(f"{who}: {printable(str(error))}", err=True)
            raise typer.Exit(exit_status(error)) from None


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
    return read_launch(os.environ).by_torchrun


def recorded(work: Callable[..., Any]) -> Callable[..., Any]:
    """Under torchrun, also write errors to the file from which torchrun shows the first error of all ranks."""
    if not under_torchrun():
        return work
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(work)


app = typer.Typer(
    name="srcfast",
    cls=Commands,
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
Model = Annotated[
    str | None, typer.Option(help="LVLM checkpoint directory, name on the Hub, or 'embedded' (model.path)")
]
Adapter = Annotated[Path | None, typer.Option(help="directory, or name on the Hub, of a LoRA adapter in PEFT's format")]
ScorerPath = Annotated[
    str | None,
    typer.Option("--scorer", help="R-Scorer checkpoint directory, name on the Hub, or 'embedded' (scorer.path)"),
]
ENDPOINT = typer.Option(
    help="address of an OpenAI-compatible server, as http://HOST:PORT/v1; the key is that of OPENAI_API_KEY"
)
ENDPOINT_MODEL = typer.Option(help="name that the server has for the model")
Concurrency = Annotated[int, typer.Option(min=1, max=1024, help="requests at the same time")]
MaxTokens = Annotated[int, typer.Option(min=1, max=1 << 20, help="tokens of an answer at most")]
MaxTokensTotal = Annotated[
    int | None,
    typer.Option(
        min=1, max=10**15, help="tokens of all prompts and answers at most, those of earlier processes included"
    ),
]
Timeout = Annotated[float, typer.Option(min=0.01, max=86400, help="seconds until an attempt counts as failed")]
Data = Annotated[
    list[Path] | None,
    typer.Option(help="file of records, or a quoted glob, used instead of the config's datasets; may be given again"),
]
Format = Annotated[
    str | None,
    typer.Option(
        help="format of --data: jsonl, llava, messages, alpaca, vlmeval_tsv, trl, rlhf_v, easy_vqa; default: by the first records"
    ),
]
ImageRoot = Annotated[
    Path | None, typer.Option(help="directory that image paths are relative to; default: the file's directory")
]
Output = Annotated[Path | None, typer.Option(help="file or directory to write")]
Quiet = Annotated[bool, typer.Option("--quiet", help="show no progress and no tables")]
Candidates = Annotated[Path | None, typer.Option(help="directory that `srcfast candidates` wrote")]
Scores = Annotated[Path | None, typer.Option(help="directory that `srcfast score` wrote")]
Profile = Annotated[
    str | None,
    typer.Option(
        help="training steps to profile, such as 3:6 (from 0, without the last): writes a trace, allocations and a summary"
        " to profile/ in the output directory"
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="print JSON")]
FollowLinks = Annotated[
    bool | None,
    typer.Option("--follow-links", help="let symbolic links lead out of the image root", show_default=False),
]
DuplicateIds = Annotated[
    str | None, typer.Option(help="a sample whose id has occurred: reject it (the default), or rename it and warn")
]
SOURCE = {  # the options of a Source
    "data": Data,
    "format": Format,
    "image_root": ImageRoot,
    "follow_links": FollowLinks,
    "duplicate_ids": DuplicateIds,
}


def settings_command(
    module: str, section: str | None, **of_settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function of settings as a command of its name; its parameters but `config` and `source` are options.

    On the command line the settings are words and the options of `of_settings`, and the source is the options of `SOURCE`.
    The function itself is a declaration: that of its name in `srcfast.cli.MODULE` is called with the same arguments. It is
    imported once the settings are read, so that errors in them are immediate: it may import torch.

    Args:
        module: of the function that is called.
        section: the section of the settings that single settings are looked up in first.
        of_settings: options that stand for settings, by name with their type.
    """

    def register(command: Callable[..., None]) -> Callable[..., None]:
        types = get_type_hints(command, localns={"Config": Any, "Source": Any}, include_extras=True)
        source = SOURCE if "source" in types else {}

        def run(words: list[str] | None, **options: Any) -> None:
            from srcfast.cli import inputs

            config = inputs.settings(words, section, **{name: options.pop(name) for name in of_settings})
            if source:
                first, *more = options.pop("data") or [None]
                rest = {name: options.pop(name) for name in source if name != "data"}
                options["source"] = inputs.Source(data=first, more=tuple(more), **rest)
            if "profile" in options:
                options["profile"] = inputs.steps(options["profile"])
            getattr(import_module(f"srcfast.cli.{module}"), command.__name__)(config, **options)

        shared = {"words": Words} | of_settings | source
        options = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=False if name == "quiet" else None, annotation=kind)
            for name, kind in shared.items()
        ]
        options += [
            parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=types[parameter.name])
            for parameter in signature(command).parameters.values()
            if parameter.name not in ("config", "source")
        ]
        run.__signature__ = Signature(options)  # type: ignore[attr-defined]  # typer reads it
        return app.command(command.__name__, help=command.__doc__)(run)

    return register


@settings_command("commands", None, model=Model, scorer=ScorerPath, output=Output, quiet=Quiet)
def calibrate(config: Config, profile: Profile = None) -> None:
    """Run everything: rationale fine-tuning, then rounds of candidates, scores, curation and DPO."""


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="arms, seeds and settings of the study")],
    output: Annotated[
        Path | None, typer.Option(help="directory for summary.json, tables.md and index.html; default: the study's")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Compare arms of a calibration over several seeds; the same command continues, and may run several times at once."""
    from srcfast.cli import study as command

    command.study(file, output, quiet)


@settings_command("teach", "candidates", model=Model, quiet=Quiet)
def teach(
    config: Config,
    source: Source,
    adapter: Adapter = None,
    output: Output = None,
    endpoint: Annotated[str | None, ENDPOINT] = None,
    endpoint_model: Annotated[str | None, ENDPOINT_MODEL] = None,
    concurrency: Concurrency = 8,
    draws: Annotated[int, typer.Option(min=1, max=1024, help="how often a sample is asked at most")] = 4,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="of the draws")] = 0.7,
    max_tokens: MaxTokens = 768,
    max_tokens_total: MaxTokensTotal = None,
    prompt_price: Annotated[float, typer.Option(min=0, max=1e9, help="price of a million tokens of prompts")] = 0.0,
    completion_price: Annotated[float, typer.Option(min=0, max=1e9, help="price of a million tokens of answers")] = 0.0,
    max_cost: Annotated[float | None, typer.Option(min=0, max=1e12, help="cost at most, by these prices")] = None,
    timeout: Timeout = 120.0,
) -> None:
    """Have rationales written for samples without one, by an endpoint's model or by --model; for rationale.teacher."""


@settings_command("commands", "rationale", model=Model, quiet=Quiet)
def rationale(config: Config, source: Source, output: Output = None, profile: Profile = None) -> None:
    """Stage 1: fine-tune a LoRA adapter on rationale-answer pairs."""


@settings_command("commands", "candidates", model=Model, quiet=Quiet)
def candidates(config: Config, source: Source, adapter: Adapter = None, output: Output = None) -> None:
    """Stage 2: generate diverse candidates by sentence-level beam search."""


@settings_command("commands", "scorer", scorer=ScorerPath, quiet=Quiet)
def score(config: Config, source: Source, candidates: Candidates = None, output: Output = None) -> None:
    """Stage 3: score the candidates pairwise by the R-Scorer."""


@settings_command("tools", "curation", quiet=Quiet)
def curate(
    config: Config, source: Source, candidates: Candidates = None, scores: Scores = None, output: Output = None
) -> None:
    """Stage 4a: choose preference pairs among scored candidates, and count what is dropped and why."""


@settings_command("commands", "dpo", model=Model, quiet=Quiet)
def dpo(
    config: Config, source: Source, adapter: Adapter = None, output: Output = None, profile: Profile = None
) -> None:
    """Stage 4b: train a LoRA adapter by confidence-weighted DPO on preference pairs."""


@settings_command("commands", "evaluation", model=Model, quiet=Quiet)
def evaluate(config: Config, source: Source, adapter: Adapter = None, output: Output = None) -> None:
    """Measure accuracy and rationale-answer alignment of greedy answers, with 95 % intervals."""


@settings_command("commands", "dpo", model=Model, quiet=Quiet)
def logprob(
    config: Config,
    adapter: Adapter = None,
    data: Annotated[Path | None, typer.Option(help="lines of {images, turns?, prompt, response}")] = None,
    image_root: ImageRoot = None,
    output: Output = None,
) -> None:
    """Compute log-probabilities: reads lines of {images, prompt, response}, writes {logprob, tokens} in the same order."""


@settings_command("estimate", None, model=Model, scorer=ScorerPath)
def estimate(
    config: Config,
    memory: Annotated[str | None, typer.Option(help="memory to fit into, such as 12GiB; default: the device's")] = None,
    flops: Annotated[
        float | None,
        typer.Option(min=1, max=1e19, help="floating-point operations a second that the run reaches, such as 400e12"),
    ] = None,
    mfu: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="share of the device's peak rate that the run reaches, unless --flops is given"
        ),
    ] = 0.4,
    text_tokens: Annotated[
        int, typer.Option(min=1, max=1 << 24, help="text tokens of a typical prompt, without its image")
    ] = 64,
    response_tokens: Annotated[int, typer.Option(min=1, max=1 << 24, help="tokens of a typical response")] = 192,
    as_json: AsJSON = False,
) -> None:
    """Forecast memory and time by stage, and advise what to change; reads config.json and file headers alone."""


@settings_command("model_tools", "rationale", model=Model)
def inspect(
    config: Config,
    source: Source,
    index: Annotated[int, typer.Option(min=0, max=10**9, help="index of the sample, from 0")] = 0,
) -> None:
    """Print one sample as the model sees it: decoded tokens, their number, the loss mask in colours."""


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="file to read")],
    target: Annotated[Path, typer.Argument(help="file to write")],
    from_format: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="format to read: jsonl, llava, messages, alpaca, trl, rlhf_v, vlmeval_tsv; default: by the first records",
        ),
    ] = None,
    to_format: Annotated[
        str | None, typer.Option("--to", help="format to write: jsonl, llava, trl, vlmeval_tsv")
    ] = None,
    image_root: ImageRoot = None,
) -> None:
    """Convert records of any format to JSON lines, LLaVA JSON, TRL preference JSON or VLMEvalKit TSV."""
    from srcfast.cli import tools

    tools.convert(source, target, from_format, to_format, image_root)


@app.command()
def export(
    predictions: Annotated[Path, typer.Argument(help="predictions of an evaluation: predictions/SET.tsv")],
    to: Annotated[str, typer.Option(help="whose files to write: vlmevalkit, lmms_eval")],
    model: Annotated[str, typer.Option(help="name of the model in the files' names")],
    dataset: Annotated[str, typer.Option(help="VLMEvalKit's name of the data set, or lmms-eval's of the task")],
    format: Annotated[str, typer.Option(help="of VLMEvalKit's file: xlsx, tsv, json")] = "xlsx",
    output: Output = None,
) -> None:
    """Write predictions, with the bare answers, as files that VLMEvalKit or lmms-eval reads."""
    from srcfast.cli import tools

    tools.export(predictions, to, model, dataset, format, output)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="LVLM checkpoint directory, name on the Hub, or 'embedded'")],
    words: Words = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="image that the questions are about; may be given again")
    ] = None,
    adapter: Adapter = None,
    question: Annotated[
        str | None, typer.Option(help="one question; default: those that are typed in, a line each")
    ] = None,
) -> None:
    """Ask a model about images: what it saw, what it concluded and its answer are shown apart."""
    from srcfast.cli import chat as command

    command.chat(model, words or [], image or [], adapter, question)


@settings_command("model_tools", None, model=Model)
def merge(config: Config, adapter: Adapter = None, output: Output = None) -> None:
    """Merge an adapter into its base and write a checkpoint that transformers reads."""


@app.command()
def push(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_DIRECTORY", help="run directory, or that of an adapter or a checkpoint")
    ],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="repository; created if it is missing")],
    merged: Annotated[
        Path | None, typer.Option(help="directory that `srcfast merge` wrote, to upload in place of the run's adapter")
    ] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="of the repository")] = True,
    revision: Annotated[str | None, typer.Option(help="branch; created if it is missing; default: main")] = None,
    licence: Annotated[str | None, typer.Option(help="identifier for the model card, such as apache-2.0")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the model card and the files, and send nothing")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="directory for the card of a dry run")] = None,
) -> None:
    """Upload a run's adapter, or a merged checkpoint, with a model card to the Hugging Face Hub; the token is HF_TOKEN's."""
    from srcfast.cli import push as command

    command.push(source, repository, merged, private, revision, licence, dry_run, output)


@settings_command("commands", "scorer_training", scorer=ScorerPath, quiet=Quiet)
def scorer(config: Config, source: Source, output: Output = None, profile: Profile = None) -> None:
    """Train an R-Scorer on rationale-answer pairs and their corruptions, and report its held-out accuracy."""


@app.command()
def verdicts(
    run: Annotated[Path, typer.Argument(help="run directory, such as runs/demo")],
    output: Annotated[Path, typer.Option(help="file of verdicts to write, for scorer_training.verdicts")],
    endpoint: Annotated[str, ENDPOINT],
    endpoint_model: Annotated[str, ENDPOINT_MODEL],
    pairs: Annotated[int, typer.Option(min=1, max=10**7, help="pairs at most, each asked in both orders")] = 500,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of the choice of pairs")] = 0,
    concurrency: Concurrency = 8,
    max_tokens: MaxTokens = 8,
    max_tokens_total: MaxTokensTotal = None,
    timeout: Timeout = 120.0,
    quiet: Quiet = False,
) -> None:
    """Have pairs of a run's candidates judged by an endpoint's model, in both orders; for scorer_training.verdicts."""
    from srcfast.cli import verdicts as command

    command.verdicts(
        run,
        output,
        endpoint,
        endpoint_model,
        pairs,
        seed,
        concurrency,
        max_tokens,
        max_tokens_total,
        timeout,
        quiet,
    )


label_commands = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(label_commands, name="label", help="Have a person judge pairs of a run's candidates in a browser.")


@label_commands.command("write")
def write_label_page(
    run: Annotated[Path, typer.Argument(help="run directory, such as runs/demo")],
    output: Annotated[Path, typer.Option(help="page to write; PAGE.pairs.jsonl is written beside it")],
    pairs: Annotated[int, typer.Option(min=1, max=10_000, help="pairs on the page at most")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of the choice and of the order")] = 0,
) -> None:
    """Write a page of pairs: half of which the R-Scorer is least sure, half at random, each in random order."""
    from srcfast.cli import label

    label.write(run, output, pairs, seed)


@label_commands.command("read")
def read_labels(
    labels: Annotated[list[Path], typer.Argument(help="files that were saved on the page")],
    pairs: Annotated[Path, typer.Option(help="the page's PAGE.pairs.jsonl")],
    output: Annotated[Path, typer.Option(help="file of verdicts to write, for scorer_training.verdicts")],
) -> None:
    """Check saved answers, write them as verdicts, and report how far people agree with each other and the R-Scorer."""
    from srcfast.cli import label

    label.read(labels, pairs, output)


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
def doctor(
    model: Annotated[str | None, typer.Argument(help="directory of an LVLM; its weights need not be there")] = None,
    json: AsJSON = False,
) -> None:
    """Print versions, available backends, and optional packages that are missing, with what each adds.

    Of a model: whether it runs, by which backbone, how many tokens an image takes, and what memory the weights need.
    """
    from srcfast.cli import model_tools

    if model is None:
        model_tools.doctor(json)
    else:
        model_tools.doctor_model(model, json)


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
def report(
    run: Annotated[Path, typer.Argument(help="run directory, such as runs/demo")],
    image_root: Annotated[
        list[Path] | None,
        typer.Option(help="directory whose images may be shown, too; may be given several times"),
    ] = None,
) -> None:
    """Write a run's page again; the run may not be done."""
    from srcfast.cli import tools

    tools.report(run, image_root or ())


@app.command()
def watch(
    run: Annotated[
        Path, typer.Argument(help="run directory, such as runs/demo; the run may be under way, or not begun")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="port on 127.0.0.1; 0: one that is free")] = 0,
) -> None:
    """Serve a page about a run on this machine: stage, time left, curves, newest candidates. Ctrl-C ends it."""
    from srcfast.cli import tools

    tools.watch(run, port)


@app.command()
def world(
    output: Output = None,
    split: Annotated[str, typer.Option(help="train, validation, test, generalisation, base or scorer")] = "train",
    samples: Annotated[int, typer.Option(min=1, max=10**9, help="number of samples")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="seed of the draw")] = 0,
) -> None:
    """Write samples of the embedded world: SPLIT.jsonl, and the images in images/."""
    from srcfast.cli import tools

    tools.world(output, split, samples, seed)
