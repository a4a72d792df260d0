"""The commands `label write` and `label read`: pairs of candidates for a person to judge, and the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from srcfast.cli.inputs import check_output
from srcfast.data.jsonl import write_json, write_jsonl
from srcfast.errors import InputError
from srcfast.report.label_page import pairs_file, write_label_page
from srcfast.stages.judged_pairs import choose_pairs, read_judged
from srcfast.stages.label_agreement import agreement, read_labels, read_shown, verdict_rows


def write(run: Path, output: Path, count: int, seed: int) -> None:
    """Write a page of a run's pairs.

    Raises:
        InputError: the directory is no run with candidates, or no sample has two candidates that differ.
    """
    for path in (output, pairs_file(output)):
        check_output(None, path, run / "config.yaml", is_file=True)
    pairs = choose_pairs(read_judged(run), count, seed)
    if not pairs:
        raise InputError(file=run, expected="a sample with two candidates that differ", found="none")
    write_label_page(output, pairs, run.resolve().name)
    unsure = sum(pair.chosen == "unsure" for pair in pairs)
    print(f"page: {output} ({len(pairs)} pairs, of {unsure} the R-Scorer is least sure)\npairs: {pairs_file(output)}")


def agreement_file(output: Path) -> Path:
    """Return the file of what `label read` reports."""
    return output.with_name(f"{output.name}.agreement.json")


def read(labels: Sequence[Path], pairs: Path, output: Path) -> None:
    """Write the answers of all files as verdicts, one record a pair, and print how far they agree.

    Raises:
        InputError: an answer that is none, is to a pair of another page, or contradicts another one of the same person.
    """
    for path in (output, agreement_file(output)):
        check_output(None, path, labels, pairs, is_file=True)
    shown = read_shown(pairs)
    answers = read_labels(labels, shown)
    report = agreement(shown, answers)
    write_jsonl(output, verdict_rows(shown, answers))
    write_json(agreement_file(output), report)
    print(json.dumps(report, indent=2))
