"""A whole training in plain PyTorch, one response and one number at a time: what the trainer's results are compared with.

Nothing here calls what it checks. A response's log-probability is that of its sequence alone under dense attention
(`small_model.path_logprob`); the loss is written out pair by pair; AdamW, clipping, the schedule and the order of items are
written from their definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.small_model import SmallModel, path_logprob, random_text, token_logprobs
from srcfast.config.settings import DPOConfig, LoRAConfig, TrainingConfig
from srcfast.data.records import Preference, Sample

# fp64 of both; the sums are in another order, and AdamW divides by the gradient's size, which enlarges their rounding.
SAME = {"rtol": 1e-8, "atol": 1e-10}
LOOP: dict[str, Any] = {
    "micro_batch_size": (1, 3),
    "gradient_accumulation_steps": (2, 4),
    "token_budget": (64, 4096),
    "max_grad_norm": (0.02, 1e3),
    "warmup_ratio": (0.0, 0.4),
    "min_learning_rate_ratio": (0.0, 0.3),
    "weight_decay": (0.0, 0.2),
    "late": (False, True),
}
STEADY = {"epochs": 3, "learning_rate": 0.01, "activation_checkpointing": 0}

Losses = Callable[[list[int]], Tensor]  # indices of a global batch -> its loss


@dataclass
class PlainHistory:
    """What each step of a plain training gives."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def plain_training(model: SmallModel, count: int, settings: TrainingConfig, loss_of: Losses) -> PlainHistory:
    """Train the model's parameters that require gradients on `count` items, in place."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = [torch.zeros_like(weight) for weight in weights]
    second = [torch.zeros_like(weight) for weight in weights]
    size = settings.micro_batch_size * settings.gradient_accumulation_steps
    batches = []
    for epoch in range(settings.epochs):
        order = np.random.default_rng((settings.seed, epoch)).permutation(count).tolist()
        batches += [order[start : start + size] for start in range(0, count, size)]
    warmup = math.ceil(settings.warmup_ratio * len(batches))
    history = PlainHistory()
    for step, batch in enumerate(batches):
        loss = loss_of(batch)
        gradients = list(torch.autograd.grad(loss, weights))
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        if norm > settings.max_grad_norm:
            gradients = [gradient * (settings.max_grad_norm / norm) for gradient in gradients]
        if step < warmup:
            rate = settings.learning_rate * (step + 1) / warmup
        else:
            last = max(len(batches) - 1, warmup + 1)
            cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (last - warmup))
            least = settings.min_learning_rate_ratio * settings.learning_rate
            rate = least + (settings.learning_rate - least) * cosine
        with torch.no_grad():
            for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                first[index] = 0.9 * first[index] + 0.1 * gradient
                second[index] = 0.999 * second[index] + 0.001 * gradient**2
                mean = first[index] / (1 - 0.9 ** (step + 1))
                square = second[index] / (1 - 0.999 ** (step + 1))
                decay = settings.weight_decay if weight.dim() > 1 else 0.0
                weight -= rate * (mean / (square.sqrt() + 1e-8) + decay * weight)
        history.losses.append(loss.item())
        history.norms.append(norm)
        history.rates.append(rate)
    return history


def response_logprob(model: SmallModel, prompt: str, response: str) -> tuple[Tensor, int]:
    """The log-probability of a response after its prompt, and its number of tokens."""
    tokens = model.encode_response(response)
    return path_logprob(model, model.encode_prompt(prompt, []), tokens), len(tokens)


def parting_sentence(text: str, other: str) -> slice:
    """The tokens of a text from its first letter that the other has not to the end of that sentence; a letter is a token.

    Sentences are words of at least two letters and a full stop; the end token closes the last one.
    """
    start = next((k for k, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    stop = text.find(".", start)
    return slice(start, len(text) + 1 if stop < 0 else stop + 1)


def sentence_logprob(model: SmallModel, prompt: str, response: str, other: str) -> Tensor:
    """The log-probability of the sentence in which a response parts from the other one."""
    logps = token_logprobs(model, model.encode_prompt(prompt, []), model.encode_response(response))
    return logps[parting_sentence(response, other)].sum()


def preference_losses(
    model: SmallModel,
    pairs: Sequence[Preference],
    rehearsed: Sequence[tuple[Sample, str]],
    settings: DPOConfig,
    weighted: bool,
) -> Losses:
    """The confidence-weighted loss of a global batch of pairs and, behind them, of rehearsed rationale-answer pairs."""

    def pair_loss(pair: Preference) -> tuple[float, Tensor]:
        chosen, size = response_logprob(model, pair.prompt, pair.chosen)
        rejected, _ = response_logprob(model, pair.prompt, pair.rejected)
        assert pair.reference_chosen_logprob is not None and pair.reference_rejected_logprob is not None
        ratios = chosen - pair.reference_chosen_logprob, rejected - pair.reference_rejected_logprob
        if settings.credit == "sentence":
            own = sentence_logprob(model, pair.prompt, pair.chosen, pair.rejected)
            other = sentence_logprob(model, pair.prompt, pair.rejected, pair.chosen)
            assert pair.reference_chosen_span_logprob is not None and pair.reference_rejected_span_logprob is not None
            ratios = own - pair.reference_chosen_span_logprob, other - pair.reference_rejected_span_logprob
        ratio = ratios[0] - ratios[1]
        quality = -torch.sigmoid(settings.beta * ratios[0]).log() - torch.sigmoid(-settings.beta * ratios[1]).log()
        delta = settings.beta * ratio
        weight = pair.confidence if weighted else 1.0
        judged = pair.extra.get("judge_confidence", pair.confidence)
        wrong = (1.0 - judged) / 2.0 if settings.label_smoothing == "confidence" else float(settings.label_smoothing)
        if settings.loss_type == "sigmoid":
            loss = (1.0 - wrong) * torch.log1p(torch.exp(-delta)) + wrong * torch.log1p(torch.exp(delta))
        elif settings.loss_type == "ipo":
            loss = (ratio - 1.0 / (2.0 * settings.beta)) ** 2
        else:
            loss = torch.clamp(1.0 - delta, min=0.0)
        loss = settings.preference_weight * loss + settings.quality_weight * quality
        return weight, weight * (loss - settings.sft_weight * chosen / size)

    def loss_of(batch: list[int]) -> Tensor:
        terms = [pair_loss(pairs[index]) for index in batch if index < len(pairs)]
        total = torch.zeros((), dtype=torch.float64)
        if terms:
            total = sum((loss for _, loss in terms), total) / sum(weight for weight, _ in terms)
        likelihoods = []
        for index in batch:
            if index >= len(pairs):
                sample, response = rehearsed[index - len(pairs)]
                logprob, size = response_logprob(model, sample.question, response)
                likelihoods.append(logprob / size)
        if likelihoods:
            total = total - settings.rehearsal_weight * torch.stack(likelihoods).mean()
        return total

    return loss_of


def rationale_losses(model: SmallModel, raps: Sequence[tuple[Sample, str]]) -> Losses:
    """The mean negative log-likelihood of the tokens of a global batch's responses."""

    def loss_of(batch: list[int]) -> Tensor:
        found = [response_logprob(model, raps[index][0].question, raps[index][1]) for index in batch]
        return -sum((logprob for logprob, _ in found), torch.zeros((), dtype=torch.float64)) / sum(n for _, n in found)

    return loss_of


def pairwise_cases(settings: dict[str, Sequence[Any]], seed: int) -> list[dict[str, Any]]:
    """Choose few combinations of settings in which each two values of any two settings meet at least once."""
    names = list(settings)
    rng = np.random.default_rng(seed)
    missing = {
        (first, a, second, b)
        for first, second in combinations(names, 2)
        for a, b in product(range(len(settings[first])), range(len(settings[second])))
    }
    cases = []
    while missing:
        best: tuple[int, dict[str, int]] = (-1, {})
        for _ in range(40):
            case = {name: int(rng.integers(len(settings[name]))) for name in names}
            first, a, second, b = min(missing)  # one that is missing is in each attempt
            case |= {first: a, second: b}
            found = sum(case[first] == a and case[second] == b for first, a, second, b in missing)
            best = max(best, (found, case), key=lambda one: one[0])
        case = best[1]
        missing = {one for one in missing if not (case[one[0]] == one[1] and case[one[2]] == one[3])}
        cases.append({name: settings[name][index] for name, index in case.items()})
    return cases


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values()).replace(" ", "")


def adapted(seed: int) -> SmallModel:
    """A model with an adapter whose B is no longer zero: all of its weights get a gradient from the first step on."""
    model = SmallModel(seed=seed, lora=LoRAConfig(r=3, alpha=12.0))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def raps(count: int, seed: int) -> list[tuple[Sample, str]]:
    rng = np.random.default_rng(seed)
    return [
        (Sample(f"r{k}", (), random_text(rng, 12), "red", image_root=Path(".")), random_text(rng, 11))
        for k in range(count)
    ]


def trained_weights(model: SmallModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters() if parameter.requires_grad])


def check_training(model: SmallModel, plain: SmallModel, history: list[dict[str, Any]], expected: PlainHistory) -> None:
    assert [row["step"] for row in history] == list(range(len(expected.losses)))
    for name, values in (("loss", expected.losses), ("grad_norm", expected.norms), ("learning_rate", expected.rates)):
        np.testing.assert_allclose([row[name] for row in history], values, **SAME, err_msg=name)
    # The lower of the two bounds of the norm is exceeded by much, and by a factor that varies; the upper one never is.
    assert 4 * 0.02 < max(expected.norms) < 1e3 and len({round(norm, 3) for norm in expected.norms}) > 1
    torch.testing.assert_close(trained_weights(model), trained_weights(plain), **SAME)


def plain_keys(seed: int, step: int, position: int, rows: int, state: int | None = None) -> Tensor:
    """The first numbers of SplitMix64 (Steele, Lea, Flood, 2014) from a tree's seed, or a state: keys of dropout, [rows]."""
    mask = (1 << 64) - 1
    if state is None:
        state = int(np.random.SeedSequence((seed, step, position)).generate_state(1, np.uint64)[0])
    keys = []
    for _ in range(rows):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        keys.append(z - (1 << 64) if z >> 63 else z)
    return torch.tensor(keys, dtype=torch.int64)
