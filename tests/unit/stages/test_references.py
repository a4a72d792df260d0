"""The reference's log-probabilities taken over from the candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_lvlm import IMAGES, SmallLVLM, load_image

from srcfast.data.records import Candidate, Preference, Sample
from srcfast.models import ImageFeatures
from srcfast.stages.candidates import prompts_of
from srcfast.stages.drift import rounding_bound
from srcfast.stages.logprobs import reference_logprobs
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
