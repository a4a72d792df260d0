"""Prompts are planned from the images' sizes, which headers say: they are the processor's own, and no pixel is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.families import FAMILIES
from helpers.family_models import FamilyModels
from helpers.further_families import VERSION
from helpers.published_configs import write_published
from PIL import Image
from transformers import AutoConfig

from srcfast.data.images import ImageFile, image_file
from srcfast.models.placeholders import ImageTexts
from srcfast.models.processor import image_inputs, image_token_id, load_processor

GetFamily = Callable[[str], FamilyModels]
# Those of whose images nothing is processed, since the processor counts positions by size; of some others a blank image is.
COUNTING = (
    *(
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_5",
        "video_llama_3",
        "glm4v",
        "glm46v",
        "glm_ocr",
        "gemma3",
    ),
    *("internvl", "qianfan_ocr", "llava_llama", "llava_next", "llava_onevision", "exaone4_5", "lighton_ocr"),
)
BY_SIZE = (*COUNTING, "smolvlm", "idefics3", "aya_vision", "deepseek_vl", "paddleocr_vl")


def files(directory: Path, rng: np.random.Generator, count: int) -> list[ImageFile]:
    """Image files of random sizes from 8 to 600 pixels a side, of which the headers are read."""
    sizes = np.exp(rng.uniform(np.log(8), np.log(600), (count, 2))).astype(int)
    for number, (height, width) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.{'jpg' if number % 2 else 'png'}")
    return [image_file(directory, file.name) for file in sorted(directory.iterdir())]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_by_size_are_those_of_the_processor_by_pixels(
    name: str, family: GetFamily, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if VERSION < (5, 18) and name in ("janus", "ovis2"):
        pytest.skip("the processors of this version of transformers say no positions by size for Janus and Ovis 2")
    ours, images = family(name).ours, files(tmp_path, rng, 6)
    turns = [images[:1], images[1:2], images[2:3], images[3:4], images[4:6]]
    own = [ours.processor_inputs("what?", [image.load() for image in turn])["input_ids"][0].tolist() for turn in turns]
    texts = ours.image_texts
    assert texts.max_images == (1 if name == "llava_onevision" else math.inf) or name not in BY_SIZE

    def refuse(self: ImageFile) -> Image.Image:
        raise AssertionError(f"{self.name} was decoded")

    if texts.max_images == math.inf:
        monkeypatch.setattr(ImageFile, "load", refuse)
    if name in COUNTING:
        monkeypatch.setattr(texts, "_processed", lambda size: pytest.fail("a blank image was processed"))
    assert [ours.encode_prompt("what?", turn).tolist() for turn in turns] == own


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B", "Qwen3-VL-4B", "Qwen3.5-0.8B", "InternVL3-8B", "Gemma3-4B"])
def test_published_processors_count_what_they_write(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    path = write_published(name, tmp_path)
    config = AutoConfig.from_pretrained(path)
    processor = load_processor(path, config.model_type)
    texts = ImageTexts(processor, processor.tokenizer.convert_ids_to_tokens(image_token_id(config)))
    assert texts.max_images == math.inf
    for size in ((640, 480), (1024, 768), (5, 900), *np.exp(rng.uniform(np.log(20), np.log(1200), (5, 2))).astype(int)):
        image = Image.new("RGB", tuple(map(int, size)))
        own = image_inputs(processor, image)["input_ids"][0]
        assert texts.token_ids(texts.placeholder, [image]).tolist() == np.asarray(own).tolist()


def test_a_processor_that_counts_wrongly_is_found_out(family: GetFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = family("qwen3_vl").ours
    counts = type(ours.processor)._get_num_multimodal_tokens
    for wrong in (lambda count, size: count + size[0][1] // 50, lambda count, size: 1):

        def miscount(self: object, image_sizes: list[tuple[int, int]], wrong: Callable = wrong) -> object:
            right = counts(self, image_sizes=image_sizes)
            right.num_image_tokens[0] = wrong(right.num_image_tokens[0], image_sizes)
            return right

        monkeypatch.setattr(type(ours.processor), "_get_num_multimodal_tokens", miscount)
        texts = ImageTexts(ours.processor, ours.image_token)
        image = Image.new("RGB", (61, 88))
        own = ours.processor_inputs("", [image])["input_ids"][0].tolist()
        assert (
            texts.token_ids(ours.chat_text(ours.prompt_messages("", 1, None)), [image]).tolist() == own
        )  # by a blank image of this size
