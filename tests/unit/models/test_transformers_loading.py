"""What the general backbone reads of a checkpoint, what it refuses by name, and what never becomes a control token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES, REFUSED
from helpers.family_models import FamilyModels, random_images
from helpers.further_families import UNTESTED, WITH_TORCHVISION
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from srcfast.errors import InputError
from srcfast.models import load_lvlm
from srcfast.models.pretrained import check_runs, meta_model
from srcfast.models.transformers_decoder import text_model

GetFamily = Callable[[str], FamilyModels]


@pytest.fixture
def directory(family: GetFamily, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    shutil.copytree(family("internvl").path, tmp_path / "copy")
    return tmp_path / "copy"


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


LAYER = "layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, name: tensors.pop(name), rf"{LAYER}.*no missing tensors"),
        (lambda tensors, name: tensors.update({f"{name}_2": torch.zeros(2)}), rf"{LAYER}_2.*no unexpected tensors"),
        (lambda tensors, name: tensors.update({name: torch.zeros(3, 5)}), rf"field '[\w.]*{LAYER}'.*no mismatched"),
        (lambda tensors, name: tensors[name][3, 4].fill_(float("nan")), rf"{LAYER}.*finite numbers.*1 of 6,144"),
    ],
    ids=["missing", "unexpected", "misshaped", "not finite"],
)
def test_a_tensor_that_does_not_fit_is_named(
    edit: Callable[[dict[str, torch.Tensor], str], object], message: str, quantize: str | None, directory: Path
) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors, next(name for name in tensors if name.endswith(LAYER)))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"(?s){message}"):
        load_lvlm(directory, quantize=quantize)


def test_pickled_weights_are_not_read(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"safetensors"):
        load_lvlm(directory)


def test_code_of_a_checkpoint_is_not_run(directory: Path) -> None:
    (directory / "evil.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\n")
    names = {"AutoConfig": "evil.C", "AutoModelForImageTextToText": "evil.M", "AutoProcessor": "evil.P"}
    change(directory / "config.json", auto_map=names)
    change(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.T"]})
    change(directory / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.I"})
    load_lvlm(directory)
    assert not (directory / "ran").exists()


def test_what_is_no_lvlm_is_refused_by_name(directory: Path) -> None:
    change(directory / "config.json", model_type="llama")
    with pytest.raises(InputError, match=r"config\.json.*model_type.*found llama"):
        load_lvlm(directory)


def test_a_prompt_is_refused_by_what_is_wrong_with_it(
    family: GetFamily, directory: Path, rng: np.random.Generator
) -> None:
    ours, image = family("internvl").ours, random_images(rng)["first"]
    assert {"<IMG_CONTEXT>", "<img>", "<|im_start|>", "<|im_end|>"} <= {*ours.control_tokens}
    for token in ours.control_tokens:
        with pytest.raises(InputError, match=r"s-7.*question.*text without"):
            ours.encode_prompt(f"what is {token}?", [image], "s-7")
    with pytest.raises(InputError, match=r"s-8.*fewer than 1024 prompt tokens.*images included"):
        ours.encode_prompt("x" * 1000, [image], "s-8")
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(InputError, match=r"images|chat_template"):
        load_lvlm(directory)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "smolvlm", "glm4v", "llava_next"])
def test_a_response_s_text_never_becomes_a_control_token(name: str, family: GetFamily) -> None:
    ours = family(name).load()
    special = {*ours.tokenizer.all_special_ids, ours.image_token_id}
    for token in ours.control_tokens:
        ids = ours.encode_response(f"a {token} b").tolist()
        assert not special & {*ids[:-1]} and ids[-1] == ours.end_token_id
        assert ours.decode(ids) == f"a {token} b"


def test_every_type_of_transformers_is_tested_or_refused_or_listed_with_a_reason() -> None:
    makers = [*FAMILIES.values(), *(make for make, _ in REFUSED.values())]
    tested = {make().model.config.model_type for make in makers} | {*WITH_TORCHVISION}
    refused = {name: message for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if (message := refusal(name))}
    types = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    assert types - tested - refused.keys() <= UNTESTED.keys()
    assert not UNTESTED.keys() & tested
    for name, needed in (
        ("qwen4_exp", "layers other than attention"),
        ("mllama", "cross-attention"),
        ("florence2", "an encoder"),
        ("blip", "takes encoded images"),
        ("blip-2", "found blip-2"),
        ("kimi_k25", "latent attention"),
        ("llama4", "chunked_attention"),
    ):
        assert needed in refused[name]


OTHER_FORM = ("blip-2", "instructblip", "instructblipvideo")  # no language model of layers as others have it


def refusal(name: str) -> str | None:
    """What is said of the default config of a model type, or of its model, before weights are read."""
    sections = {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}}
    config = AutoConfig.for_model(name, **(sections if name == "vision-encoder-decoder" else {}))
    try:
        check_runs(config, Path())
        if name in OTHER_FORM:
            text_model(meta_model(AutoModelForImageTextToText, Path(), config))
    except InputError as error:
        return str(error)
    return None
