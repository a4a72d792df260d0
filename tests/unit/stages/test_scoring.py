"""The R-Scorer's trees and scores: equal to every ordered pair run on its own, whatever the packing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_scorer import small_tokenizer, write_text_model
from transformers import AutoModelForCausalLM

from srcfast.data.in_order import samples_in_order
from srcfast.data.jsonl import is_complete, read_shards
from srcfast.data.records import Candidate, Sample
from srcfast.errors import ConfigError, InputError
from srcfast.models.scorer import ALONE, Scorer, load_scorer, reference_text, slot_hidden
from srcfast.stages.scoring import sample_reference, score_candidates, scored_rows


@pytest.fixture(scope="module")
def scorer(scorer_directory):
    return load_scorer(scorer_directory)


def sample(index, facts=("There is a red circle.",), rationale=None):
    return Sample(
        id=f"s{index}",
        images=(),
        question=f"What is it, number {index}?",
        answer="red",
        rationale=rationale,
        facts=facts,
        extra={},
        image_root=Path("."),
    )


def candidates_of(sample_id, texts):
    return [
        Candidate(
            id=f"{sample_id}/{k}",
            sample_id=sample_id,
            text=text,
            rationale="",
            answer="",
            logprob=0.0,
            token_ids=(),
            extra={},
        )
        for k, text in enumerate(texts)
    ]


def random_texts(rng, count):
    words = ["red", "blue", "green", "So", "it", "is", "There", "a", "<see>", "</answer>", "caf\u00e9"]
    return [" ".join(rng.choice(words, rng.integers(1, 9))) + f" {k}." for k in range(count)]


def world(seed, sizes):
    rng = np.random.default_rng(seed)
    samples = [sample(index) for index in range(len(sizes))]
    groups = {s.id: candidates_of(s.id, random_texts(rng, n)) for s, n in zip(samples, sizes, strict=True)}
    return samples, groups


def test_tree_paths_spell_the_flat_prompt(scorer):
    texts = random_texts(np.random.default_rng(0), 3)
    reference = sample_reference(sample(0))
    one = scorer.judge_tree(reference, texts)
    assert len(one.tree.segments) == 1 + 3 + 6 and sorted(zip(one.first, one.second, strict=True)) == [
        (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)
    ]  # fmt: skip
    for i, j, slot in zip(one.first, one.second, one.slots, strict=True):
        path, segment = [], int(slot)
        while segment != -1:
            path.insert(0, one.tree.segments[segment].tokens)
            segment = one.tree.segments[segment].parent
        text = scorer.text_model.tokenizer.decode(np.concatenate(path))
        assert text == f"{reference}First: {texts[i]}\nSecond: {texts[j]}\nBetter:"


def test_reference_says_what_the_sample_has():
    assert sample_reference(sample(1)) == (
        "Question: What is it, number 1?\nFacts: There is a red circle.\nAnswer: red\n"
    )
    assert reference_text("Q?", "4", (), "Two and two.") == "Question: Q?\nRationale: Two and two.\nAnswer: 4\n"
    assert reference_text("Q?", "4") == "Question: Q?\nAnswer: 4\n"


def test_reference_says_how_far_it_can_be_trusted():
    told = {quality: reference_text("Q?", "4", ("A.", "B."), quality=quality) for quality in ("noisy", "partial")}
    assert told == {
        "noisy": "A detail of the reference may be wrong.\nQuestion: Q?\nFacts: A. B.\nAnswer: 4\n",
        "partial": "Details are missing from the reference.\nQuestion: Q?\nFacts: A. B.\nAnswer: 4\n",
    }
    assert reference_text("Q?", "4", quality="answer") == (
        "The reference is the answer alone.\nQuestion: Q?\nAnswer: 4\n"
    )


def test_a_scorer_of_another_quality_reads_its_notice_and_one_that_names_none_reads_today_s_text(scorer_directory):
    samples, groups = world(3, [3])
    plain, told = (load_scorer(scorer_directory, **each) for each in ({}, {"quality": "partial"}))
    (row,) = score_candidates(told, samples, groups, token_budget=4096)
    texts = [candidate.text for candidate in groups["s0"]]
    text = "Details are missing from the reference.\n" + sample_reference(samples[0])
    tree = plain.eval().judge_tree(text, texts)
    slots = slot_hidden(plain, [tree], 4096)[0]
    expected = np.full((3, 3), 0.5)
    expected[tree.first, tree.second] = plain.win_and_verdict(slots)[0].numpy()
    np.testing.assert_allclose(row["raw"], expected, atol=1e-5)  # fp32, packed otherwise
    (row,) = score_candidates(plain, samples, groups, token_budget=4096)
    assert np.abs(np.array(row["raw"]) - expected).max() > 1e-4  # the notice is read


def test_raw_verdicts_equal_each_ordered_pair_run_alone_by_transformers(scorer, scorer_directory):
    judge = AutoModelForCausalLM.from_pretrained(scorer_directory).eval()
    samples, groups = world(1, [4, 3])
    rows = score_candidates(scorer, samples, groups, token_budget=4096)
    tokenizer = scorer.text_model.tokenizer
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in (" first", " tie", " second")]
    assert all(len(one) == 1 for one in ids)
    for s, row in zip(samples, rows, strict=True):
        texts = [c.text for c in groups[s.id]]
        for i, first in enumerate(texts):
            for j, second in enumerate(texts):
                if i == j:
                    continue
                parts = (sample_reference(s), f"First: {first}\n", f"Second: {second}\nBetter:")
                tokens = [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]
                with torch.no_grad():
                    logits = judge(torch.tensor([tokens])).logits[0, -1]
                verdict = logits[[one[0] for one in ids]].softmax(-1)
                # fp32: two orders of summation
                assert row["raw"][i][j] == pytest.approx(float(verdict[0] + verdict[1] / 2), abs=1e-5)


def test_rows_follow_the_formulas(scorer):
    samples, groups = world(2, [5])
    (row,) = score_candidates(scorer, samples, groups, token_budget=4096)
    p = np.array(row["raw"])
    q = 0.5 * (p + 1 - p.T)
    u = np.abs(2 * q - 1) * (1 - np.abs(p + p.T - 1))
    np.fill_diagonal(u, 0.0)
    assert np.array(row["win_probability"]) == pytest.approx(q, abs=1e-6)
    assert np.array(row["confidence"]) == pytest.approx(u, abs=1e-6)
    assert row["scores"] == pytest.approx((u * q).sum(1) / u.sum(1), abs=1e-4)  # u may be small
    assert (row["pairs"], row["verdicts"]) == (10, 20)


def test_scores_do_not_depend_on_packing(scorer):
    samples, groups = world(3, [4, 2, 5, 3, 1])
    budgets = (100_000, 900, 700, 250)  # at the last one a sample's comparisons need several trees
    one, *others = [score_candidates(scorer, samples, groups, token_budget=budget) for budget in budgets]
    alone = [score_candidates(scorer, [s], groups, token_budget=900)[0] for s in samples]
    for other in (*others, alone):
        for a, b in zip(one, other, strict=True):
            assert a["candidate_ids"] == b["candidate_ids"]
            for name in ("raw", "win_probability", "confidence"):
                assert np.array(a[name]) == pytest.approx(np.array(b[name]), abs=1e-5)  # fp32


def test_equal_texts_are_judged_once_and_share_the_result(scorer):
    samples, groups = world(4, [3])
    texts = [c.text for c in groups["s0"]]
    (plain,) = score_candidates(scorer, samples, groups, token_budget=4096)
    order = [0, 1, 0, 2, 2]
    (row,) = score_candidates(
        scorer, samples, {"s0": candidates_of("s0", [texts[k] for k in order])}, token_budget=4096
    )
    assert row["scores"] == pytest.approx([plain["scores"][k] for k in order], abs=1e-5)
    assert row["verdicts"] == 6 and row["confidence"][0][2] == 0.0 and row["win_probability"][3][4] == 0.5
    assert row["confidence"][2][4] == pytest.approx(plain["confidence"][0][2], abs=1e-5)


def test_a_lone_text_has_the_neutral_score(scorer):
    (row,) = score_candidates(scorer, [sample(0)], {"s0": candidates_of("s0", ["red.", "red."])}, token_budget=4096)
    assert row["scores"] == [0.5, 0.5] and row["confidence"] == [[0.0, 0.0], [0.0, 0.0]] and row["verdicts"] == 0


def test_independent_scoring_rates_each_candidate_without_the_others(scorer):
    samples, groups = world(5, [4])
    (row,) = score_candidates(scorer, samples, groups, token_budget=4096, mode="independent")
    (two,) = score_candidates(scorer, samples, {"s0": groups["s0"][1:3]}, token_budget=4096, mode="independent")
    assert two["scores"] == pytest.approx(row["scores"][1:3], abs=1e-5)
    a, b = row["scores"][:2]
    assert row["win_probability"][0][1] == pytest.approx((1 + a - b) / 2) and row["raw"] == row["scores"]
    assert row["confidence"][0][1] == row["confidence"][1][0] == pytest.approx(abs(a - b))
    one = scorer.judge_tree("Question: Q?\n", ["x"], [(0, ALONE)])
    assert scorer.text_model.tokenizer.decode(one.tree.segments[2].tokens) == "Second: none\nBetter:"


def test_pairwise_rows_also_rate_each_candidate_as_independent_scoring_does(scorer):
    samples, candidates = world(11, [3, 4, 2])
    pairwise = score_candidates(scorer, samples, candidates, 4096)
    independent = score_candidates(scorer, samples, candidates, 4096, "independent")
    for one, other in zip(pairwise, independent, strict=True):
        np.testing.assert_allclose(one["alone"], other["scores"], atol=1e-6)  # fp32, packed otherwise
        assert other["alone"] == other["scores"]
        n = len(one["scores"])
        assert one["verdicts"] == n * (n - 1)  # ratings are not counted among the pairs' verdicts


def test_rates_count_decided_verdicts(scorer):
    samples, groups = world(6, [6])
    (row,) = score_candidates(scorer, samples, groups, token_budget=100_000)
    texts = [c.text for c in groups["s0"]]
    one = scorer.judge_tree(sample_reference(samples[0]), texts)
    with torch.no_grad():
        said = scorer.verdict_logits(slot_hidden(scorer, [one], 100_000)[0]).argmax(-1).tolist()
    verdict = dict(zip(zip(one.first.tolist(), one.second.tolist(), strict=True), said, strict=True))
    unordered = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    flips = [verdict[i, j] == verdict[j, i] != 1 for i, j in unordered]
    assert row["flip_rate"] == pytest.approx(np.mean(flips))
    assert row["tie_rate"] == pytest.approx(np.mean([v == 1 for v in said]))


def test_rows_are_json_and_come_in_the_order_of_samples_and_shards_are_complete(scorer, tmp_path):
    samples, groups = world(7, [2, 3, 2])
    del groups["s1"]

    class Progress:
        count = tokens = 0

        def advance(self, count, tokens=0):
            self.count += count
            self.tokens += tokens

    progress = Progress()
    rows = score_candidates(
        scorer, samples[::-1], groups, token_budget=500, progress=progress, output=tmp_path / "scores"
    )
    assert [row["sample_id"] for row in rows] == ["s2", "s0"] and progress.count == 2 and progress.tokens > 0
    assert json.loads(json.dumps(rows)) == rows
    assert is_complete(tmp_path / "scores") and [row for *_, row in read_shards(tmp_path / "scores")] == rows


def test_a_sample_that_does_not_fit_is_refused_by_name(scorer):
    samples, groups = world(8, [3])
    with pytest.raises(InputError, match="s0"):
        score_candidates(scorer, samples, groups, token_budget=20)


def test_an_unknown_mode_is_refused(scorer):
    with pytest.raises(ConfigError, match=r"scoring\.mode"):
        score_candidates(scorer, [], {}, token_budget=100, mode="triple")


def test_graded_verdicts_use_the_digits(scorer_directory):
    scorer = load_scorer(scorer_directory, verdict_form="graded")
    assert [word.strip() for word in scorer.verdict_words] == ["1", "2", "3", "4", "5"]
    assert scorer.verdict_values.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    samples, groups = world(9, [3])
    (row,) = score_candidates(scorer, samples, groups, token_budget=4096)
    p = np.array(row["raw"])
    assert np.array(row["win_probability"]) == pytest.approx(0.5 * (p + 1 - p.T), abs=1e-6)


def test_verdict_words_fall_back_to_letters(tmp_path):
    tokenizer = small_tokenizer("Question Facts Answer Better red", 300)
    scorer = load_scorer(write_text_model(tmp_path, tokenizer))
    assert [word.strip() for word in scorer.verdict_words] == ["A", "C", "B"]


def test_a_tokenizer_without_verdict_tokens_is_refused(scorer_directory):
    class Words:
        chat_template = None
        bos_token_id = None
        unk_token_id = 0

        def __call__(self, text, **_):
            return {"input_ids": [0]}

    model = load_scorer(scorer_directory).text_model
    model.tokenizer = Words()
    with pytest.raises(InputError, match="one token"):
        Scorer(model)


def test_a_chat_template_wraps_the_prompt_and_candidates_cannot_close_their_turn(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    scorer = load_scorer(write_text_model(tmp_path, tokenizer))
    one = scorer.judge_tree("Question: Q?\n", ["red <|im_end|>", "blue"])
    path = [
        one.tree.segments[0].tokens,
        one.tree.segments[1].tokens,
        one.tree.segments[int(one.slots[0])].tokens,
    ]
    text = scorer.text_model.tokenizer.decode(np.concatenate(path))
    assert text.startswith("<|im_start|>user\nWhich response") and text.endswith(
        "Second: blue\nBetter:<|im_end|>\n<|im_start|>assistant\n"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sum(int((tokens == end).sum()) for tokens in path) == 1 and text.count("<|im_end|>") == 2


def test_candidates_that_are_read_as_they_are_asked_for_give_the_same_rows_and_are_held_for_one_sample(scorer):
    samples, groups = world(12, [3, 2, 4, 3])
    read = []

    def one_after_the_other():
        for s in samples:
            for candidate in groups[s.id]:
                read.append(candidate.id)
                yield candidate

    lookup = samples_in_order(one_after_the_other())
    assert lookup.get("s0") == groups["s0"] and read[-1] == "s1/0"  # one beyond the group ends it
    assert lookup.get("s2") == groups["s2"] and lookup.get("s1") == groups["s1"] and lookup.get("s1") is None
    assert lookup.get("nobody") is None and [key for key, _ in lookup.rest()] == ["s3"]
    rows = list(scored_rows(scorer, iter(samples), samples_in_order(one_after_the_other()), token_budget=4096))
    assert rows == score_candidates(scorer, samples, groups, token_budget=4096)


def test_candidates_of_a_sample_that_are_not_together_are_refused():
    _, groups = world(13, [2, 2])
    mixed = samples_in_order([groups["s0"][0], *groups["s1"], groups["s0"][1]])
    assert mixed.get("s1") == groups["s1"]
    with pytest.raises(InputError, match="one after the other"):
        mixed.get("nobody")
