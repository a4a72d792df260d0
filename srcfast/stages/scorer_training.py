"""Train the R-Scorer to compare true rationale-answer pairs with their corruptions, in all ordered pairs.

The number of faults decides which is better: a candidate has one for each part (perception, reasoning,
answer) that differs from the true one's. Fewer faults win; equal numbers tie, none at all as well as one each.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from srcfast.config.settings import Config, TrainingConfig
from srcfast.data.corruptions import KINDS, Parts, Vocabulary, corrupt
from srcfast.data.forest import Forest
from srcfast.data.logit_rows import row_positions
from srcfast.data.rationale_format import Format, ParsedResponse, format_response, parse_response
from srcfast.data.rationale_pairs import build_raps
from srcfast.data.records import ReferenceQuality, Sample
from srcfast.data.verdicts import Shares
from srcfast.errors import ConfigError, InputError
from srcfast.models.head import Head, check_numbers
from srcfast.models.scorer import ALONE, JudgeTree, Scorer, slot_hidden, slot_rows
from srcfast.stages.scoring import sample_reference
from srcfast.training.items import Loss, Metrics, Objective, TrainingItem
from srcfast.training.loop import TrainingOptions, train
from srcfast.world.claims import truth_of, vocabulary_of
from srcfast.world.degraded_references import degrade_reference
from srcfast.world.verification import verify_sample
from srcfast_kernels.transfers import fetch, to_device

# Sample, perception sentences, reasoning sentences, answer.
ParsedRationale = tuple[Sample, Sequence[str], Sequence[str], str]


@dataclass(frozen=True)
class Variant:
    """A candidate whose number of faults is known; `kind` names the first one, "none" where there is none."""

    text: str
    faults: int
    kind: str = "none"


@dataclass(frozen=True)
class ScorerExample:
    """One sample's comparisons before tokenising: its reference, variants, and the ordered pairs to compare.

    `pairs` are indices (first, second) into `variants`; second -1: the first alone, a win if faultless.
    `verdicts` are a judge's shares of "first", "tie" and "second" for each pair; without them the faults decide.
    """

    key: str
    reference: str
    variants: tuple[Variant, ...]
    pairs: tuple[tuple[int, int], ...]
    verdicts: tuple[Shares, ...] = ()


def scorer_example(sample: Sample, variants: Sequence[Variant]) -> ScorerExample:
    """Build an example of all ordered pairs of the variants, and of each variant alone.

    The variants may come from `corrupted_variants` or be a model's candidates whose faults a stronger model
    has counted.
    """
    indices = range(len(variants))
    pairs = tuple((i, j) for i in indices for j in (*indices, ALONE) if i != j)
    return ScorerExample(sample.id, sample_reference(sample), tuple(variants), pairs)


def scorer_examples(
    raps: Iterable[ParsedRationale],
    rng: Random,
    vocabulary: Vocabulary | None,
    *,
    variants: int = 4,
    format: Format = "tagged",
    is_faulty: Callable[[Sample, Parts], bool] | None = None,
) -> list[ScorerExample]:
    """Build one example for each true rationale-answer pair in which a fault can be made.

    Args:
        raps: (sample, perception sentences, reasoning sentences, answer), all true.
        rng: decides corruptions and order.
        vocabulary: interchangeable words, see `corrupt`; None: those of each sample's data family.
        variants: candidates a tree: the true one, in one of four trees the true one in another order of sentences,
            the rest corrupted.
        format: of the candidates' texts, "tagged" or "plain".
        is_faulty: an oracle's verdict on whether a corruption is a fault indeed (a swapped word may happen to be
            true as well); others are drawn in place of those that are not.
    """
    examples = []
    for sample, see, think, answer in raps:
        truth: Parts = (tuple(see), tuple(think), answer)
        candidates = _true_variants(truth, rng, variants, format)
        words = vocabulary_of(truth_of(sample)) if vocabulary is None else vocabulary
        candidates += corrupted_variants(sample, truth, variants - len(candidates), rng, words, format, is_faulty)
        if any(variant.faults for variant in candidates):
            rng.shuffle(candidates)
            examples.append(scorer_example(sample, candidates))
    return examples


def corrupted_variants(
    sample: Sample,
    truth: Parts,
    count: int,
    rng: Random,
    vocabulary: Vocabulary,
    format: Format = "tagged",
    is_faulty: Callable[[Sample, Parts], bool] | None = None,
) -> list[Variant]:
    """Make up to `count` distinct corruptions of a true rationale-answer pair, of as many kinds as possible.

    One in four has a second fault, so that the scorer learns to tell bad from worse.
    """
    made: dict[str, Variant] = {}
    kinds = rng.sample(KINDS, len(KINDS))
    for attempt in range(4 * count):  # a kind may not apply to this pair, or its corruption may be true as well
        if len(made) >= count:
            break
        kind = kinds[attempt % len(kinds)]
        try:
            parts = corrupt(*truth, kind, rng, vocabulary)
            if rng.random() < 0.25:
                parts = corrupt(*parts, rng.choice(KINDS), rng, vocabulary)
        except InputError:
            continue
        faults = sum(part != true for part, true in zip(parts, truth, strict=True))
        if faults == 0 or not any(parts[:2]) or (is_faulty is not None and not is_faulty(sample, parts)):
            continue
        text = format_response(*parts, format)
        made.setdefault(text, Variant(text, faults, kind))
    return list(made.values())


def _true_variants(truth: Parts, rng: Random, variants: int, format: Format) -> list[Variant]:
    """Return the true pair and, one time in four, the same with its perceptions in another order: order is no fault."""
    see, think, answer = truth
    faultless = [Variant(format_response(see, think, answer, format), 0)]
    if variants >= 3 and len(see) >= 2 and rng.random() < 0.25:
        shuffled = tuple(rng.sample(see, len(see)))
        if shuffled != see:
            faultless.append(Variant(format_response(shuffled, think, answer, format), 0))
    return faultless


def target_verdict(example: ScorerExample, first: int, second: int, num_verdicts: int) -> int:
    """Return the index of the right verdict on an ordered pair: 0 the first is better, ..., num_verdicts - 1 the second.

    The middle one is a tie. Of five verdicts the outer ones mean a difference of two faults or more. Of a judge's shares the
    likeliest decides, of first and second alike a tie.
    """
    if example.verdicts:
        better, tie, worse = example.verdicts[example.pairs.index((first, second))]
        if better == worse or tie >= max(better, worse):
            return num_verdicts // 2
        return 0 if better > worse else num_verdicts - 1
    faults = example.variants[first].faults
    if second == ALONE:
        lead = -2 if faults else 2
    else:
        lead = example.variants[second].faults - faults
    middle = num_verdicts // 2
    return middle - max(-middle, min(middle, lead))


def fault_name(example: ScorerExample, first: int, second: int) -> str:
    """Name what a pair tests: the kind of the one fault there is, or "tie", "bad_or_worse", "alone", a judge's "verdict"."""
    if example.verdicts:
        return "verdict"
    if second == ALONE:
        return "alone"
    shown_first, shown_second = example.variants[first], example.variants[second]
    if shown_first.faults == shown_second.faults:
        return "tie"
    if shown_first.faults and shown_second.faults:
        return "bad_or_worse"
    return shown_first.kind if shown_first.faults else shown_second.kind


def judge_tree_of(scorer: Scorer, example: ScorerExample) -> JudgeTree:
    """Tokenise the example."""
    texts = [variant.text for variant in example.variants]
    return scorer.judge_tree(example.reference, texts, example.pairs, example.key)


def train_scorer(
    scorer: Scorer,
    examples: Sequence[ScorerExample],
    settings: TrainingConfig,
    **options: Unpack[TrainingOptions],
) -> list[Metrics]:
    """Train the scorer by cross entropy over the verdict tokens alone, at the verdict slots alone.

    The adapter is trained where there is one, else the whole model. The loss is the mean over the slots of
    the global batch, however the batch is cut into forests.

    Args:
        scorer: with or without an adapter.
        examples: in any order; the seed decides that of training.
        settings: the loop.
        options: of `train`.

    Returns:
        The steps' metrics, `accuracy` over the step's slots among them.
    """
    if not any(parameter.requires_grad for parameter in scorer.parameters()):
        scorer.requires_grad_(True)
    scorer.calibration, scorer.temperature = {}, 1.0  # it was of the weights as they were
    # The slots are among the segments' ends. The head's product has a column a verdict token: it counts for nothing in MFU.
    objective = Objective(scorer_loss(scorer), num_slots, segment_ends, head_rows=lambda forest: 0)
    return train(scorer.text_model, scorer_items(scorer, examples), objective=objective, settings=settings, **options)


def scorer_items(scorer: Scorer, examples: Sequence[ScorerExample]) -> list[TrainingItem]:
    """Build the items of `train_scorer`: each example's tree, and what is right at each of its slots.

    That is the index of the verdict, [slots] int64; where a judge has given shares, those of all verdicts, [slots, K] fp32.
    """
    items, verdicts = [], len(scorer.verdict_values)
    for example in examples:
        judge_tree = judge_tree_of(scorer, example)
        pairs = list(zip(judge_tree.first.tolist(), judge_tree.second.tolist(), strict=True))
        if example.verdicts:
            given = dict(zip(example.pairs, example.verdicts, strict=True))
            targets = torch.tensor([verdict_shares(given[pair], verdicts) for pair in pairs])
        else:
            targets = torch.tensor([target_verdict(example, *pair, verdicts) for pair in pairs])
        items.append(TrainingItem(judge_tree.tree, (judge_tree, targets)))
    return items


def verdict_shares(shares: Shares, num_verdicts: int) -> list[float]:
    """Return a judge's shares over 3 or 5 verdicts: without grades, a side's is split between its two."""
    first, tie, second = shares
    return [first, tie, second] if num_verdicts == 3 else [first / 2, first / 2, tie, second / 2, second / 2]


def num_slots(batch: Sequence[TrainingItem]) -> int:
    """Count the verdict slots of a global batch: the loss's denominator."""
    return sum(len(item.meta[1]) for item in batch)


def scorer_loss(scorer: Scorer) -> Loss:
    """Return the loss for `train`: cross entropy over the scorer's K verdict tokens at the M slots of a forest."""

    def loss(
        hidden: Tensor, forest: Forest, head: Head, items: Sequence[TrainingItem], slots: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = slot_rows(forest, [item.meta[0] for item in items]).numpy()  # [M]
        positions = row_positions(rows, hidden, forest, segment_ends(forest))  # [M]
        of_items = [item.meta[1] for item in items]
        if all(right.ndim == 1 for right in of_items):
            index = np.stack([positions, torch.cat(of_items).numpy()])  # [2, M]
            positions, targets = to_device(index, hidden.device)  # [M] each
            right = targets
        else:
            verdicts = len(scorer.verdict_values)
            shares = [each if each.ndim == 2 else F.one_hot(each, verdicts).float() for each in of_items]
            positions, targets = (to_device(each, hidden.device) for each in (positions, torch.cat(shares).numpy()))
            right = targets.argmax(-1)
        logits = head.logits(hidden.index_select(0, positions), scorer.verdict_token_ids)  # [M, K]
        hits = (logits.argmax(-1) == right).sum()
        return F.cross_entropy(logits, targets, reduction="sum") / slots, {"accuracy": hits / slots}

    return loss


def segment_ends(forest: Forest) -> Tensor:
    """Return each segment's last row, [S] int64, on the host."""
    return (forest.host or forest).cu_seqlens_q[1:].long() - 1


def evaluate_scorer(
    scorer: Scorer, examples: Sequence[ScorerExample], token_budget: int = 8192, seed: int = 0
) -> dict[str, Any]:
    """Measure how often the scorer's verdict is the right one, on held-out examples.

    Returns:
        accuracy: share of ordered pairs whose verdict (first, tie or second is better) is right;
        ci95: its bootstrap interval, resampled by example;
        by_fault: the same share by what the pair tests (`fault_name`);
        preference_accuracy: share of unordered pairs of unequal quality in which q_ij, the order's bias cancelled, is on the
            right side;
        alone_accuracy: share of candidates rated alone that are judged right or faulty as they are;
        order_flip_rate: share of unordered pairs whose verdict names the same position in both orders;
        n: ordered pairs.
    """
    scorer.eval()
    trees = [judge_tree_of(scorer, example) for example in examples]
    wins, verdicts = (
        fetch(scorer.win_and_verdict(slot_hidden(scorer, trees, token_budget)[0])).wait().numpy()
    )  # [M] each
    keys = [tree.tree.key for tree in trees for _ in tree.slots]
    check_numbers(scorer.text_model, wins, keys, "verdicts")
    values = scorer.verdict_values.tolist()
    hits = np.zeros((len(examples), 2))  # right verdicts and verdicts of each example
    by_fault: dict[str, list[bool]] = defaultdict(list)
    # Of (example, first, second): p, the verdict's value and the right verdict's value, each less 1/2. The sign says who wins.
    leans: dict[tuple[int, int, int], tuple[float, float, float]] = {}
    slot = 0
    for number, (tree, example) in enumerate(zip(trees, examples, strict=True)):
        for pair in zip(tree.first.tolist(), tree.second.tolist(), strict=True):
            target = values[target_verdict(example, *pair, len(values))]
            lean = (wins[slot] - 0.5, verdicts[slot] - 0.5, target - 0.5)
            slot += 1
            right = bool(np.sign(lean[1]) == np.sign(lean[2]))
            by_fault[fault_name(example, *pair)].append(right)
            if pair[1] != ALONE:
                hits[number] += right, 1
                leans[(number, *pair)] = lean
    # Each unordered pair once, with both of its orders.
    both = [(lean, leans[k, j, i]) for (k, i, j), lean in leans.items() if i < j and (k, j, i) in leans]
    alone = by_fault.pop("alone", [])
    return {
        "accuracy": _mean(hits[:, 0].sum() / np.maximum(hits[:, 1].sum(), 1.0)),
        "ci95": _bootstrap(hits, seed),
        "by_fault": {name: _mean(by_fault[name]) for name in sorted(by_fault)},
        "preference_accuracy": _mean([(a[0] - b[0]) * a[2] > 0.0 for a, b in both if a[2] != 0.0]),
        "alone_accuracy": _mean(alone),
        "order_flip_rate": _mean([a[1] * b[1] > 0.0 for a, b in both]),
        "n": int(hits[:, 1].sum()),
    }


def _mean(values: Any) -> float | None:
    """Return the mean, None of nothing."""
    return float(np.mean(values)) if np.size(values) else None


def _bootstrap(hits: np.ndarray, seed: int, resamples: int = 1000) -> list[float]:
    """Return the 95 % percentile bootstrap interval of the share hits[:, 0] / hits[:, 1], resampled by row."""
    picks = np.random.default_rng(seed).integers(0, len(hits), (resamples, len(hits)))
    totals = hits[picks].sum(1)  # [resamples, 2]
    low, high = np.quantile(totals[:, 0] / np.maximum(totals[:, 1], 1.0), (0.025, 0.975))
    return [float(low), float(high)]


def with_quality(
    example: ScorerExample,
    sample: Sample,
    quality: ReferenceQuality,
    seed: int,
    words: Vocabulary | None = None,
) -> ScorerExample:
    """Return the example with the reference in a quality, which the prompt states; its labels stay those of the truth."""
    return replace(example, reference=sample_reference(degrade_reference(sample, quality, seed, words), quality))


def in_each_quality(
    examples: Sequence[ScorerExample],
    samples: Mapping[str, Sample],
    qualities: Sequence[ReferenceQuality],
    seed: int,
    words: Vocabulary | None = None,
) -> dict[str, list[ScorerExample]]:
    """Return the examples of these samples, by id, with references in each of the qualities, by its name."""
    return {
        quality: [with_quality(each, samples[each.key], quality, seed, words) for each in examples]
        for quality in qualities
    }


def draw_quality(qualities: Sequence[ReferenceQuality], key: str) -> ReferenceQuality:
    """Draw one of the qualities; the key decides."""
    return random.Random(f"quality/{key}").choice(qualities)


def split_examples(
    config: Config, samples: Sequence[Sample], words: Vocabulary | None
) -> tuple[list[ScorerExample], dict[str, list[ScorerExample]]]:
    """Make the R-Scorer's examples from samples with rationales: those to train on, and those held out.

    An example to train on has one of the qualities of references that the settings name, drawn by seed and sample id; those
    held out come in each of these.

    Raises:
        InputError: too few samples in whose rationales faults can be made.
    """
    form, settings = config.rationale.format, config.scorer_training
    if form == "answer":
        raise ConfigError(
            "rationale.format: expected tagged or plain for an R-Scorer, found answer, without rationales"
        )
    parsed = [(sample, parse_response(text)) for sample, text in build_raps(samples, form)[0]]
    pairs = [(s, p.perception, p.reasoning, p.answer) for s, p in parsed if p.answer is not None]
    rng = random.Random(f"scorer/{config.seed}")
    rng.shuffle(pairs)
    cut = max(1, round(settings.held_out * len(pairs)))
    held_out, train = (
        scorer_examples(subset, rng, words, variants=settings.variants, format=form, is_faulty=may_be_faulty)
        for subset in (pairs[:cut], pairs[cut:])
    )
    if not held_out or not train:
        raise InputError(
            field="rationale",
            expected="enough samples with rationales in which faults can be made",
            found=f"{len(train)} to train on and {len(held_out)} held out",
            fix="add samples, or name the domain's words: scorer_training.vocabulary=FILE.yaml",
        )
    by_id = {sample.id: sample for sample in samples}
    drawn = [draw_quality(settings.qualities, f"{config.seed}/{example.key}") for example in train]
    train = [
        with_quality(example, by_id[example.key], quality, config.seed, words)
        for example, quality in zip(train, drawn, strict=True)
    ]
    return train, in_each_quality(held_out, by_id, settings.qualities, config.seed, words)


def may_be_faulty(sample: Sample, parts: Parts) -> bool:
    """Return whether the oracle finds a fault in the corruption; True where it cannot check the sample."""
    judgement = verify_sample(sample, ParsedResponse(*parts))
    return judgement is None or not judgement.aligned
