"""Stage 1, rationale fine-tuning: train LoRA on the rationale-answer pairs (RAPs) of `data.rationale_pairs`.

The tree of a RAP is prompt -> response. The loss is the mean negative log-likelihood of the response's
tokens, the end token included, over the whole global batch; the prompt's tokens have none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Unpack

import numpy as np
from torch import Tensor

from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.gc_pauses import pause_full_collections
from srcfast.data.logit_rows import response_logit_rows, row_positions
from srcfast.data.rationale_pairs import RationalePair, build_raps, read_teacher
from srcfast.data.records import Sample
from srcfast.errors import InputError
from srcfast.models.head import Head
from srcfast.models.protocols import VisionLanguageModel
from srcfast.stages.datasets import draw
from srcfast.stages.logprobs import check_logprobs
from srcfast.stages.policy import Policy
from srcfast.stages.prompts import PromptEncoder, image_keys
from srcfast.stages.stage_run import StageRun
from srcfast.training.items import Metrics, Objective, TrainingItem
from srcfast.training.loop import TrainingOptions, train
from srcfast_kernels.transfers import to_device


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
    on_items: Callable[[Sequence[TrainingItem]], None] | None = None,
    **options: Unpack[TrainingOptions],
) -> list[Metrics]:
    """Train the model's adapter (what requires gradients) on RAPs; return one dict of metrics a step.

    Args:
        model: the policy.
        raps: rationale-answer pairs.
        settings: the loop.
        on_items: called with the training items before training.
        options: of `train`.

    Raises:
        SrcfastError: a log-probability above 0.
    """
    items = rationale_trees(model, raps)
    if on_items is not None:
        on_items(items)
    objective = Objective(rationale_loss, response_tokens, response_logit_rows)
    return train(model, items, objective=objective, settings=settings, before_update=check_logprobs, **options)


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
                (Segment(encode_prompt(sample)), Segment(model.encode_response(response), 0)),
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
