"""Greedy decoding and sampling against recomputation and against transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_lvlm import SmallLVLM, load_image

from srcfast.config.settings import CandidatesConfig
from srcfast.generation import decode
from srcfast.generation.beam_search import sentence_beam_search
from srcfast.generation.decode import _Decoding
from srcfast.generation.generate import Prompt, generate_greedy, most_tokens, sample_responses
from srcfast.generation.sampling import Sampling, _draw_twice, draw_tokens, sample_tokens


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


@pytest.mark.parametrize("most", [1, 35, 36, 64, 4096])
def test_prompts_run_together_up_to_a_number_of_tokens_and_a_longer_one_alone(
    most: int, exact: SmallLVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = exact.prompts()
    expected = generate_greedy(exact.model, prompts, exact.features, 6, len(prompts))
    lengths = sorted(len(prompt.token_ids) for prompt in prompts)  # 15, 21, 28, 33, 78
    together: list[list[int]] = [[]]  # with a slot for each prompt
    for length in lengths:
        if together[-1] and sum(together[-1]) + length > most:
            together.append([])
        together[-1].append(length)
    seen: list[list[int]] = []
    prefill = _Decoding._prefill

    def watched(self: _Decoding, run: list[Prompt], slots: list[int]) -> Any:
        seen.append([len(prompt.token_ids) for prompt in run])
        return prefill(self, run, slots)

    monkeypatch.setattr(_Decoding, "_prefill", watched)
    monkeypatch.setattr(decode, "PREFILL_TOKENS", most)
    results = generate_greedy(exact.model, prompts, exact.features, 6, len(prompts))
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert seen == together


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
    assert sum(n for n, _ in told) == len(prompts) and len(told) > 1
    expected = sum(len(p.token_ids) for p in prompts) + sum(len(r.token_ids) for r in results)
    assert sum(tokens for _, tokens in told) == expected


@pytest.mark.parametrize("dtype", ["exact", "single"])
def test_samples_do_not_depend_on_what_else_is_decoded(dtype: str, request: pytest.FixtureRequest) -> None:
    """In fp32 rounding could move a draw across the border between two tokens; for these seeds it does not."""
    lvlm: SmallLVLM = request.getfixturevalue(dtype)
    prompts = lvlm.prompts()

    def sampled(slots: int, order: slice = slice(None)) -> list[list[tuple[int, ...]]]:
        found = sample_responses(
            lvlm.model, prompts[order], lvlm.features, count=3, max_new_tokens=40, seed=7, slots=slots
        )
        return [[one.token_ids for one in own] for own in found]

    expected = sampled(5)
    assert len({one for own in expected for one in own}) == 15  # all differ
    assert sampled(1) == sampled(2) == sampled(50) == expected
    assert sampled(2, slice(None, None, -1)) == expected[::-1]


def test_a_sample_s_log_probability_is_the_model_s_own(single: SmallLVLM) -> None:
    prompts = single.prompts()
    for settings in ({}, {"temperature": 1.7, "top_p": 0.8}):
        found = sample_responses(
            single.model, prompts, single.features, count=4, max_new_tokens=50, seed=1, slots=2, **settings
        )
        for prompt, own in zip(prompts, found, strict=True):
            assert len(own) == 4
            for one in own:
                # fp32, a few dozen log-probabilities of a few units each
                assert one.logprob == pytest.approx(single.logprob(prompt, one.token_ids), rel=1e-4, abs=1e-4)
                assert one.finished == (one.token_ids[-1] == single.model.end_token_id)
                assert one.finished or len(one.token_ids) == 50


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


def test_a_nucleus_among_many_tokens_is_the_one_that_sorting_all_of_them_finds() -> None:
    """Rows whose nucleus is small are drawn from the likeliest tokens alone, rows with a large one from all."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(60, 700, generator=generator, dtype=torch.float64)
    logits[::2] *= 6.0  # peaked
    uniform = torch.rand(60, generator=generator, dtype=torch.float64)
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
    sizes = ((probabilities.cumsum(-1) - probabilities) < 0.9).sum(-1)
    assert (sizes < 64).sum() >= 20 and (sizes > 64).sum() >= 20
    for row, token in enumerate(sample_tokens(logits, uniform, 1.0, 0.9).tolist()):
        kept = probabilities[row, : sizes[row]]
        place = int((kept.cumsum(0) <= uniform[row] * kept.sum()).sum())
        assert token == int(order[row, place])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_log_probabilities_are_at_temperature_one(temperature: float, top_p: float) -> None:
    logits = torch.randn(20, 90, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3
    uniform = torch.rand(20, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, uniform, Sampling(temperature, top_p))
    assert torch.equal(tokens, sample_tokens(logits, uniform, temperature, top_p))
    expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.6])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
def test_a_token_that_is_excluded_is_never_sampled_and_costs_the_others_nothing(
    temperature: float, top_p: float
) -> None:
    logits = torch.randn(13, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 2
    excluded = int(logits.argmax())
    draws = 20_000
    rows = logits.expand(draws, -1)
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    before, _ = draw_tokens(rows, uniform, Sampling(temperature, top_p))
    tokens, logprobs = draw_tokens(rows, uniform, Sampling(temperature, top_p), excluded)
    assert (before == excluded).any() and not (tokens == excluded).any()
    assert torch.equal(tokens[before != excluded], before[before != excluded])
    torch.testing.assert_close(logprobs, rows.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])  # the model's own
    if temperature == 0.0:
        others = logits.clone()
        others[excluded] = -torch.inf
        assert set(tokens.tolist()) == {int(others.argmax())}
        return
    # As drawn on a GPU, without a wait for the host: its own steps, the same numbers.
    shares = (rows / temperature).softmax(-1)
    assert torch.equal(_draw_twice(shares, uniform, top_p, excluded), tokens)
    kept = nucleus((logits / temperature).softmax(-1).tolist(), top_p)
    masked = (logits / temperature).softmax(-1)
    masked[excluded] = 0.0
    again = nucleus((masked / masked.sum()).tolist(), top_p)
    for token in range(13):
        expected = 0.0 if token == excluded else kept[token] + kept[excluded] * again[token]
        # a share of 20,000 random draws: four standard deviations are at most 4 * 0.5 / 141
        assert abs(float((tokens == token).double().mean()) - expected) < 0.015


def test_no_response_holds_an_image_s_placeholder(single: SmallLVLM) -> None:
    """The token that begins the greedy response is declared the placeholder: greedily, sampled and searched, others are said."""
    model = copy.copy(single.model)
    prompts = [Prompt(model.encode_prompt("What is left of the red square?", []), (), "s")]
    [said] = generate_greedy(model, prompts, single.features, 8, 1)
    model.image_token_id = said.token_ids[0]
    [other] = generate_greedy(model, prompts, single.features, 8, 1)
    [sampled] = sample_responses(model, prompts, single.features, count=200, max_new_tokens=8, seed=3, slots=16)
    settings = CandidatesConfig(num_candidates=4, max_new_tokens=24)
    [[*searched]], _ = sentence_beam_search(model, prompts, single.features, settings, 5, slots=4)
    before = sample_responses(single.model, prompts, single.features, count=200, max_new_tokens=8, seed=3, slots=16)
    assert any(model.image_token_id in one.token_ids for one in before[0])  # it would have been said
    responses = [other, *sampled, *searched]
    assert len(responses) > 201 and not any(model.image_token_id in one.token_ids for one in responses)


@pytest.mark.parametrize("vocabulary", [8, 128])  # one that is sorted whole, one of which the likeliest are taken first
@pytest.mark.parametrize(("top_p", "size"), [(0.125, 1), (0.25, 2), (0.5, 4), (0.51, 5), (0.875, 7)])
def test_a_nucleus_ends_with_the_token_whose_mass_reaches_it_exactly(vocabulary: int, top_p: float, size: int) -> None:
    """Eight tokens of 1/8 each, without rounding: at a boundary the next token is left out, and of equal ones the first count."""
    logits = torch.full((vocabulary,), -torch.inf, dtype=torch.float64)
    logits[:8] = 0.0
    uniform = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    picked = sample_tokens(logits.expand(64, -1), uniform, 1.0, top_p)
    counted = picked.bincount(minlength=8).double() / 64
    assert (counted > 0).sum() == size
    assert counted[counted > 0].max() - counted[counted > 0].min() <= 1 / 64  # evenly spaced draws, equal shares


def test_a_number_at_the_border_of_two_tokens_is_the_later_one_s() -> None:
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    uniform = torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, 0.9999], dtype=torch.float64)
    logits = logits - logits.logsumexp(0)
    assert sample_tokens(logits.expand(6, -1), uniform, 1.0, 1.0).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("wanted", "most"), [(7, 7), (8, 8), (9, 8), (100, 8)])
def test_a_response_takes_all_positions_behind_its_prompt(wanted: int, most: int) -> None:
    model: Any = SimpleNamespace(decoder=SimpleNamespace(config=SimpleNamespace(max_positions=20)))
    assert most_tokens(model, Prompt(np.arange(12)), wanted) == most
