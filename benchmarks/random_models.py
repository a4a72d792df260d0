"""Checkpoints of any shape with random weights, and records to go with them: what the benchmarks of whole stages run on.

An LVLM and a text model, as transformers writes them, with a tokenizer whose words are single tokens, random images, and
texts of known length. One dimension of the residual stream is held constant, so that the head can give the end token and the
full stop chances of their own: what such a model writes ends, and is made of sentences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from srcfast.data.jsonl import write_jsonl
from srcfast.data.records import Preference, Sample
from srcfast.models.processor import load_processor
from srcfast.recipes.base_checkpoint import train_tokenizer

CONSTANT = 1.0  # what the held dimension of the residual stream is, and
GAIN = 4.0  # what the last norm makes of it, on average: the head's column there, times this, is a bias on the logits

# TRL hands an assistant's words over in parts, too.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'USER:' if message['role'] == 'user' else 'ASSISTANT:' }}"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Qwen3-VL's own, by transformers' name in its config; taken from the unused tokens of the vocabulary.
QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_TEMPLATE = CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")


@dataclass(frozen=True)
class ModelShape:
    """A LLaVA-1.5, or without `image_size` a Llama, or a Qwen3-VL. `deviation` is that of the random weights."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    vocabulary: int
    image_size: int = 0  # pixels a side
    patch_size: int = 14
    vision_hidden_size: int = 128
    vision_layers: int = 4
    deviation: float = 0.06
    end_probability: float = 0.0  # a token; 0: as likely as any other
    stop_probability: float = 0.0  # of a full stop, a token
    dtype: str = "float32"
    kv_heads: int = 0  # of keys and values; 0: as many as of queries
    family: str = "llava"  # or qwen3_vl, which makes one position of four patches


# 64 image tokens, five million parameters: what two cores can train.
SMALL = ModelShape(256, 688, 4, 8, 2048, image_size=64, patch_size=8)
# As Qwen3-VL-4B and 8B: four heads of queries to one of keys, features of three layers of the tower added to the first layers.
SMALL_QWEN3_VL = ModelShape(256, 688, 4, 8, 2048, image_size=128, patch_size=8, kv_heads=2, family="qwen3_vl")
SMALL_JUDGE = ModelShape(256, 688, 4, 8, 2048)
LLAVA_7B = ModelShape(4096, 11008, 32, 32, 32064, 336, 14, 1024, 24, deviation=0.02, dtype="bfloat16")
JUDGE_1B = ModelShape(2048, 5632, 22, 32, 32064, deviation=0.02, dtype="bfloat16")
# Qwen2.5-1.5B with a smaller vocabulary: a judge reads a few rows of the head.
JUDGE_1_5B = ModelShape(1536, 8960, 28, 12, 32064, deviation=0.02, dtype="float16", kv_heads=2)


def write_model(directory: Path, shape: ModelShape, device: str = "cpu", seed: int = 0) -> Path:
    """A checkpoint directory of this shape; one that is there already is taken as it is."""
    done = directory / "shape.json"
    if done.is_file() and json.loads(done.read_text()) == asdict(shape):
        return directory
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(shape.vocabulary, tuple(QWEN_TOKENS.values()) if shape.family == "qwen3_vl" else ())
    model = build_model(shape, tokenizer, device)
    decoder = model.model.language_model if shape.image_size else model.model
    _hold_a_dimension(decoder, model, tokenizer, shape)
    model.to(getattr(torch, shape.dtype)).save_pretrained(directory)
    write_companions(directory, shape, tokenizer)
    done.write_text(json.dumps(asdict(shape)))
    return directory


def build_model(shape: ModelShape, tokenizer: PreTrainedTokenizerFast, device: str) -> Any:
    """A model of transformers of this shape, with the weights that transformers starts from (none on the device "meta")."""
    text: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads or shape.heads,
        "max_position_embeddings": 4096,
        "initializer_range": shape.deviation,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    with torch.device(device):
        if shape.family == "qwen3_vl":
            return Qwen3VLForConditionalGeneration(_qwen3_vl(shape, text, tokenizer))
        if shape.image_size:
            return LlavaForConditionalGeneration(_llava(shape, LlamaConfig(**text), tokenizer))
        return LlamaForCausalLM(LlamaConfig(**text))


def write_companions(directory: Path, shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the files of the tokenizer and of the image processor."""
    if shape.family == "qwen3_vl":
        tokenizer.chat_template = QWEN_TEMPLATE
        pixels = shape.image_size**2
        Qwen2VLImageProcessorPil(
            patch_size=shape.patch_size, merge_size=2, size={"shortest_edge": pixels, "longest_edge": pixels}
        ).save_pretrained(directory)
    elif shape.image_size:
        tokenizer.chat_template = CHAT_TEMPLATE
        _llava_processor(shape, tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def shape_of(directory: Path) -> ModelShape:
    """The shape that `write_model` wrote a checkpoint in."""
    return ModelShape(**json.loads((directory / "shape.json").read_text()))


def processor_of(directory: Path, *, padding_side: str = "right") -> Any:
    """The processor of a checkpoint that `write_model` wrote, which transformers and TRL take texts and images through."""
    shape = shape_of(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side=padding_side)
    if shape.family != "qwen3_vl":
        return _llava_processor(shape, tokenizer)
    processor = load_processor(directory, shape.family)  # without its part for videos, which needs torchvision
    processor.tokenizer = tokenizer
    return processor


def _llava_processor(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    size = {"height": shape.image_size, "width": shape.image_size}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size, resample=3),
        tokenizer,
        patch_size=shape.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _llava(shape: ModelShape, text: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden_size,
        intermediate_size=4 * shape.vision_hidden_size,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_hidden_size // 64,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(shape.image_size // shape.patch_size) ** 2,
        tie_word_embeddings=False,
    )


def _qwen3_vl(shape: ModelShape, text: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    sections = shape.hidden_size // shape.heads // 2  # of time, height and width, which share out half of a head
    width = height = sections // 3
    return Qwen3VLConfig(
        text_config=text
        | {
            "head_dim": shape.hidden_size // shape.heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [sections - height - width, height, width],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "hidden_size": shape.vision_hidden_size,
            "intermediate_size": 4 * shape.vision_hidden_size,
            "out_hidden_size": shape.hidden_size,
            "depth": shape.vision_layers,
            "num_heads": shape.vision_hidden_size // 64,
            "patch_size": shape.patch_size,
            "num_position_embeddings": (shape.image_size // shape.patch_size) ** 2,
            "deepstack_visual_indexes": list(range(min(3, shape.vision_layers, shape.layers))),
        },
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()},
    )


@torch.no_grad()
def _hold_a_dimension(decoder: Any, model: Any, tokenizer: PreTrainedTokenizerFast, shape: ModelShape) -> None:
    """Dimension 0 is CONSTANT at every position and after every layer; the head's column there biases the logits."""
    decoder.embed_tokens.weight[:, 0] = CONSTANT
    if shape.family == "qwen3_vl":
        visual = model.model.visual
        for merger, value in ((visual.merger, CONSTANT), *((one, 0.0) for one in visual.deepstack_merger_list)):
            merger.linear_fc2.weight[0], merger.linear_fc2.bias[0] = 0.0, value
    elif shape.image_size:
        model.model.multi_modal_projector.linear_2.weight[0] = 0.0
        model.model.multi_modal_projector.linear_2.bias[0] = CONSTANT
    for layer in decoder.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    drawn = torch.randint(10, shape.vocabulary, (1, 128), device=decoder.norm.weight.device)
    decoder.norm.weight[0] = GAIN / decoder(drawn).last_hidden_state[0, :, 0].mean()
    bias_head(model.lm_head.weight, tokenizer, shape)


@torch.no_grad()
def bias_head(head: torch.Tensor, tokenizer: PreTrainedTokenizerFast, shape: ModelShape) -> None:
    """Change a head [V, D] in place so that the end token and the full stop get the shape's probabilities, by dimension 0."""
    head[:, 0] = 0.0
    variance = head[:, 1:].float().var(dim=1).mean().item() * shape.hidden_size  # of the logits
    spread = 0.5 * variance  # log of the mean of exp of normal logits
    chances = {tokenizer.eos_token_id: shape.end_probability, _stop(tokenizer): shape.stop_probability}
    for token, chance in chances.items():
        if chance:
            head[token, 1:] = 0.0
            head[token, 0] = (math.log(chance * shape.vocabulary) + spread) / GAIN
    special = tokenizer.convert_tokens_to_ids(["<image>", *QWEN_TOKENS.values()])
    for token in (tokenizer.pad_token_id, tokenizer.bos_token_id, *(token for token in special if token is not None)):
        head[token] = 0.0
        head[token, 0] = -30.0 / GAIN  # never written


def _stop(tokenizer: PreTrainedTokenizerFast) -> int:
    return tokenizer("a.", add_special_tokens=False).input_ids[-1]


def word_tokenizer(vocabulary: int, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Words of two or three syllables, each a single token, to fill a vocabulary of this size, and further special tokens."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = sorted({"".join(rng.choice(syllables, rng.integers(2, 4))) for _ in range(2 * vocabulary)})
    grades = " 1 2 3 4 5" * vocabulary  # so often that each is a token: a judge's verdicts
    tokenizer = train_tokenizer(
        (f"{' '.join(rng.permutation(words))}.{grades}" for _ in range(3)), vocabulary - 8 - len(special)
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    fill = vocabulary - len(tokenizer)
    tokenizer.add_tokens([f"<unused{number}>" for number in range(fill)])
    return tokenizer


def words_of(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Words that are one token each."""
    found = (token[1:] for token in tokenizer.get_vocab() if token.startswith("\u0120") and len(token) > 4)
    return sorted(word for word in found if word.isalpha())


def texts(words: list[str], rng: np.random.Generator, least: int, most: int) -> Iterator[str]:
    """Texts of `least` to `most` tokens, evenly drawn."""
    while True:
        yield " ".join(rng.choice(words, rng.integers(least, most + 1)))


def write_images(directory: Path, count: int, side: int, rng: np.random.Generator) -> list[str]:
    """Random pictures, smooth enough to compress; their names."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.png" for number in range(count)]
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side)).save(directory / name)
    return names


def write_records(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    *,
    image_side: int,
    prompt_words: tuple[int, int] = (10, 20),
    response_words: tuple[int, int] = (9, 59),
    seed: int = 0,
) -> tuple[list[Sample], list[Preference]]:
    """Samples with a rationale, and a preference pair each, with an image of their own.

    `response_words` and one for the end token are the tokens of a response; chosen and rejected are drawn apart.
    """
    rng = np.random.default_rng(seed)
    words = words_of(tokenizer)
    images = write_images(directory / "images", count, image_side, rng)
    questions, responses = texts(words, rng, *prompt_words), texts(words, rng, *response_words)
    samples, pairs = [], []
    for number, image in enumerate(images):
        question, chosen, rejected = next(questions), next(responses), next(responses)
        root = directory / "images"
        samples.append(Sample(str(number), (image,), question, "yes", rationale=f"{chosen}.", image_root=root))
        pairs.append(Preference(str(number), (image,), question, chosen, rejected, image_root=root))
    write_jsonl(directory / "samples.jsonl", (sample.to_json() for sample in samples))
    write_jsonl(directory / "pairs.jsonl", (pair.to_json() for pair in pairs))
    return samples, pairs
