"""Greedy decoding and sampling against recomputation and against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_lvlm import SmallLVLM, load_image

from srcfast.runtime.generation import generate_greedy, next_logits, prefill, sample_tokens


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_equals_running_everything_anew_at_each_step(batch_size: int, exact: SmallLVLM) -> None:
    prompts = exact.prompts()
    results = generate_greedy(exact.model, prompts, exact.features, 40, batch_size)
    for prompt, result in zip(prompts, results, strict=True):
        tokens: list[int] = []
        while len(tokens) < 40 and (not tokens or tokens[-1] != exact.model.end_token_id):
            tokens.append(int(exact.logits(prompt, tokens)[-1].argmax()))
        assert list(result.token_ids) == tokens
        assert result.finished == (tokens[-1] == exact.model.end_token_id)
        assert result.logprob == pytest.approx(exact.logprob(prompt, tokens), abs=1e-9)  # fp64
    lengths = {len(result.token_ids) for result in results}
    assert len(lengths) > 2 and max(lengths) > 33  # rows end at different times, and the cache has grown


def test_greedy_equals_transformers_generate(written: tuple[Path, Any], single: SmallLVLM) -> None:
    theirs = written[1]
    prompts = single.prompts()
    ours = generate_greedy(single.model, prompts, single.features, 20, 3)
    for prompt, result in zip(prompts, ours, strict=True):
        pixels = {}
        if prompt.images:
            pixels = single.model.vision.processor(
                images=[load_image(key) for key in prompt.images], return_tensors="pt"
            )
        ids = torch.from_numpy(prompt.token_ids)[None]
        with torch.no_grad():
            out = theirs.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=0,
                **pixels,
            )
        assert list(result.token_ids) == out[0, ids.shape[1] :].tolist()


def test_the_end_token_ends_and_the_limit_holds(exact: SmallLVLM) -> None:
    for limit in (1, 3):
        for result in generate_greedy(exact.model, exact.prompts(), exact.features, limit, 4):
            assert len(result.token_ids) <= limit
            assert exact.model.end_token_id not in result.token_ids[:-1]
            assert result.finished or len(result.token_ids) == limit


def test_no_prompts_give_no_results(exact: SmallLVLM) -> None:
    assert generate_greedy(exact.model, [], exact.features, 5, 4) == []


def test_progress_counts_every_sample_and_token(exact: SmallLVLM) -> None:
    told: list[tuple[int, int]] = []
    prompts = exact.prompts()
    results = generate_greedy(exact.model, prompts, exact.features, 9, 2, lambda n, tokens: told.append((n, tokens)))
    assert [n for n, _ in told] == [2, 2, 1]
    expected = sum(len(p.token_ids) for p in prompts) + sum(len(r.token_ids) for r in results)
    assert sum(tokens for _, tokens in told) == expected


def test_rows_may_be_repeated_reordered_and_dropped(exact: SmallLVLM) -> None:
    """The continuation's cache follows its row; the prompt's stays with its sample."""
    prompts = exact.prompts()[:3]
    state, _ = prefill(exact.model, prompts, exact.features(["image-0", "image-1", "image-2", "image-3"]))
    state.select_rows(torch.tensor([0, 0, 1, 1, 2, 2]), 2)
    first = torch.tensor([40, 41, 42, 43, 44, 45])
    state.step(exact.model, first)
    state.select_rows(torch.tensor([1, 1, 0, 3, 2, 2, 4, 5, 5]), 3)
    state.select_samples(torch.tensor([0, 2]))
    second = torch.tensor([50, 51, 52, 53, 54, 55])
    logits = next_logits(exact.model, state.step(exact.model, second))
    before = [41, 41, 40, 44, 45, 45]
    for row, (one, two) in enumerate(zip(before, second.tolist(), strict=True)):
        expected = exact.logits([prompts[0], prompts[2]][row // 3], [one, two])[-1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-10, atol=1e-10)  # fp64


def nucleus(probabilities: list[float], top_p: float) -> list[float]:
    """Holtzman et al., 2020: the smallest set of the likeliest tokens whose mass reaches top_p, renormalised."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept: list[int] = []
    while sum(probabilities[token] for token in kept) < top_p and len(kept) < len(order):
        kept.append(order[len(kept)])
    total = sum(probabilities[token] for token in kept)
    return [p / total if token in kept else 0.0 for token, p in enumerate(probabilities)]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6, 0.05])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_sampled_shares_are_the_nucleus_s_probabilities(temperature: float, top_p: float) -> None:
    logits = torch.randn(13, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    draws = 4000
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    picked = sample_tokens(logits.expand(draws, -1), uniform, temperature, top_p)
    expected = nucleus((logits / temperature).softmax(-1).tolist(), top_p)
    for token, share in enumerate(expected):
        # evenly spaced draws: each interval of the CDF is hit to within one draw
        assert abs(float((picked == token).double().mean()) - share) <= 1.0 / draws + 1e-12


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(9, 17, generator=torch.Generator().manual_seed(2))
    assert torch.equal(sample_tokens(logits, torch.rand(9), 0.0, 0.5), logits.argmax(-1))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_draws_at_the_edges_stay_among_possible_tokens(top_p: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf, 0.5, -torch.inf]]).repeat(3, 1)
    uniform = torch.tensor([0.0, 1.0 - 2.0**-53, 1.0 - 2.0**-24], dtype=torch.float64)  # the second rounds to 1 in fp32
    assert set(sample_tokens(logits, uniform, 1.0, top_p).tolist()) <= {1, 2, 4}
