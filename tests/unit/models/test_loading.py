"""What loading and saving must keep, refuse, or leave as the checkpoint has it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_checkpoints import (
    assert_close,
    lvlm_logits,
    oracle_logits,
    random_image,
    random_tokens,
    text_config,
    tokenizer,
    write_lvlm,
    write_text_model,
)
from safetensors.torch import load_file, save_file

from srcfast.config.settings import LoRAConfig
from srcfast.errors import InputError
from srcfast.models import load_lvlm, load_text_model
from srcfast.models.checkpoint import model_hash
from srcfast.models.lora import add_lora, lora_parameters, merge_lora, save_adapter
from srcfast.models.lvlm import save_lvlm
from srcfast.models.text_model import save_text_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_far_positions_keep_their_angle_in_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Frequencies rounded to bf16 would be off by 2^-9, which is two radians at position 1,000."""
    write_text_model(tmp_path, text_config())
    exact = load_text_model(tmp_path).decoder
    positions = torch.tensor([0, 1, 97, 1000, 4095])
    loaded = load_text_model(tmp_path, dtype=dtype).decoder
    cast = load_text_model(tmp_path).to(dtype).decoder
    for decoder in (loaded, cast):
        for found, expected in zip(
            decoder.rotary(positions, dtype), exact.rotary(positions, torch.float32), strict=True
        ):
            # cos and sin themselves are rounded: half a unit of bf16; fp32 angles of 4,095 carry 2.4e-4
            torch.testing.assert_close(
                found.float(), expected, rtol=0.0, atol=5e-3 if dtype == torch.bfloat16 else 5e-4
            )


def test_the_adapter_of_a_loaded_model_drops_nothing_out(tmp_path: Path) -> None:
    write_lvlm(tmp_path / "base")
    trained = load_lvlm(tmp_path / "base", lora=LoRAConfig(r=2, dropout=0.9, alpha=32.0))
    with torch.no_grad():
        for parameter in lora_parameters(trained):
            parameter.fill_(0.1)
    save_adapter(trained, tmp_path / "adapter")
    loaded = load_lvlm(tmp_path / "base", lora=tmp_path / "adapter")
    first, second = (lvlm_logits(loaded, "Why?", [], np.array([5, 6])) for _ in range(2))
    assert torch.equal(first, second)


def test_a_second_adapter_is_refused(tmp_path: Path) -> None:
    write_text_model(tmp_path, text_config())
    model = load_text_model(tmp_path, lora=LoRAConfig(r=2, alpha=32.0))
    with pytest.raises(InputError, match="a model without an adapter"):
        add_lora(model, LoRAConfig(r=2, alpha=32.0))


def test_an_unmerged_adapter_is_not_saved_as_a_model(tmp_path: Path) -> None:
    write_text_model(tmp_path / "text", text_config())
    write_lvlm(tmp_path / "lvlm")
    text = load_text_model(tmp_path / "text", lora=LoRAConfig(r=2, alpha=32.0))
    lvlm = load_lvlm(tmp_path / "lvlm", lora=LoRAConfig(r=2, alpha=32.0))
    with pytest.raises(InputError, match="merge_lora"):
        save_text_model(text, tmp_path / "out")
    with pytest.raises(InputError, match="merge_lora"):
        save_lvlm(lvlm, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_lora(text)
    save_text_model(text, tmp_path / "out")
    with pytest.raises(InputError, match="a model with an adapter"):
        save_adapter(text, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_head_beside_a_tied_embedding_must_be_the_same(tmp_path: Path) -> None:
    write_text_model(tmp_path, text_config(tie_word_embeddings=True))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file, metadata={"format": "pt"})
    load_text_model(tmp_path)
    save_file({**tensors, "lm_head.weight": embedding + 1.0}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight.*ties the two"):
        load_text_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(text: str, tmp_path: Path) -> None:
    write_text_model(tmp_path, text_config(), max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json.*weight_map"):
        load_text_model(tmp_path)


def test_a_missing_tokenizer_or_image_processor_is_named(tmp_path: Path) -> None:
    write_lvlm(tmp_path / "blind")
    (tmp_path / "blind" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"blind.*image processor"):
        load_lvlm(tmp_path / "blind")
    write_text_model(tmp_path / "mute", text_config())
    for file in (tmp_path / "mute").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"mute.*tokenizer"):
        load_text_model(tmp_path / "mute")


def test_the_processor_s_template_goes_before_the_text_model_s(tmp_path: Path) -> None:
    """As in LLaVA-NeXT on Mistral: tokenizer_config.json holds a template that knows nothing of images."""
    write_lvlm(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    own = tokenizer()
    own.chat_template = "{% for message in messages %}[INST] {{ message['content'] + '' }} [/INST]{% endfor %}"
    own.save_pretrained(tmp_path, save_jinja_files=False)
    assert not (tmp_path / "chat_template.jinja").exists()
    (tmp_path / "chat_template.json").write_text(
        '{"chat_template": "[INST] {% for part in messages[0].content %}{% if part.type == \'image\' %}<image>\\n'
        '{% else %}{{ part.text }}{% endif %}{% endfor %} [/INST]"}'
    )
    model = load_lvlm(tmp_path)
    image = random_image(np.random.default_rng(0), 30, 20)
    prompt = model.encode_prompt("Why?", [image])
    assert (prompt == model.image_token_id).sum() == 9
    kept = prompt[prompt != model.image_token_id]
    assert model.tokenizer.decode(kept).split() == ["[INST]", "Why?", "[/INST]"]


@pytest.mark.parametrize("sizes", [[(301, 7)], [(7, 301)], [(1, 1)], [(200, 9), (33, 70), (24, 24)]])
def test_any_resolution_packs_as_transformers_does(sizes: list[tuple[int, int]], tmp_path: Path) -> None:
    theirs = write_lvlm(tmp_path, kind="llava_next", seed=4)
    ours = load_lvlm(tmp_path)
    rng = np.random.default_rng(len(sizes) + sum(sizes[0]))
    images = [random_image(rng, *size) for size in sizes]
    response = random_tokens(rng, 5)
    logits = lvlm_logits(ours, "Which is red?", images, response)
    assert_close(logits, oracle_logits(theirs, ours, "Which is red?", images, response))


def test_the_hash_of_a_model_is_of_its_config_and_its_weights_whatever_its_directory(tmp_path: Path) -> None:
    write_text_model(tmp_path / "one", text_config())
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    whole = model_hash(tmp_path / "one")
    content = (tmp_path / "one" / "config.json").read_bytes() + (tmp_path / "one" / "model.safetensors").read_bytes()
    assert whole == hashlib.sha256(content).hexdigest() == model_hash(tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert model_hash(tmp_path / "copy") != whole
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1e-3}, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    assert model_hash(tmp_path / "one") != whole
