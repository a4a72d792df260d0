"""Encode every record once before anything is trained, and set aside what the models can't take.

A record that holds a control token, or leaves no room, would otherwise end a run in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import nlargest
from typing import Any

from srcfast import distributed
from srcfast.config.settings import Config
from srcfast.data.rationale_pairs import build_raps, read_teacher
from srcfast.data.readers import check_rejected
from srcfast.data.records import Candidate, Preference, Record, Sample, of_record
from srcfast.errors import InputError
from srcfast.models.protocols import VisionLanguageModel
from srcfast.models.scorer import ALONE, Scorer
from srcfast.run.progress import track
from srcfast.stages.pair_trees import preference_tree
from srcfast.stages.prompts import encode_prompt
from srcfast.stages.scoring import pairs_of, sample_reference

Check = Callable[[Any], None]  # raises InputError for a record that doesn't fit
Responses = Callable[[Any], Sequence[tuple[str, str]]]  # the fields and texts of the responses to a record's prompt


def split_fitting(
    records: Sequence[Record], check: Check, config: Config, rejected: list[dict[str, Any]], name: str = "data"
) -> list[Record]:
    """Return the records that fit; append a row about each of the others to `rejected`. The ranks share the work.

    Raises:
        InputError: none fits, or more than `max_rejected` do not.
    """
    shared, mine = range(distributed.rank(), len(records), distributed.world_size()), {}
    with track(f"check {name}", len(shared), quiet=config.quiet) as progress:
        for index in shared:
            try:
                check_each([records[index]], check)
            except InputError as error:
                mine[str(index)] = error.as_record()
            progress.advance()
    of_ranks = {int(index): row for part in distributed.gather(mine) for index, row in part.items()}
    rows = {index: of_ranks[index] for index in sorted(of_ranks)}
    listed = {row["reason"] for row in rejected}  # a sample of both uses is checked twice
    rejected += [row for row in rows.values() if row["reason"] not in listed]
    check_rejected(list(rows.values()), len(records), config.max_rejected)
    return [record for index, record in enumerate(records) if index not in rows]


def check_each(records: Iterable[Record], check: Check) -> None:
    """Check records. Raises InputError, with file and line, at the first that doesn't fit."""
    for record in records:
        try:
            check(record)
        except InputError as error:
            raise of_record(error, record) from error


def check_fits(
    model: VisionLanguageModel, said: Responses = lambda record: (), setting: str = "", limit: int = 0
) -> Check:
    """Return a check that a record's prompt leaves room for a response, and that the tree of both fits into `limit` tokens.

    Args:
        said: the field and the text of each response to the prompt: none, one, or the two of a pair.
        setting: the limit's.
    """

    def check(record: Sample | Preference) -> None:
        prompt = encode_prompt(model, record)
        responses = [(field, model.response_tokens(prompt, text, record.id, field)) for field, text in said(record)]
        if responses:
            (field, first), *others = responses
            trees = [preference_tree(prompt, first, second, key=record.id) for _, second in others]
            _check_tokens(record.id, field, trees[0].num_tokens if trees else len(prompt) + len(first), setting, limit)

    return check


def check_lesson(model: VisionLanguageModel, config: Config) -> Check:
    """Return a check that a sample's prompt and, if it has one, its rationale and answer fit into stage 1's forests."""
    section = config.rationale
    teacher = None if section.teacher is None else read_teacher(section.teacher)

    def said(sample: Sample) -> list[tuple[str, str]]:
        return [("rationale", response) for _, response in build_raps([sample], section.format, teacher)[0]]

    return check_fits(model, said, "rationale.token_budget", section.token_budget)


def check_response(model: VisionLanguageModel, token_budget: int) -> Check:
    """Return a check that a sample's prompt and its answer, as a response, have at most `token_budget` tokens."""
    return check_fits(model, lambda sample: [("response", sample.answer)], "dpo.token_budget", token_budget)


def check_pair(model: VisionLanguageModel, token_budget: int) -> Check:
    """Return a check that a preference pair makes a tree of at most `token_budget` tokens."""
    return check_fits(
        model, lambda pair: [("chosen", pair.chosen), ("rejected", pair.rejected)], "dpo.token_budget", token_budget
    )


def longest_candidates(scorer: Scorer, groups: Iterable[tuple[str, Sequence[Candidate]]]) -> dict[str, list[str]]:
    """Return by sample id the two texts, of all that its candidates have, of the most tokens."""

    def size(text: str) -> int:
        return len(scorer.encode(text))

    return {key: nlargest(2, dict.fromkeys(one.text for one in group), key=size) for key, group in groups}


def check_judged(scorer: Scorer, config: Config, candidates: Mapping[str, list[str]] | None = None) -> Check:
    """Return a check that the R-Scorer has room for a sample's reference beside the candidates that it compares or rates.

    Args:
        candidates: of `longest_candidates`; None: they are not known yet, and have `candidates.max_new_tokens` each.
    """
    positions, mode = scorer.text_model.decoder.config.max_positions, config.scorer.mode
    first, assumed = ((0, 1), 2) if mode == "pairwise" else ((0, ALONE), 1)
    assumed = 0 if candidates is not None else assumed * config.candidates.max_new_tokens
    field = "facts" if candidates is None else "candidates"

    def check(sample: Sample) -> None:
        texts = ["", ""] if candidates is None else candidates.get(sample.id, [])
        pairs = [first] if candidates is None else pairs_of(len(texts), mode)
        judged = scorer.judge_tree(sample_reference(sample, scorer.quality), texts, pairs, key=sample.id)
        sizes = [segment.tokens.size for segment in judged.tree.segments]
        paths = [sizes[0] + sizes[judged.tree.segments[slot].parent] + sizes[slot] for slot in judged.slots]
        tokens = max(paths, default=0) + assumed
        _check_tokens(sample.id, field, tokens, "scorer.token_budget", config.scorer.token_budget)
        if tokens > positions:
            expected = f"at most the R-Scorer's {positions} positions"
            fix = "take another scorer, or leave this sample out"
            raise InputError(sample_id=sample.id, field=field, expected=expected, found=f"{tokens} tokens", fix=fix)

    return check


def pair_fits(model: VisionLanguageModel, token_budget: int, pair: Preference) -> bool:
    """Return whether `check_pair` takes a pair."""
    try:
        check_pair(model, token_budget)(pair)
    except InputError as error:
        if error.field not in ("chosen", "rejected"):  # such as an image that is gone
            raise
        return False
    return True


def _check_tokens(sample_id: str, field: str, tokens: int, setting: str, limit: int) -> None:
    if tokens > limit:
        expected, fix = f"at most {setting} = {limit} tokens", f"raise {setting}, or leave this sample out"
        raise InputError(sample_id=sample_id, field=field, expected=expected, found=f"{tokens} tokens", fix=fix)
