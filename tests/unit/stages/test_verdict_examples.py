"""Examples of a judge's verdicts: both orders, averages, the loss over shares, what is held out, and the mixture."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from helpers.small_scorer import write_text_model

from srcfast.config.load import load_config
from srcfast.data.forest import Forest
from srcfast.data.records import Sample
from srcfast.data.verdicts import JudgedPair
from srcfast.errors import ConfigError, InputError
from srcfast.models.scorer import Scorer, load_scorer, slot_hidden
from srcfast.stages.scorer_training import (
    ScorerExample,
    Variant,
    evaluate_scorer,
    fault_name,
    scorer_items,
    scorer_loss,
    target_verdict,
)
from srcfast.stages.verdict_examples import mix, verdict_examples, with_verdicts


def judged(name: str, first: str, second: str, *shares: float) -> JudgedPair:
    a, b, c = shares
    return JudgedPair(Sample(name, (), "Q?", "red", facts=("It is red.",)), (first, second), (a, b, c))


def test_a_pair_stands_in_both_orders_with_the_mean_of_its_verdicts() -> None:
    pairs = [
        judged("s", "red", "blue", 0.6, 0.4, 0.0),
        judged("t", "red", "gold", 0.0, 0.0, 1.0),
        judged("s", "blue", "red", 0.2, 0.0, 0.8),
        judged("s", "blue", "green", 0.0, 1.0, 0.0),
    ]
    s, t = verdict_examples(pairs)
    assert (s.key, t.key) == ("s", "t") and s.reference == "Question: Q?\nFacts: It is red.\nAnswer: red\n"
    assert [variant.text for variant in s.variants] == ["red", "blue", "green"]
    assert s.pairs == ((0, 1), (1, 0), (1, 2), (2, 1))
    assert np.array(s.verdicts) == pytest.approx(np.array([(0.7, 0.2, 0.1), (0.1, 0.2, 0.7), (0, 1, 0), (0, 1, 0)]))
    assert t.verdicts == ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("shares", "of_three", "of_five"),
    [
        ((0.5, 0.3, 0.2), 0, 0),
        ((0.2, 0.3, 0.5), 2, 4),
        ((0.3, 0.4, 0.3), 1, 2),
        ((0.4, 0.2, 0.4), 1, 2),  # neither side
        ((0.45, 0.45, 0.1), 1, 2),  # a tie as likely as a side
    ],
)
def test_the_likeliest_verdict_is_the_right_one(
    shares: tuple[float, float, float], of_three: int, of_five: int
) -> None:
    example = verdict_examples([judged("s", "red", "blue", *shares)])[0]
    assert target_verdict(example, 0, 1, 3) == of_three and target_verdict(example, 1, 0, 3) == 2 - of_three
    assert target_verdict(example, 0, 1, 5) == of_five and target_verdict(example, 1, 0, 5) == 4 - of_five
    assert fault_name(example, 0, 1) == "verdict"


@pytest.mark.parametrize("form", ["choice", "graded"])
def test_the_loss_is_the_cross_entropy_with_the_shares(form: str, scorer_directory: Path) -> None:
    scorer = load_scorer(scorer_directory, verdict_form=form)  # type: ignore[arg-type]
    by_faults = ScorerExample("f", "Q\n", (Variant("red", 0), Variant("blue", 1)), ((0, 1), (1, 0)))
    examples = [verdict_examples([judged("s", "red", "blue", 0.7, 0.2, 0.1)])[0], by_faults]
    items = scorer_items(scorer, examples)
    forest = Forest.of([item.tree for item in items])
    loss, metrics = scorer_loss(scorer)(
        scorer.text_model(forest), forest, scorer.text_model.decoder.head, items, slots=4
    )
    logits = scorer.verdict_logits(slot_hidden(scorer, [item.meta[0] for item in items], 10_000)[0]).double()
    log_shares = logits.log_softmax(-1).detach().numpy()
    right = {
        "choice": [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [1, 0, 0], [0, 0, 1]],
        "graded": [[0.35, 0.35, 0.2, 0.05, 0.05], [0.05, 0.05, 0.2, 0.35, 0.35], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]],
    }[form]
    assert float(loss) == pytest.approx(-(np.array(right) * log_shares).sum() / 4, rel=1e-5)
    if form == "choice":
        hits = (log_shares.argmax(-1) == np.array(right).argmax(-1)).sum()
        assert float(metrics["accuracy"]) == hits / 4


def test_a_mixture_has_the_share_and_leaves_out_what_is_too_much() -> None:
    corrupted, given = ([ScorerExample(f"{kind}{n}", "", (), ()) for n in range(100)] for kind in "cv")

    def counts(c: int, v: int, share: float | None) -> tuple[int, int]:
        keys = [example.key for example in mix(corrupted[:c], given[:v], share, Random(0))]
        assert len(set(keys)) == len(keys)
        return sum(key[0] == "c" for key in keys), sum(key[0] == "v" for key in keys)

    assert counts(100, 10, None) == (100, 10)
    assert counts(100, 10, 0.5) == (10, 10)
    assert counts(100, 10, 0.2) == (40, 10)
    assert counts(10, 100, 0.5) == (10, 10)
    assert counts(30, 100, 0.75) == (30, 90)
    assert counts(30, 100, 1.0) == (0, 100)


def test_no_sample_is_both_trained_on_and_held_out() -> None:
    config = load_config(None, ["scorer_training.held_out=0.25", "scorer_training.verdicts=v.jsonl"])
    verdicts = [judged(f"s{n}", "red", "blue", 1.0, 0.0, 0.0) for n in range(12)]
    train = [ScorerExample(f"s{n}", "", (), ()) for n in range(2, 20)]
    held_out = {"complete": [ScorerExample(f"s{n}", "", (), ()) for n in (0, 1, 30)]}
    mixed, apart = with_verdicts(config, verdicts, train, held_out, None)
    tested = {example.key for example in apart["complete"]}
    assert {"s0", "s1"} < tested and len(tested) == 3  # a quarter of twelve
    of_verdicts = {example.key for example in mixed if example.verdicts}
    assert of_verdicts == {f"s{n}" for n in range(12)} - tested
    assert {example.key for example in mixed if not example.verdicts} == {f"s{n}" for n in range(2, 20)} - tested
    with pytest.raises(InputError, match=r"v\.jsonl.*1 samples with verdicts, of which 1 are held out"):
        with_verdicts(config, verdicts[:1], train, held_out, None)
    with pytest.raises(ConfigError, match="verdict_share: expected none without verdicts"):
        load_config(None, ["scorer_training.verdict_share=0.5"])


def test_references_have_the_qualities_of_the_settings() -> None:
    words = ["scorer_training.qualities=[answer]", "scorer_training.verdicts=v.jsonl"]
    verdicts = [judged(f"s{n}", "red", "blue", 1.0, 0.0, 0.0) for n in range(4)]
    mixed, apart = with_verdicts(load_config(None, words), verdicts, [], {}, None)
    expected = "The reference is the answer alone.\nQuestion: Q?\nAnswer: red\n"
    assert {example.reference for example in (*mixed, *apart["answer"])} == {expected}


def test_agreement_on_verdicts_is_measured_over_both_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers.small_scorer import small_tokenizer

    scorer = load_scorer(write_text_model(tmp_path, small_tokenizer()))
    examples = verdict_examples(
        [
            judged("a", "red", "blue", 0.9, 0.1, 0.0),
            judged("b", "red", "blue", 0.0, 0.1, 0.9),
            judged("c", "red", "blue", 0.1, 0.8, 0.1),
        ]
    )
    # Pairs come as (0, 1), (1, 0) of each: p and the value of the likeliest verdict.
    said = torch.tensor([[0.8, 0.7, 0.6, 0.9, 0.5, 0.1], [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]])
    monkeypatch.setattr(Scorer, "win_and_verdict", lambda self, slots: said)
    report = evaluate_scorer(scorer, examples)
    assert report["by_fault"] == {"verdict": pytest.approx(3 / 6)}  # a: first of two; b: second of two; c: the tie
    assert report["n"] == 6
    assert report["preference_accuracy"] == 1.0  # 0.8 > 0.7 for a, 0.6 < 0.9 for b; c is a tie
    assert report["order_flip_rate"] == pytest.approx(2 / 3)
