"""First contact, drift of log-probabilities: of candidates as decoding computed them, alone, and packed with others.

One model, three methods to compute one number: the steps of beam search, a forest of the candidate's tree alone, and forests of
many. They differ by rounding, which the training's checks of its reference have to allow for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from srcfast.models import ImageFeatures
from srcfast.stages.candidates import generate_candidates, prompts_of
from srcfast.stages.drift import drift, drift_of, rounding_bound
from srcfast.stages.logprobs import response_logprobs
from srcfast.stages.prompts import image_loader
from srcfast_benchmarks.contact_decoding import (
    ENDINGS,
    RANK,
    SAMPLES,
    config_of,
    samples_of,
    search_of,
    set_endings,
)
from srcfast_benchmarks.contact_model import Models, free
from srcfast_benchmarks.contact_part import Case, Cases
from srcfast_benchmarks.contact_results import Context

Values = dict[str, Any]

BUDGETS = {"full": (2048, 16384), "tiny": (256, 1024)}  # tokens of a forest: of about one tree, and of many
TINY_ENDINGS = (1 / 6, 1 / 4)


def cases(context: Context) -> Cases:
    models = Models(context)
    plan = [("none", True), ("nf4", True), ("none", False)]
    return {
        f"{quantize}, {'graphs' if graphs else 'no graphs'}": partial(three_ways, models, quantize, graphs)
        for quantize, graphs in (plan[:1] if context.tiny else plan)
    }


def three_ways(models: Models, quantize: str, graphs: bool, case: Case) -> Values:
    """Candidates of eight samples, and their log-probabilities by each method."""
    model = models.lvlm(quantize, RANK)
    set_endings(model, models, *(TINY_ENDINGS if case.context.tiny else ENDINGS["sentences"]))
    samples = samples_of(model, models, case.context)
    features = ImageFeatures(model, image_loader(samples))
    settings = config_of(models, quantize, search_of(case.context)).candidates
    candidates = generate_candidates(
        model, samples, settings, features=features, seed=1, batch_size=SAMPLES, graphs=graphs
    )
    items, decoded = [], []
    for prompt, of_sample in zip(prompts_of(model, samples), candidates, strict=True):
        for candidate in of_sample:
            items.append((prompt.token_ids, prompt.images, np.array(candidate.token_ids)))
            decoded.append(candidate.logprob)
    case.store(candidates=len(items))
    free()
    small, large = BUDGETS[case.context.shapes]
    alone = [response_logprobs(model, [item], token_budget=small, features=features)[0] for item in items]
    packed = [value for value, _ in response_logprobs(model, items, token_budget=large, features=features)]
    lengths, dtype = [tokens for _, tokens in alone], model.decoder.head_weight.dtype
    return {
        "tokens": sum(lengths),
        "mean_logprob_a_token": sum(packed) / sum(lengths),
        "packings": differences([value for value, _ in alone], packed, lengths, dtype),
        "decoding": differences(decoded, packed, lengths, dtype),
    }


def differences(ones: Sequence[float], others: Sequence[float], lengths: Sequence[int], dtype: torch.dtype) -> Values:
    """Of log-probabilities of responses: in nats, and in nats a root token beside what is allowed of rounding."""
    apart = np.abs(np.array(ones) - np.array(others))
    found = drift_of([drift(*values) for values in zip(ones, others, lengths, strict=True)], dtype)
    assert found is not None
    return {
        "mean_nats": apart.mean(),
        "largest_nats": apart.max(),
        "root_mean_square_drift": found.root_mean_square,
        "most_root_mean_square_drift": rounding_bound(dtype, found.responses),
        "largest_drift": found.greatest,
        "most_drift": rounding_bound(dtype, 1),
    }
