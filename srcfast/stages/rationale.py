"""Stage 1, rationale fine-tuning: turn samples into rationale-answer pairs (RAPs), and train LoRA on them.

The tree of a RAP is prompt -> response. The loss is the mean negative log-likelihood of the response's
tokens, the end token included, over the whole global batch; the prompt's tokens have none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.gc_pauses import pause_full_collections
from srcfast.data.jsonl import read_jsonl
from srcfast.data.logit_rows import response_logit_rows, row_positions
from srcfast.data.rationale_format import bare_answer, format_response, normalise_answer, parse_response
from srcfast.data.records import Sample
from srcfast.errors import InputError
from srcfast.models.head import Head
from srcfast.models.protocols import VisionLanguageModel
from srcfast.stages.datasets import draw
from srcfast.stages.logprobs import check_logprobs
from srcfast.stages.policy import Policy
from srcfast.stages.prompts import PromptEncoder, image_keys
from srcfast.stages.stage_run import StageRun
from srcfast.training.checkpoint import TrainingCheckpoints
from srcfast.training.items import Features, Metrics, Objective, TrainingItem
from srcfast.training.loop import train
from srcfast.training.profiler import StepProfiler
from srcfast_kernels.transfers import to_device

RationalePair = tuple[Sample, str]  # a sample and its response's text: rationale, then answer


@dataclass(frozen=True)
class TeacherRationale:
    """What a teacher wrote for a sample; `answer` is None where it gave none."""

    rationale: str
    answer: str | None = None


def read_teacher(path: str | Path) -> dict[str, TeacherRationale]:
    """Read a teacher's file by sample id: JSON lines of `{id, rationale, answer?}`.

    Raises:
        InputError: a malformed line, a field that is missing or no text, or an id that occurs twice.
    """
    entries: dict[str, TeacherRationale] = {}
    for line, row in read_jsonl(path):
        for field, needed in (("id", True), ("rationale", True), ("answer", False)):
            value = row.get(field)
            if value is None and not needed:
                continue
            if not isinstance(value, str) or not value.strip():
                raise InputError(file=path, line=line, field=field, expected="a non-empty text", found=repr(value))
        if row["id"] in entries:
            raise InputError(file=path, line=line, field="id", expected="an id that no other line has", found=row["id"])
        entries[row["id"]] = TeacherRationale(row["rationale"], row.get("answer"))
    return entries


def rationale_pairs(config: Config, samples: Sequence[Sample]) -> tuple[list[RationalePair], Counter[str]]:
    """Build the rationale-answer pairs that stage 1 trains on, and count the samples dropped by reason.

    Raises:
        InputError: no sample gives a pair.
    """
    section = config.rationale
    teacher = None if section.teacher is None else read_teacher(section.teacher)
    raps, dropped = build_raps(draw(samples, section.samples, f"rationale/{config.seed}"), section.format, teacher)
    if not raps:
        raise InputError(
            field="rationale",
            expected="samples with facts or a rationale",
            found=f"dropped: {dict(dropped)}",
            fix="add facts or rationales, or name a teacher's file: rationale.teacher=FILE.jsonl",
        )
    return raps, dropped


def build_raps(
    samples: Sequence[Sample],
    format: Literal["tagged", "plain", "answer"] = "tagged",
    teacher: Mapping[str, TeacherRationale] | None = None,
) -> tuple[list[RationalePair], Counter[str]]:
    """Build rationale-answer pairs from the teacher's entry, else the sample's rationale, else its facts.

    Facts become what is seen, with nothing concluded. In a rationale without tags the last sentence is the conclusion, and
    those before it are what is seen.

    Args:
        samples: in the order of the pairs.
        format: of the responses, "tagged" or "plain"; "answer": the answer alone, whether or not there is a rationale.
        teacher: entries by sample id.

    Returns:
        The pairs in the samples' order, and how many samples were dropped for which reason: "no_answer",
        "no_rationale_or_facts", "unreadable_rationale", "answer_contradicts_rationale" (the rationale or the
        teacher states another answer).
    """
    raps: list[RationalePair] = []
    dropped: Counter[str] = Counter()
    for sample in samples:
        response, reason = _response(sample, (teacher or {}).get(sample.id), format)
        if response is None:
            dropped[reason] += 1
        else:
            raps.append((sample, response))
    return raps, dropped


def _response(
    sample: Sample, entry: TeacherRationale | None, format: Literal["tagged", "plain", "answer"]
) -> tuple[str | None, str]:
    """Return (response, "") or (None, the reason why there is none)."""
    rationale = (sample.rationale if entry is None else entry.rationale) or ""
    if not sample.answer.strip():
        return None, "no_answer"
    if format == "answer":
        return bare_answer(sample.answer), ""
    stated = [] if entry is None else [entry.answer]  # answers of the teacher and within the rationale
    if rationale.strip():
        see, think, answer = _read_rationale(rationale)
        stated.append(answer)
    else:
        see, think = tuple(map(_as_sentence, sample.facts)), ()
    if not see and not think:
        return None, "unreadable_rationale" if rationale.strip() else "no_rationale_or_facts"
    gold = normalise_answer(sample.answer)
    if any(answer is not None and normalise_answer(answer) != gold for answer in stated):
        return None, "answer_contradicts_rationale"
    try:
        return format_response(see, think, sample.answer, format), ""
    except InputError:
        return None, "unreadable_rationale"


def _read_rationale(text: str) -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """Return (sentences seen, sentences concluded, the answer if it states one) of a rationale with or without tags."""
    parsed = parse_response(text)
    answer = parsed.answer if parsed.has_rationale else None
    if not parsed.has_rationale:  # a rationale without an answer: the parser of responses reads it once one follows
        tagged = "<see>" in text or "<think>" in text
        parsed = parse_response(f"{text} <answer> unknown </answer>" if tagged else f"{text} Answer: unknown")
    see, think = parsed.perception, parsed.reasoning
    if not see and len(think) > 1:
        see, think = think[:-1], think[-1:]
    return see, think, answer


def _as_sentence(text: str) -> str:
    """End the text with a full stop unless it ends a sentence already."""
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


# Training ---------------------------------------------------------------------------------------------------


def tune_rationale(stage: StageRun, policy: Policy, pairs: Sequence[RationalePair], loop: TrainingConfig) -> None:
    """Train a new adapter of the policy on rationale-answer pairs."""
    model = policy.fresh()
    with stage.training(model, pairs, loop) as hooks:
        fine_tune_rationale(model, pairs, loop, features=policy.features, **hooks)


def fine_tune_rationale(
    model: VisionLanguageModel,
    raps: Sequence[RationalePair],
    settings: TrainingConfig,
    *,
    features: Features | None = None,
    on_step: Callable[[Metrics], None] | None = None,
    profiler: StepProfiler | None = None,
    on_items: Callable[[Sequence[TrainingItem]], None] | None = None,
    checkpoints: TrainingCheckpoints | None = None,
) -> list[Metrics]:
    """Train the model's adapter (what requires gradients) on RAPs; return one dict of metrics a step.

    Args:
        model: the policy.
        raps: rationale-answer pairs.
        settings: the loop.
        features: image keys to embeddings.
        on_step: called after each update with its metrics.
        profiler: of some steps.
        on_items: called with the training items before training.
        checkpoints: see `train`.

    Raises:
        SrcfastError: a log-probability above 0.
    """
    items = rationale_trees(model, raps)
    if on_items is not None:
        on_items(items)
    return train(
        model,
        items,
        objective=Objective(rationale_loss, response_tokens, response_logit_rows),
        settings=settings,
        features=features,
        on_step=on_step,
        before_update=check_logprobs,
        profiler=profiler,
        checkpoints=checkpoints,
    )


@pause_full_collections()
def rationale_trees(model: VisionLanguageModel, raps: Sequence[RationalePair]) -> list[TrainingItem]:
    """Build one item a RAP: the tree prompt -> response, the end token included.

    Args:
        model: `encode_prompt` and `encode_response` of an `LVLM`.
        raps: of `build_raps`.
    """
    encode_prompt = PromptEncoder(model)
    return [
        TrainingItem(
            Tree(
                (
                    Segment(encode_prompt(sample, sample.question, sample.id)),
                    Segment(model.encode_response(response), 0),
                ),
                image_keys(sample),
                key=sample.id,
            ),
            images=sample.images,
        )
        for sample, response in raps
    ]


def response_tokens(items: Sequence[TrainingItem]) -> int:
    """Count the tokens that carry loss in a global batch: the loss's denominator."""
    return sum(item.tree.segments[1].tokens.size for item in items)


def rationale_loss(
    hidden: Tensor, forest: Forest, head: Head, items: Sequence[TrainingItem], denominator: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum -log p over the responses' tokens, divided by the global batch's number of them.

    Args:
        hidden: [T, D], or [M, D] of the forest's `response_logit_rows`.
        forest: of trees prompt -> response.
        head: the model's.
        items: of the forest's trees.
        denominator: of `response_tokens`.

    Returns:
        The loss in nats a token, and metrics: response_tokens, and max_logprob, the greatest log p of a token.
    """
    rows, targets = target_rows(forest)  # [n] each
    positions = row_positions(rows, hidden, forest, response_logit_rows(forest))  # [n], rows of `hidden`
    index = to_device(np.stack([positions, targets]), hidden.device)  # [2, n], in one transfer
    logps = head.logprobs(hidden.index_select(0, index[0]), index[1])  # [n]
    metrics = {"response_tokens": logps.new_full((), float(len(logps))), "max_logprob": logps.detach().max()}
    return -logps.sum() / denominator, metrics


def target_rows(forest: Forest) -> np.ndarray:
    """Return the rows that predict the responses' tokens, and these tokens: [2, n] int64, on the host."""
    host = forest.host or forest
    predictor, tokens = host.predictor.numpy(), host.token_ids.numpy()
    spans = [
        slice(starts[1], starts[1] + tree.segments[1].tokens.size)
        for starts, tree in zip(host.segment_start, host.trees, strict=True)
    ]
    return np.concatenate([np.stack([predictor[span], tokens[span]]) for span in spans], axis=1)
