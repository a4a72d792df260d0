"""The command `verdicts`: a language model behind an endpoint judges pairs of a run's candidates."""

from __future__ import annotations

import json
from pathlib import Path

from srcfast.cli.inputs import check_output, is_rank_zero
from srcfast.cli.teach import asked_directory
from srcfast.data.jsonl import write_json, write_jsonl
from srcfast.endpoint.answer_log import AnswerLog
from srcfast.endpoint.budget import Budget, Limit
from srcfast.endpoint.client import Endpoint
from srcfast.errors import InputError, SrcfastError
from srcfast.run.lock import lock_directory
from srcfast.run.progress import track
from srcfast.stages.endpoint_verdicts import Verdicts, ask_verdicts, verdict_report, verdict_rows
from srcfast.stages.judged_pairs import choose_pairs, read_judged


def verdicts(
    run: Path,
    output: Path,
    endpoint: str,
    endpoint_model: str,
    pairs: int,
    seed: int,
    concurrency: int,
    max_tokens: int,
    max_tokens_total: int | None,
    timeout: float,
    quiet: bool,
) -> None:
    """Ask for verdicts on a run's pairs in both orders, write them to `output`, and print what came of all.

    Answers are in a directory beside `output`, so that the same command continues. Where it ends early, `output` has what there
    is.

    Raises:
        SrcfastError: the budget is spent, or verdicts are missing that the same command may get.
    """
    check_output(None, output, run / "config.yaml", is_file=True)
    asked = asked_directory(output)
    check_output(None, asked, run / "config.yaml")
    server = Endpoint.from_environment(endpoint, endpoint_model, timeout)
    if not is_rank_zero():
        return
    chosen = choose_pairs(read_judged(run), pairs, seed)
    if not chosen:
        raise InputError(file=run, expected="a sample with two candidates that differ", found="none")
    with lock_directory(asked):
        result = Verdicts()
        log = AnswerLog(asked / "answers.jsonl")
        limits = [] if max_tokens_total is None else [Limit("tokens", max_tokens_total)]
        budget = Budget(limits, log.prompt_tokens, log.completion_tokens)
        try:
            with track("verdicts", 2 * len(chosen), "verdicts", quiet=quiet) as progress:
                ask_verdicts(server, chosen, max_tokens, log, budget, concurrency, progress, result)
        finally:
            log.close()
            report = verdict_report(chosen, result)
            report |= {"prompt_tokens": budget.prompt_tokens, "completion_tokens": budget.completion_tokens}
            write_jsonl(output, verdict_rows(chosen, result, endpoint_model))
            write_json(asked / "funnel.json", report)
            if not quiet:
                print(json.dumps(report, indent=2))
    if unanswered := report["dropped"].get("unanswered"):
        raise SrcfastError(f"{unanswered} pairs were not answered. Fix: the same command asks them again")
