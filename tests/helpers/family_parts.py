"""What small checkpoints of all families are made of: sizes, chat templates, tokenizers, random weights."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

VOCABULARY = 320
END = "<|im_end|>"
SPECIAL = {"<pad>": 0, "<|im_start|>": 1, END: 2}  # of every family; an image's placeholder is token 10
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}%IMAGE%{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
USER_ASSISTANT = (  # as the models of Hugging Face's M4 team have it
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}"
    "{% for part in m.content %}{% if part.type == 'image' %}%IMAGE%{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ m.role | upper }}: {% for part in m.content %}{% if part.type == 'image' %}%IMAGE%"
    "{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {**TOWER, "image_size": 32, "patch_size": 4}
DYNAMIC = {  # Qwen's towers
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


@dataclass(frozen=True)
class Family:
    """A model that is not yet random, and all that its processor is made of.

    Attributes:
        tokens: special tokens beside SPECIAL, and their ids.
        image: what the chat template writes for an image.
        processor: contents of processor_config.json.
        named: the tokenizer's names of special tokens, which some processors ask for.
        first: the token that the tokenizer puts before a text, unless the chat template wrote it.
    """

    model: Any
    image_processor: Any
    tokens: dict[str, int]
    image: str
    template: str = CHAT
    processor: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    first: str | None = None


def of_its_module(kind: Any) -> Any:
    """The class as its module has it: of the package's, transformers 5.17 says that some need torchvision, which they do not."""
    return getattr(importlib.import_module(kind.__module__), kind.__name__)


def randomise(model: Any, seed: int) -> None:
    """Draw every parameter, large enough that norms, gates, biases and projections all show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter += 0.1 * drawn
            else:
                parameter.copy_((0.5 if "embed" in name else 0.1) * drawn)
    model.eval().requires_grad_(False)


def byte_tokenizer(family: Family) -> Any:
    """Return a tokenizer of bytes and special tokens."""
    vocabulary = SPECIAL | family.tokens
    free = iter(sorted({*range(VOCABULARY)} - {*vocabulary.values()}))
    letters = {letter: next(free) for letter in sorted(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocabulary | letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    more = [token for token in vocabulary if token not in ("<pad>", END)]
    backend.add_special_tokens([*vocabulary])
    options: dict[str, Any] = {"extra_special_tokens": family.named} if family.named else {}
    if first := family.first:
        pairs = [(first, vocabulary[first])]
        backend.post_processor = processors.TemplateProcessing(f"{first} $A", special_tokens=pairs)
        options["bos_token"] = first
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token="<pad>", additional_special_tokens=more, **options
    )
