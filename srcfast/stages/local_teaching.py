"""Teaching by a model that is loaded here: several draws of each sample side by side, on its shared prompt.

A model without an adapter gets the instructions that a model behind an endpoint gets. One with the adapter of a rationale
fine-tuning states rationales without being asked, and gets the question alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from srcfast.config.settings import CandidatesConfig
from srcfast.data.records import Sample
from srcfast.endpoint.client import Answer
from srcfast.generation.generate import sample_responses
from srcfast.models.lvlm import ImageFeatures
from srcfast.models.protocols import VisionLanguageModel
from srcfast.models.sharding import in_step_with
from srcfast.run.chunks import BATCHES, ChunkFiles, ChunkResult, Chunks, run_chunks
from srcfast.stages.candidates import Counted, decoding_memory, prompts_of
from srcfast.stages.teaching import Drawing, Taught, take_draw


def draws_in_chunks(
    chunks: Chunks,
    model: VisionLanguageModel,
    samples: Sequence[Sample],
    drawing: Drawing,
    settings: CandidatesConfig,
    *,
    features: ImageFeatures,
    seed: int,
) -> ChunkFiles:
    """Sample responses chunk by chunk: rows of {id, draws: [[text, whether it ended], ...]}, in the samples' order.

    Args:
        samples: as the model is to see them.
        settings: how many samples are decoded at once, and whether by CUDA graphs.
    """

    def work(chunk: Sequence[Sample]) -> ChunkResult:
        features.clear()  # nothing may carry over from one chunk to the next
        counted = Counted(chunks.progress)
        responses = sample_responses(
            model,
            prompts_of(model, chunk),
            features,
            count=drawing.draws,
            max_new_tokens=drawing.max_tokens,
            seed=seed,
            temperature=drawing.temperature,
            slots=settings.batch_size,
            on_done=counted.advance,
            graphs=settings.cuda_graphs,
            memory=memory,
        )
        rows = [
            {"id": sample.id, "draws": [[model.decode(one.token_ids), one.finished] for one in of_sample]}
            for sample, of_sample in zip(chunk, responses, strict=True)
        ]
        return rows, {"tokens": counted.tokens}

    with decoding_memory(model) as memory:
        files = run_chunks(chunks, samples, BATCHES * settings.batch_size, work, in_step_with(model))
    features.clear()
    return files


def taught_by(samples: Sequence[Sample], rows: Iterable[Mapping[str, Any]]) -> Taught:
    """Take each sample's first draw that reaches its answer.

    Args:
        samples: as they were read.
        rows: of `draws_in_chunks`, in the samples' order.
    """
    taught = Taught()
    for sample, row in zip(samples, rows, strict=True):
        for text, finished in row["draws"]:
            if take_draw(taught, sample, Answer(text, not finished, None, None)):
                break
    return taught
