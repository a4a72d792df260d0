"""Calls of `decode` on one memory: each gives what it gives in memory of its own, and nothing is left behind."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_lvlm import SmallLVLM, load_image
from helpers.stand_in_graphs import SharedPool, StandInMemory, decode_by_graphs

from srcfast.config.settings import CandidatesConfig, LoRAConfig
from srcfast.data.records import Sample
from srcfast.generation.beam_search import Search, sentence_beam_search
from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.decode import Prompt
from srcfast.generation.kv_store import PROMPT_STEP
from srcfast.generation.sampling import Sampling
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.stages.candidates import decoding_memory, generate_candidates

SETTINGS = CandidatesConfig(
    num_candidates=4, num_beams=3, proposals=2, max_sentence_tokens=9, max_new_tokens=40, top_p=1.0, max_sentences=12
)


def longer(prompt: Prompt, tokens: int) -> Prompt:
    """The same prompt with its last token so often again."""
    ids = prompt.token_ids
    return Prompt(torch.cat([torch.from_numpy(ids), torch.full((tokens,), ids[-1])]).numpy(), prompt.images, prompt.key)


def chunks_of(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Chunks with other longest prompts, and fewer samples than slots at the end."""
    return [
        [prompts[1], prompts[3], prompts[4]],
        [longer(prompts[0], 2 * PROMPT_STEP), prompts[2], prompts[3]],
        [prompts[4], prompts[0], prompts[1]],
        [longer(prompts[3], PROMPT_STEP), prompts[2]],
    ]


def found_by(searches: Sequence[Search]) -> list[list[tuple[tuple[int, ...], float]]]:
    return [[(beam.tokens, beam.logprob) for beam in one.finished] for one in searches]


def test_a_call_finds_what_it_would_find_in_memory_of_its_own(single: SmallLVLM) -> None:
    """In fp32, to the bit, in any order, and whatever was in the memory."""
    chunks = chunks_of(single.prompts())
    limits: Any = {"slots": 3, "width": SETTINGS.width, "limit": 49}

    def run(chunk: Sequence[Prompt], memory: DecodingMemory | None = None) -> Any:
        searches = [Search(prompt, SETTINGS, 5, single.model.end_tokens) for prompt in chunk]
        decode_by_graphs(single, searches, memory=memory, **limits)
        return found_by(searches)

    alone = [run(chunk) for chunk in chunks]
    assert sum(len(own) for chunk in alone for own in chunk) > 20
    pool = SharedPool()
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 3, 1]):
        with StandInMemory(pool) as memory:
            for number in order:
                assert run(chunks[number], memory) == alone[number]
                with torch.inference_mode():
                    for held in memory._storage.values():
                        held.fill_(float("nan"))


def test_a_call_in_the_same_memory_draws_as_it_is_told_to(single: SmallLVLM) -> None:
    prompts = single.prompts()[:3]

    def run(sampling: Sampling, memory: DecodingMemory) -> Any:
        searches = [Search(prompt, SETTINGS, 5, single.model.end_tokens) for prompt in prompts]
        decode_by_graphs(single, searches, memory=memory, slots=3, width=SETTINGS.width, limit=49, sampling=sampling)
        return found_by(searches)

    ways = [Sampling(), Sampling(0.0), Sampling(0.5), Sampling(0.5, 0.6), Sampling(1.0, 0.6)]
    pool = SharedPool()
    alone = []
    for way in ways:
        with StandInMemory(SharedPool()) as memory:
            alone.append(run(way, memory))
    assert all(one != other for one, other in itertools.combinations(alone, 2))
    with StandInMemory(pool) as memory:
        for number in (0, 1, 2, 3, 4, 2, 0):
            assert run(ways[number], memory) == alone[number]


def test_a_memory_of_enough_room_captures_a_shape_once(single: SmallLVLM) -> None:
    chunks, pool = chunks_of(single.prompts()), SharedPool()

    def run(number: int, memory: DecodingMemory) -> int:
        before = pool.captures
        searches = [Search(prompt, SETTINGS, 5, single.model.end_tokens) for prompt in chunks[number]]
        decode_by_graphs(single, searches, memory=memory, slots=3, width=SETTINGS.width, limit=49)
        return pool.captures - before

    with StandInMemory(pool) as memory:
        assert run(1, memory) > 1 and run(1, memory) == 0
        storage = {name: held.data_ptr() for name, held in memory._storage.items()}
        assert run(0, memory) > 0 and run(1, memory) == 0 and run(0, memory) == 0
        assert {name: held.data_ptr() for name, held in memory._storage.items()} == storage


def test_nothing_of_a_call_is_a_reference_cycle(single: SmallLVLM) -> None:
    """A cycle would keep the cache until some later collection finds it."""
    searches = [Search(prompt, SETTINGS, 5, single.model.end_tokens) for prompt in single.prompts()]
    gc.collect()
    gc.disable()
    try:
        with StandInMemory(SharedPool()) as memory:
            decode_by_graphs(single, searches, memory=memory, slots=3, width=SETTINGS.width, limit=49)
            (step, graphs), *_ = memory._steps.values()
            held = [weakref.ref(one) for one in (step, graphs, step.cache, step.cache.stores[0].row_keys, step.pending)]
            del step, graphs
        assert [one() for one in held] == [None] * len(held)
    finally:
        gc.enable()


def test_steps_are_captured_anew_for_weights_at_other_addresses(single: SmallLVLM) -> None:
    """A captured step would go on reading the old ones."""
    head, pool = single.model.decoder.lm_head, SharedPool()

    def run(memory: DecodingMemory | None = None) -> Any:
        searches = [Search(prompt, SETTINGS, 5, single.model.end_tokens) for prompt in single.prompts()]
        decode_by_graphs(single, searches, memory=memory, slots=3, width=SETTINGS.width, limit=49)
        return found_by(searches)

    plain, whole = run(), head.weight.data
    try:
        with StandInMemory(pool) as memory:
            assert run(memory) == plain
            head.weight.data = 0.9 * whole
            captures, changed = pool.captures, run()
            assert changed != plain and run(memory) == changed and pool.captures > captures
    finally:
        head.weight.data = whole


def test_a_stage_folds_the_adapter_once_and_leaves_the_weights_as_they_were(written: tuple[Path, Any]) -> None:
    model = load_lvlm(written[0], lora=LoRAConfig(r=2, alpha=32.0))
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    generator = torch.Generator().manual_seed(2)
    for layer in layers:
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator)
    whole = [layer.base.weight.data_ptr() for layer in layers]
    samples = [Sample(f"s{n}", (), "Why?", "3", None, (), {}) for n in range(2)]
    options: dict[str, Any] = {"features": lambda keys: {}, "seed": 1, "batch_size": 2}
    alone = generate_candidates(model, samples, SETTINGS, **options)
    with decoding_memory(model) as memory:
        folded = [layer.base.weight.data_ptr() for layer in layers]
        assert generate_candidates(model, samples, SETTINGS, memory=memory, **options) == alone
        assert [layer.base.weight.data_ptr() for layer in layers] == folded != whole
    assert [layer.base.weight.data_ptr() for layer in layers] == whole and all(layer.active for layer in layers)


# On a device ----------------------------------------------------------------------------------------------------


class OnDevice:
    """The small model on a GPU, its images encoded beforehand so that they don't count."""

    def __init__(self, directory: Path, dtype: torch.dtype, lora: LoRAConfig | None = None) -> None:
        self.model = load_lvlm(directory, dtype=dtype, device="cuda", lora=lora)
        self.features = ImageFeatures(self.model, load_image)
        self.prompts = SmallLVLM(directory, torch.float64).prompts()
        self.features([key for prompt in self.prompts for key in prompt.images])

    def search(self, prompts: Sequence[Prompt], graphs: bool, memory: DecodingMemory | None = None) -> Any:
        return sentence_beam_search(
            self.model, prompts, self.features, SETTINGS, 3, slots=3, graphs=graphs, memory=memory
        )


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def on_device(request: pytest.FixtureRequest, written: tuple[Path, Any]) -> OnDevice:
    return OnDevice(written[0], request.param)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_a_call_leaves_nothing_on_the_device(on_device: OnDevice, graphs: bool) -> None:
    gc.collect()
    gc.disable()  # what only a collection frees is as good as lost
    try:
        before = torch.cuda.memory_allocated()
        on_device.search(on_device.prompts, graphs)
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_calls_that_share_memory_give_the_same_bytes_and_take_no_more(on_device: OnDevice, graphs: bool) -> None:
    chunks = chunks_of(on_device.prompts)
    alone = [on_device.search(chunk, graphs) for chunk in chunks]
    gc.collect()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with DecodingMemory() as memory:
        torch.cuda.reset_peak_memory_stats()
        assert on_device.search(chunks[1], graphs, memory) == alone[1]
        first, kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        assert on_device.search(chunks[1], graphs, memory) == alone[1]
        assert torch.cuda.memory_allocated() == kept
        for number in (3, 0, 2, 1, 0):
            assert on_device.search(chunks[number], graphs, memory) == alone[number]
        storage = sum(held.nbytes for held in memory._storage.values())
        assert torch.cuda.max_memory_allocated() < first + storage / 2  # no second cache beside the first
    assert torch.cuda.memory_allocated() == before
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved
