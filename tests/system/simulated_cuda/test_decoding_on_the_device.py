"""Beam search, sampled and greedy decoding on the simulated device: in fp32 the CPU's tokens, with and without graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import simulated_cuda
import torch
from helpers.small_lvlm import SmallLVLM, load_image, write_small_lvlm

from srcfast.config.settings import CandidatesConfig
from srcfast.generation.beam_search import sentence_beam_search
from srcfast.generation.generate import Generated, Prompt, generate_greedy, sample_responses
from srcfast.models import LVLM, ImageFeatures, load_lvlm
from srcfast.stages.logprobs import response_logprobs

pytestmark = pytest.mark.simulated
SLOTS = 2  # of five prompts
SETTINGS = CandidatesConfig(
    num_candidates=6, num_beams=3, proposals=2, max_sentences=6, max_sentence_tokens=12, max_new_tokens=40, top_p=1.0
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small_lvlm")
    write_small_lvlm(path)
    return path


@pytest.fixture(scope="module")
def prompts(directory: Path) -> list[Prompt]:
    return SmallLVLM(directory, torch.float32).prompts()


def model_on(device: str, directory: Path, quantize: str | None = None, dtype: torch.dtype = torch.float32) -> LVLM:
    """4-bit weights are quantised on the CPU: on a GPU bitsandbytes rounds their scales in another way."""
    return load_lvlm(directory, quantize=quantize, dtype=dtype, device="cpu" if quantize else device).to(device)


def decoded(how: str, model: LVLM, prompts: list[Prompt], graphs: bool) -> list[list[Generated]]:
    features = ImageFeatures(model, load_image)
    if how == "greedy":
        return [[one] for one in generate_greedy(model, prompts, features, 40, SLOTS, graphs=graphs)]
    if how == "beams":
        return sentence_beam_search(model, prompts, features, SETTINGS, 0, slots=SLOTS, graphs=graphs)[0]
    # In fp32 rounding may move a draw across the border between two tokens; with these seeds it does not.
    nucleus = {"count": 3, "max_new_tokens": 40, "seed": 0, "temperature": 1.3, "top_p": 0.9}
    return sample_responses(model, prompts, features, slots=SLOTS, graphs=graphs, **nucleus)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("how", ["greedy", "sampled", "beams"])
def test_tokens_and_log_probabilities_are_the_cpus(
    how: str, quantize: str | None, directory: Path, prompts: list[Prompt]
) -> None:
    expected = decoded(how, model_on("cpu", directory, quantize), prompts, graphs=False)
    model = model_on("cuda", directory, quantize)
    for graphs in (True, False):
        with simulated_cuda.recording() as record:
            found = decoded(how, model, prompts, graphs)
        assert bool(record.captures) == bool(record.replays) == graphs
        for own, other in zip(found, expected, strict=True):
            assert [(one.token_ids, one.finished) for one in own] == [(one.token_ids, one.finished) for one in other]
            # fp32: up to 40 log-probabilities of a few units, from sums in another order
            assert [one.logprob for one in own] == pytest.approx([one.logprob for one in other], rel=1e-5, abs=1e-5)
    assert sum(map(len, expected)) >= len(prompts) and max(len(one.token_ids) for own in expected for one in own) > 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_log_probabilities_in_16_bits_are_those_that_the_cpu_computes_in_fp32(
    dtype: torch.dtype, directory: Path, prompts: list[Prompt]
) -> None:
    found = decoded("beams", model_on("cuda", directory, dtype=dtype), prompts, graphs=True)
    exact = model_on("cpu", directory)
    eps, compared = torch.finfo(dtype).eps, 0
    for prompt, own in zip(prompts, found, strict=True):
        rows = [one for one in own if exact.image_token_id not in one.token_ids]  # it would stand for an image
        items = [(prompt.token_ids, prompt.images, one.token_ids) for one in rows]
        features = ImageFeatures(exact, load_image)
        for one, (logprob, _) in zip(
            rows, response_logprobs(exact, items, token_budget=4096, features=features), strict=True
        ):
            # Hidden states and logits are rounded in every layer of a model whose weights are large: 8 eps, of 1 at least.
            assert one.logprob == pytest.approx(logprob, rel=8 * eps, abs=8 * eps)
            compared += 1
    assert compared > 10
