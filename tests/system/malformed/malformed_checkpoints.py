"""Malformed checkpoint directories and adapters: a sound one of a few thousand weights, and one change each."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from malformed_case import Case

ASSETS = Path(__file__).parents[3] / "srcfast" / "world" / "assets"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYER = "model.layers.0"
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (512, 8),
    "lm_head.weight": (512, 8),
    "model.norm.weight": (8,),
    f"{LAYER}.input_layernorm.weight": (8,),
    f"{LAYER}.post_attention_layernorm.weight": (8,),
    f"{LAYER}.self_attn.q_proj.weight": (8, 8),
    f"{LAYER}.self_attn.k_proj.weight": (4, 8),
    f"{LAYER}.self_attn.v_proj.weight": (4, 8),
    f"{LAYER}.self_attn.o_proj.weight": (8, 8),
    f"{LAYER}.mlp.gate_proj.weight": (12, 8),
    f"{LAYER}.mlp.up_proj.weight": (12, 8),
    f"{LAYER}.mlp.down_proj.weight": (8, 12),
}
Q = f"{LAYER}.self_attn.q_proj.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "lora_dropout": 0.0}
ADAPTED = f"base_model.model.{LAYER}.self_attn.q_proj"
ADAPTER_SHAPES: dict[str, tuple[int, ...]] = {f"{ADAPTED}.lora_A.weight": (2, 8), f"{ADAPTED}.lora_B.weight": (8, 2)}
Content = bytes | str | Callable[[], bytes] | None  # of a file; a function makes it when it is needed; None: no file
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1}


def framed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def tensor_file(shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str] | None = None, byte: int = 0) -> bytes:
    """A safetensors file of fp32 tensors, or of the dtypes named, each byte the same."""
    header, at = {}, 0
    for name, shape in shapes.items():
        dtype = (dtypes or {}).get(name, "F32")
        size = math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return framed(json.dumps(header).encode(), bytes([byte]) * at)


def odd_number(value: float, dtype: str = "float32", name: str = Q) -> bytes:
    """A safetensors file of the sound model, one of whose numbers is this one."""
    import torch
    from safetensors.torch import save

    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    tensors[name].view(-1)[-1] = value
    return save(tensors)


def four_bits(change: dict[str, Any], settings: dict[str, Any]) -> bytes:
    """A safetensors file of the sound model with one weight as bitsandbytes quantises it, some of it replaced."""
    import torch
    from safetensors.torch import save

    from srcfast_kernels import nf4_quantize
    from srcfast_kernels.nf4 import nf4_state_dict

    parts = nf4_state_dict(nf4_quantize(torch.ones(8, 8)))
    told = json.loads(bytes(parts["quant_state.bitsandbytes__nf4"].tolist())) | settings
    parts["quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    parts |= {key: torch.tensor(values) for key, values in change.items()}
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items() if name != Q}
    return save(tensors | {f"{Q}.{key}" if key else Q: value for key, value in parts.items()})


SOUND = tensor_file(SHAPES)
SOUND_ADAPTER = tensor_file(ADAPTER_SHAPES, byte=0x3C)  # not 0: such an adapter changes nothing


def model(files: Mapping[str, Content], more: Callable[[Path], None] | None = None) -> Callable[[Path], Path]:
    """Makes the sound text model with some files replaced, or (None) left out."""

    def make(folder: Path) -> Path:
        place = folder / "model"
        place.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            os.symlink(ASSETS / "scorer" / name, place / name)
        _write(place, {"config.json": json.dumps(CONFIG), WEIGHTS: SOUND, **files})
        if more is not None:
            more(place)
        return place

    return make


def lvlm(
    change: dict[str, Any], left_out: str = "", files: Mapping[str, Content] | None = None
) -> Callable[[Path], Path]:
    """Makes the embedded LVLM with some settings of config.json replaced (dotted), or a file left out."""

    def make(folder: Path) -> Path:
        place = folder / "lvlm"
        place.mkdir()
        for file in (ASSETS / "base").iterdir():
            if file.name not in ("config.json", left_out):
                os.symlink(file, place / file.name)
        config = json.loads((ASSETS / "base" / "config.json").read_text())
        for key, value in change.items():
            part, _, name = key.rpartition(".")
            (config[part] if part else config)[name] = value
        _write(place, {"config.json": json.dumps(config), **(files or {})})
        return place

    return make


def adapter(files: dict[str, bytes | str | None] | None = None, **settings: Any) -> Callable[[Path], Path]:
    """Makes the sound text model, and beside it its adapter with some settings or files replaced; `...` leaves one out."""

    def make(folder: Path) -> Path:
        model({})(folder)
        place = folder / "adapter"
        place.mkdir()
        told = {key: value for key, value in (ADAPTER_CONFIG | settings).items() if value is not ...}
        own = {"adapter_config.json": json.dumps(told), "adapter_model.safetensors": SOUND_ADAPTER}
        _write(place, own | (files or {}))
        return place

    return make


def blind() -> bytes:
    """The embedded LVLM's weights with one number of the vision tower that is none."""
    import torch
    from safetensors.torch import load, save

    tensors: dict[str, torch.Tensor] = load((ASSETS / "base" / WEIGHTS).read_bytes())
    name = max(name for name in tensors if "vision_tower" in name)
    tensors[name].view(-1)[0] = math.nan
    return save(tensors)


def _write(place: Path, files: Mapping[str, Content]) -> None:
    for name, content in files.items():
        (place / name).unlink(missing_ok=True)
        data = content() if callable(content) else content
        if data is not None:
            (place / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def read_model(path: Path) -> None:
    from srcfast.models.text_model import load_text_model

    load_text_model(path)


def read_judge(path: Path) -> None:
    from srcfast.models.verdict_temperature import read_calibration

    read_calibration(path, "complete", "choice")


def read_model_in_half(path: Path) -> None:
    import torch

    from srcfast.models.text_model import load_text_model

    load_text_model(path, dtype=torch.float16)


def read_lvlm(path: Path) -> None:
    from srcfast.models import load_lvlm

    load_lvlm(path)


def read_adapter(path: Path) -> None:
    from srcfast.models.text_model import load_text_model

    load_text_model(path.parent / "model", lora=path)


def hash_adapter(path: Path) -> None:
    from srcfast.models.lora import adapter_hash

    adapter_hash(path)


def _index(told: Any) -> dict[str, bytes | str | None]:
    return {INDEX: told if isinstance(told, bytes | str) else json.dumps(told), WEIGHTS: None}


def _shards(place: Path) -> None:
    """Two shards with one tensor in both."""
    names = list(SHAPES)
    for file, own in (("a.safetensors", names[:6]), ("b.safetensors", names[5:])):
        (place / file).write_bytes(tensor_file({name: SHAPES[name] for name in own}))


def _without(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in SHAPES.items() if key != name}


TWICE = framed(
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    bytes(4),
)
HEADERS: dict[str, bytes] = {
    "no byte": b"",
    "7 bytes": b"\x08\0\0\0\0\0\0",
    "a header cut off": SOUND[:200],
    "data cut off": SOUND[:-8],
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header that is no JSON": framed(b"{'a': 1}"),
    "a header that is a list": framed(b"[]"),
    "a header that is not UTF-8": framed(b'{"\xff": 1}'),
    "a header of 10,000 brackets": framed(b"[" * 10_000),
    "a name twice": TWICE,
    "a tensor without a shape": framed(b'{"a":{"dtype":"F32","data_offsets":[0,4]}}', bytes(4)),
    "a tensor of an unknown type": framed(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "a tensor outside of the file": framed(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', bytes(4)),
    "a shape below 0": framed(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
    "a shape beyond its bytes": framed(b'{"a":{"dtype":"F32","shape":[1048576],"data_offsets":[0,4]}}', bytes(4)),
    "bytes behind the data": SOUND + b"more",
}
TENSORS: dict[str, tuple[bytes, str]] = {
    "a tensor missing": (tensor_file(_without(Q)), "missing"),
    "no tensor": (framed(b"{}"), "its files hold"),
    "a tensor too many": (tensor_file(SHAPES | {"model.more.weight": (3,)}), "unexpected"),
    "a tensor turned": (tensor_file(SHAPES | {f"{LAYER}.mlp.up_proj.weight": (8, 12)}), "shape [12, 8]"),
    "a tensor of one dimension": (tensor_file(SHAPES | {Q: (64,)}), "shape [8, 8]"),
    "whole numbers for weights": (tensor_file(SHAPES, {Q: "I64"}), "int64"),
    "truth values for weights": (tensor_file(SHAPES, {Q: "BOOL"}), "bool"),
    "8 bits without a scale": (tensor_file(SHAPES, {Q: "F8_E4M3"}), "float8"),
    "bytes without scales": (tensor_file(SHAPES, {Q: "U8"}), "NF4"),
}
ODD_NUMBERS: dict[str, tuple[float, str, str]] = {
    "a weight of NaN": (math.nan, "float32", Q),
    "a weight of Infinity": (math.inf, "float32", Q),
    "a weight of -Infinity in 64 bits": (-math.inf, "float64", Q),
    "a weight of NaN in float16": (math.nan, "float16", "model.embed_tokens.weight"),
    "a weight of -Infinity in bfloat16": (-math.inf, "bfloat16", "model.norm.weight"),
    "a head with a NaN": (math.nan, "bfloat16", "lm_head.weight"),
}
NF4: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a scale of NaN": ({"nested_absmax": [math.nan]}, {}, "nested_absmax"),
    "a scale of Infinity": ({"nested_absmax": [math.inf]}, {}, "nested_absmax"),
    "a mean of the scales that is Infinity": ({}, {"nested_offset": math.inf}, "NF4"),
    "a mean of the scales that is a list": ({}, {"nested_offset": [0.0, 1.0]}, "NF4"),
    "a mean of the scales in words": ({}, {"nested_offset": "small"}, "NF4"),
    "other codes": ({"quant_map": [0.0] * 16}, {}, "codes"),
    "a scale too many": ({"nested_absmax": [1.0, 1.0]}, {}, "nested_absmax"),
    "scales of scales that are whole numbers": ({"nested_absmax": [1]}, {}, "nested_absmax"),
    "scales in 64 bits": ({"absmax": [7]}, {}, "absmax"),
    "blocks of 0": ({}, {"blocksize": 0}, "blocks of 0"),
    "blocks of 10^12": ({}, {"blocksize": 10**12}, "blocks of"),
    "blocks in words": ({}, {"blocksize": "64"}, "blocks of"),
    "blocks smaller than the scales say": ({}, {"blocksize": 32}, "absmax"),
    "a shape that its codes don't have": ({}, {"shape": [8, 4096]}, "codes"),
    "a shape below 0": ({}, {"shape": [-8, -8]}, "shape [8, 8]"),
    "a shape beyond all": ({}, {"shape": [10**400]}, "NF4"),
    "no shape": ({}, {"shape": None}, "NF4"),
    "a type that is none": ({}, {"dtype": "mine"}, "NF4"),
    "a type that is a module": ({}, {"dtype": "nn"}, "NF4"),
    "settings that are no JSON": ({"quant_state.bitsandbytes__nf4": [255, 254]}, {}, "NF4"),
}
CONFIGS: dict[str, tuple[str | bytes | None, str]] = {
    "missing": (None, "config.json"),
    "empty": ("", "config"),
    "no JSON": ("{'a': 1}", "config"),
    "a list": ("[]", "config"),
    "not UTF-8": (b'{"a": "\xff"}', "config"),
    "10,000 brackets": ("[" * 10_000, "config"),
    "no model_type": ("{}", "config"),
    "a model_type that is a number": ('{"model_type": 3}', "config"),
}
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown model_type": ({"model_type": "mine"}, "config"),
    "a model_type that is not run": ({"model_type": "t5"}, "causal language model"),
    "hidden_size in words": ({"hidden_size": "eight"}, "hidden_size"),
    "hidden_size with a point": ({"hidden_size": 8.5}, "hidden_size"),
    "hidden_size of null": ({"hidden_size": None}, "hidden_size"),
    "hidden_size of 0": ({"hidden_size": 0, "head_dim": 4}, "hidden_size"),
    "hidden_size below 0": ({"hidden_size": -8}, "hidden_size"),
    "hidden_size of 10^12": ({"hidden_size": 10**12}, "hidden_size"),
    "hidden_size that the weights don't have": ({"hidden_size": 4096}, "its files hold"),
    "10^9 layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "a layer that the weights don't have": ({"num_hidden_layers": 2}, "missing"),
    "layers in a list": ({"num_hidden_layers": [1]}, "num_hidden_layers"),
    "no attention head": ({"num_attention_heads": 0}, "num_attention_heads"),
    "key heads that don't divide": ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
    "a head of 10^9": ({"head_dim": 10**9}, "head_dim"),
    "a vocabulary of 10^12": ({"vocab_size": 10**12}, "vocab_size"),
    "a vocabulary below 0": ({"vocab_size": -1}, "vocab_size"),
    "intermediate_size that is true": ({"intermediate_size": True}, "intermediate_size"),
    "no position": ({"max_position_embeddings": 0}, "max_position_embeddings"),
    "an unknown activation": ({"hidden_act": "sine"}, "hidden_act"),
    "rotary settings that are text": ({"rope_scaling": "linear"}, "config"),
    "an unknown rotary type": ({"rope_scaling": {"rope_type": "mine", "factor": 2.0}}, "config"),
    "an epsilon in words": ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    "a window": ({"model_type": "mistral", "sliding_window": -8}, "sliding_window"),
}
INDEXES: dict[str, Any] = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "not UTF-8": b"\xff",
    "no weight_map": {},
    "a weight_map that is a list": {"weight_map": ["a"]},
    "an empty weight_map": {"weight_map": {}},
    "a shard that is missing": {"weight_map": {Q: "none.safetensors"}},
    "a shard outside": {"weight_map": {Q: "../a.safetensors"}},
    "a shard by its full path": {"weight_map": {Q: "/etc/passwd"}},
    "a shard that is a number": {"weight_map": {Q: 3}},
    "a shard that is a list": {"weight_map": {Q: []}},
    "a shard with a NUL": {"weight_map": {Q: "a\0b"}},
    "a shard that is the folder": {"weight_map": {Q: "."}},
    "a name twice": '{"weight_map": {"a": "x", "a": "y"}}',
    "10,000 brackets": "[" * 10_000,
}
VISION: dict[str, tuple[dict[str, Any], str]] = {
    "a text model for an LVLM": ({"model_type": "llama"}, "model_type"),
    "a tower of 10^12": ({"vision_config.hidden_size": 10**12}, "vision_config.hidden_size"),
    "a tower of 10^9 layers": ({"vision_config.num_hidden_layers": 10**9}, "vision_config.num_hidden_layers"),
    "an image's side of null": ({"vision_config.image_size": None}, "vision_config.image_size"),
    "an image's sides as a list": ({"vision_config.image_size": [72, 72]}, "vision_config.image_size"),
    "a patch's sides as a list": ({"vision_config.patch_size": [12, 12]}, "vision_config.patch_size"),
    "tiles of one side": (
        {"model_type": "llava_next", "image_grid_pinpoints": [[72]]},
        "config.json, field 'image_grid_pinpoints'",
    ),
    "a patch of no pixel": ({"vision_config.patch_size": 0}, "vision_config.patch_size"),
    "a patch larger than the image": ({"vision_config.patch_size": 4096}, "vision_config.patch_size"),
    "an image larger than its weights": ({"vision_config.image_size": 8192}, "its files hold"),
    "a tower wider than its weights": (
        {"vision_config.hidden_size": 65536, "vision_config.intermediate_size": 262144},
        "its files hold",
    ),
    "a tower deeper than its weights": ({"vision_config.num_hidden_layers": 1000}, "its files hold"),
    "an image of 10^9 pixels": ({"vision_config.image_size": 10**9}, "vision_config.image_size"),
    "heads that don't divide": ({"vision_config.num_attention_heads": 7}, "multiple"),
    "an unknown tower": ({"vision_config.model_type": "mine"}, "config"),
    "a tower that is text": ({"vision_config": "clip"}, "config"),
    "an image token outside of the vocabulary": ({"image_token_id": 10**6}, "image_token_id"),
    "an image token below 0": ({"image_token_id": -1}, "image_token_id"),
    "an image token in words": ({"image_token_id": "<image>"}, "image_token_id"),
    "no such choice of features": ({"vision_feature_select_strategy": "mine"}, "config"),
    "a decoder of other tensors": ({"text_config.model_type": "gemma2"}, "post_feedforward_layernorm"),
    "a decoder's size of null": ({"text_config.hidden_size": None}, "text_config.hidden_size"),
}
ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "no rank": ({"r": ...}, "'r'"),
    "a rank of 0": ({"r": 0}, "'r'"),
    "a rank with a point": ({"r": 2.5}, "'r'"),
    "a rank in words": ({"r": "two"}, "'r'"),
    "a rank that is true": ({"r": True}, "'r'"),
    "a rank beyond all": ({"r": 10**9}, "'r'"),
    "another rank than the weights'": ({"r": 4}, "lora_A"),
    "no alpha": ({"lora_alpha": ...}, "lora_alpha"),
    "an alpha of 0": ({"lora_alpha": 0}, "lora_alpha"),
    "an alpha that is a list": ({"lora_alpha": [4]}, "lora_alpha"),
    "an alpha of NaN": ({"lora_alpha": float("nan")}, "finite"),
    "an alpha beyond all floats": ({"lora_alpha": 10**400}, "lora_alpha"),
    "a dropout of 1": ({"lora_dropout": 1}, "lora_dropout"),
    "a dropout of null": ({"lora_dropout": None}, "lora_dropout"),
    "another method": ({"peft_type": "IA3"}, "peft_type"),
    "a method that is a list": ({"peft_type": ["LORA"]}, "peft_type"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "ranks by pattern": ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    "modules saved whole": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "biases": ({"bias": "all"}, "bias"),
}
_A, _B = ADAPTER_SHAPES
ADAPTER_FILES: dict[str, tuple[bytes | None, str]] = {
    "no weights": (None, "safetensors"),
    "no byte": (b"", "safetensors"),
    "cut off": (SOUND_ADAPTER[:-5], "safetensors"),
    "a name twice": (TWICE, "there twice"),
    "no tensor": (framed(b"{}"), "an adapter's tensors"),
    "NaN weights": (tensor_file(ADAPTER_SHAPES, byte=0xFF), "finite numbers"),
    "whole numbers for weights": (tensor_file(ADAPTER_SHAPES, {_A: "I64"}), "int64"),
    "no lora_B": (tensor_file({_A: (2, 8)}), "lora_B"),
    "another base's width": (tensor_file({_A: (2, 16), _B: (16, 2)}), "another base"),
    "another base's layers": (
        tensor_file({name.replace("layers.0", "layers.7"): shape for name, shape in ADAPTER_SHAPES.items()}),
        "another base",
    ),
    "an unknown target": (
        tensor_file({name.replace("q_proj", "qkv"): shape for name, shape in ADAPTER_SHAPES.items()}),
        "target_modules",
    ),
    "an embedding's tensor": (tensor_file({"base_model.model.embed.lora_embedding_A": (2, 8)}), "of a decoder layer"),
    "the vision tower's": (
        tensor_file({"base_model.model.vision_tower.layers.0.q_proj.lora_A.weight": (2, 8)}),
        "the decoder only",
    ),
}
ADAPTER_CONFIGS: dict[str, str | bytes | None] = {
    "missing": None,
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "not UTF-8": b"\xff",
    "r twice": '{"r": 2, "r": 4}',
    "10,000 brackets": "[" * 10_000,
}


def _folder_for_config(place: Path) -> None:
    (place / "config.json").unlink()
    (place / "config.json").mkdir()


CALIBRATIONS = {  # of an R-Scorer's verdicts: the file's text, and what the error names
    "no JSON": ("{", "calibration.json"),
    "a list": ("[]", "calibration.json"),
    "a number": ('{"complete": 2}', "complete.temperature"),
    "no temperature": ('{"complete": {"verdict": "choice"}}', "complete.temperature"),
    "a temperature of 0": ('{"complete": {"verdict": "choice", "temperature": 0}}', "complete.temperature"),
    "a temperature below 0": ('{"complete": {"verdict": "choice", "temperature": -1}}', "complete.temperature"),
    "a temperature that is text": ('{"complete": {"verdict": "choice", "temperature": "1"}}', "complete.temperature"),
    "a temperature beyond all bounds": (
        '{"complete": {"verdict": "choice", "temperature": 1e300}}',
        "complete.temperature",
    ),
}


def cases() -> list[Case]:
    """All of them."""
    config, weights, index = "config.json", "Weights", "Weights' index"
    found = [
        Case(config, wrong, model({"config.json": text}), read_model, (word,))
        for wrong, (text, word) in CONFIGS.items()
    ]
    found.append(Case(config, "a folder", model({}, _folder_for_config), read_model, ("config.json",)))
    for wrong, (change, word) in FIELDS.items():
        make = model({"config.json": json.dumps(CONFIG | change)})
        found.append(Case(config, wrong, make, read_model, ("config.json", word) if word != "missing" else (word,)))
    found += [
        Case(weights, wrong, model({WEIGHTS: data}), read_model, (WEIGHTS, "safetensors"))
        for wrong, data in HEADERS.items()
    ]
    found += [
        Case(weights, wrong, model({WEIGHTS: data}), read_model, (word,)) for wrong, (data, word) in TENSORS.items()
    ]
    for wrong, (value, dtype, name) in ODD_NUMBERS.items():
        make = model({WEIGHTS: partial(odd_number, value, dtype, name)})
        found.append(Case(weights, wrong, make, read_model, (WEIGHTS, name, "finite numbers")))
    large = model({WEIGHTS: partial(odd_number, 1e6)})
    found.append(Case(weights, "a number beyond float16, read into it", large, read_model_in_half, (Q[6:], "float16")))
    for wrong, (change, settings, word) in NF4.items():
        make = model({WEIGHTS: partial(four_bits, change, settings)})
        found.append(Case("Weights in 4 bits", wrong, make, read_model, (Q[6:], word)))
    pickled: dict[str, bytes | str | None] = {WEIGHTS: None, "pytorch_model.bin": b"\x80\x02."}
    found += [
        Case(weights, "no file", model({WEIGHTS: None}), read_model, ("no weights",)),
        Case(weights, "a pickle", model(pickled), read_model, ("reads no pickle",)),
    ]
    found += [Case(index, wrong, model(_index(told)), read_model, (INDEX,)) for wrong, told in INDEXES.items()]
    for wrong, (told, word) in CALIBRATIONS.items():
        found.append(Case("An R-Scorer's calibration", wrong, model({"calibration.json": told}), read_judge, (word,)))
    both = _index({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
    found.append(Case(index, "a tensor in two shards", model(both, _shards), read_model, ("each tensor once",)))
    for wrong, text in (("missing", None), ("empty", ""), ("no JSON", "{"), ("a list", "[]"), ("an object", "{}")):
        make = model({"tokenizer.json": text, "tokenizer_config.json": None if text is None else "{}"})
        found.append(Case("Tokenizers", wrong, make, read_model, ("tokenizer",)))
    beside = model({"chat_template.json": "{}"})
    found.append(Case("Tokenizers", "a template file without a template", beside, read_model, ("chat_template",)))
    found += [
        Case("LVLM checkpoints", wrong, lvlm(change), read_lvlm, (word,)) for wrong, (change, word) in VISION.items()
    ]
    found += [
        Case(
            "LVLM checkpoints", "no image processor", lvlm({}, "preprocessor_config.json"), read_lvlm, ("preprocessor",)
        ),
        Case(
            "LVLM checkpoints",
            "an image processor that is a list",
            lvlm({}, files={"preprocessor_config.json": "[]"}),
            read_lvlm,
            ("preprocessor",),
        ),
        Case("LVLM checkpoints", "no weights", lvlm({}, WEIGHTS), read_lvlm, ("no weights",)),
        Case("LVLM checkpoints", "a tower with a NaN", lvlm({}, files={WEIGHTS: blind}), read_lvlm, ("vision_tower",)),
    ]
    found += [
        Case("Adapters", wrong, adapter(**settings), read_adapter, ("adapter", word))
        for wrong, (settings, word) in ADAPTERS.items()
    ]
    for wrong, (data, word) in ADAPTER_FILES.items():
        make = adapter({"adapter_model.safetensors": data})
        found.append(Case("Adapters", f"weights: {wrong}", make, read_adapter, (word,)))
    for wrong, told in ADAPTER_CONFIGS.items():
        make = adapter({"adapter_config.json": told})
        found.append(Case("Adapters", f"settings: {wrong}", make, read_adapter, ("adapter_config.json",)))
        found.append(Case("Adapters", f"settings, hashed: {wrong}", make, hash_adapter, ("adapter_config.json",)))
    return found
