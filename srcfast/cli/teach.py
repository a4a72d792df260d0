"""The command `teach`: have rationales written by a model behind an endpoint."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from srcfast.cli.inputs import Source, check_output, is_rank_zero, read_all, require_option
from srcfast.config.settings import Config
from srcfast.data.jsonl import write_json, write_jsonl
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
    """Ask for a rationale of each sample, write those that reach the gold answer to `output`, and print what came of all.

    Answers are logged in a directory beside `output`, so that the same command asks only what is missing. Where it ends early,
    `output` has what is there so far.

    Raises:
        SrcfastError: the budget is spent, or samples remain unanswered.
    """
    output = require_option(output, "--output", "a file for the rationales")
    if endpoint is None or endpoint_model is None:
        missing = "--endpoint" if endpoint is None else "--endpoint-model"
        raise ConfigError(
            f"{missing}: expected a server's address and its name for the model, found nothing. Fix: name both"
        )
    server = Endpoint.from_environment(endpoint, endpoint_model, timeout)
    limits = [] if max_tokens_total is None else [Limit("tokens", max_tokens_total)]
    if max_cost is not None:
        if not prompt_price + completion_price:
            raise ConfigError(
                "--max-cost: expected prices, found none. Fix: name --prompt-price and --completion-price"
            )
        limits.append(Limit("cost", max_cost, prompt_price / 1e6, completion_price / 1e6))
    for path in (output, rejected_file := output.with_name(f"{output.name}.rejected.jsonl")):
        check_output(config, path, *source.paths, is_file=True)
    directory = output.with_name(f"{output.name}.asked")
    check_output(config, directory, *source.paths)
    if not is_rank_zero():
        return
    with lock_directory(directory):
        rejected: list[dict[str, object]] = []
        try:
            samples = read_all(config, source, "rationale", rejected)
        finally:
            if rejected:
                write_jsonl(rejected_file, rejected)
        left_out = Counter(filter(None, map(needs_no_teacher, samples)))
        samples = [sample for sample in samples if needs_no_teacher(sample) is None]
        taught, drawing = Taught(), Drawing(draws, temperature, max_tokens)
        log = AnswerLog(directory / "answers.jsonl")
        budget = Budget(limits, log.prompt_tokens, log.completion_tokens)
        try:
            with track("teach", len(samples), quiet=config.quiet) as progress:
                teach_samples(server, samples, drawing, log, budget, concurrency, progress, taught)
        finally:
            log.close()
            write_jsonl(output, rows_in_order(samples, taught))
            cost = (budget.prompt_tokens * prompt_price + budget.completion_tokens * completion_price) / 1e6
            funnel = {
                "samples": len(samples) + left_out.total(),
                "taught": len(taught.entries),
                "dropped": dict(left_out + Counter(taught.reasons.values())),
                "not_asked": len(samples) - len(taught.entries) - len(taught.reasons),
                "draws": dict(taught.draws),
                "rejected": len(rejected),
                "prompt_tokens": budget.prompt_tokens,
                "completion_tokens": budget.completion_tokens,
            } | ({"cost": cost} if prompt_price or completion_price else {})
            write_json(directory / "funnel.json", funnel)
            if not config.quiet:
                print(json.dumps(funnel, indent=2))
    if unanswered := Counter(taught.reasons.values())["unanswered"]:
        raise SrcfastError(f"{unanswered} samples were not answered. Fix: the same command asks them again")
