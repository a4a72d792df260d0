"""Training the R-Scorer: examples, targets, a small one learns to judge from scratch and by LoRA."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.plain_scoring import VALUES, plain_shares, plain_verdict
from helpers.small_scorer import small_tokenizer, write_text_model

from srcfast.config.load import load_config
from srcfast.config.settings import LoRAConfig, TrainingConfig
from srcfast.data.corruptions import KINDS
from srcfast.data.rationale_format import parse_response, split_sentences
from srcfast.data.records import Sample
from srcfast.models.scorer import ALONE, load_scorer
from srcfast.stages.scorer_calibration import calibrate_confidence
from srcfast.stages.scorer_training import (
    ScorerExample,
    Variant,
    evaluate_scorer,
    fault_name,
    scorer_example,
    scorer_examples,
    split_examples,
    target_verdict,
    train_scorer,
)
from srcfast.world.claims import VOCABULARY as WORLD_WORDS
from srcfast.world.samples import world_samples

VOCABULARY = {
    "colour": ("red", "blue", "green", "gold"),
    "shape": ("circle", "square"),
    "count": ("1", "2", "3"),
}


def rap(index, rng):
    a, b = rng.sample(VOCABULARY["colour"], 2)
    see = (f"There is a {a} circle.", f"There is a {b} square.")
    sample = Sample(
        id=f"s{index}",
        images=(),
        question="Which colour is the circle?",
        answer=a,
        rationale=None,
        facts=see,
        extra={},
        image_root=Path("."),
    )
    return sample, see, (f"The circle is {a}.",), a


def raps(count, seed=0):
    rng = random.Random(seed)
    return [rap(index, rng) for index in range(count)]


def test_examples_hold_the_truth_and_its_corruptions():
    examples = scorer_examples(raps(200), random.Random(1), VOCABULARY)
    assert len(examples) == 200
    kinds, sizes, retold = set(), set(), 0
    for example, (sample, see, think, answer) in zip(examples, raps(200), strict=True):
        assert example.key == sample.id and sample.question in example.reference and see[0] in example.reference
        sizes.add(len(example.variants))
        assert len({v.text for v in example.variants}) == len(example.variants)
        for variant in example.variants:
            parsed = parse_response(variant.text)
            if variant.faults == 0:
                retold += parsed.perception != see
                assert set(parsed.perception) == set(see) and parsed.reasoning == think and parsed.answer == answer
            else:
                kinds.add(variant.kind)
                parts = (parsed.perception != see, parsed.reasoning != think, parsed.answer != answer)
                assert sum(parts) == variant.faults
        assert 1 <= sum(v.faults == 0 for v in example.variants) <= 2
    assert kinds == set(KINDS) and max(sizes) == 4 and 20 < retold < 80
    places = [[v.faults for v in e.variants].index(0) for e in examples]
    assert set(places) == {0, 1, 2, 3}  # the truth's place gives nothing away


def test_examples_depend_on_the_seed_alone():
    one, two, other = (scorer_examples(raps(20), random.Random(seed), VOCABULARY) for seed in (3, 3, 4))
    assert one == two != other


def test_a_stronger_judge_may_overrule_corruptions():
    def is_faulty(sample, parts):
        return parts[2] != sample.answer

    examples = scorer_examples(raps(50), random.Random(5), VOCABULARY, is_faulty=is_faulty)
    answers = {sample.id: answer for sample, _, _, answer in raps(50)}
    assert len(examples) > 30  # where no such corruption was found in a few attempts, the sample is left out
    for example in examples:
        assert all(parse_response(v.text).answer != answers[example.key] for v in example.variants if v.faults)


def test_raps_that_cannot_be_corrupted_are_left_out():
    sample = raps(1)[0][0]
    assert scorer_examples([(sample, ("Nothing.",), (), "x")], random.Random(0), VOCABULARY) == []


def example_of(*faults):
    kinds = [("none", "insufficient", "counterfactual", "unreasonable")[f] for f in faults]
    variants = [Variant(f"text {k}", f, kind) for k, (f, kind) in enumerate(zip(faults, kinds, strict=True))]
    return scorer_example(raps(1)[0][0], variants)


def test_fewer_faults_win_and_equal_numbers_tie():
    example = example_of(0, 1, 1, 3, 0)
    assert len(example.pairs) == 20 + 5
    choice = {pair: target_verdict(example, *pair, 3) for pair in example.pairs}
    assert [choice[p] for p in ((0, 1), (1, 0), (1, 2), (0, 4), (2, 3), (3, 2))] == [0, 2, 1, 1, 0, 2]
    assert [choice[i, ALONE] for i in range(5)] == [0, 2, 2, 2, 0]
    graded = {pair: target_verdict(example, *pair, 5) for pair in example.pairs}
    assert [graded[p] for p in ((0, 1), (1, 0), (1, 2), (2, 3), (3, 0))] == [1, 3, 2, 0, 4]
    assert [graded[i, ALONE] for i in range(2)] == [0, 4]
    names = [fault_name(example, *p) for p in ((0, 1), (1, 0), (1, 2), (0, 4), (1, 3), (0, ALONE))]
    assert names == ["insufficient", "insufficient", "tie", "tie", "bad_or_worse", "alone"]


COLOURS = ("red", "blue", "green", "gold", "pink")


def gold_examples(count, seed):
    """A synthetic judging task: a candidate is good if it has the gold word; one example in four is a tie."""
    rng = random.Random(seed)
    examples = []
    for index in range(count):
        gold, wrong = rng.sample(COLOURS, 2)
        variants = [Variant(f"So it is {gold}", 0), Variant(f"So it is {wrong}", 1, "unreasonable")]
        if rng.random() < 0.25:
            variants[1] = variants[0]
        rng.shuffle(variants)
        pairs = tuple((i, j) for i in (0, 1) for j in (0, 1, ALONE) if i != j)
        examples.append(ScorerExample(f"g{index}", f"Answer: {gold}\n", tuple(variants), pairs))
    return examples


def judging_tokenizer():
    return small_tokenizer(
        "Question Facts Answer First Second Better first tie second So it is none " + " ".join(COLOURS)
    )


def test_a_small_scorer_learns_to_judge_from_scratch(tmp_path):
    scorer = load_scorer(write_text_model(tmp_path, judging_tokenizer(), hidden_size=64, initializer_range=0.1))
    settings = TrainingConfig(
        micro_batch_size=16,
        learning_rate=0.001,
        warmup_ratio=0.1,
        weight_decay=0.01,
        gradient_accumulation_steps=1,
        token_budget=8192,
        activation_checkpointing=0,
    )
    before = evaluate_scorer(scorer, gold_examples(100, seed=1))
    history = train_scorer(scorer, gold_examples(2200, seed=0), settings)
    after = evaluate_scorer(scorer, gold_examples(200, seed=2))
    assert before["accuracy"] < 0.6
    assert after["accuracy"] > 0.9 and after["preference_accuracy"] > 0.9 and after["order_flip_rate"] < 0.1
    assert after["ci95"][0] <= after["accuracy"] <= after["ci95"][1] and after["n"] == 200 * 2
    assert set(after["by_fault"]) == {"tie", "unreasonable"} and after["alone_accuracy"] > 0.9
    assert history[-1]["accuracy"] > 0.9 > history[0]["accuracy"]


def test_training_with_lora_changes_only_the_adapter_and_learns(scorer_directory):
    scorer = load_scorer(scorer_directory, lora=LoRAConfig(r=4, alpha=8))
    frozen = {n: p.clone() for n, p in scorer.named_parameters() if not p.requires_grad}
    settings = TrainingConfig(
        epochs=4,
        micro_batch_size=24,
        learning_rate=0.005,
        gradient_accumulation_steps=1,
        token_budget=8192,
        activation_checkpointing=0,
    )
    history = train_scorer(scorer, gold_examples(16, seed=0), settings)
    assert all(torch.equal(p, frozen[n]) for n, p in scorer.named_parameters() if n in frozen)
    assert len(frozen) > 0 and history[-1]["loss"] < history[0]["loss"]


def test_the_first_loss_is_the_mean_over_all_slots_whatever_the_cut(scorer_directory):
    examples = gold_examples(6, seed=3)
    losses = []
    for batch, steps, budget in ((18, 1, 8192), (6, 3, 8192), (18, 1, 150)):
        scorer = load_scorer(scorer_directory)
        settings = TrainingConfig(
            micro_batch_size=batch, gradient_accumulation_steps=steps, token_budget=budget, activation_checkpointing=0
        )
        losses.append(train_scorer(scorer, examples, settings)[0]["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)  # fp32: the order of summation differs
    assert np.isfinite(losses[0])


# Against comparisons that are each run as a text of its own ---------------------------------------------------------------


def right_verdict(example, first, second, form):
    """The index of the verdict that is right: by the lead in faults, or by whether there are any."""
    own = example.variants[first].faults
    last = len(VALUES[form]) - 1
    if second == ALONE:
        return last if own else 0
    lead = example.variants[second].faults - own
    if form == "choice":
        return 0 if lead > 0 else 2 if lead < 0 else 1
    return {0: 2, 1: 1, -1: 3}.get(lead, 0 if lead > 0 else 4)


def graded_examples():
    """Faults from 0 to 3, two of them equal, and pairs that are compared in one order alone."""
    variants = tuple(
        Variant(f"So it is {word}", faults, kind)
        for word, faults, kind in (("red", 0, "none"), ("blue", 1, "counterfactual"), ("green gold", 3, "insufficient"))
    )
    more = (*variants, Variant("It is", 1, "unreasonable"))
    sample = Sample("a", (), "Which?", "red")
    whole = scorer_example(sample, more)
    one_way = ScorerExample("b", "Answer: blue\n", variants, ((0, 1), (1, 2), (2, 1), (2, ALONE)))
    return [whole, one_way]


@pytest.mark.parametrize("form", ["choice", "graded"])
def test_figures_of_a_scorer_are_those_of_comparisons_one_by_one(scorer_directory, form):
    scorer, examples = load_scorer(scorer_directory, verdict_form=form).eval(), graded_examples()
    values = VALUES[form]
    sides, by_fault, alone, hits, preferred, flips = {}, {}, [], [], [], []
    for example in examples:
        for first, second in example.pairs:
            texts = [example.variants[first].text, None if second == ALONE else example.variants[second].text]
            p, verdict = plain_verdict(scorer, example.reference, *texts)
            target = values[right_verdict(example, first, second, form)]
            right = (verdict > 0.5) - (verdict < 0.5) == (target > 0.5) - (target < 0.5)
            if second == ALONE:
                alone.append(right)
                continue
            hits.append(right)
            own, other = (example.variants[k] for k in (first, second))
            name = "tie" if own.faults == other.faults else "bad_or_worse" if own.faults and other.faults else ""
            by_fault.setdefault(name or (own.kind if own.faults else other.kind), []).append(right)
            sides[example.key, first, second] = p, verdict, target
    for (key, i, j), (p, verdict, target) in sides.items():
        if i < j and (key, j, i) in sides:
            back, back_verdict, _ = sides[key, j, i]
            flips.append((verdict > 0.5) == (back_verdict > 0.5) and 0.5 not in (verdict, back_verdict))
            if target != 0.5:
                preferred.append(((p + 1 - back) / 2 > 0.5) == (target > 0.5))
    assert len(hits) == 15 and len(preferred) == 6 and len(flips) == 7
    found = evaluate_scorer(scorer, examples, token_budget=10_000, seed=3)
    expected = {
        "accuracy": np.mean(hits),
        "alone_accuracy": np.mean(alone),
        "preference_accuracy": np.mean(preferred),
        "order_flip_rate": np.mean(flips),
        "n": 15,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert found["by_fault"] == pytest.approx({name: np.mean(rights) for name, rights in by_fault.items()})
    # Resampled by example, whose shares are of 12 and of 3 verdicts.
    shares = (sum(hits[:12]), 12), (sum(hits[12:]), 3)
    picks = np.random.default_rng(3).integers(0, 2, (1000, 2))
    resampled = [sum(shares[k][0] for k in pick) / sum(shares[k][1] for k in pick) for pick in picks.tolist()]
    assert found["ci95"] == pytest.approx(np.quantile(resampled, [0.025, 0.975]).tolist())


@pytest.mark.parametrize("form", ["choice", "graded"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_loss_is_the_mean_over_all_slots_of_a_batch(scorer_directory, form, micro_batch):
    scorer, examples = load_scorer(scorer_directory, verdict_form=form), graded_examples()
    losses, hits = [], []
    for example in examples:
        for first, second in example.pairs:
            texts = [example.variants[first].text, None if second == ALONE else example.variants[second].text]
            shares = plain_shares(scorer, example.reference, *texts)
            target = right_verdict(example, first, second, form)
            assert target_verdict(example, first, second, len(VALUES[form])) == target
            losses.append(-np.log(shares[target]))
            hits.append(int(np.argmax(shares)) == target)
    settings = TrainingConfig(
        micro_batch_size=micro_batch, gradient_accumulation_steps=2 // micro_batch, learning_rate=1e-3,
        activation_checkpointing=0,
    ).seeded(1)  # fmt: skip
    (step,) = train_scorer(scorer, examples, settings)
    assert step["forests"] == 2 // micro_batch
    assert step["loss"] == pytest.approx(np.mean(losses), rel=1e-5)  # fp32
    assert step["accuracy"] == pytest.approx(np.mean(hits), abs=1e-6)


def test_examples_have_all_qualities_evenly_and_labels_of_the_truth(tmp_path):
    samples = world_samples("scorer", 300, 4, image_dir=tmp_path)
    names = ("complete", "noisy", "partial", "answer")
    words = ["seed=3", "scorer_training.held_out=0.2"]
    plain, plain_held_out = split_examples(load_config(None, words), samples, WORLD_WORDS)
    config = load_config(None, [*words, f"scorer_training.qualities=[{', '.join(names)}]"])
    train, held_out = split_examples(config, samples, WORLD_WORDS)
    by_id = {sample.id: sample for sample in samples}
    notices = {
        "noisy": "A detail of the reference may be wrong.\n",
        "partial": "Details are missing from the reference.\n",
        "answer": "The reference is the answer alone.\n",
        "complete": "",
    }

    def quality_of(example):
        return next(name for name, text in notices.items() if example.reference.startswith(text))

    counts = Counter(quality_of(example) for example in train)
    assert all(35 <= counts[name] <= 90 for name in names)  # 240 draws at 1/4: 60, standard deviation 6.7
    for example, as_today in zip(train, plain, strict=True):  # the same candidates, pairs and faults
        assert (example.key, example.variants, example.pairs) == (as_today.key, as_today.variants, as_today.pairs)
        sample, quality = by_id[example.key], quality_of(example)
        lines = example.reference.removeprefix(notices[quality]).splitlines()
        facts = [line.removeprefix("Facts: ") for line in lines if line.startswith("Facts: ")]
        assert lines[0] == f"Question: {sample.question}" and lines[-1] == f"Answer: {sample.answer}"
        assert [line.split(":")[0] for line in lines] == ["Question", *["Facts"] * len(facts), "Answer"]
        true = " ".join(sample.facts)
        if quality == "complete":
            assert example == as_today and facts == [true]
        elif quality == "noisy":
            assert len(facts[0].split(". ")) == len(sample.facts) and facts != [true]
        elif quality == "partial":
            left = split_sentences(facts[0])
            assert set(left) < set(sample.facts) and abs(2 * len(left) - len(sample.facts)) <= 1
        else:
            assert facts == []
    assert list(held_out) == list(names) and list(plain_held_out) == ["complete"]
    assert held_out["complete"] == plain_held_out["complete"] and len(held_out["noisy"]) == 60
    for name in names:
        assert {quality_of(example) for example in held_out[name]} == {name}
        assert [e.variants for e in held_out[name]] == [e.variants for e in held_out["complete"]]
    assert split_examples(config, samples, WORLD_WORDS) == (train, held_out)


@pytest.mark.parametrize("form", ["choice", "graded"])
def test_a_calibration_is_that_of_comparisons_one_by_one(scorer_directory, form):
    scorer = load_scorer(scorer_directory, verdict_form=form).eval()
    examples = [*graded_examples(), *gold_examples(3, seed=5)]
    logits, targets, halves = [], [], []
    for number, example in enumerate(examples):
        for first, second in example.pairs:
            if second != ALONE:
                shares = plain_shares(
                    scorer, example.reference, example.variants[first].text, example.variants[second].text
                )
                logits.append(np.log(shares))
                targets.append(right_verdict(example, first, second, form))
                halves.append(number % 2)
    logits, targets, halves = np.array(logits), np.array(targets), np.array(halves)
    right = logits.argmax(-1) == targets

    def best(mask):  # over a grid, of steps of 0.1 %
        grid = np.exp(np.linspace(np.log(0.05), np.log(20), 6000))
        losses = [
            -torch.from_numpy(logits[mask] / t).log_softmax(-1).numpy()[range(mask.sum()), targets[mask]].mean()
            for t in grid
        ]
        return grid[int(np.argmin(losses))]

    def error(confidence):
        bins = np.minimum((10 * confidence).astype(int), 9)
        return sum(abs((right[bins == b] - confidence[bins == b]).sum()) for b in range(10)) / len(right)

    temperatures = [best(halves == 1), best(halves == 0)]  # for the examples of even and of odd number
    scaled = torch.from_numpy(logits / np.array(temperatures)[halves][:, None]).softmax(-1).numpy()
    [(name, found)] = calibrate_confidence(scorer, {"noisy": examples}, 10_000).items()
    assert (name, found["verdict"], found["pairs"]) == ("noisy", form, len(targets))
    assert found["temperature"] == pytest.approx(best(halves >= 0), rel=2e-3)
    assert found["ece_before"] == pytest.approx(error(np.exp(logits).max(-1)), abs=1e-4)  # fp32
    assert found["ece_after"] == pytest.approx(
        error(scaled.max(-1)), abs=2e-2
    )  # a verdict at an edge may change its bin
    assert sum(row["pairs"] for row in found["reliability"]) == len(targets)
    assert scorer.temperature == 1.0


def test_a_single_example_is_calibrated_by_its_own_pairs(scorer_directory):
    scorer = load_scorer(scorer_directory)
    found = calibrate_confidence(scorer, {"complete": graded_examples()[:1]}, 10_000)["complete"]
    assert found["pairs"] == 12 and 0.05 <= found["temperature"] <= 20.0


def test_training_forgets_the_temperature_of_other_weights(scorer_directory):
    scorer = load_scorer(scorer_directory)
    scorer.temperature = 3.0
    train_scorer(scorer, graded_examples(), TrainingConfig(activation_checkpointing=0).seeded(0))
    assert scorer.temperature == 1.0
