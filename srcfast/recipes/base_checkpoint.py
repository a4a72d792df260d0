"""Create small Hugging Face checkpoints: the embedded LVLM and R-Scorer before training, and their tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from srcfast.data.jsonl import write_json
from srcfast.models import LVLM, TextModel
from srcfast.models.text_model import load_tokenizer, save_text_model

IMAGE_SIZE = 72  # pixels a side: the world's 3 x 3 cells of 24 pixels each
PATCH_SIZE = 12  # pixels: 2 x 2 patches a cell, so 36 image tokens
TAGS = ("<see>", "</see>", "<think>", "</think>", "<answer>", "</answer>")
# No space or newline at the image: each would cost one more token in byte-level BPE.
LVLM_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER:"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %} "
    "{% else %}ASSISTANT: {{ message['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, *, single_digits: bool = False
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on `texts`: words of the world become single tokens, and any other text still encodes.

    With `single_digits` each digit of a number is a token, the first one together with the space before it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    if single_digits:  # "Ġ" is how byte-level BPE writes a space
        split = pre_tokenizers.Split(Regex("Ġ?[0-9]"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, split])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A tag takes the space before it, so that each costs one token. Tags aren't special tokens: decoding must return them.
    tokenizer.add_tokens([AddedToken(tag, lstrip=True, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=2048,
    )


def new_lvlm(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int,
    num_layers: int,
    vision_layers: int,
    seed: int,
    vision_size: int = 128,
    image_size: int = IMAGE_SIZE,
    patch_size: int = PATCH_SIZE,
) -> None:
    """Write a randomly initialised `LlavaForConditionalGeneration` with processor and tokenizer to `directory`.

    Its decoder is a small Llama, its vision tower CLIP's: heads of 32, MLPs three times as wide as the hidden states.
    """
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_size,
            intermediate_size=3 * vision_size,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_size // 32,
            image_size=image_size,
            patch_size=patch_size,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 32,
            num_key_value_heads=hidden_size // 32,
            max_position_embeddings=2048,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(image_size // patch_size) ** 2,
        tie_word_embeddings=False,
    )
    LlavaForConditionalGeneration(config).save_pretrained(directory)
    tokenizer.chat_template = LVLM_CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size=size, crop_size=size, resample=3).save_pretrained(directory)
    # What transformers' AutoProcessor needs beside these; srcfast reads it from config.json.
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # the class token, which the strategy leaves out
        "patch_size": patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    write_json(directory / "processor_config.json", processor)


@torch.no_grad()
def take_decoder(model: LVLM, source: LVLM) -> None:
    """Copy a trained decoder of the same size into a model with another tokenizer.

    Rows of embedding and head go by token: a token that the source's tokenizer splits gets the mean of its parts.
    """
    known, parts = source.tokenizer.get_vocab(), []
    for index, token in enumerate(model.tokenizer.convert_ids_to_tokens(list(range(len(model.tokenizer))))):
        text = model.decode([index])
        parts.append([known[token]] if token in known else source.tokenizer.encode(text, add_special_tokens=False))
    weights = source.decoder.state_dict()
    by_token = (model.decoder.embed_tokens.weight, model.decoder.head_weight)  # [tokens, hidden] each
    for name, parameter in model.decoder.named_parameters():
        if any(parameter is each for each in by_token):
            parameter.copy_(torch.stack([weights[name][rows].mean(0) for rows in parts]))
        else:
            parameter.copy_(weights[name])


def decoder_as_text_model(model: LVLM, directory: Path) -> None:
    """Write an LVLM's decoder and tokenizer as a `LlamaForCausalLM` checkpoint."""
    config = model.vision.config.text_config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    tokenizer = load_tokenizer(model.path)
    tokenizer.chat_template = None  # the R-Scorer's prompts are plain text
    tokenizer.save_pretrained(directory)
    save_text_model(TextModel(model.decoder, tokenizer, directory), directory)
