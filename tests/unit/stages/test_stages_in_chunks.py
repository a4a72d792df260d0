"""Stages in pieces: the same bytes when stopped in the middle and continued, and on two ranks."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.counted_work import merged
from helpers.rank_processes import run_ranks, values_of
from helpers.small_lvlm import IMAGES, load_image, write_small_lvlm
from helpers.small_scorer import small_tokenizer, write_text_model
from PIL import Image

from srcfast import distributed
from srcfast.config.settings import CandidatesConfig, EvaluationConfig, ScorerConfig
from srcfast.data.in_order import InOrder
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.errors import InputError
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.models.scorer import load_scorer
from srcfast.run.chunks import ChunkFiles, Chunks
from srcfast.run.progress import StageProgress
from srcfast.stages import logprobs
from srcfast.stages.adaptive_pairs import AdaptivePairs
from srcfast.stages.candidates import candidates_in_chunks
from srcfast.stages.evaluation import answers_in_chunks, predictions_of
from srcfast.stages.logprobs import (
    PAIRS,
    logprobs_in_chunks,
    logprobs_of,
    reference_logprobs,
    references_in_chunks,
    response_logprobs,
)
from srcfast.stages.prompts import PromptEncoder, image_keys
from srcfast.stages.scoring import scores_in_chunks

SEARCH = CandidatesConfig(
    num_candidates=3,
    num_beams=2,
    max_sentences=2,
    max_sentence_tokens=5,
    max_new_tokens=10,
    proposals=2,
    top_p=1.0,
    batch_size=2,
)
ADAPTIVE = AdaptivePairs(ScorerConfig(adaptive_margin=0.05, adaptive_contenders=1, adaptive_audit=0.3))


def asked(number: int, folder: Path) -> Sample:
    question = " ".join(["Why?", "What is left of the red square?"][: 1 + number % 2] * (1 + number % 3))
    return Sample(f"s{number}", (f"image-{number % 4}.png",), question, "3", None, (), {}, image_root=folder)


class Stages:
    """The stages that work in pieces, over small models in `folder`; images are read until one is unreadable."""

    def __init__(self, folder: Path, unreadable_after: int | None = None, device: str = "cpu") -> None:
        self.folder, self.left = folder, unreadable_after
        torch.set_num_threads(1)
        self.samples = [asked(number, folder) for number in range(36)]  # in batches of 2: pieces of 16, 16 and 4
        self.model = load_lvlm(folder / "lvlm", device=device)
        names = {key: f"image-{n % 4}" for n, sample in enumerate(self.samples) for key in image_keys(sample)}
        self.features = ImageFeatures(self.model, lambda key: self.load(names[key]))

    def load(self, name: str) -> Image.Image:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise OSError("the disk is gone")
        return load_image(name)

    def candidates(self) -> ChunkFiles:
        chunks = Chunks(self.folder / "candidates-parts", dict, StageProgress("candidates", 36, quiet=True))
        return candidates_in_chunks(chunks, self.model, self.samples, SEARCH, features=self.features, seed=3)

    def answers(self) -> ChunkFiles:
        settings = EvaluationConfig(max_new_tokens=6, batch_size=2)
        chunks = Chunks(self.folder / "answers-parts", dict, StageProgress("answers", 36, quiet=True))
        return answers_in_chunks(chunks, self.model, self.samples, settings, features=self.features)

    def logprobs(self) -> ChunkFiles:
        place = self.folder / "logprobs-parts"
        progress = StageProgress("logprobs", len(self.requests), unit="responses", quiet=True)
        options: dict[str, Any] = {"features": self.features, "token_budget": 3000}
        parts = logprobs_in_chunks(Chunks(place, dict, progress), self.model, self.requests, **options)
        assert progress.done == len(self.requests)
        return parts

    def references(self) -> list[Preference]:
        progress = StageProgress("references", len(self.pairs), unit="pairs", quiet=True)
        logprobs = references_in_chunks(Chunks(self.folder / "references-parts", dict, progress))
        return logprobs(self.model, self.pairs, reference_hash="abc", token_budget=3000, features=self.features)

    @property
    def pairs(self) -> list[Preference]:
        """More than a piece has."""
        return [
            Preference(
                s.id, s.images, s.question, "It is 3.", f"No {k}!", 1.0, None, None, {"k": k}, image_root=s.image_root
            )
            for k in range(8)
            for s in self.samples
        ]

    @property
    def requests(self) -> list[Sample]:
        """More than a piece has; half of them ask the same again."""
        answers = [f"It is {' '.join('3' * (1 + k))}." for k in range(1 + PAIRS // len(self.samples))]
        return [replace(sample, answer=answer) for answer in answers for sample in self.samples]


class Judging:
    """290 samples with 1 to 4 candidates each; `until` is the sample at which their file can't be read any more."""

    def __init__(self, folder: Path, until: int | None = None) -> None:
        self.folder, self.until = folder, until
        torch.set_num_threads(1)
        self.samples = [asked(number, folder) for number in range(290)]
        self.scorer = load_scorer(folder / "scorer")
        self.reads = 0

    def candidates(self) -> Iterator[tuple[str, list[Candidate]]]:
        self.reads += 1
        for number, sample in enumerate(self.samples):
            if self.reads == 2 and number == self.until:
                raise OSError("the disk is gone")
            if number % 7 != 5:  # some have none
                texts = [f"It is {'red blue green gold'.split()[(number + k) % 4]}" for k in range(1 + number % 4)]
                yield sample.id, [Candidate(f"{number}#{k}", sample.id, t, "", "", 0.0) for k, t in enumerate(texts)]

    def scores(self) -> ChunkFiles:
        progress = StageProgress("scores", 290, quiet=True)
        place = self.folder / "scores-parts"
        chunks, settings = Chunks(place, dict, progress), ScorerConfig(token_budget=4096)
        return scores_in_chunks(
            chunks, self.scorer, self.samples, lambda: InOrder(self.candidates()), settings, ADAPTIVE
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_small_lvlm(folder / "lvlm")
    write_text_model(folder / "scorer", small_tokenizer())
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A folder of its own with the models in it."""

    def made(name: str) -> Path:
        (tmp_path / name).mkdir()
        for file in models.iterdir():
            (tmp_path / name / file.name).symlink_to(file)
        for image in IMAGES:
            load_image(image).save(tmp_path / name / f"{image}.png")
        return tmp_path / name

    return made


@pytest.mark.parametrize("stage", ["candidates", "answers", "logprobs"])
def test_a_stage_stopped_in_a_later_piece_and_continued_gives_the_same_bytes(
    folder: Callable[[str], Path], stage: str
) -> None:
    whole = folder("whole")
    expected = merged(getattr(Stages(whole), stage)(), whole / "shards")
    assert len(expected.splitlines()) > 20
    stopped = folder("stopped")
    with pytest.raises(OSError, match="disk is gone"):  # the first piece has 4 images
        getattr(Stages(stopped, unreadable_after=4), stage)()
    assert [file.name for file in (stopped / f"{stage}-parts").iterdir()] == ["00000.jsonl"]
    assert merged(getattr(Stages(stopped), stage)(), stopped / "shards") == expected


def test_scores_stopped_in_a_later_piece_and_continued_give_the_same_bytes_and_counts(
    folder: Callable[[str], Path],
) -> None:
    whole, stopped = folder("whole"), folder("stopped")
    parts = Judging(whole).scores()
    judged = [row["sample_id"] for row in parts.rows()]
    assert judged == [f"s{number}" for number in range(290) if number % 7 != 5]
    counts = parts.counts()
    # Lone texts are not compared; more are there than one piece holds only if samples without candidates are left out.
    assert counts["samples"] == sum(number % 4 > 0 for number in range(290) if number % 7 != 5)
    assert 0 < counts["pairs"] < counts["all_pairs"] and counts["audited"] > 0
    expected = merged(parts, whole / "shards")
    with pytest.raises(OSError, match="disk is gone"):
        Judging(stopped, until=10).scores()
    again = Judging(stopped)
    assert merged(again.scores(), stopped / "shards") == expected and again.scores().counts() == counts


def test_references_in_chunks_are_those_computed_at_once(folder: Callable[[str], Path]) -> None:
    stages = Stages(folder("references"))
    pairs = stages.pairs
    assert len(pairs) > PAIRS
    options: dict[str, Any] = {"reference_hash": "abc", "token_budget": 3000, "features": stages.features}
    found = stages.references()
    logprobs = references_in_chunks(Chunks(stages.folder / "few", dict, StageProgress("references", 0, quiet=True)))
    few = logprobs(stages.model, pairs[:3], **options)
    for one, other in zip(found, reference_logprobs(stages.model, pairs, **options), strict=True):
        assert one.extra == other.extra and one.chosen == other.chosen and one.rejected == other.rejected
        assert one.reference_chosen_logprob == pytest.approx(other.reference_chosen_logprob, abs=1e-4)
        assert one.reference_rejected_logprob == pytest.approx(other.reference_rejected_logprob, abs=1e-4)
    assert [one.reference_chosen_logprob for one in few] == pytest.approx(
        [one.reference_chosen_logprob for one in found[:3]], abs=1e-4
    )


def test_logprobs_in_chunks_are_those_computed_at_once(folder: Callable[[str], Path]) -> None:
    stages = Stages(folder("logprobs"))
    assert len(stages.requests) > PAIRS
    encode = PromptEncoder(stages.model)
    items = [(encode(s), image_keys(s), stages.model.encode_response(s.answer)) for s in stages.requests]
    expected = response_logprobs(stages.model, items, token_budget=3000, features=stages.features)
    found = logprobs_of(stages.requests, stages.logprobs())
    assert [row["tokens"] for row in found] == [tokens for _, tokens in expected]
    # Packed otherwise: rounding of fp32.
    assert [row["logprob"] for row in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_requests_share_their_prompt_however_far_they_lie_apart(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, progress = Stages(folder("far")), StageProgress("logprobs", 8, unit="responses", quiet=True)
    monkeypatch.setattr(logprobs, "PAIRS", 4)
    model, two = stages.model, stages.samples[:2]
    requests = [replace(sample, answer="3 " * (1 + k)) for k in range(4) for sample in two]  # in turns
    options: dict[str, Any] = {"features": stages.features, "token_budget": 3000}
    parts = logprobs_in_chunks(Chunks(stages.folder / "parts", dict, progress), model, requests, **options)
    answers = [len(model.encode_response(one.answer)) for one in requests]
    assert [row["tokens"] for row in logprobs_of(requests, parts)] == answers
    encode = PromptEncoder(model)
    assert progress.tokens == sum(answers) + sum(len(encode(one)) for one in two)


def test_a_request_that_does_not_fit_the_model_is_named_before_any_is_computed(folder: Callable[[str], Path]) -> None:
    stages, progress = Stages(folder("bad")), StageProgress("logprobs", 300, unit="responses", quiet=True)
    requests = [*stages.requests, replace(stages.samples[0], id="request 7", question="Why </s>?")]
    options: dict[str, Any] = {"features": stages.features, "token_budget": 3000}
    with pytest.raises(InputError, match="'request 7'"):
        logprobs_in_chunks(Chunks(stages.folder / "parts", dict, progress), stages.model, requests, **options)
    assert progress.done == 0 and not (stages.folder / "parts").exists()


def test_answers_in_chunks_are_parsed_in_the_samples_order(folder: Callable[[str], Path]) -> None:
    stages = Stages(folder("answers"))
    answers = stages.answers()
    predictions = list(predictions_of(stages.samples, answers))
    assert [one.sample.id for one in predictions] == [sample.id for sample in stages.samples]
    assert [one.text for one in predictions] == [row["text"] for row in answers.rows()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", ["candidates", "answers"])
def test_on_a_gpu_pieces_share_memory_and_leave_none(folder: Callable[[str], Path], stage: str) -> None:
    stages, one = Stages(folder("whole"), device="cuda"), Stages(folder("one"), device="cuda")
    one.samples = one.samples[16:32]  # the second piece

    def run(stages: Stages) -> tuple[list[dict[str, Any]], int]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        rows = list(getattr(stages, stage)().rows())
        assert torch.cuda.memory_allocated() == before
        return rows, torch.cuda.max_memory_allocated() - before

    gc.collect()
    gc.disable()  # what only a collection frees is as good as lost
    try:
        whole, peak = run(stages)
        alone, peak_alone = run(one)
    finally:
        gc.enable()
    assert alone and peak < 1.5 * peak_alone
    ids = {sample.id for sample in one.samples}
    assert [row for row in whole if row.get("sample_id", row["id"]) in ids] == alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_stage_that_fails_leaves_no_memory(folder: Callable[[str], Path]) -> None:
    stages = Stages(folder("failing"), unreadable_after=4, device="cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    with pytest.raises(OSError, match="disk is gone") as caught:
        stages.candidates()
    del caught  # its frames hold what they had
    stages.features.clear()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def all_stages(folder: Path) -> Any:
    stages, judging = Stages(folder), Judging(folder)
    found = {"candidates": stages.candidates(), "answers": stages.answers(), "scores": judging.scores()}
    found["logprobs"] = stages.logprobs()
    references = [pair.to_json() for pair in stages.references()]
    distributed.barrier()  # rank 0 holds the store that the others ask
    rows = {name: list(parts.rows()) for name, parts in found.items()}
    return {**rows, "references": references, "counts": found["scores"].counts()}


def test_two_ranks_give_what_one_gives(folder: Callable[[str], Path]) -> None:
    alone = all_stages(folder("alone"))
    for told in values_of(run_ranks(2, all_stages, folder("ranks"))):
        assert Counter(told.pop("counts")) == alone["counts"]
        assert told == {name: alone[name] for name in told} and len(told) == 5
