"""The reference's log-probabilities taken over from the candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_lvlm import IMAGES, SmallLVLM, load_image
from helpers.small_model import SmallModel

from srcfast.data.records import Candidate, Preference, Sample
from srcfast.data.turns import Turn
from srcfast.models import ImageFeatures
from srcfast.stages.candidates import prompts_of
from srcfast.stages.drift import rounding_bound
from srcfast.stages.logprobs import reference_logprobs, with_reference
from srcfast.stages.prompts import image_loader
from srcfast.stages.references import RECHECKED, reuse_candidate_logprobs

WORDS = "There is a red square left of the blue circle and it is what we see in them".split()
OPTIONS: dict[str, Any] = {"reference_hash": "abc", "token_budget": 2000}


class Round:
    """Samples, candidates for them with the model's own log-probabilities, each run alone, and pairs of these."""

    def __init__(self, lvlm: SmallLVLM, folder: Path) -> None:
        self.model = lvlm.model
        made = [
            Sample(f"s{n}", (f"image-{n % 4}.png",), f"Why {n}?", "3", None, (), {}, image_root=folder)
            for n in range(40)
        ]
        self.samples = {sample.id: sample for sample in made}
        for name in IMAGES:
            load_image(name).save(folder / f"{name}.png")
        self.features = ImageFeatures(self.model, image_loader(made))
        prompts = {prompt.key: prompt for prompt in prompts_of(self.model, made)}
        rng = np.random.default_rng(2)
        self.candidates: dict[str, list[Candidate]] = {}
        for sample in made:
            own = []
            for number in range(3):
                text = " ".join(rng.choice(WORDS, rng.integers(2, 12))) + str(number)
                tokens = tuple(self.model.encode_response(text).tolist())
                if number == 2 and len(self.candidates) % 4 == 0:
                    tokens = self._spelt_otherwise(tokens)
                logprob = lvlm.logprob(replace(prompts[sample.id], images=self._names(sample)), tokens)
                own.append(Candidate(f"{sample.id}#{number}", sample.id, text, "", "", logprob, tokens))
            self.candidates[sample.id] = own
        self.pairs = [
            self._pair(self.samples[key], chosen, rejected)
            for key, own in self.candidates.items()
            for chosen, rejected in zip(own, own[1:], strict=False)
        ]

    def _names(self, sample: Sample) -> tuple[str, ...]:
        return tuple(name.removesuffix(".png") for name in sample.images)

    def _spelt_otherwise(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The same text in single letters."""
        words = self.model.tokenizer.convert_ids_to_tokens(tokens[:-1])
        letters = tuple(self.model.tokenizer.convert_tokens_to_ids(list("".join(words))))
        assert len(letters) >= len(tokens) and self.model.decode(letters) == self.model.decode(tokens)
        return (*letters, tokens[-1])

    def _pair(self, sample: Sample, chosen: Candidate, rejected: Candidate) -> Preference:
        return Preference(
            sample_id=sample.id,
            images=sample.images,
            prompt=sample.question,
            chosen=chosen.text,
            rejected=rejected.text,
            confidence=1.0,
            reference_chosen_logprob=None,
            reference_rejected_logprob=None,
            extra={"chosen_id": chosen.id, "rejected_id": rejected.id},
            image_root=sample.image_root,
        )

    def exact(self, pairs: Sequence[Preference]) -> list[Preference]:
        return reference_logprobs(self.model, pairs, features=self.features, **OPTIONS)

    def takeover(self, candidates: Any = None, pairs: Sequence[Preference] | None = None, seed: int = 0) -> Any:
        return reuse_candidate_logprobs(
            self.model,
            self.pairs if pairs is None else pairs,
            self.samples,
            self.candidates if candidates is None else candidates,
            features=self.features,
            seed=seed,
            **OPTIONS,
        )


@pytest.fixture(scope="module")
def round_(single: SmallLVLM, tmp_path_factory: pytest.TempPathFactory) -> Round:
    made = Round(single, tmp_path_factory.mktemp("images"))
    assert len(made.pairs) > 3 * RECHECKED
    return made


def values(pair: Preference) -> list[float | None]:
    return [pair.reference_chosen_logprob, pair.reference_rejected_logprob]


def test_what_is_taken_over_is_what_would_be_computed(round_: Round) -> None:
    exact = round_.exact(round_.pairs)
    found, report = round_.takeover()
    for one, other in zip(found, exact, strict=True):
        assert values(one) == pytest.approx(values(other), rel=1e-4, abs=1e-4)  # fp32
        assert replace(one, reference_chosen_logprob=0.0, reference_rejected_logprob=0.0) == replace(
            other, reference_chosen_logprob=0.0, reference_rejected_logprob=0.0
        )
    assert report.pairs == len(round_.pairs)
    assert 0 <= report.disagreement <= report.tolerance == rounding_bound(torch.float32, 2 * RECHECKED)
    assert report.disagreement <= report.worst <= rounding_bound(torch.float32, 1)
    assert report.rechecked == RECHECKED and report.reused == report.eligible - RECHECKED > RECHECKED
    known = {candidate.id: candidate.logprob for own in round_.candidates.values() for candidate in own}
    taken = [p for p in found if values(p) == [known[p.extra["chosen_id"]], known[p.extra["rejected_id"]]]]
    assert len(taken) >= report.reused


def test_a_text_that_encodes_to_other_tokens_is_computed(round_: Round) -> None:
    """A model may spell a text in tokens that the tokenizer wouldn't choose: their log-probability is another one."""
    report = round_.takeover()[1]
    assert report.pairs - report.eligible == len(round_.samples) // 4


def test_pairs_that_are_credited_in_part_are_computed(round_: Round) -> None:
    """Of a part of a response generation has no log-probability."""
    found, report = round_.takeover(pairs=[replace(pair, credit="sentence") for pair in round_.pairs[:4]])
    assert (report.pairs, report.eligible, report.reused) == (4, 0, 0)
    for pair in found:
        assert pair.reference_chosen_span_logprob is not None and pair.reference_chosen_logprob is not None
        assert pair.reference_chosen_logprob - 1e-4 <= pair.reference_chosen_span_logprob <= 1e-4  # fp32


def test_if_the_recheck_disagrees_all_are_computed(round_: Round) -> None:
    wrong = {
        key: [replace(candidate, logprob=candidate.logprob + 0.5) for candidate in own]
        for key, own in round_.candidates.items()
    }
    found, report = round_.takeover(wrong)
    assert report.reused == 0 and report.disagreement > report.tolerance
    for one, other in zip(found, round_.exact(round_.pairs), strict=True):
        assert values(one) == pytest.approx(values(other), rel=1e-5)
        assert one.extra["reference_hash"] == "abc"


def test_the_seed_says_which_are_rechecked(round_: Round) -> None:
    """Two bad ones among many are found by some seeds and missed by others."""
    bad = {pair.extra["chosen_id"] for pair in round_.pairs[2:4]}
    some = {
        key: [replace(c, logprob=c.logprob + 0.5) if c.id in bad else c for c in own]
        for key, own in round_.candidates.items()
    }
    reused = [round_.takeover(some, seed=seed)[1].reused for seed in range(12)]
    assert 0 in reused and max(reused) > 0


def test_another_prompt_or_no_candidate_is_computed(round_: Round) -> None:
    pairs = [replace(pair, prompt=pair.prompt + " And?") for pair in round_.pairs]
    assert round_.takeover(pairs=pairs)[1].eligible == 0
    found, report = round_.takeover(candidates={})
    assert (report.eligible, report.rechecked, report.reused) == (0, 0, 0)
    assert report.disagreement is report.tolerance is report.worst is None
    assert [values(pair) for pair in found] == [values(pair) for pair in round_.exact(round_.pairs)]


# By literal numbers, without a model -------------------------------------------------------------------------------------


class Reused:
    """Candidates whose log-probability is off by `offs` roundoffs a root token from the exact one, -2 a token."""

    def __init__(self, offs: Sequence[float]) -> None:
        self.model = SmallModel(dtype=torch.float32)
        self.offs, self.pairs, self.candidates, self.samples = list(offs), [], {}, {}
        self.asked: list[list[str]] = []
        for number, off in enumerate(offs):
            name = f"s{number}"
            texts = ("a" * (number % 5 + 3), "b" * (number % 3 + 8))
            own = []
            for side, text in enumerate(texts):
                tokens = tuple(self.model.encode_response(text).tolist())
                z = (off if side == 0 else 0.0) * 2.0**-20
                logprob = -2.0 * len(tokens) + z * len(tokens) ** 0.5
                own.append(Candidate(f"{name}#{side}", name, text, "", "", logprob, tokens))
            self.candidates[name] = own
            self.samples[name] = Sample(name, (), "Why?", "3")
            extra = {"chosen_id": f"{name}#0", "rejected_id": f"{name}#1"}
            self.pairs.append(Preference(name, (), "Why?", *texts, extra=extra))

    def exact(self, model: Any, pairs: Sequence[Preference], *, reference_hash: str, **_: Any) -> list[Preference]:
        self.asked.append([pair.sample_id for pair in pairs])
        return [
            with_reference(
                pair, [-2.0 * len(model.encode_response(t)) for t in (pair.chosen, pair.rejected)], reference_hash
            )
            for pair in pairs
        ]

    def reuse(self, **options: Any) -> tuple[list[Preference], Any]:
        return reuse_candidate_logprobs(
            self.model, self.pairs, self.samples, self.candidates, logprobs=self.exact, seed=4, **(OPTIONS | options)
        )


@pytest.mark.parametrize(("count", "rechecked"), [(3, 3), (16, 16), (40, 16), (500, 25)])
def test_as_many_pairs_are_rechecked_as_the_seed_draws(count: int, rechecked: int) -> None:
    round_ = Reused([1.0] * count)
    pairs, report = round_.reuse()
    drawn = Random("references/4").sample(range(count), rechecked)
    assert round_.asked == [[f"s{number}" for number in sorted(drawn)]]
    assert (report.pairs, report.eligible, report.rechecked, report.reused) == (
        count,
        count,
        rechecked,
        count - rechecked,
    )
    # Of each pair's two responses one is off by a roundoff.
    assert report.disagreement == pytest.approx(2.0**-20 / 2**0.5, rel=1e-6)
    assert report.worst == pytest.approx(2.0**-20, rel=1e-6)
    assert report.tolerance == pytest.approx(2.0**-20 * 64 * (1 + 3 / (2 * rechecked) ** 0.5))
    for number, pair in enumerate(pairs):
        own = round_.candidates[pair.sample_id]
        exact = -2.0 * len(own[0].token_ids)
        assert pair.reference_chosen_logprob == (exact if number in drawn else own[0].logprob)
        assert pair.reference_rejected_logprob == -2.0 * len(own[1].token_ids)
        assert pair.extra["reference_hash"] == "abc"


@pytest.mark.parametrize(("off", "agrees"), [(250.0, True), (260.0, False)])
def test_one_response_that_differs_by_more_than_rounding_has_all_computed(off: float, agrees: bool) -> None:
    """The bound of one is 64 x 4 = 256 roundoffs."""
    drawn = Random("references/4").sample(range(20), 16)
    round_ = Reused([off if number == drawn[7] else 0.0 for number in range(20)])
    _, report = round_.reuse()
    left = sorted(set(range(20)) - set(drawn))
    assert report.reused == (4 if agrees else 0)
    assert round_.asked[1:] == ([] if agrees else [[f"s{number}" for number in left]])
    assert report.worst == pytest.approx(off * 2.0**-20, rel=1e-5)


@pytest.mark.parametrize("other", ["tokens", "prompt", "images", "turns", "candidate", "sample"])
def test_what_is_not_the_pair_s_own_response_is_computed(other: str) -> None:
    round_ = Reused([0.0] * 20)
    name = "s5"
    if other == "tokens":
        round_.candidates[name][1] = replace(round_.candidates[name][1], token_ids=(1, 2))
    elif other == "candidate":
        del round_.candidates[name][1]
    elif other == "sample":
        del round_.samples[name]
    else:
        change = {
            "prompt": {"question": "Who?"},
            "images": {"images": ("a.png",)},
            "turns": {"turns": (Turn("user", "x"),)},
        }
        round_.samples[name] = replace(round_.samples[name], **change[other])
    pairs, report = round_.reuse()
    assert (report.eligible, report.rechecked) == (19, 16) and name in round_.asked[0] and len(round_.asked[0]) == 17
    assert pairs[5].reference_rejected_logprob == -2.0 * len(round_.model.encode_response(pairs[5].rejected))


def test_the_rechecked_share_is_that_of_the_eligible_pairs() -> None:
    round_ = Reused([0.0] * 600)
    for number in range(500, 600):
        del round_.samples[f"s{number}"]
    _, report = round_.reuse()
    assert (report.pairs, report.eligible, report.rechecked, report.reused) == (600, 500, 25, 475)
    drawn = Random("references/4").sample(range(500), 25)
    assert round_.asked == [[f"s{number}" for number in sorted([*drawn, *range(500, 600)])]]
