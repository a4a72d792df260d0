"""The LVLM against transformers' LLaVA-1.5 and LLaVA-NeXT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_checkpoints import (
    SIDE,
    assert_close,
    lvlm_logits,
    oracle_logits,
    random_image,
    random_tokens,
    reload,
    text_config,
    tokenizer,
    write_lvlm,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaProcessor

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import InputError
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.models.lvlm import LLAVA_TEMPLATE, save_lvlm

SHAPES: dict[str, dict[str, Any]] = {
    "LLaVA-1.5": {},
    "all positions of the tower": {"vision_feature_select_strategy": "full"},
    "last layer": {"vision_feature_layer": -1},
    "several layers": {"vision_feature_layer": [-2, -1]},
    "SigLIP": {"tower": "siglip", "vision_feature_select_strategy": "full"},
    "Qwen2 decoder": {"text": text_config("qwen2")},
    "tied head": {"text": text_config(tie_word_embeddings=True), "tie_word_embeddings": True},
    "LLaVA-NeXT": {"kind": "llava_next"},
    "LLaVA-NeXT, SigLIP": {"kind": "llava_next", "tower": "siglip", "vision_feature_select_strategy": "full"},
    "LLaVA-NeXT, Mistral": {"kind": "llava_next", "text": text_config("mistral")},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str, tmp_path: Path) -> None:
    theirs = write_lvlm(tmp_path, seed=len(shape), **SHAPES[shape])
    ours = load_lvlm(tmp_path)
    rng = np.random.default_rng(len(shape))
    response = random_tokens(rng, 7)
    for sizes in ([(31, 45)], [(24, 24), (70, 13)], []):
        images = [random_image(rng, *size) for size in sizes]
        logits = lvlm_logits(ours, "What is left of the red square?", images, response)
        assert_close(logits, oracle_logits(theirs, ours, "What is left of the red square?", images, response))


def test_the_images_change_the_logits(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    ours = load_lvlm(tmp_path)
    rng = np.random.default_rng(0)
    one, other = (lvlm_logits(ours, "Why?", [random_image(rng, 24, 24)], np.array([5])) for _ in range(2))
    assert float((one - other).abs().max()) > 0.05


@pytest.mark.parametrize(
    "size", [(24, 24), (25, 24), (301, 7), (7, 301), (1, 1), (48, 47), (200, 199), (33, 70), (500, 3)]
)
@pytest.mark.parametrize("shape", ["LLaVA-NeXT", "LLaVA-NeXT, SigLIP"])
def test_the_placeholders_are_as_many_as_the_embeddings(
    shape: str, size: tuple[int, int], tmp_path_factory: pytest.TempPathFactory, loaded: dict[str, Any]
) -> None:
    if shape not in loaded:
        directory = tmp_path_factory.mktemp("next")
        write_lvlm(directory, **SHAPES[shape])
        loaded[shape] = load_lvlm(directory)
    image = random_image(np.random.default_rng(size), *size)
    (embeddings,) = loaded[shape].encode_images([image])
    assert loaded[shape].vision.num_tokens(image) == len(embeddings)


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_other_layouts_of_the_keys_read_alike(kind: str, tmp_path: Path) -> None:
    write_lvlm(tmp_path, kind=kind)
    ours = load_lvlm(tmp_path)
    image = random_image(np.random.default_rng(1), 40, 30)
    expected = lvlm_logits(ours, "Why?", [image], np.array([5]))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    bare = {name.replace("language_model.model.", "model.language_model."): t for name, t in tensors.items()}
    layouts = {
        "before transformers 4.52": {
            name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in tensors.items()
        },
        "in memory": {
            name.removeprefix("language_model.") if "lm_head" in name
            else name if name.startswith("model.")
            else f"model.{name}": t
            for name, t in bare.items()
        },
    }  # fmt: skip
    for layout, renamed in layouts.items():
        assert set(renamed) != set(tensors), layout
        save_file(renamed, file, metadata={"format": "pt"})
        assert torch.equal(lvlm_logits(load_lvlm(tmp_path), "Why?", [image], np.array([5])), expected), layout


@pytest.mark.parametrize("shape", ["LLaVA-1.5", "SigLIP", "tied head", "LLaVA-NeXT"])
def test_a_saved_lvlm_is_transformers_own(shape: str, tmp_path: Path) -> None:
    write_lvlm(tmp_path / "there", seed=5, **SHAPES[shape])
    ours = load_lvlm(tmp_path / "there")
    save_lvlm(ours, tmp_path / "here")
    theirs, report = reload(tmp_path / "here")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    images = [random_image(np.random.default_rng(2), 50, 20)]
    response = np.array([7, 8, 9])
    logits = lvlm_logits(ours, "Why?", images, response)
    assert_close(logits, oracle_logits(theirs, ours, "Why?", images, response))
    assert torch.equal(lvlm_logits(load_lvlm(tmp_path / "here"), "Why?", images, response), logits)


def test_a_saved_lvlm_may_be_narrower(tmp_path: Path) -> None:
    write_lvlm(tmp_path / "there")
    save_lvlm(load_lvlm(tmp_path / "there"), tmp_path / "here", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "here" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("template", ["own", "none", "beside"])
def test_a_prompt_is_what_transformers_processor_makes(template: str, tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    tokens = tokenizer()
    ours = load_lvlm(tmp_path)
    own = ours.tokenizer.chat_template
    if template != "own":
        (tmp_path / "chat_template.jinja").unlink()
        if template == "beside":  # where processors of transformers 4 kept it
            own = "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
            own += "[<image>]{% else %}Q: {{ part['text'] }}{% endif %}{% endfor %}{% endfor %} A:"
            (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": own}))
        else:
            own = LLAVA_TEMPLATE
        ours = load_lvlm(tmp_path)
    processor = LlavaProcessor(
        image_processor=ours.vision.processor,
        tokenizer=tokens,
        patch_size=SIDE // 3,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=own,
    )
    rng = np.random.default_rng(3)
    for count in (0, 1, 2):
        images = [random_image(rng, 30, 40) for _ in range(count)]
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "How many rings are red?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        expected = processor(text=text, images=images or None, return_tensors="np")["input_ids"][0]
        assert ours.encode_prompt("How many rings are red?", images).tolist() == expected.tolist()


def test_the_template_of_llava_1_5_reads_as_its_authors_wrote_it(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    ours = load_lvlm(tmp_path)
    prompt = ours.encode_prompt("Why?", [Image.new("RGB", (9, 9))])
    places = prompt == ours.image_token_id
    assert places.sum() == 9
    collapsed = prompt[~(places & np.roll(places, 1))]
    expected = ours.tokenizer("USER: <image>\nWhy? ASSISTANT:").input_ids
    assert collapsed.tolist() == expected


def test_a_processor_s_own_directory_loads(tmp_path: Path) -> None:
    """transformers 5 writes the image processor into processor_config.json."""
    write_lvlm(tmp_path)
    before = load_lvlm(tmp_path)
    processor = LlavaProcessor(
        image_processor=before.vision.processor,
        tokenizer=before.tokenizer,
        patch_size=SIDE // 3,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=before.tokenizer.chat_template,
    )
    (tmp_path / "preprocessor_config.json").unlink()
    processor.save_pretrained(tmp_path)
    image = random_image(np.random.default_rng(4), 30, 30)
    after = load_lvlm(tmp_path)
    assert torch.equal(after.encode_images([image])[0], before.encode_images([image])[0])
    assert after.encode_prompt("Why?", [image]).tolist() == before.encode_prompt("Why?", [image]).tolist()


def test_a_response_ends_with_the_end_token_and_decodes_to_itself(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    ours = load_lvlm(tmp_path)
    text = "<see> a blue circle. </see> <answer> 3 </answer>"
    tokens = ours.encode_response(text)
    assert tokens[-1] == ours.end_token_id and (tokens == ours.end_token_id).sum() == 1
    assert ours.decode(tokens).replace(" ", "") == text.replace(" ", "")  # a tag swallows the space before it
    tags = ours.tokenizer.convert_tokens_to_ids(["<see>", "</see>", "<answer>", "</answer>"])
    assert [token for token in tokens.tolist() if token in tags] == tags


@pytest.mark.parametrize("word", ["<image>", "</s>", "<pad>"])
def test_text_never_becomes_a_control_token(word: str, tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    ours = load_lvlm(tmp_path)
    tokens = ours.encode_response(f"a {word} b")
    special = set(ours.tokenizer.all_special_ids) | {ours.image_token_id}
    assert not special & set(tokens[:-1].tolist())


@pytest.mark.parametrize("word", ["</s>", "<s>"])
def test_a_control_token_in_a_question_is_refused(word: str, tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    with pytest.raises(InputError, match=rf"(?s)sample-7.*without {word}"):
        load_lvlm(tmp_path).encode_prompt(f"What is {word}?", [], "sample-7")


def test_a_prompt_without_room_is_refused_not_cut(tmp_path: Path) -> None:
    write_lvlm(tmp_path, text=text_config(max_position_embeddings=40))
    ours = load_lvlm(tmp_path)
    image = Image.new("RGB", (9, 9))
    length = len(ours.encode_prompt("Why?", [image]))
    assert length < 40
    with pytest.raises(InputError, match="fewer than 40 prompt tokens"):
        ours.encode_prompt("Why?" + " red" * (40 - length), [image], "sample-8")


def test_a_template_that_drops_an_image_is_refused(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    ours = load_lvlm(tmp_path)
    ours.tokenizer.chat_template = "USER: {{ messages[0]['content'][-1]['text'] }} ASSISTANT:"
    with pytest.raises(InputError, match="1 image placeholders"):
        ours.encode_prompt("Why?", [Image.new("RGB", (9, 9))])


def test_embeddings_that_are_fewer_than_placeholders_are_refused(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    ours = load_lvlm(tmp_path)
    image = Image.new("RGB", (9, 9))
    forest = Forest.of([Tree((Segment(ours.encode_prompt("Why?", [image])),), ("a",))])
    with pytest.raises(InputError, match="9 image positions"):
        ours(forest, {"a": ours.encode_images([image])[0][:-1]})


def test_another_family_is_named(tmp_path: Path) -> None:
    from helpers.small_checkpoints import write_text_model

    write_text_model(tmp_path, text_config())
    with pytest.raises(InputError, match="(?s)images and text.*llama"):
        load_lvlm(tmp_path)


def test_a_missing_tensor_of_the_tower_is_named(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("multi_modal_projector.linear_2.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 missing: multi_modal_projector\.linear_2\.bias"):
        load_lvlm(tmp_path)


def test_nothing_but_an_adapter_is_ever_trained(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    ours = load_lvlm(tmp_path)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


def test_a_tower_s_own_dropout_never_acts(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    ours = load_lvlm(tmp_path)
    image = random_image(np.random.default_rng(3), 31, 45)
    (expected,) = ours.vision([image])
    for layer in ours.vision.model.modules():
        if hasattr(layer, "dropout"):
            layer.dropout = 0.9
    assert ours.train().decoder.training
    assert torch.equal(ours.vision([image])[0], expected)


def test_each_distinct_image_is_encoded_once_while_it_is_kept(tmp_path: Path) -> None:
    write_lvlm(tmp_path, kind="llava_next")
    ours = load_lvlm(tmp_path)
    rng = np.random.default_rng(5)
    images = {name: random_image(rng, *size) for name, size in zip("abcde", rng.integers(5, 90, (5, 2)), strict=True)}
    asked: list[str] = []

    def load(key: str) -> Image.Image:
        asked.append(key)
        return images[key]

    features = ImageFeatures(ours, load, batch_size=2)
    features(["a", "b", "a"])
    found = features(["c", "b", "d", "a", "e", "c"])
    assert sorted(asked) == list("abcde") and features.encoded == 5
    for key, image in images.items():
        (alone,) = ours.encode_images([image])
        # batched and single products add in another order: fp32 rounding over the tower's few layers
        torch.testing.assert_close(found[key], alone, rtol=1e-4, atol=1e-5)


def test_kept_images_stay_within_their_memory_and_the_least_recent_leaves(tmp_path: Path) -> None:
    write_lvlm(tmp_path)
    ours = load_lvlm(tmp_path)
    rng = np.random.default_rng(6)
    images = {name: random_image(rng, 24, 24) for name in "abc"}
    one = ours.encode_images([images["a"]])[0].nbytes
    features = ImageFeatures(ours, images.__getitem__, max_bytes=2 * one)
    features(["a"]), features(["b"]), features(["a"])
    assert features.encoded == 2
    features(["c"])  # b leaves: a was used after it
    features(["a"])
    assert features.encoded == 3
    features(["b"])
    assert features.encoded == 4
    assert len(features(["a", "b", "c"])) == 3  # more than fits is still given
    images |= {name: random_image(rng, 24, 24) for name in "defgh"}
    assert len(features("defgh")) == 5
    assert features.missing("abcdefgh") == list("abcdef")  # as many leave as must
    features.clear()
    assert features.missing("gh") == ["g", "h"]
    features("efgh")
    assert features.missing("efgh") == ["e", "f"]
