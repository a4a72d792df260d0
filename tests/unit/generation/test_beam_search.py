"""Sentence-level beam search and the candidates stage."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_lvlm import IMAGES, SmallLVLM, load_image
from pydantic import ValidationError

from srcfast.config.settings import CandidatesConfig
from srcfast.data.records import Candidate, Sample
from srcfast.generation.beam_search import Beam, Search, _choose, _diverse, bigram_overlap, sentence_beam_search
from srcfast.generation.decode import Prompt, Start, Written
from srcfast.generation.generate import Generated, generate_greedy, random_of, sample_responses
from srcfast.generation.sentences import sentence_ended
from srcfast.stages import candidates as candidate_stage
from srcfast.stages.candidates import diversity, generate_candidates

SETTINGS = CandidatesConfig(
    num_candidates=6, num_beams=3, proposals=2, max_sentences=6, max_sentence_tokens=12, max_new_tokens=40, top_p=1.0
)


def search(
    lvlm: SmallLVLM, settings: CandidatesConfig = SETTINGS, seed: int = 0, only: slice = slice(None), slots: int = 8
) -> list[Any]:
    return sentence_beam_search(lvlm.model, lvlm.prompts()[only], lvlm.features, settings, seed, slots=slots)[0]


def test_log_probabilities_are_the_model_s_own(single: SmallLVLM) -> None:
    settings = SETTINGS.replace(temperature=1.5, top_p=0.9)
    results = search(single, settings)
    assert sum(map(len, results)) > 8 and max(len(one.token_ids) for own in results for one in own) > 12
    for prompt, own in zip(single.prompts(), results, strict=True):
        for one in own:
            # fp32, a few dozen log-probabilities of a few units each
            assert one.logprob == pytest.approx(single.logprob(prompt, one.token_ids), rel=1e-4, abs=1e-4)


def test_log_probabilities_are_exact_in_fp64(exact: SmallLVLM) -> None:
    for prompt, own in zip(exact.prompts(), search(exact), strict=True):
        for one in own:
            assert one.logprob == pytest.approx(exact.logprob(prompt, one.token_ids), abs=1e-9)


def test_candidates_do_not_depend_on_the_batch(exact: SmallLVLM) -> None:
    together = search(exact)
    for number, own in enumerate(together):
        (alone,) = search(exact, only=slice(number, number + 1))
        assert [one.token_ids for one in alone] == [one.token_ids for one in own]


@pytest.mark.parametrize("dtype", ["exact", "single"])
def test_candidates_do_not_depend_on_how_many_samples_are_searched_at_once(
    dtype: str, request: pytest.FixtureRequest
) -> None:
    """In fp32 rounding could move a draw across the border between two tokens; for these seeds it does not."""
    lvlm: SmallLVLM = request.getfixturevalue(dtype)
    every = search(lvlm)
    for slots in (1, 2, 3):
        for own, other in zip(every, search(lvlm, slots=slots), strict=True):
            assert [one.token_ids for one in own] == [one.token_ids for one in other]
            assert [one.logprob for one in own] == pytest.approx([one.logprob for one in other], rel=1e-5)


class Recomputing:
    """The search by its definition, one row at a time, every token's logits from the whole text run anew."""

    def __init__(self, lvlm: SmallLVLM, prompt: Prompt, settings: CandidatesConfig, seed: int) -> None:
        self.lvlm, self.task = lvlm, Search(prompt, settings, seed, lvlm.model.end_tokens)

    def row(self, before: tuple[int, ...], draws: np.ndarray, room: int) -> Written:
        settings, model = self.task.settings, self.lvlm.model
        written: list[int] = []
        total = 0.0
        for draw in draws[:room]:
            logits = self.lvlm.logits(self.task.prompt, [*before, *written])[-1]
            cumulative = (logits / settings.temperature).softmax(-1).cumsum(-1)
            written.append(int((cumulative <= draw * cumulative[-1]).sum()))
            total += float(logits.log_softmax(-1)[written[-1]])
            if written[-1] == model.end_token_id or sentence_ended(model.tokenizer.decode(written)):
                break
        return Written(tuple(written), total)

    def run(self) -> None:
        start: Start | None = self.task.begin()
        while start is not None:
            beams = [beam.tokens for beam in self.task.parents]
            rows = zip(beams, start.draws, start.limits, strict=True)
            start = self.task.ended([self.row(*one) for one in rows])


def test_the_search_is_its_definition(exact: SmallLVLM) -> None:
    settings = SETTINGS.replace(num_beams=2, max_new_tokens=30, temperature=1.2)
    prompts = exact.prompts()[:3]
    found = search(exact, settings, seed=2, only=slice(3), slots=2)
    assert sum(map(len, found)) > 3
    for prompt, own in zip(prompts, found, strict=True):
        slow = Recomputing(exact, prompt, settings, seed=2)
        slow.run()
        known = {beam.tokens: beam.logprob for beam in slow.task.finished}
        assert len(own) == min(len({exact.model.decode(tokens) for tokens in known}), settings.num_candidates)
        for one in own:
            assert one.logprob == pytest.approx(known[one.token_ids], abs=1e-9)  # fp64


@pytest.mark.parametrize("plain", [4, 6, 15])  # in rows that a search has: fewer, as many, and three times
def test_plain_samples_stand_behind_the_beams_and_are_those_that_sampling_alone_gives(
    exact: SmallLVLM, plain: int
) -> None:
    settings = SETTINGS.replace(plain_samples=plain, temperature=1.3, top_p=0.95)
    prompts = exact.prompts()
    beams = search(exact, settings.replace(plain_samples=0), seed=6)
    named = [replace(prompt, key=f"{prompt.key}/plain") for prompt in prompts]
    options = {"count": plain, "max_new_tokens": settings.max_new_tokens, "temperature": 1.3, "top_p": 0.95}
    sampled = sample_responses(exact.model, named, exact.features, seed=6, **options)
    new = 0
    for own, first, others in zip(search(exact, settings, seed=6, slots=3), beams, sampled, strict=True):
        expected, texts = list(first), {exact.model.decode(one.token_ids) for one in first}
        for one in others:
            text = exact.model.decode(one.token_ids)
            if one.token_ids[-1] == exact.model.end_token_id and text not in texts:
                texts.add(text)
                expected.append(one)
        assert [one.token_ids for one in own] == [one.token_ids for one in expected]
        assert [one.sampled for one in own] == [False] * len(first) + [True] * (len(expected) - len(first))
        for one, other in zip(own, expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-9)  # fp64
        new += len(own) - len(first)
    assert new > len(prompts)


def test_the_seed_decides(exact: SmallLVLM) -> None:
    assert search(exact, seed=4) == search(exact, seed=4)
    assert search(exact, seed=4) != search(exact, seed=5)


def test_candidates_end_are_distinct_and_within_the_limits(exact: SmallLVLM) -> None:
    end = exact.model.end_token_id
    for settings in (
        SETTINGS,
        CandidatesConfig(
            num_candidates=2,
            num_beams=4,
            proposals=3,
            max_new_tokens=7,
            top_p=1.0,
            max_sentences=12,
            max_sentence_tokens=48,
        ),
    ):
        results = search(exact, settings)
        assert any(results)
        for own in results:
            assert len(own) <= settings.num_candidates
            assert len({exact.model.decode(one.token_ids) for one in own}) == len(own)
            for one in own:
                assert one.finished and one.token_ids[-1] == end and end not in one.token_ids[:-1]
                assert len(one.token_ids) <= settings.max_new_tokens


def test_one_sentence_is_one_sentence(exact: SmallLVLM) -> None:
    settings = CandidatesConfig(
        num_candidates=20,
        num_beams=10,
        proposals=3,
        max_sentences=1,
        max_sentence_tokens=9,
        top_p=1.0,
        max_new_tokens=256,
    )
    results = [one for own in search(exact, settings) for one in own]
    assert len(results) > 3
    for one in results:
        assert len(one.token_ids) <= 9
        for length in range(1, len(one.token_ids)):
            text = exact.model.tokenizer.decode(one.token_ids[:length])
            assert not sentence_ended(text)


def test_without_chance_the_one_beam_is_greedy_decoding(exact: SmallLVLM) -> None:
    settings = CandidatesConfig(
        num_beams=1, proposals=1, max_sentences=40, max_sentence_tokens=5, max_new_tokens=40, top_p=1.0
    ).model_copy(update={"temperature": 0.0})  # which a config refuses: all beams would be one
    greedy = generate_greedy(exact.model, exact.prompts(), exact.features, 40, 5)
    assert any(one.finished for one in greedy)
    for one, own in zip(greedy, search(exact, settings), strict=True):
        assert [other.token_ids for other in own] == ([one.token_ids] if one.finished else [])


def test_the_best_score_comes_first_where_diversity_is_free(exact: SmallLVLM) -> None:
    settings = SETTINGS.replace(diversity=0.0, length_penalty=0.7)
    for own in search(exact, settings):
        scores = [one.logprob / len(one.token_ids) ** 0.7 for one in own]
        assert scores == sorted(scores, reverse=True)


def beam(tokens: str, logprob: float) -> Beam:
    ids = tuple(map(ord, tokens))
    return Beam(ids, logprob, 0, frozenset(zip(ids, ids[1:], strict=False)))


def test_overlap_is_jaccard_s_of_bigrams() -> None:
    assert bigram_overlap(beam("abcd", 0), beam("abcx", 0)) == pytest.approx(2 / 4)
    assert bigram_overlap(beam("abab", 0), beam("ba", 0)) == pytest.approx(1 / 2)
    assert bigram_overlap(beam("a", 0), beam("a", 0)) == 0.0


def test_a_beam_pays_for_what_a_better_one_says_already() -> None:
    beams = [beam("abcd", -4.0), beam("abce", -4.4), beam("wxyz", -6.0)]
    for diversity_weight, second in ((0.0, "abce"), (0.5, "abce"), (2.0, "wxyz")):
        settings = CandidatesConfig(
            diversity=diversity_weight,
            num_beams=4,
            proposals=2,
            top_p=1.0,
            max_sentences=12,
            max_sentence_tokens=48,
            max_new_tokens=256,
        )
        kept = _diverse(beams, 2, settings)
        assert ["".join(map(chr, one.tokens)) for one in kept] == ["abcd", second]


@pytest.mark.parametrize(
    "changes",
    [{"num_beams": 0}, {"proposals": 0}, {"max_sentences": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_settings_out_of_bounds_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        CandidatesConfig(**changes)


class Counter:
    def __init__(self) -> None:
        self.samples = self.tokens = 0

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        self.samples += n
        self.tokens += tokens


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    for key in IMAGES:
        load_image(key).save(tmp_path / f"{key}.png")
    made = []
    for number, question in enumerate(["Why?", "What is left of the red square?", "Where?", "What is red?"]):
        made.append(
            Sample(
                id=f"s{number}",
                images=(f"image-{number % 3}.png",),
                question=question,
                answer="3",
                rationale=None,
                facts=(),
                extra={},
                image_root=tmp_path,
            )
        )
    return made


@pytest.mark.parametrize("plain", [0, 9])
def test_the_stage_keeps_the_samples_order_whatever_the_batches(
    exact: SmallLVLM, samples: list[Sample], plain: int
) -> None:
    from srcfast.models import ImageFeatures
    from srcfast.stages.prompts import image_keys

    keys = {key: f"image-{n % 3}" for n, sample in enumerate(samples) for key in image_keys(sample)}
    features = ImageFeatures(exact.model, lambda key: load_image(keys[key]))
    found = []
    for batch_size in (1, 3):
        progress = Counter()
        found.append(
            generate_candidates(
                exact.model,
                samples,
                SETTINGS.replace(plain_samples=plain),
                features=features,
                seed=3,
                batch_size=batch_size,
                progress=progress,
            )
        )
        assert progress.samples == len(samples) and progress.tokens > 0
    for sample, one, other in zip(samples, *found, strict=True):
        assert one and [c.token_ids for c in one] == [c.token_ids for c in other]
        for number, candidate in enumerate(one):
            assert candidate.id == f"{sample.id}#{number}" and candidate.sample_id == sample.id
            assert candidate.text == exact.model.decode(candidate.token_ids)
            assert candidate.extra in ({}, {"sampled": True})
    assert any(candidate.extra for own in found[0] for candidate in own) == (plain > 0)
    assert torch.is_grad_enabled()


def test_a_response_without_a_word_is_no_candidate(
    exact: SmallLVLM, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    from srcfast.models import ImageFeatures

    model, (sample, *_) = exact.model, samples
    written = [(), tuple(model.encode_response("Red.").tolist()), (model.end_token_id,)]
    responses = [Generated(tokens, -1.0, True) for tokens in written]
    monkeypatch.setattr(candidate_stage, "sentence_beam_search", lambda *_, **__: ([responses], None))
    (group,) = generate_candidates(
        model, [sample], SETTINGS, features=ImageFeatures(model, load_image), seed=0, batch_size=1
    )
    assert [(one.id, one.text) for one in group] == [(f"{sample.id}#0", "Red.")]


def candidate(text: str, answer: str, tokens: tuple[int, ...]) -> Candidate:
    return Candidate("a#0", "a", text, "", answer, 0.0, tokens)


def test_diversity_by_hand() -> None:
    own = [candidate("x", "1", (1, 2, 3)), candidate("y", "1", (1, 2, 4)), candidate("y", "2", (7, 8, 9))]
    measured = diversity([own, [own[0]], []])
    assert measured["distinct_texts"] == pytest.approx(2 / 3) == measured["distinct_answers"]
    assert measured["bigram_overlap"] == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert diversity([[own[0]]]) == {}


def texts_of(beams: list[Beam]) -> list[str]:
    return ["".join(map(chr, one.tokens)) for one in beams]


def test_a_beam_pays_for_its_largest_overlap_with_any_that_is_selected() -> None:
    """The third one overlaps with the first, not with the second, which is selected last."""
    beams = [beam("abcdef", -6.0), beam("uvwxyz", -6.6), beam("abcdeg", -7.2), beam("klmnop", -9.0)]
    settings = CandidatesConfig(diversity=1.0, length_penalty=1.0)
    # In nats a token: -1.0; -1.1; -1.2 - 4/6; -1.5
    assert texts_of(_diverse(beams, 3, settings)) == ["abcdef", "uvwxyz", "klmnop"]
    assert texts_of(_diverse(beams, 3, settings.replace(diversity=0.3))) == ["abcdef", "uvwxyz", "abcdeg"]
    assert texts_of(_diverse(beams[:1], 3, settings)) == ["abcdef"]


def test_of_equal_beams_the_one_of_smaller_tokens_goes_first() -> None:
    beams = [beam("xy", -1.0), beam("ab", -1.0), beam("mn", -1.0)]
    for given in (beams, beams[::-1]):
        assert texts_of(_diverse(given, 2, CandidatesConfig(diversity=0.5))) == ["ab", "mn"]


@pytest.mark.parametrize(("penalty", "score"), [(0.0, -6.0), (0.5, -3.0), (1.0, -1.5), (2.0, -0.375)])
def test_a_score_is_the_log_probability_over_a_power_of_the_length(penalty: float, score: float) -> None:
    assert beam("abcd", -6.0).score(CandidatesConfig(length_penalty=penalty)) == pytest.approx(score, rel=1e-12)
    assert beam("", -6.0).score(CandidatesConfig(length_penalty=penalty)) == -6.0


class FixedRows:
    """A search whose rows are given: each call of `ended` takes what they wrote."""

    def __init__(self, **settings: Any) -> None:
        self.settings = SETTINGS.replace(num_beams=2, proposals=1, diversity=0.0, **settings)
        self.task = Search(Prompt(np.array([1]), (), "a"), self.settings, 0, {0})

    def ended(self, *rows: tuple[tuple[int, ...], float]) -> Start | None:
        return self.task.ended([Written(tokens, logprob) for tokens, logprob in rows])


def test_sentences_are_continued_up_to_their_number_and_tokens_up_to_theirs() -> None:
    search = FixedRows(max_sentences=2, max_new_tokens=5, max_sentence_tokens=9)
    first = search.task.begin()
    assert first.limits == [5, 5] and first.draws.shape == (2, 9) and first.parents == ()
    second = search.ended(((7, 8), -1.0), ((7, 9, 8), -1.2))
    assert second is not None
    assert [beam.tokens for beam in search.task.parents] == [(7, 9, 8), (7, 8)] and second.limits == [2, 3]
    assert search.ended(((8, 0), -1.0), ((8, 8), -1.0)) is None  # two sentences are all
    assert [beam.tokens for beam in search.task.finished] == [(7, 9, 8, 8, 0)]
    # What two sentences have in common across their border counts as an overlap.
    assert search.task.live[0].bigrams == {(7, 8), (8, 8)} and search.task.live[0].logprob == -2.0
    search = FixedRows(max_sentences=9, max_new_tokens=3)
    search.task.begin()
    assert search.ended(((7, 8, 9), -1.0), ((7, 8), -1.0)) is not None
    assert [beam.tokens for beam in search.task.live] == [(7, 8)]  # the other has no token left


def test_a_beam_is_continued_by_about_as_many_rows_as_any_other() -> None:
    search = FixedRows()
    search.task.live = [beam("a", -1.0), beam("b", -2.0)]
    search.task.settings = SETTINGS.replace(num_beams=3, proposals=2)
    start = search.task._next_sentence()
    assert texts_of(search.task.parents) == ["a", "a", "a", "b", "b", "b"] and len(start.limits) == 6


def test_a_sample_s_numbers_follow_from_seed_and_key() -> None:
    """The bytes of what a run has drawn: a continued run must draw the same."""
    digest = hashlib.sha256(b"5/sample").digest()
    expected = np.random.default_rng(np.frombuffer(digest[:16], dtype=np.uint32)).random(3)
    assert random_of(5, "sample").random(3).tolist() == expected.tolist()
    assert len({float(random_of(seed, key).random()) for seed in (0, 1) for key in ("a", "b")}) == 4


def test_of_candidates_of_one_text_the_best_by_score_counts() -> None:
    """The longer one has the lower sum and the higher mean."""
    search = FixedRows()
    search.task.finished = [beam("abcd", -4.0), beam("abcdef", -4.5), beam("xy", -3.0)]
    model: Any = SimpleNamespace(decode=lambda tokens: "x" if tokens[0] == ord("x") else "one text")
    chosen = _choose(model, search.task, search.settings)
    assert [(len(one.token_ids), one.logprob, one.finished) for one in chosen] == [(6, -4.5, True), (2, -3.0, True)]
    chosen = _choose(model, search.task, search.settings.replace(length_penalty=0.0))
    assert [(len(one.token_ids), one.logprob) for one in chosen] == [(2, -3.0), (4, -4.0)]


def test_a_response_is_finished_once() -> None:
    search = FixedRows()
    search.task.begin()
    search.ended(((7, 0), -1.0), ((7, 0), -1.0))
    assert [one.tokens for one in search.task.finished] == [(7, 0)]
    search.task.parents = [Beam(), Beam((7,), -0.5)]
    search.ended(((7, 0), -1.0), ((0,), -0.5))
    assert [one.tokens for one in search.task.finished] == [(7, 0)]
