"""Which layers of transformers' models run as the hand-written decoder's, that others don't, and what the fused ones save."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES
from helpers.family_models import ADAPTER, LETTERS, FamilyModels, RandomForest, randomise_adapter
from helpers.family_parts import randomise
from helpers.small_checkpoints import assert_close
from torch import Tensor, nn
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.logit_rows import response_logit_rows
from srcfast.generation.cpu_decoder import ROWS, CPUDecoder
from srcfast.memory.activations import ForestSizes, activation_bytes
from srcfast.memory.checkpoint_shapes import checkpoint_shapes
from srcfast.memory.measure import SavedTensors
from srcfast.memory.model_sizes import LAYER_FACTORS, ModelSizes
from srcfast.models.dropout_keys import dropout_keys, dropping
from srcfast.models.fused_modules import is_fused, is_ordinary, mixing_attention, ordinary_modules
from srcfast.models.lora import apply_lora, folded_lora, lora_parameters
from srcfast.models.transformers_decoder import TransformersDecoder

GetFamily = Callable[[str], FamilyModels]
ROUNDING = 5e-5  # of the largest number: fp32 sums in another order over four layers
# Layers of these are other blocks: experts, parallel branches, norms behind, gates, recurrent mixers.
OTHER_BLOCKS = {
    "qwen3_vl_moe",
    "qwen3_5",
    "lfm2",
    "glm4v",
    "glm46v",
    "glm4v_moe",
    "glm_ocr",
    "aya_vision",
    "exaone4_5",
    "gemma2",
    "gemma3",
    "gemma3_capped",
    "gemma4",
    "gemma4_vision",
    "paligemma",
    "paligemma2",
    "cohere2",
    "aria",
    "hunyuan_vl",
    "hyperclovax_vision_v2",
    "qwen3_5_moe",
    "cohere_compass",
    "glmga",
    "lfm3_vl",
    "granite_docling",
}
WINDOWED = {"llava_window"}  # plain blocks, of which the CPU's decoder does not have the attention
SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_blocks_are_known_and_selected_rows_equal_those_of_the_whole(
    name: str, family: GetFamily, rng: np.random.Generator
) -> None:
    models = family(name)
    decoder = models.ours.decoder
    plain = name not in OTHER_BLOCKS
    assert decoder.selects_rows == all(map(is_fused, decoder.layers)) == plain
    assert decoder.plain_layers == (plain and name not in WINDOWED)
    forest = RandomForest(models, rng)
    rows = torch.from_numpy(np.sort(rng.choice(forest.forest.num_tokens, 9, replace=False)))
    with torch.no_grad():
        whole, some = (models.ours(forest.forest, forest.features(), wanted) for wanted in (None, rows))
    assert_close(some, whole[rows], ROUNDING)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_llama", "glm_ocr", "qwen3_vl_moe"])
@torch.no_grad()
def test_fused_modules_give_what_the_ordinary_ones_give(name: str, family: GetFamily, rng: np.random.Generator) -> None:
    """One by one, for inputs other than those by which they were chosen."""
    decoder = family(name).ours.decoder
    positions = torch.from_numpy(rng.integers(0, 900, 11))
    rotary = decoder.rotary_emb(torch.empty(1, 1, 1), decoder._by_axes(positions)[..., None, :])
    compared = set()
    for module in decoder.layers.modules():
        if not is_fused(module):
            continue
        size = module.weight if hasattr(module, "weight") else next(module.parameters())
        x = torch.from_numpy(rng.normal(size=(1, 11, size.shape[-1]))).float()
        more = {}
        if hasattr(module, "self_attn") or hasattr(module, "q_proj"):
            more = {"position_embeddings": rotary, "attention_mask": None, "attend": mixing_attention}
        fused = module(x, **more)
        with ordinary_modules(decoder.layers):
            ordinary = module(x, **more)
        assert_close(_first(fused), _first(ordinary), 1e-5)  # fp32 sums of some dozen products in another order
        compared.add(type(module).__name__)
    assert len(compared) >= 2


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def smaller(layer: Any, ordinary: Any, x: Tensor, **options: Any) -> Tensor:
    return 0.999 * ordinary(x, **options)


@contextmanager
def changed(kind: type, change: Any) -> Iterator[None]:
    """Change the forward pass of a class of transformers."""
    ordinary = kind.forward

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        return change(self, MethodType(ordinary, self), *inputs, **options)

    forward.__signature__ = inspect.signature(ordinary)  # type: ignore[attr-defined]
    kind.forward = forward  # type: ignore[attr-defined]
    try:
        yield
    finally:
        kind.forward = ordinary  # type: ignore[attr-defined]


def decoder_of(config: Any = None) -> TransformersDecoder:
    torch.manual_seed(1)
    model = LlamaForCausalLM(config or LlamaConfig(**SIZES))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return TransformersDecoder(model.eval().requires_grad_(False))


def fused_kinds(decoder: TransformersDecoder) -> set[str]:
    return {type(module).__name__ for module in decoder.layers.modules() if is_fused(module)}


def test_what_differs_in_a_part_keeps_its_code() -> None:
    llama = {"LlamaRMSNorm", "LlamaMLP", "LlamaDecoderLayer"}
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

    assert fused_kinds(decoder_of()) == llama
    with changed(LlamaDecoderLayer, smaller):
        decoder = decoder_of()
        assert fused_kinds(decoder) == {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"} and not decoder.plain_layers
    with changed(LlamaAttention, lambda self, ordinary, *x, **options: (0.99 * ordinary(*x, **options)[0], None)):
        assert fused_kinds(decoder_of()) == {"LlamaRMSNorm", "LlamaMLP"}
    with changed(LlamaAttention, lambda self, ordinary, *x, **options: ordinary(*x, **options, sinks=1.0)):
        assert fused_kinds(decoder_of()) == {"LlamaRMSNorm", "LlamaMLP"}
    assert fused_kinds(decoder_of(LlamaConfig(**SIZES, hidden_act="gelu"))) == {"LlamaRMSNorm", "LlamaAttention"}


def test_clipped_projections_are_no_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    turn = modeling_llama.apply_rotary_pos_emb

    def clip(q: Tensor, k: Tensor, *angles: Tensor) -> tuple[Tensor, Tensor]:
        return turn(q.clamp(-20.0, 20.0), k.clamp(-20.0, 20.0), *angles)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", clip)
    assert fused_kinds(decoder_of()) == {"LlamaRMSNorm", "LlamaMLP"}


def test_attention_with_options_is_not_ordinary() -> None:
    assert is_ordinary({"scaling": 0.25, "sliding_window": None}, 16) and is_ordinary({}, 16)
    assert not any(
        is_ordinary(options, 16)
        for options in ({"scaling": 0.2}, {"scaling": 0.25, "sliding_window": 64}, {"softcap": 30.0})
    )


def text_forest(rng: np.random.Generator, length: int = 300) -> Forest:
    """A tree of random tokens: a prompt and two responses."""
    root, *leaves = (rng.integers(*LETTERS, size) for size in (length, 30, 40))
    return Forest.of([Tree((Segment(root), *(Segment(leaf, 0) for leaf in leaves)))])


def saved_bytes(model: Any, forest: Forest, every: int) -> int:
    """What a training pass saves for backward."""
    model.decoder.checkpoint_layers = every
    with SavedTensors(model.parameters) as saved:
        hidden = model(forest, {}, rows=response_logit_rows(forest))
        count = saved.bytes
    assert len(hidden) < forest.num_tokens
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llava_llama", "llava_qwen2", "llava_qwen3"])
def test_a_plain_block_saves_what_a_hand_written_one_saves(
    name: str, dtype: torch.dtype, family: GetFamily, rng: np.random.Generator
) -> None:
    forest, found = text_forest(rng), {}
    for backbone in ("transformers", "handwritten"):
        model = family(name).load(lora=ADAPTER, backbone=backbone, dtype=dtype).train()
        found[backbone] = [saved_bytes(model, forest, every) for every in (0, 1)]
    for ours, handwritten in zip(found["transformers"], found["handwritten"], strict=True):
        assert 0.9 * handwritten < ours <= 1.05 * handwritten
    assert found["transformers"][1] < 0.4 * found["transformers"][0]  # layers are recomputed


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "smolvlm", "glm_ocr", "qwen3_vl_moe"])
def test_what_is_saved_was_forecast(name: str, family: GetFamily, rng: np.random.Generator) -> None:
    forest = text_forest(rng)
    model = family(name).load(lora=ADAPTER).train()
    sizes = ModelSizes.of(model)
    for every in (0, 1, 2):
        forecast = activation_bytes(sizes, ForestSizes.of(forest, "cpu"), every).at_the_head
        share = saved_bytes(model, forest, every) / forecast
        # Exact for plain blocks but for the plans of attention; a bound for others, whose form is not known.
        assert 0.9 < share < 1.1 if model.decoder.plain_layers else share < 1.1


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("qwen3_vl", "blocks"),
        ("qwen2_5_vl", "blocks"),
        ("glm_ocr", "feed-forwards"),
        ("aya_vision", "feed-forwards"),
        ("gemma3", "nothing"),
    ],
)
def test_a_forecast_by_a_config_knows_what_is_replaced(name: str, replaced: str, family: GetFamily) -> None:
    models = family(name)
    assert checkpoint_shapes(models.path, "transformers").replaced == replaced
    sizes = ModelSizes.of(models.ours)
    assert sizes.layer_factor == LAYER_FACTORS[replaced] and not sizes.recomputes_groups
    assert sizes.shapes.qk_norm == (name in ("qwen3_vl", "gemma3"))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", ["qwen3_vl", "glm_ocr"])
def test_recomputed_layers_have_the_same_gradients(
    name: str, dropout: float, family: GetFamily, rng: np.random.Generator
) -> None:
    models = family(name)
    model = models.load()
    apply_lora(model, ADAPTER.replace(dropout=dropout, target_modules=("k_proj", "down_proj")))
    randomise_adapter(model, 4)
    model.train()
    forest = RandomForest(models, rng)
    features, results = forest.features(), []
    for every in (0, 1, 3):
        model.decoder.checkpoint_layers = every
        with dropping(model.decoder, dropout_keys(forest.forest, 0, 5, [0, 1, 2])):
            hidden = model(forest.forest, features, response_logit_rows(forest.forest))
        hidden.square().sum().backward()
        results.append([parameter.grad for parameter in lora_parameters(model)])
        model.zero_grad()
    for recomputed in results[1:]:
        for gradient, expected in zip(recomputed, results[0], strict=True):
            assert float(expected.abs().max()) > 0
            assert_close(gradient, expected, 1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OTHER_BLOCKS | WINDOWED])
def test_the_cpu_s_decoder_runs_plain_blocks(name: str, family: GetFamily, rng: np.random.Generator) -> None:
    model = family(name).load(lora=ADAPTER)
    randomise_adapter(model, 6)
    decoder = model.decoder
    assert CPUDecoder.of(decoder) is None  # of an adapter that is not folded
    with folded_lora(model), torch.no_grad():
        fast = CPUDecoder.of(decoder)
        assert fast is not None
        for count in (1, ROWS, 3 * ROWS + 1):
            token_ids = torch.from_numpy(rng.integers(*LETTERS, count))
            positions = torch.from_numpy(rng.integers(0, 900, count))
            expected = decoder(decoder.embed(token_ids), positions, mixing_attention)
            found = fast(fast.embed(token_ids), positions, mixing_attention)
            assert_close(found, expected, ROUNDING)
            within = fast.run_within(decoder, decoder.embed(token_ids), positions, mixing_attention)
            assert_close(within, expected, ROUNDING)
            assert torch.equal(decoder(decoder.embed(token_ids), positions, mixing_attention), expected)


def test_the_cpu_s_decoder_leaves_out_what_a_model_does_around_its_layers() -> None:
    """Plain blocks whose model scales embeddings: the comparison shows that they are no whole plain pass."""
    config = GraniteConfig(**SIZES, attention_multiplier=8**-0.5, residual_multiplier=1.0)
    for multiplier, runs in ((1.0, True), (2.0, False)):
        config.embedding_multiplier = multiplier
        model = GraniteForCausalLM(config)
        randomise(model, 3)
        decoder = TransformersDecoder(model)
        assert decoder.plain_layers and (CPUDecoder.of(decoder) is not None) == runs
