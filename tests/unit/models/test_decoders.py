"""The hand-written decoder against transformers' Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_checkpoints import assert_close, random_tokens, text_config, text_logits, write_text_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from srcfast.errors import InputError
from srcfast.models import load_text_model
from srcfast.models.checkpoint import model_hash
from srcfast.models.decoder import Decoder, DecoderConfig
from srcfast.models.text_model import save_text_model
from srcfast.models.transformers_decoder import TransformersDecoder

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama with grouped queries": ("llama", {}),
    "llama with tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "llama 3.1 frequencies": ("llama", {"rope_parameters": LLAMA3}),
    "llama with linear scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 99.0, "factor": 3.0}},
    ),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with narrow heads": ("llama", {"head_dim": 10}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 14}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str, tmp_path: Path) -> None:
    kind, changes = SHAPES[shape]
    theirs = write_text_model(tmp_path, text_config(kind, **changes), seed=len(shape))
    ours = load_text_model(tmp_path)
    rng = np.random.default_rng(len(shape))
    sequences = [random_tokens(rng, length) for length in (67, 1, 30)]  # beyond llama3's original 32 positions
    for tokens, logits in zip(sequences, text_logits(ours, sequences), strict=True):
        with torch.no_grad():
            assert_close(logits, theirs(torch.from_numpy(tokens)[None]).logits[0])


def test_the_scaled_frequencies_differ_from_the_plain_ones(tmp_path: Path) -> None:
    """Otherwise the comparison above would say nothing of the scaling."""
    write_text_model(tmp_path / "scaled", text_config(rope_parameters=LLAMA3))
    write_text_model(tmp_path / "plain", text_config(rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    scaled, plain = (load_text_model(tmp_path / name).decoder.inverse_frequencies for name in ("scaled", "plain"))
    assert not torch.allclose(scaled, plain, rtol=0.1)


def test_a_sharded_checkpoint_reads_as_a_single_file(tmp_path: Path) -> None:
    config = text_config("qwen3")
    write_text_model(tmp_path / "single", config)
    write_text_model(tmp_path / "sharded", config, max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    tokens = [random_tokens(np.random.default_rng(0), 9)]
    single, sharded = (text_logits(load_text_model(tmp_path / name), tokens)[0] for name in ("single", "sharded"))
    assert torch.equal(single, sharded)


@pytest.mark.parametrize("shape", ["llama with tied embeddings", "qwen2", "qwen3 with biases"])
def test_a_saved_text_model_is_transformers_own(shape: str, tmp_path: Path) -> None:
    kind, changes = SHAPES[shape]
    write_text_model(tmp_path / "there", text_config(kind, **changes))
    ours = load_text_model(tmp_path / "there")
    save_text_model(ours, tmp_path / "here")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "here", output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens = random_tokens(np.random.default_rng(1), 11)
    with torch.no_grad():
        assert_close(text_logits(ours, [tokens])[0], theirs(torch.from_numpy(tokens)[None]).logits[0])


def test_a_sharded_checkpoint_saves_to_one_file_that_loads(tmp_path: Path) -> None:
    """The copied companions must not hold the old index."""
    write_text_model(tmp_path / "there", text_config(), max_shard_size="20KB")
    ours = load_text_model(tmp_path / "there")
    save_text_model(ours, tmp_path / "here")
    tokens = [random_tokens(np.random.default_rng(2), 7)]
    assert torch.equal(text_logits(load_text_model(tmp_path / "here"), tokens)[0], text_logits(ours, tokens)[0])


def test_bf16_weights_load_into_any_dtype(tmp_path: Path) -> None:
    theirs = write_text_model(tmp_path, text_config())
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    wide = load_text_model(tmp_path, dtype=torch.float64)
    narrow = load_text_model(tmp_path, dtype=torch.bfloat16)
    assert wide.decoder.norm.weight.dtype == torch.float64
    assert torch.equal(wide.decoder.head_weight.bfloat16(), narrow.decoder.head_weight)


def test_the_hash_follows_the_weights_not_the_place(tmp_path: Path) -> None:
    write_text_model(tmp_path / "one", text_config(), seed=3)
    write_text_model(tmp_path / "copy", text_config(), seed=3)
    write_text_model(tmp_path / "other", text_config(), seed=4)
    assert model_hash(tmp_path / "one") == model_hash(tmp_path / "copy") != model_hash(tmp_path / "other")


def edit_weights(directory: Path, edit: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda t: t.pop(NORM), r"1 missing: layers\.1\.input_layernorm\.weight"),
        (lambda t: t.update({"model.layers.1.extra": torch.ones(2)}), r"1 unexpected: layers\.1\.extra"),
        (lambda t: t.update({NORM: torch.ones(23)}), r"layers\.1\.input_layernorm\.weight.*\[24\].*\[23\]"),
        (lambda t: t.update({NORM: torch.ones(1)}), r"layers\.1\.input_layernorm\.weight.*\[24\].*\[1\]"),
    ],
    ids=["missing", "unexpected", "misshaped", "broadcastable"],
)
def test_a_tensor_that_does_not_fit_is_named(edit: Any, found: str, tmp_path: Path) -> None:
    write_text_model(tmp_path, text_config())
    edit_weights(tmp_path, edit)
    with pytest.raises(InputError, match=rf"(?s){found}"):
        load_text_model(tmp_path)


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    write_text_model(tmp_path, text_config())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        load_text_model(tmp_path)


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    write_text_model(tmp_path, text_config())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_text_model(tmp_path)


def test_shards_outside_the_directory_or_absent_are_refused(tmp_path: Path) -> None:
    write_text_model(tmp_path, text_config(), max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text()
    first = sorted(set(json.loads(whole)["weight_map"].values()))[0]
    for bad in ("../elsewhere.safetensors", "absent.safetensors"):
        index.write_text(whole.replace(first, bad))
        with pytest.raises(InputError, match=bad):
            load_text_model(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "found"),
    [
        ("llama", {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "t5"),
        ("llama", {"model_type": "no_such_model"}, "no_such_model"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_a_config_that_is_not_supported_is_named(
    kind: str, changes: dict[str, Any], found: str, tmp_path: Path
) -> None:
    write_text_model(tmp_path, text_config(kind))
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError, match=rf"(?s)config\.json.*{found}"):
        load_text_model(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("mistral", {"sliding_window": 64}), ("qwen2", {"use_sliding_window": True, "sliding_window": 33})],
)
def test_a_window_is_run_by_the_general_backbone(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = text_config(kind, **changes)
    write_text_model(tmp_path, config)
    assert isinstance(load_text_model(tmp_path).decoder, TransformersDecoder)
    with pytest.raises(InputError, match=r"sliding_window.*transformers"):
        DecoderConfig.from_huggingface(config)


def test_a_window_that_no_sequence_outgrows_is_no_window(tmp_path: Path) -> None:
    write_text_model(tmp_path, text_config("mistral", sliding_window=512))
    assert isinstance(load_text_model(tmp_path).decoder, Decoder)


def test_a_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        load_text_model(tmp_path)
