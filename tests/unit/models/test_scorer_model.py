"""The R-Scorer's texts, trees and verdicts by literal values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from srcfast.data.forest import Forest, Tree
from srcfast.errors import InputError
from srcfast.models import scorer as scorer_module
from srcfast.models.scorer import ALONE, Scorer, all_pairs, load_scorer, reference_text, slot_hidden, slot_rows


@pytest.fixture(scope="module")
def scorers(scorer_directory: Path) -> dict[str, Scorer]:
    return {form: load_scorer(scorer_directory, verdict_form=form) for form in ("choice", "graded")}  # type: ignore[arg-type]


def text_of(scorer: Scorer, tokens: np.ndarray) -> str:
    return scorer.text_model.tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("form", "words", "values"),
    [
        ("choice", (" first", " tie", " second"), [1.0, 0.5, 0.0]),
        ("graded", (" 1", " 2", " 3", " 4", " 5"), [1.0, 0.75, 0.5, 0.25, 0.0]),
    ],
)
def test_each_form_has_its_verdicts_from_the_first_s_win_to_the_second_s(
    form: str, words: tuple[str, ...], values: list[float], scorers: dict[str, Scorer]
) -> None:
    scorer = scorers[form]
    assert scorer.verdict_values.tolist() == values
    assert [word.strip() for word in scorer.verdict_words] == [word.strip() for word in words]
    assert [text_of(scorer, [token]).strip() for token in scorer.verdict_token_ids.tolist()] == [
        w.strip() for w in words
    ]


@pytest.mark.parametrize(
    ("facts", "rationale", "text"),
    [
        ((), None, "Question: Why?\nAnswer: red\n"),
        ((), "It is red.", "Question: Why?\nRationale: It is red.\nAnswer: red\n"),
        (("It is red.", "It is small."), None, "Question: Why?\nFacts: It is red. It is small.\nAnswer: red\n"),
        (("It is red.",), "So it is.", "Question: Why?\nFacts: It is red.\nAnswer: red\n"),
    ],
)
def test_the_reference_is_the_facts_or_without_them_the_rationale(
    facts: tuple[str, ...], rationale: str | None, text: str
) -> None:
    assert reference_text("Why?", "red", facts, rationale) == text


def test_a_tree_shows_each_pair_once_in_order(scorers: dict[str, Scorer]) -> None:
    scorer = scorers["choice"]
    judged = scorer.judge_tree("Facts\n", ["red", "blue"], [(1, 0), (0, ALONE), (1, ALONE), (0, 1)], key="s")
    assert list(zip(judged.first.tolist(), judged.second.tolist(), strict=True)) == [(0, -1), (0, 1), (1, -1), (1, 0)]
    segments = [(text_of(scorer, one.tokens), one.parent) for one in judged.tree.segments]
    assert [text.removeprefix("<s>") for text, _ in segments] == [
        "Facts\n",
        "First: red\n",
        "Second: none\nBetter:",
        "Second: blue\nBetter:",
        "First: blue\n",
        "Second: none\nBetter:",
        "Second: red\nBetter:",
    ]
    assert [parent for _, parent in segments] == [-1, 0, 1, 1, 0, 4, 4]
    assert judged.slots.tolist() == [2, 3, 5, 6]
    sizes = [one.tokens.size for one in judged.tree.segments]
    forest = Forest.of([judged.tree, judged.tree])
    ends = [sum(sizes[: slot + 1]) - 1 for slot in (2, 3, 5, 6)]
    assert slot_rows(forest, [judged, judged]).tolist() == ends + [sum(sizes) + end for end in ends]
    assert all_pairs(3) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]


@pytest.mark.parametrize("form", ["choice", "graded"])
def test_wins_are_the_mean_value_of_the_verdicts_after_each_path_alone(form: str, scorers: dict[str, Scorer]) -> None:
    """Each path is run by itself, all logits are computed, and the softmax over the verdicts is written out."""
    scorer = scorers[form].eval()
    judged = [
        scorer.judge_tree("Facts\n", ["red red", "red blue", "green"]),
        scorer.judge_tree("So\n", ["gold", "none"]),
    ]
    slots, tokens = slot_hidden(scorer, judged, 10_000)
    found, verdicts = scorer.win_and_verdict(slots).tolist()
    values = {"choice": (1.0, 0.5, 0.0), "graded": (1.0, 0.75, 0.5, 0.25, 0.0)}[form]
    expected, likeliest = [], []
    with torch.no_grad():
        for tree in judged:
            for slot in tree.slots.tolist():
                segments, path, index = tree.tree.segments, [], slot
                while index >= 0:
                    path.insert(0, segments[index].tokens)
                    index = segments[index].parent
                forest = Forest.of([type(tree.tree)((type(segments[0])(np.concatenate(path)),))])
                hidden = scorer.text_model(forest)[-1].double()
                weight = scorer.text_model.decoder.head_weight.double()
                logits = [float(weight[token] @ hidden) for token in scorer.verdict_token_ids.tolist()]
                shares = np.exp(np.array(logits) - max(logits))
                expected.append(float(shares @ np.array(values) / shares.sum()))
                likeliest.append(values[int(np.argmax(logits))])
    assert found == pytest.approx(expected, abs=1e-5)  # fp32
    assert verdicts == likeliest
    assert 0 < tokens <= sum(tree.tree.num_tokens for tree in judged)


def test_text_never_becomes_a_control_token(scorers: dict[str, Scorer]) -> None:
    scorer = scorers["choice"]
    tokenizer = scorer.text_model.tokenizer
    tokens = scorer.encode("red</s><s> blue")
    assert not {tokenizer.eos_token_id, tokenizer.bos_token_id} & set(tokens.tolist())
    assert text_of(scorer, tokens) == "red</s><s> blue"


@pytest.mark.parametrize(("most", "forests"), [(1, 3), (40, 3), (4096, 1)])
def test_on_a_cpu_trees_run_together_up_to_a_number_of_tokens_and_a_larger_one_alone(
    most: int, forests: int, scorers: dict[str, Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number, a tree that fits into the token budget is judged, with the same hidden states."""
    scorer = scorers["choice"]
    facts = ["It is red.\n", "It is blue and large.\n", "It is a circle, and it stands behind all the others.\n"]
    judged = [scorer.judge_tree(fact, ["red", "a blue one"], all_pairs(2), key=fact) for fact in facts]
    expected = torch.cat([slot_hidden(scorer, [one], 10_000)[0] for one in judged])
    sizes: list[int] = []
    packed = Forest.packed

    def watched(trees: Sequence[Tree], budget: int) -> Iterator[Forest]:
        for forest in packed(trees, budget):
            sizes.append(forest.num_tokens)
            yield forest

    monkeypatch.setattr(scorer_module, "CPU_TOKENS", most)
    monkeypatch.setattr(scorer_module.Forest, "packed", watched)
    hidden, tokens = slot_hidden(scorer, judged, 10_000)
    assert (len(sizes), sum(sizes)) == (forests, tokens)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)  # fp32, summed in another order
    with pytest.raises(InputError, match="token_budget"):
        slot_hidden(scorer, judged, max(sizes) - 1 if forests == 3 else 20)
