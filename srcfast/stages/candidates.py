"""Stage 2: generate diverse rationale-answer candidates of every sample, by sentence-level beam search.

The search is `srcfast.generation.beam_search`; here are the samples' prompts, the candidates as records, and the chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from srcfast.config.settings import CandidatesConfig
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Candidate, Sample
from srcfast.generation.beam_search import sentence_beam_search
from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.generate import Features, Generated, Prompt
from srcfast.models.lora import folded_lora
from srcfast.models.lvlm import ImageFeatures
from srcfast.models.protocols import VisionLanguageModel
from srcfast.models.sharding import in_step_with
from srcfast.run.chunks import BATCHES, ChunkFiles, ChunkResult, Chunks, run_chunks
from srcfast.stages.policy import Policy
from srcfast.stages.prompts import PromptEncoder, image_keys
from srcfast.stages.stage_run import StageRun


class Progress(Protocol):
    """Counts samples and tokens as they are done: `run.progress.StageProgress`."""

    def advance(self, n: int = 1, tokens: int = 0) -> None: ...


@dataclass
class Counted:
    """Advance a progress, and sum the tokens."""

    progress: Progress
    tokens: int = 0

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        self.tokens += tokens
        self.progress.advance(n, tokens)


@contextmanager
def decoding_memory(model: VisionLanguageModel) -> Iterator[DecodingMemory]:
    """Fold the adapter into the weights once, and share one decoding memory between a stage's chunks.

    At the end the weights are as they were and the memory is free.
    """
    with folded_lora(model), DecodingMemory() as memory:
        yield memory


def prompts_of(model: VisionLanguageModel, samples: Sequence[Sample]) -> list[Prompt]:
    """Encode each sample's prompt, image placeholders expanded, keyed by the sample's id."""
    encode_prompt = PromptEncoder(model)
    return [Prompt(encode_prompt(s), image_keys(s), s.id) for s in samples]


def generate_candidates(
    model: VisionLanguageModel,
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
    """Generate up to `settings.num_candidates` distinct candidates a sample, best score of the search first, then plain samples.

    Args:
        model: an LVLM.
        samples: the questions to answer.
        settings: the search.
        features: image keys to embeddings.
        seed: with a sample's id it decides the sample's draws.
        batch_size: samples searched at once; as one ends, the next takes its slot.
        progress: advances by samples done and tokens run.
        graphs: on a GPU, replay steps as CUDA graphs.
        memory: a `decoding_memory` of the stage; default: one for this call.
    """
    prompts = prompts_of(model, samples)
    on_done = None if progress is None else progress.advance
    with folded_lora(model):
        generated, _ = sentence_beam_search(
            model, prompts, features, settings, seed, slots=batch_size, on_done=on_done, graphs=graphs, memory=memory
        )
    # A response that ends before its first word is none to compare with others.
    worded = ([one for one in responses if model.decode(one.token_ids)] for responses in generated)
    return [
        [_candidate(model, sample, number, response) for number, response in enumerate(responses)]
        for sample, responses in zip(samples, worded, strict=True)
    ]


def _candidate(model: VisionLanguageModel, sample: Sample, number: int, generated: Generated) -> Candidate:
    """Decode and parse a generated response. Its log-probability, in nats, is the model's over its tokens."""
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
        extra={"sampled": True} if generated.sampled else {},
    )


def diversity(candidates: Iterable[Sequence[Candidate]]) -> dict[str, float]:
    """Measure how much the candidates of a sample differ, on average over samples with at least two.

    `distinct_texts` and `distinct_answers` are shares of a sample's candidates; `bigram_overlap` is the mean Jaccard overlap of
    two candidates' token bigrams.
    """
    texts, answers, overlaps = [], [], []
    for group in candidates:
        if len(group) < 2:
            continue
        texts.append(len({c.text for c in group}) / len(group))
        answers.append(len({c.answer for c in group}) / len(group))
        bigrams = [set(zip(c.token_ids, c.token_ids[1:], strict=False)) for c in group]
        pairs = [(a, b) for i, a in enumerate(bigrams) for b in bigrams[i + 1 :]]
        overlaps.append(float(np.mean([len(a & b) / max(1, len(a | b)) for a, b in pairs])))
    if not texts:
        return {}
    return {
        "distinct_texts": float(np.mean(texts)),
        "distinct_answers": float(np.mean(answers)),
        "bigram_overlap": float(np.mean(overlaps)),
    }


def search_candidates(
    stage: StageRun, policy: Policy, samples: Sequence[Sample], seed: int, name: str = ""
) -> ChunkFiles:
    """Stage 2: search candidates of the samples by the policy as it is; `name` tells several searches of a stage apart."""
    chunks = stage.chunks(name, policy=policy.hash)
    return candidates_in_chunks(
        chunks, policy.model, samples, stage.config.candidates, features=policy.features, seed=seed
    )


def candidates_in_chunks(
    chunks: Chunks,
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    settings: CandidatesConfig,
    *,
    features: ImageFeatures,
    seed: int,
) -> ChunkFiles:
    """Run `generate_candidates` chunk by chunk; the rows are the candidates' JSON, and `tokens` counts the tokens run."""

    def work(chunk: Sequence[Sample]) -> ChunkResult:
        features.clear()  # nothing may carry over from one chunk to the next
        counted = Counted(chunks.progress)
        groups = generate_candidates(
            model,
            chunk,
            settings,
            features=features,
            seed=seed,
            batch_size=settings.batch_size,
            progress=counted,
            graphs=settings.cuda_graphs,
            memory=memory,
        )
        return [candidate.to_json() for group in groups for candidate in group], {"tokens": counted.tokens}

    with decoding_memory(model) as memory:
        files = run_chunks(chunks, samples, BATCHES * settings.batch_size, work, in_step_with(model))
    features.clear()  # no later stage uses these
    return files
