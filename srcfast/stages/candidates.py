"""Stage 2: diverse rationale-answer candidates of every sample, by sentence-level beam search over the model itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from srcfast.config.settings import CandidatesConfig
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Candidate, Sample
from srcfast.generation.beam_search import sentence_beam_search
from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.generate import Features, Generated, Prompt
from srcfast.models.lora import folded_lora
from srcfast.models.lvlm import ImageFeatures
from srcfast.models.sharding import in_step_with
from srcfast.run.chunks import BATCHES, ChunkFiles, ChunkResult, Chunks, run_chunks
from srcfast.stages.prompts import PromptEncoder, image_keys


class Progress(Protocol):
    """What `run.progress.track` gives."""

    def advance(self, n: int = 1, tokens: int = 0) -> None: ...


@contextmanager
def decoding_memory(model: Any) -> Iterator[DecodingMemory]:
    """What a stage decodes with, chunk after chunk: the adapter folded into the weights once, and memory that chunks share.

    At the stage's end the weights are as they were and the memory is free.
    """
    with folded_lora(model), DecodingMemory() as memory:
        yield memory


def prompts_of(model: Any, samples: Sequence[Sample]) -> list[Prompt]:
    """Each sample's prompt, image placeholders expanded, keyed by the sample's id."""
    encode = PromptEncoder(model)
    return [Prompt(encode(s, s.question, s.id), image_keys(s), s.id) for s in samples]


def generate_candidates(
    model: Any,
    samples: Sequence[Sample],
    settings: CandidatesConfig,
    *,
    features: Features,
    seed: int,
    batch_size: int,
    progress: Progress | None = None,
    graphs: bool = True,
    memory: DecodingMemory | None = None,
) -> list[list[Candidate]]:
    """Up to `settings.num_candidates` distinct candidates a sample, best score first.

    Args:
        model: an LVLM.
        samples: what to answer.
        features: image keys to embeddings.
        seed: with a sample's id it decides the sample's draws.
        batch_size: samples searched at once; as one ends, the next takes its place.
        progress: told of samples done and tokens run.
        graphs: on a GPU, replay steps as CUDA graphs.
        memory: a `decoding_memory` of the stage; default: one for this call.
    """
    prompts = prompts_of(model, samples)
    on_done = None if progress is None else progress.advance
    with folded_lora(model):
        found, _ = sentence_beam_search(
            model, prompts, features, settings, seed, slots=batch_size, on_done=on_done, graphs=graphs, memory=memory
        )
    return [
        [_candidate(model, sample, number, one) for number, one in enumerate(own)]
        for sample, own in zip(samples, found, strict=True)
    ]


def _candidate(model: Any, sample: Sample, number: int, generated: Generated) -> Candidate:
    text = model.decode(generated.token_ids)
    parsed = parse_response(text)
    return Candidate(
        id=f"{sample.id}#{number}",
        sample_id=sample.id,
        text=text,
        rationale=parsed.rationale,
        answer=parsed.answer or "",
        logprob=generated.logprob,
        token_ids=generated.token_ids,
    )


def diversity(candidates: Iterable[Sequence[Candidate]]) -> dict[str, float]:
    """How much the candidates of a sample differ, on average over samples with at least two.

    `distinct_texts` and `distinct_answers` are shares of a sample's candidates; `bigram_overlap` is the mean Jaccard overlap of
    two candidates' token bigrams.
    """
    texts, answers, overlaps = [], [], []
    for own in candidates:
        if len(own) < 2:
            continue
        texts.append(len({c.text for c in own}) / len(own))
        answers.append(len({c.answer for c in own}) / len(own))
        bigrams = [set(zip(c.token_ids, c.token_ids[1:], strict=False)) for c in own]
        pairs = [(a, b) for i, a in enumerate(bigrams) for b in bigrams[i + 1 :]]
        overlaps.append(float(np.mean([len(a & b) / max(1, len(a | b)) for a, b in pairs])))
    if not texts:
        return {}
    return {
        "distinct_texts": float(np.mean(texts)),
        "distinct_answers": float(np.mean(answers)),
        "bigram_overlap": float(np.mean(overlaps)),
    }


def candidates_in_chunks(
    chunks: Chunks,
    model: Any,
    samples: Sequence[Sample],
    settings: CandidatesConfig,
    *,
    features: ImageFeatures,
    seed: int,
) -> ChunkFiles:
    """`generate_candidates`, as rows of candidates."""

    def work(piece: Sequence[Sample]) -> ChunkResult:
        features.clear()
        found = generate_candidates(
            model,
            piece,
            settings,
            features=features,
            seed=seed,
            batch_size=settings.batch_size,
            progress=chunks.progress,
            graphs=settings.cuda_graphs,
            memory=memory,
        )
        return [candidate.to_json() for own in found for candidate in own], {}

    with decoding_memory(model) as memory:
        parts = run_chunks(chunks, samples, BATCHES * settings.batch_size, work, in_step_with(model))
    features.clear()  # no stage uses these
    return parts
