"""Sample tokens from logits by one uniform number each, on the logits' device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LIKELIEST = 64  # tokens among which the CPU looks for a nucleus before it sorts the whole vocabulary
LOWER_DIGITS = 2.0**24  # behind the digits that chose a token, a number in [0, 1) of float64 has as many again


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled; log-probabilities are always the model's own. Temperature 0 takes the likeliest token."""

    temperature: float = 1.0
    top_p: float = 1.0


def draw_tokens(
    logits: Tensor, uniform: Tensor, sampling: Sampling, excluded: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sample as `sample_tokens`; also return the tokens' log-probabilities [R] under the logits at temperature 1.

    Args:
        logits: [R, V].
        uniform: [R] numbers in [0, 1).
        sampling: temperature and top_p.
        excluded: a token that is never sampled, such as an image's placeholder; where it would be, another is drawn. The
            log-probabilities are the model's, which gives it a share.
    """
    temperature, top_p = sampling.temperature, sampling.top_p
    if temperature == 0.0:
        logps = logits.log_softmax(-1)
        if excluded is not None:
            logps[:, excluded] = -torch.inf
        best = logps.max(-1)
        return best.indices, best.values
    scaled = (logits if temperature == 1.0 else logits / temperature).softmax(-1)
    tokens = _draw_others(scaled, uniform, top_p, excluded)
    if temperature != 1.0:
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return tokens, scaled.gather(-1, tokens[:, None])[:, 0].log()  # a sampled token's is not 0


def _draw_others(probabilities: Tensor, uniform: Tensor, top_p: float, excluded: int | None) -> Tensor:
    """Sample tokens [R] other than the excluded one."""
    if excluded is None:
        return _draw(probabilities, uniform, top_p)
    if probabilities.is_cuda:
        return _draw_twice(probabilities, uniform, top_p, excluded)
    tokens = _draw(probabilities, uniform, top_p)
    hit = (tokens == excluded).nonzero()[:, 0]
    if len(hit):  # rarely: in place of it another is drawn, by the number's lower digits
        others = probabilities[hit]  # a copy
        others[:, excluded] = 0.0
        others /= others.sum(-1, keepdim=True)
        tokens[hit] = _draw(others, (uniform[hit] * LOWER_DIGITS).frac(), top_p)
    return tokens


def _draw_twice(probabilities: Tensor, uniform: Tensor, top_p: float, excluded: int) -> Tensor:
    """Sample as `_draw_others` where the host would have to wait to see whether the excluded token was drawn."""
    if top_p == 1.0:
        ordered, order = probabilities, torch.arange(probabilities.shape[-1], device=probabilities.device)
    else:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    order = order.expand_as(ordered)
    others = ordered.masked_fill(order == excluded, 0.0)
    others = others / others.sum(-1, keepdim=True)
    first, second = (
        _inverse_cdf(weights, numbers) if top_p == 1.0 else _nucleus(weights, numbers, top_p)
        for weights, numbers in ((ordered, uniform), (others, (uniform * LOWER_DIGITS).frac()))
    )
    tokens, again = (order.gather(-1, picked[:, None])[:, 0] for picked in (first, second))
    return torch.where(tokens == excluded, again, tokens)


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Sample tokens [R] from logits [R, V] by inverting the CDF at uniform numbers [R]. Temperature 0 takes the likeliest.

    Nucleus sampling (Holtzman et al., 2020) leaves the likeliest tokens up to a mass of `top_p`.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    return _draw((logits / temperature).softmax(-1), uniform, top_p)


def _draw(probabilities: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    if top_p == 1.0:
        return _inverse_cdf(probabilities, uniform)
    count = min(LIKELIEST, probabilities.shape[-1])
    # On a GPU the host would have to wait for `nonzero`.
    if probabilities.is_cuda or count == probabilities.shape[-1]:
        return _draw_sorted(probabilities, uniform, top_p)
    best, order = probabilities.topk(count, dim=-1)
    tokens = order.gather(-1, _nucleus(best, uniform, top_p)[:, None])[:, 0]
    wide = (best.sum(-1) < top_p).nonzero()[:, 0]  # rows whose nucleus has more tokens
    if len(wide):
        tokens[wide] = _draw_sorted(probabilities[wide], uniform[wide], top_p)
    return tokens


def _draw_sorted(probabilities: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    return order.gather(-1, _nucleus(ordered, uniform, top_p)[:, None])[:, 0]


def _nucleus(ordered: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Sample indices [R] by probabilities [R, n] in descending order."""
    before = ordered.cumsum(-1) - ordered
    return _inverse_cdf(ordered.masked_fill(before >= top_p, 0.0), uniform)


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    cumulative = weights.cumsum(-1)
    # A number that rounds to 1 would lie behind the last token of a probability above 0.
    below_one = uniform.to(cumulative.dtype).clamp(max=1.0 - torch.finfo(cumulative.dtype).eps / 2)
    threshold = below_one[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return picked.clamp_(max=weights.shape[-1] - 1)
