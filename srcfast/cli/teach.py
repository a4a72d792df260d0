"""The command `teach`: have rationales written, by a model behind an endpoint or by one that is loaded here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from srcfast.cli.hub_inputs import from_hub
from srcfast.cli.inputs import Source, check_output, is_rank_zero, read_all, rejected_records, require_option
from srcfast.config.settings import Config
from srcfast.data.jsonl import write_json, write_jsonl
from srcfast.data.records import Sample
from srcfast.endpoint.answer_log import AnswerLog
from srcfast.endpoint.budget import Budget, Limit
from srcfast.endpoint.client import Endpoint
from srcfast.errors import ConfigError, SrcfastError
from srcfast.run.lock import lock_directory
from srcfast.run.progress import track
from srcfast.stages.teaching import Drawing, Taught, needs_no_teacher, rows_in_order
from srcfast.stages.teaching import teach as teach_samples


def teach(
    config: Config,
    source: Source,
    adapter: Path | None,
    output: Path | None,
    endpoint: str | None,
    endpoint_model: str | None,
    concurrency: int,
    draws: int,
    temperature: float,
    max_tokens: int,
    max_tokens_total: int | None,
    prompt_price: float,
    completion_price: float,
    max_cost: float | None,
    timeout: float,
) -> None:
    """Have a rationale written for each sample, write those that reach the gold answer to `output`, and print what came of all.

    What was drawn is in a directory beside `output`, so that the same command continues. Where it ends early, `output` has what
    an endpoint has written so far.

    Raises:
        SrcfastError: the budget is spent, or samples remain unanswered.
    """
    output = require_option(output, "--output", "a file for the rationales")
    # What it writes may be the teacher's file of the settings, which it does not read.
    config = config.replace(rationale=config.rationale.replace(teacher=None))
    for path in (output, rejected_file(output)):
        check_output(config, path, *source.paths, adapter, is_file=True)
    check_output(config, asked_directory(output), *source.paths, adapter)
    drawing = Drawing(draws, temperature, max_tokens)
    if endpoint is None:
        from srcfast.cli.commands import teach_here

        if endpoint_model is not None or max_tokens_total is not None or max_cost is not None:
            raise ConfigError("--endpoint: expected a server's address beside its options, found none. Fix: name it")
        if config.model.path == "embedded" and adapter is None:
            expected = "a teacher: --endpoint with --endpoint-model, or --model (the embedded one with --adapter)"
            raise ConfigError(f"--endpoint: expected {expected}, found none. Fix: name one")
        teach_here(config, source=source, adapter=adapter, output=output, drawing=drawing)
        return
    if endpoint_model is None:
        raise ConfigError("--endpoint-model: expected the server's name for the model, found nothing. Fix: name it")
    server = Endpoint.from_environment(endpoint, endpoint_model, timeout)
    limits = [] if max_tokens_total is None else [Limit("tokens", max_tokens_total)]
    if max_cost is not None:
        if not prompt_price + completion_price:
            raise ConfigError(
                "--max-cost: expected prices, found none. Fix: name --prompt-price and --completion-price"
            )
        limits.append(Limit("cost", max_cost, prompt_price / 1e6, completion_price / 1e6))
    if not is_rank_zero():
        return
    config, options = from_hub(config, {"source": source}, data="train", directory=asked_directory(output))
    source = options["source"]
    with rejected_records(asked_directory(output), rejected_file(output)) as rejected:
        samples = read_all(config, source, "rationale", rejected)
    with lock_directory(asked_directory(output)):
        taught = Taught()
        log = AnswerLog(asked_directory(output) / "answers.jsonl")
        budget = Budget(limits, log.prompt_tokens, log.completion_tokens)
        asked = [sample for sample in samples if needs_no_teacher(sample) is None]
        try:
            with track("teach", len(asked), quiet=config.quiet) as progress:
                teach_samples(server, asked, drawing, log, budget, concurrency, progress, taught)
        finally:
            log.close()
            counts: dict[str, float] = {"rejected": len(rejected)}
            counts |= {"prompt_tokens": budget.prompt_tokens, "completion_tokens": budget.completion_tokens}
            if prompt_price or completion_price:
                counts["cost"] = (
                    budget.prompt_tokens * prompt_price + budget.completion_tokens * completion_price
                ) / 1e6
            write_taught(config, output, samples, taught, counts)
    if unanswered := Counter(taught.reasons.values())["unanswered"]:
        raise SrcfastError(f"{unanswered} samples were not answered. Fix: the same command asks them again")


def asked_directory(output: Path) -> Path:
    """Return the directory of what was drawn for an output."""
    return output.with_name(f"{output.name}.asked")


def rejected_file(output: Path) -> Path:
    """Return the file of records that could not be read."""
    return output.with_name(f"{output.name}.rejected.jsonl")


def write_taught(
    config: Config, output: Path, samples: Sequence[Sample], taught: Taught, counts: Mapping[str, float]
) -> None:
    """Write a teacher's file and the funnel, and print the latter.

    Args:
        samples: all that were read.
        counts: further figures of the funnel.
    """
    write_jsonl(output, rows_in_order(samples, taught))
    left_out = Counter(filter(None, map(needs_no_teacher, samples)))
    funnel = {
        "samples": len(samples),
        "taught": len(taught.entries),
        "dropped": dict(left_out + Counter(taught.reasons.values())),
        "not_asked": len(samples) - len(taught.entries) - len(taught.reasons) - left_out.total(),
        "draws": dict(taught.draws),
        **counts,
    }
    write_json(asked_directory(output) / "funnel.json", funnel)
    if not config.quiet:
        print(json.dumps(funnel, indent=2))
