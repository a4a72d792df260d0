"""A whole decoder over a forest gives what every root-to-leaf path alone gives, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.random_forests import VOCABULARY, causal_attention, trees
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srcfast.attention.forest_attention import forest_attend
from srcfast.data.forest import Forest, Tree
from srcfast.models.decoder import Decoder, DecoderConfig


def small_decoder(seed: int, **changes: object) -> Decoder:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 20,
        "intermediate_size": 27,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50.0,
    }
    return Decoder(DecoderConfig(**{**shape, **changes})).double()


def over_forest(decoder: Decoder, forest: Forest, backend: str = "blocks") -> Tensor:
    """Logits [T, V]."""
    hidden = decoder(decoder.embed(forest.token_ids), forest.positions, forest_attend(forest, backend))
    return hidden @ decoder.head_weight.T


def alone(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits [n, V] of an ordinary sequence."""
    hidden = decoder(decoder.embed(tokens), torch.arange(len(tokens)), lambda layer, q, k, v: causal_attention(q, k, v))
    return hidden @ decoder.head_weight.T


@pytest.mark.parametrize("backend", ["blocks", "varlen_reference", "reference"])
@settings(max_examples=12, deadline=None)
@given(drawn=st.lists(trees(), min_size=1, max_size=3), seed=st.integers(0, 99), tied=st.booleans())
def test_logits_log_probabilities_and_gradients_equal_those_of_the_paths(
    backend: str, drawn: list[Tree], seed: int, tied: bool
) -> None:
    decoder = small_decoder(seed, tie_embeddings=tied, qkv_bias=tied, qk_norm=not tied)
    parameters = list(decoder.parameters())
    forest = Forest.of(drawn)
    logits = over_forest(decoder, forest, backend)
    weights = np.random.default_rng(seed).normal(size=len(forest.paths()))
    total_forest = total_paths = torch.zeros((), dtype=torch.float64)
    for path, weight in zip(forest.paths(), weights, strict=True):
        tokens = forest.token_ids[path]
        expected = alone(decoder, tokens)
        # fp64 through two layers: 1e-10 is some thousand roundings of numbers of size one.
        torch.testing.assert_close(logits[path], expected, rtol=1e-10, atol=1e-10)
        logps = [x.log_softmax(-1)[:-1].gather(1, tokens[1:, None]) for x in (logits[path], expected)]
        torch.testing.assert_close(*logps, rtol=1e-10, atol=1e-10)
        total_forest, total_paths = (
            total_forest + weight * logps[0].sum(),
            total_paths + weight * logps[1].sum(),
        )
    if not total_paths.requires_grad or max(len(path) for path in forest.paths()) < 2:
        return  # a single token predicts nothing
    ours = torch.autograd.grad(total_forest, parameters)
    theirs = torch.autograd.grad(total_paths, parameters)
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(drawn=st.lists(trees(), min_size=2, max_size=6), seed=st.integers(0, 99), budget=st.integers(63, 130))
def test_how_trees_are_packed_changes_no_log_probability(drawn: list[Tree], seed: int, budget: int) -> None:
    decoder = small_decoder(seed)
    with torch.no_grad():
        whole = Forest.of(drawn)
        found = _log_probabilities(decoder, [whole])
        packed = _log_probabilities(decoder, Forest.pack(drawn, budget))
        singly = _log_probabilities(decoder, Forest.pack(drawn, budget, max_trees=1))
    for index in range(len(drawn)):
        torch.testing.assert_close(packed[index], found[index], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(singly[index], found[index], rtol=1e-11, atol=1e-11)


def _log_probabilities(decoder: Decoder, forests: list[Forest]) -> dict[int, Tensor]:
    """Of every token that has a predecessor, by the tree's place in the list that was packed."""
    result = {}
    for forest in forests:
        logps = over_forest(decoder, forest).log_softmax(-1)
        for number, index in enumerate(forest.indices):
            rows, targets = forest.target_rows(number, range(len(forest.trees[number].segments)))
            result[index] = logps[rows, targets]
    return result
