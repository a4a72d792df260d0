"""A text-only decoder with its tokenizer, on which an R-Scorer is built."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, ProcessorMixin

from srcfast import distributed
from srcfast.attention.forest_attention import forest_attend
from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest
from srcfast.data.jsonl import replacing
from srcfast.errors import InputError
from srcfast.models.checkpoint import (
    WEIGHTS,
    check_weight_count,
    companions,
    fill,
    read_config,
    read_tensors,
    save_tensors,
)
from srcfast.models.decoder import Decoder, DecoderConfig, is_handwritten_text
from srcfast.models.lora import apply_lora, check_no_adapter
from srcfast.models.pretrained import check_runs, load_pretrained, refusing_other_forms
from srcfast.models.quantized import quantize_linears
from srcfast.models.self_check import check_text_model
from srcfast.models.sharding import shard_layers
from srcfast.models.transformers_decoder import TransformersDecoder
from srcfast_kernels.transfers import to_device


class TextModel(nn.Module):
    """A causal language model with its tokenizer: hand-written for Llama, Mistral, Qwen2 and Qwen3, else transformers' own."""

    adapter_path: Path | None = None

    def __init__(self, decoder: Decoder | TransformersDecoder, tokenizer: Any, path: Path) -> None:
        super().__init__()
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.path = path
        self.adapter_prefix = "model"  # of its layers' names in transformers

    def forward(self, forest: Forest, rows: Tensor | None = None) -> Tensor:
        """Compute hidden states [T, D] of a forest, or those of `rows` [M] alone (int64, ascending, on the host): [M, D]."""
        embeddings, attend = self.decoder.embed_forest(forest), forest_attend(forest, rows=rows)
        if rows is None:
            return self.decoder(embeddings, forest.positions, attend)
        return self.decoder(embeddings, forest.positions, attend, to_device(rows, forest.token_ids.device))


def load_text_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    lora: str | Path | LoRAConfig | None = None,
) -> TextModel:
    """Read a Hugging Face directory of a causal LM.

    Args:
        path: directory with config.json, safetensors (single or sharded) and tokenizer.
        lora: a PEFT adapter's directory, or a LoRAConfig for a new, trainable adapter.

    Raises:
        InputError: another architecture, or a tensor that is missing, unexpected or misshaped.
    """
    config = read_config(path)
    if not is_handwritten_text(config):
        return _load_general(Path(path), config, dtype, device, lora)
    decoder = build_decoder(config, path, device, dtype)
    tensors = (("language", name.removeprefix("model."), tensor) for name, tensor in read_tensors(path))
    fill({"language": decoder}, decoder_tensors(decoder, tensors, path), path)
    model = TextModel(decoder, load_tokenizer(path), Path(path)).to(device)
    model.requires_grad_(False)
    model.eval()
    apply_lora(model, lora)
    return model


def _load_general(
    path: Path, config: Any, dtype: torch.dtype, device: str | torch.device, lora: str | Path | LoRAConfig | None
) -> TextModel:
    """Read a causal language model of transformers that the hand-written decoder does not have. Raises InputError."""
    check_runs(config, path)
    whole = load_pretrained(AutoModelForCausalLM, path, config, dtype, device=device)
    tokenizer = load_tokenizer(path)
    with refusing_other_forms(path, config):
        whole.to(device)  # buffers, too: weights are there
        decoder = TransformersDecoder(whole)
        model = TextModel(decoder, tokenizer, path)
        model.requires_grad_(False)
        model.eval()
        decoder.observe_layers()
        check_text_model(model, whole)
    apply_lora(model, lora)
    return model


def save_text_model(model: TextModel, directory: str | Path) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` reads.

    Raises:
        InputError: the model has an adapter that is not merged.
    """
    check_no_adapter(model)
    directory = Path(directory)
    if isinstance(model.decoder, TransformersDecoder):
        model.decoder.save(directory)
        return copy_companions(model.path, directory)
    tensors = {
        name if name.startswith("lm_head") else f"model.{name}": tensor
        for name, tensor in model.decoder.state_dict().items()
    }
    save_tensors(directory / WEIGHTS, tensors)
    copy_companions(model.path, directory)


def build_decoder(
    config: Any,
    path: str | Path,
    device: str | torch.device,
    dtype: torch.dtype,
    quantize: str | None = None,
    shard: bool = False,
) -> Decoder:
    """Build a decoder of a transformers text config, with memory allocated but not set (`fill` sets all of it).

    With `shard` its layers are sharded over the ranks of this node, and each rank allocates its shards alone.

    Raises:
        InputError: another architecture; the config's file and field are named.
    """
    shard = shard and distributed.world_size() > 1
    decoder = _sketch_decoder(config, Path(path) / "config.json", dtype, quantize, flat=shard)
    if torch.device(device).type == "meta":
        return decoder
    check_weight_count([decoder], path)
    if shard:
        shard_layers(decoder, device)
    return decoder.to_empty(device=device)


def _sketch_decoder(config: Any, file: Path, dtype: torch.dtype, quantize: str | None, flat: bool) -> Decoder:
    """Build a decoder that takes no memory yet. Raises InputError naming the config's file."""
    try:
        with torch.device("meta"):  # no time for initial values, no fp32 copy of what is loaded in bf16
            decoder = Decoder(DecoderConfig.from_huggingface(config)).to(dtype=dtype)
            if quantize == "nf4":
                quantize_linears(decoder, flat=flat)
            return decoder
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise InputError(file=file, expected="settings of a decoder", found=found) from error
    except InputError as error:  # of a field, without its file
        expected, found = error.expected, error.found
        raise InputError(file=file, field=error.field, expected=expected, found=found, fix=error.fix) from error


def decoder_tensors(
    decoder: Decoder, tensors: Iterable[tuple[str, str, Tensor]], path: str | Path
) -> Iterator[tuple[str, str, Tensor]]:
    """Filter (part, name, values): leave out rotary frequencies, and the head where it is tied to the embedding.

    Raises:
        InputError: a tied head differs from the embedding; raised after the last tensor, when the embedding is filled.
    """
    head = None
    for part, name, tensor in tensors:
        if part == "language" and name == "lm_head.weight" and decoder.config.tie_embeddings:
            head = tensor
        elif not name.endswith("rotary_emb.inv_freq"):
            yield part, name, tensor
    if head is not None and not torch.equal(decoder.head_weight, head.to(decoder.head_weight)):
        raise InputError(
            file=path,
            field="lm_head.weight",
            expected="the embedding itself, as config.json ties the two",
            found="other values",
            fix="set tie_word_embeddings to false in config.json",
        )


def load_tokenizer(path: str | Path) -> Any:
    """Load the checkpoint's tokenizer, without remote code, with the chat template that transformers' processors read first.

    Raises:
        InputError: a file is missing or damaged, or the tokenizer names no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a file that it can't read
        found = f"{type(error).__name__}: {error}"
        raise InputError(file=path, expected="a tokenizer beside the model", found=found) from error
    if tokenizer.eos_token_id is None:
        expected = "a tokenizer with an end token"
        raise InputError(file=path, field="eos_token", expected=expected, found="none", fix="name it")
    try:
        settings, _ = ProcessorMixin.get_processor_dict(path)
    except Exception as error:  # of any class, for files of other fields, or that contradict each other
        expected, found = "one template, in JSON or Jinja", f"{type(error).__name__}: {error}"
        raise InputError(file=path, field="chat_template", expected=expected, found=found) from error
    tokenizer.chat_template = settings.get("chat_template") or tokenizer.chat_template
    return tokenizer


def copy_companions(source: Path, target: Path) -> None:
    """Copy config, tokenizer, processor and template files: everything in JSON, Jinja or text but the weights' index."""
    target.mkdir(parents=True, exist_ok=True)
    for file in companions(source):
        if file.resolve() != (target / file.name).resolve():
            with replacing(target / file.name) as copy, open(file, "rb") as opened:
                shutil.copyfileobj(opened, copy)
