"""Credited spans: which tokens they are, their references, and a loss that is of them alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plain_training import parting_sentence
from helpers.small_lvlm import SmallLVLM
from helpers.small_model import SmallModel, random_preferences, token_logprobs

from srcfast.config.settings import CandidatesConfig, DPOConfig, LoRAConfig, TrainingConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.records import Preference
from srcfast.errors import InputError, SrcfastError
from srcfast.generation.beam_search import Search, sentence_beam_search
from srcfast.generation.sentences import SentenceEnds
from srcfast.models.head import Head
from srcfast.stages.credit import credited, credited_spans, credited_tokens
from srcfast.stages.dpo import PairMeta, SpanMeta, pair_denominator, preference_items, preference_loss, train_preference
from srcfast.stages.logprobs import reference_logprobs
from srcfast.stages.pair_trees import pair_rows, preference_tree, preference_trees
from srcfast.stages.reference_checks import check_reference_hash, check_references
from srcfast.training.items import TrainingItem
from srcfast_kernels.backends import use_backend

LOOP = TrainingConfig(
    micro_batch_size=3,
    token_budget=4096,
    learning_rate=0.003,
    warmup_ratio=0.0,
    gradient_accumulation_steps=1,
    activation_checkpointing=0,
).seeded(1)


def pair_of(chosen: str, rejected: str, credit: str | None) -> Preference:
    return replace(random_preferences(1)[0], chosen=chosen, rejected=rejected, credit=credit)


def credited_texts(model: Any, chosen: str, rejected: str, credit: str) -> list[str] | None:
    """The texts of the spans, each with what is shared cut off."""
    pair = pair_of(chosen, rejected, credit)
    (tree,) = preference_trees(model, [pair])
    spans = credited_spans(model, pair, tree)
    assert spans is not None
    ends = [segment.tokens.tolist() for segment in tree.segments[-2:]]
    return [model.decode(end[start:stop]).strip() for end, (start, stop) in zip(ends, spans, strict=True)]


def test_a_response_is_cut_into_its_sentences(exact: SmallLVLM) -> None:
    """A full stop behind a digit waits for the token after it, which is then part of the sentence."""
    model = exact.model
    ends = SentenceEnds.of(model.tokenizer, len(model.decoder.head_weight))
    for text, expected in (
        (
            "a red square. It is 3. There is no circle! What",
            ["a red square.", "It is 3.", "There is no circle!", "What"],
        ),
        ("It is 2.5. a ring. e.g. a", ["It is 2.5. a", "ring.", "e.g. a"]),
        ("a circle.", ["a circle."]),
        ("red", ["red"]),
    ):
        tokens = model.tokenizer(text, add_special_tokens=False).input_ids
        cut = ends.cut(tokens)
        pieces = [tokens[start:stop] for start, stop in zip([0, *cut], cut, strict=False)]
        assert cut[-1] == len(tokens) and [model.tokenizer.decode(piece).strip() for piece in pieces] == expected


def test_sentences_are_those_of_the_search(exact: SmallLVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One beam that writes sentence after sentence: each row that decoding ends is a sentence of the response."""
    rows: dict[str, list[int]] = {}
    ended = Search.ended

    def recording(search: Search, written: Any) -> Any:
        rows.setdefault(search.prompt.key, []).append(len(written[0].token_ids))
        return ended(search, written)

    monkeypatch.setattr(Search, "ended", recording)
    settings = CandidatesConfig(num_beams=1, proposals=1, max_sentences=40, max_new_tokens=60, top_p=1.0)
    prompts = exact.prompts()
    results, _ = sentence_beam_search(exact.model, prompts, exact.features, settings, 2)
    ends = SentenceEnds.of(exact.model.tokenizer, len(exact.model.decoder.head_weight))
    sentences = 0
    for prompt, own in zip(prompts, results, strict=True):
        for response in own:
            assert ends.cut(list(response.token_ids)) == np.cumsum(rows[prompt.key]).tolist()
            sentences += len(rows[prompt.key])
    assert sentences > 6


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("a red square. It is left. No.", "a red square. It is right. No.", ["left.", "right."]),
        ("a red square. No.", "a blue circle! There are rings. No.", ["red square.", "blue circle!"]),
        # A sentence left out: there the next one comes too early.
        ("a circle. a square. It is red.", "a circle. It is red.", ["a square.", "It is red."]),
        ("It is red. a ring", "It is red. a rings", ["ring", "rings"]),
    ],
)
def test_the_sentence_in_which_two_part_is_credited(
    exact: SmallLVLM, chosen: str, rejected: str, expected: list[str]
) -> None:
    found = credited_texts(exact.model, chosen, rejected, "sentence")
    assert found is not None
    # A word's first letters may be shared as tokens of their own.
    assert all(full.endswith(part) and part for full, part in zip(expected, found, strict=True))
    assert [part[-1] for part in found] == [full[-1] for full in expected]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (
            "<see> a red square. </see> <answer> red </answer>",
            "<see> a circle. It is left. </see> <answer> red </answer>",
            ["<answer> red </answer>"] * 2,
        ),
        ("It is red. Answer: red", "No. There are rings. Answer: red", ["Answer: red"] * 2),
    ],
)
def test_the_answer_is_credited_with_its_mark(
    exact: SmallLVLM, chosen: str, rejected: str, expected: list[str]
) -> None:
    found = credited_texts(exact.model, chosen, rejected, "answer")
    assert found is not None
    assert [text.replace(" ", "") for text in found] == [text.replace(" ", "") for text in expected]


def test_a_credited_answer_that_is_not_there_is_named(exact: SmallLVLM) -> None:
    pair = pair_of("It is red.", "Answer: red", "answer")
    with pytest.raises(InputError, match="sample-0.*chosen.*a response with an answer"):
        credited_spans(exact.model, pair, *preference_trees(exact.model, [pair]))


def sentence_pairs(count: int, seed: int = 0) -> list[Preference]:
    rng = np.random.default_rng(seed)

    def text(words: int) -> str:
        return "".join("".join(rng.choice(list("abcdefgh"), rng.integers(2, 6))) + "." for _ in range(words))

    made = []
    for number, pair in enumerate(random_preferences(count, seed)):
        both = text(number % 3)
        made.append(replace(pair, chosen=both + text(2), rejected=both + text(3), credit="sentence"))
    return made


def with_references(model: SmallModel, pairs: list[Preference]) -> list[Preference]:
    return reference_logprobs(model, pairs, reference_hash="abc", token_budget=150)


def test_references_of_spans_are_the_sums_over_their_tokens() -> None:
    model = SmallModel()
    plain = [replace(pair, credit=None) if number == 2 else pair for number, pair in enumerate(sentence_pairs(7))]
    for before, after in zip(plain, with_references(model, plain), strict=True):
        prompt = model.encode_prompt(before.prompt, [])
        for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
            text = getattr(before, side)
            logps = token_logprobs(model, prompt, model.encode_response(text)).detach()
            assert getattr(after, f"reference_{side}_logprob") == pytest.approx(logps.sum().item(), rel=1e-10)
            found = getattr(after, f"reference_{side}_span_logprob")
            if before.credit is None:
                assert found is None
            else:
                span = parting_sentence(text, getattr(before, other))
                assert found == pytest.approx(logps[span].sum().item(), rel=1e-10)
        row = after.to_json()
        assert Preference.from_json(row, file="x", line=1, image_root=after.image_root) == after
        assert ("credit" in row) == (before.credit is not None) == ("reference_chosen_span_logprob" in row)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_the_loss_is_of_the_credited_tokens_and_the_likelihood_of_all(loss_type: Any, backend: Any) -> None:
    """In fp64, token by token: two pairs with spans, one that is credited whole, and a rehearsed response between them."""
    rng = np.random.default_rng(3)
    spans = [((1, 3), (0, 2)), None, ((0, 5), (2, 3))]
    items = []
    for own, (shared, chosen, rejected) in zip(spans, ((4, 5, 3), (2, 4, 7), (0, 6, 4)), strict=True):
        both = rng.integers(4, 40, shared)
        ends = [np.append(both, rng.permutation(36)[:count] + 4) for count in (chosen, rejected)]
        tree = preference_tree(rng.integers(4, 40, 6), *ends)
        numbers = (*rng.uniform(0.1, 1.0, 2), *rng.uniform(-30.0, -5.0, 2))
        items.append(TrainingItem(tree, PairMeta(*numbers) if own is None else SpanMeta(*numbers, own)))
    rehearsed = Tree((Segment(rng.integers(4, 40, 5)), Segment(rng.integers(4, 40, 4), 0)))
    items.insert(1, TrainingItem(rehearsed))
    spans.insert(1, None)
    settings = DPOConfig(beta=0.3, sft_weight=0.7, rehearsal_weight=0.5, loss_type=loss_type)
    forest = Forest.of([item.tree for item in items])
    generator = torch.Generator().manual_seed(4)
    head = Head(torch.randn(40, 8, generator=generator, dtype=torch.float64))
    hidden = torch.randn(forest.num_tokens, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    denominator = pair_denominator(items)
    with use_backend(backend):
        loss, metrics = preference_loss(settings)(hidden, forest, head, items, denominator)
        (gradient,) = torch.autograd.grad(loss, hidden)

    rows, targets, sequences = pair_rows(forest)
    logps = (hidden[rows] @ head.weight.T).log_softmax(-1)[torch.arange(len(rows)), torch.from_numpy(targets)]
    expected, drifts = torch.zeros((), dtype=torch.float64), []
    for number, (item, own) in enumerate(zip(items, spans, strict=True)):
        parts = [logps[sequences == index] for index in (2 * number, 2 * number + 1, 2 * len(items) + number)]
        whole = torch.cat([parts[2], parts[0]])
        if item.meta is None:
            expected = expected - 0.5 * whole.mean()
            continue
        sums = [parts[2].sum() + parts[0].sum(), parts[2].sum() + parts[1].sum()]
        sizes = [len(parts[2]) + len(parts[0]), len(parts[2]) + len(parts[1])]
        if own is not None:
            sums = [part[start:stop].sum() for part, (start, stop) in zip(parts, own, strict=False)]
            sizes = [stop - start for start, stop in own]
        reference = (item.meta.reference_chosen_logprob, item.meta.reference_rejected_logprob)
        drifts += [float((s - r).detach()) / n**0.5 for s, r, n in zip(sums, reference, sizes, strict=True)]
        ratio = (sums[0] - reference[0]) - (sums[1] - reference[1])
        preference = torch.log1p(torch.exp(-0.3 * ratio)) if loss_type == "sigmoid" else (ratio - 1 / 0.6) ** 2
        expected = expected + item.meta.weight * (preference - 0.7 * whole.mean()) / denominator.weight
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    assert metrics["max_drift"].item() == pytest.approx(np.abs(drifts).max(), rel=1e-10)
    assert metrics["mean_square_drift"].item() == pytest.approx(np.square(drifts).mean(), rel=1e-10)


def test_without_a_span_in_a_forest_no_token_is_chosen() -> None:
    forest = Forest.of([item.tree for item in preference_items(SmallModel(), random_preferences(3))])
    assert credited_tokens(forest, [None, None, None]) is None


def test_before_the_first_update_margins_of_spans_are_nought_and_later_they_grow() -> None:
    model = SmallModel()
    settings = DPOConfig(**LOOP.replace(epochs=6).model_dump(), credit="sentence", sft_weight=0.0, beta=0.3).seeded(1)
    history = train_preference(
        model, with_references(model, sentence_pairs(9)), settings, expected_reference_hash="abc"
    )
    assert abs(history[0]["margin"]) < 1e-9 and history[0]["max_drift"] < 1e-9
    assert history[-1]["margin"] > 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_span_s_stored_reference_that_is_another_s_is_refused(side: str, dropout: float) -> None:
    model = SmallModel(lora=LoRAConfig(r=3, alpha=12.0, dropout=dropout))
    pairs = with_references(model, sentence_pairs(6))
    field = f"reference_{side}_span_logprob"
    wrong = [*pairs[:3], replace(pairs[3], **{field: getattr(pairs[3], field) - 0.01}), *pairs[4:]]
    settings = DPOConfig(**LOOP.replace(micro_batch_size=6).model_dump(), credit="sentence").seeded(1)
    with pytest.raises(SrcfastError, match=f"sample-3.*before the first update.*{field}"):
        train_preference(model, wrong, settings, expected_reference_hash="abc")
    check_references(model, pairs, 150)


def test_pairs_of_another_credit_are_named_and_an_answer_s_stay(tmp_path: Path) -> None:
    model = SmallModel()
    made = with_references(model, sentence_pairs(2))
    assert credited(made, "sentence") == made
    (whole, _) = credited(made, "response")
    assert (whole.credit, whole.reference_chosen_span_logprob, whole.reference_chosen_logprob) == (
        None,
        None,
        made[0].reference_chosen_logprob,
    )
    answer = replace(made[0], credit="answer")
    assert credited([answer], "response") == credited([answer], "sentence") == [answer]
    (again,) = credited([whole], "sentence")
    with pytest.raises(InputError, match="reference_chosen_span_logprob.*made with another dpo.credit.*set dpo.credit"):
        check_reference_hash(again, "abc")
    with pytest.raises(InputError, match="reference_rejected_span_logprob.*at most 0"):
        check_reference_hash(replace(made[0], reference_rejected_span_logprob=0.5), "abc")
