"""What decoding takes against its forecast: the cache to the byte, captured steps and the peak within a tenth."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from helpers.live_tensors import LiveTensors
from helpers.small_training import SmallModel

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.generation.buffers import DecodingMemory
from srcfast.generation.cuda_graphs import position_buckets, row_buckets
from srcfast.generation.decode import PREFILL_TOKENS, Prompt
from srcfast.generation.generate import sample_responses
from srcfast.generation.kv_cache import SlotCache
from srcfast.generation.kv_store import Layout, storage_of
from srcfast.memory.activations import ForestSizes
from srcfast.memory.forecast import GRAPH_BYTES, Forecast, forecast_decoding
from srcfast.memory.model_sizes import ModelSizes

# Large enough that what is rounded up to pages and segments weighs little.
SHAPE = {
    "vocab_size": 3000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 32,
}
SLOTS, WIDTH, PROMPT, NEW = 3, 8, 180, 150


class Tokenizer:
    """Text without an end."""

    def __len__(self) -> int:
        return SHAPE["vocab_size"]

    def decode(self, token_ids: Any) -> str:
        return "a" * len(token_ids)


class Writer(SmallModel):
    """A decoder that decodes and never ends, so that rows are as long as they may be."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(SHAPE, None, dtype)
        self.tokenizer, self.end_token_id, self.end_tokens = Tokenizer(), -1, frozenset({-1})

    def embed(self, forest: Forest, features: Any) -> torch.Tensor:
        return self.decoder.embed(forest.token_ids)


def prompts(rng: np.random.Generator, count: int) -> list[Prompt]:
    return [Prompt(rng.integers(0, 3000, PROMPT - n % 7), (), str(n)) for n in range(count)]


def forecast_of(model: Writer, device_type: str, graphs: bool) -> Forecast:
    sizes = ModelSizes.of(model, device_type)
    prefill = ForestSizes.of(Forest.of([Tree((Segment(np.zeros(PROMPT, dtype=np.int64)),))]), device_type)
    return forecast_decoding(
        sizes,
        prefill.times(min(SLOTS, PREFILL_TOKENS // PROMPT)),
        samples=SLOTS,
        rows=WIDTH,
        prompt_tokens=PROMPT,
        new_tokens=NEW,
        graphs=graphs,
        stage="candidates",
    )


def write(model: Writer, own: list[Prompt], graphs: bool, memory: DecodingMemory | None = None) -> None:
    sample_responses(
        model,
        own,
        lambda keys: {},
        count=WIDTH,
        max_new_tokens=NEW,
        seed=1,
        top_p=0.9,
        slots=SLOTS,
        graphs=graphs,
        memory=memory,
    )


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gpus_cache_is_forecast_to_the_byte(dtype: torch.dtype, graphs: bool) -> None:
    model = Writer(torch.float32)
    forecast = forecast_of(model.to(dtype), "cuda", graphs)
    layout = Layout.of(SLOTS, WIDTH, PROMPT, NEW, on_gpu=True, spare=graphs)
    storage = storage_of(model.decoder.config, layout, torch.zeros(1))  # in fp32, on a CPU
    assert sum(held.nbytes for held in storage.values()) * dtype.itemsize / 4 == forecast.keys_and_values
    cache = SlotCache(model.decoder.config, layout, torch.zeros(1), storage)
    (store,) = cache.stores
    used = (store.prompt_keys, store.prompt_values, store.row_keys, store.row_values)
    assert sum(held.numel() for held in used) == sum(held.numel() for held in storage.values())
    # A row that fills up takes one row's positions, not a sample's.
    assert layout.rows == SLOTS * WIDTH + graphs
    assert bool(forecast.graphs) == graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_decoding_on_a_cpu_stays_below_its_forecast(rng: np.random.Generator, dtype: torch.dtype) -> None:
    model, own = Writer(dtype), prompts(rng, 5)
    forecast = forecast_of(model, "cpu", True)
    assert forecast.graphs == 0.0
    with LiveTensors() as live:
        write(model, own, True)
    # The native attention, which has no scores in memory, takes less.
    assert 0.8 * forecast.keys_and_values < live.peak <= 1.1 * (forecast.keys_and_values + forecast.workspace)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_decoding_on_a_gpu_peaks_where_it_was_forecast(rng: np.random.Generator, graphs: bool) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    model, own = Writer(torch.bfloat16).cuda(), prompts(rng, 7)
    forecast = forecast_of(model, "cuda", graphs)
    nodes = GRAPH_BYTES * len(row_buckets(SLOTS * WIDTH)) * len(position_buckets(160)) if graphs else 0
    before, pools = torch.cuda.memory_allocated(), []
    with DecodingMemory() as memory:
        for part in (own[:3], own, own[:5]):
            torch.cuda.reset_peak_memory_stats()
            write(model, part, graphs, memory)
            # Reserved, in segments of 2 MiB: a pool of graphs is held for them between their replays, too.
            assert torch.cuda.max_memory_reserved() <= 1.1 * (forecast.peak - nodes) + (4 << 20)
            assert torch.cuda.max_memory_allocated() >= 0.9 * (forecast.peak - nodes - forecast.graphs)
            torch.cuda.empty_cache()
            pools.append(torch.cuda.memory_reserved())
        assert sum(held.nbytes for held in memory._storage.values()) == forecast.keys_and_values
        captured = [len(steps._graphs) for _, steps in memory._steps.values() if steps is not None]
    assert not graphs or captured[0] > 4
    assert pools[1:] == pools[:-1]  # what the largest graph took is enough for all
    assert torch.cuda.memory_allocated() == before
