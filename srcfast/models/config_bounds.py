"""Check what torch and transformers take from a checkpoint's files against a table of bounds, before either reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import parse_object, regular
from srcfast.errors import InputError
from srcfast.models.foreign_code import BOUNDS as FOREIGN
from srcfast.models.foreign_code import FOREIGN_FILES

FILES = tuple(
    f"{name}.json"
    for name in ("config preprocessor_config processor_config tokenizer_config generation_config".split())
)
OTHER_MEDIA = ("video_processor", "feature_extractor", "audio_processor")  # sections of processors that are never built
MOST_BYTES = 1 << 26  # of such a file; a tokenizer_config.json of many added tokens has a few millions
Bound = tuple[Callable[[Any], bool], str]  # whether a value is within bounds, and what is expected
ANYTHING: Bound = (lambda value: True, "")
FLAG: Bound = (lambda value: value is None or isinstance(value, bool), "true or false")


def whole(least: int, most: int) -> Bound:
    """Return whether a value is a whole number within bounds, and what is expected, in words."""
    return lambda value: type(value) is int and least <= value <= most, f"a whole number from {least:,} to {most:,}"


def number(least: float, most: float) -> Bound:
    return lambda value: type(value) in (int, float) and least <= value <= most, f"a number from {least:g} to {most:g}"


def one_or(kind: Bound, *lengths: int) -> Bound:
    """Return the check of a value or of a list, at any depth, or a mapping of such values."""

    def fits(value: Any) -> bool:
        parts = [*value.values()] if isinstance(value, dict) else value
        if not isinstance(parts, list):
            return kind[0](value)
        return 0 < len(parts) <= 1024 and (not lengths or len(parts) in lengths) and all(fits(part) for part in parts)

    return fits, kind[1] + (f", or {' or '.join(map(str, lengths))} of them" if lengths else ", or several")


def or_none(kind: Bound) -> Bound:
    return lambda value: value is None or kind[0](value), f"{kind[1]}, or null"


# Well above the values of any published model: a file with others is damaged, or made to exhaust memory. An image of the longest
# sides takes 200 MB as floats; a smaller epsilon rounds to 0 in 32 bits; the deviation divides, and images have three channels.
SIDE, AREA, PATCH, COUNT = whole(1, 1 << 12), whole(1, 1 << 26), whole(1, 1 << 14), whole(1, 1 << 16)
FIELDS: dict[str, Bound] = {
    "hidden_size": COUNT,
    "intermediate_size": one_or(whole(1, 1 << 18)),
    "num_hidden_layers": whole(1, 1024),
    "num_attention_heads": one_or(whole(1, 1024)),
    "num_key_value_heads": or_none(one_or(whole(1, 1024))),
    "head_dim": or_none(whole(1, 4096)),
    "vocab_size": whole(1, 1 << 22),
    "max_position_embeddings": whole(1, 1 << 28),
    "sliding_window": (lambda value: value is False or or_none(whole(1, 1 << 28))[0](value), "a whole number above 0, or null"),
    "rms_norm_eps layer_norm_eps norm_eps layer_norm_epsilon norm_epsilon": number(1e-20, 1),
    "rope_theta rope_local_base_freq": or_none(number(1, 1e11)),
    "factor": or_none(number(1e-3, 1e4)),  # of rotary positions
    "partial_rotary_factor": or_none(number(1e-3, 1)),
    "logits_scaling logit_scale embedding_multiplier residual_multiplier attention_multiplier": or_none(number(1e-9, 1e9)),
    "final_logit_softcapping attn_logit_softcapping": or_none(number(1e-9, 1e9)),
    "return_dict": (lambda value: value is None or value is True, "true"),
    "torchscript": (lambda value: not value, "false"),  # it makes models return tuples
    "model_max_length": or_none(number(1, 1e31)),  # 1e30 where transformers knows none
    "vision_feature_layer": or_none(one_or(whole(-1024, 1024))),
    "image_mean": or_none(one_or(number(-1e3, 1e3), 3)),
    "image_std": or_none(one_or(number(1e-3, 1e3), 3)),
    "rescale_factor": or_none(number(1e-6, 1e3)),
    "resample": or_none(whole(0, 5)),  # Pillow has six
    "image_size patch_size": or_none(one_or(PATCH)),
    "crop_size pad_size max_image_size min_image_size tile_size image_grid_pinpoints split_resolutions": or_none(one_or(SIDE)),
    "size min_pixels max_pixels": or_none(one_or(AREA)),  # `vision.load_image_processor` bounds sides
    "merge_size spatial_merge_size temporal_patch_size": or_none(whole(1, 64)),
    "max_patches min_patches max_image_tiles max_num_tiles": or_none(COUNT),
    "image_seq_length image_seq_len num_additional_image_tokens": or_none(whole(0, 1 << 16)),
}  # fmt: skip
TABLE = {name: bound for names, bound in FIELDS.items() for name in names.split()} | FOREIGN
TOKEN, PADDING = or_none(one_or(whole(0, 1 << 22))), or_none(one_or(whole(-1, 1 << 22)))  # -1: none
ENDS = {"pad_token_id": PADDING, "_token_id": TOKEN, "_token_index": TOKEN}  # of fields' names


def check_files(path: Path) -> None:
    """Check each JSON file of a checkpoint that transformers reads.

    Raises:
        InputError: a file is no JSON object, or too large, or a field, at any depth, is out of bounds; both are named.
    """
    for file in (path / name for name in FOREIGN_FILES if (path / name).exists()):
        raise InputError(file=file, expected="no such file: it makes transformers fetch", found="one", fix="remove it")
    for file in (path / name for name in FILES if (path / name).exists()):
        try:
            if (size := regular(file).stat().st_size) > MOST_BYTES:
                raise ValueError(f"{size:,} bytes")
            settings = parse_object(file.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(file=file, expected="a model's config in JSON", found=error) from error
        for field, value, expected in _misfits(settings, ""):
            foreign = field.rpartition(".")[2] in FOREIGN
            fix = "remove the field, if you trust the rest of the checkpoint" if foreign else None
            raise InputError(file=file, field=field, expected=expected, found=repr(value), fix=fix)


def _misfits(settings: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (name with its sections, value, what is expected) of the fields that are out of bounds, at any depth."""
    entries = dict(enumerate(settings)) if isinstance(settings, list) else settings
    for key, value in entries.items() if isinstance(entries, dict) else ():
        name = str(key)
        ending = next((bound for end, bound in ENDS.items() if name.endswith(end)), ANYTHING)
        fits, expected = TABLE.get(name, FLAG if name.startswith("do_") else ending)
        if not fits(value):
            yield prefix + name, value, expected
        elif name not in OTHER_MEDIA and name not in FOREIGN:
            yield from _misfits(value, f"{prefix}{name}.")
    if isinstance(settings, dict):
        yield from _contradictions(settings, prefix)


def _contradictions(settings: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Yield as `_misfits` the fields of a section that do not fit others, all of which are within bounds."""
    heads, groups = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        yield f"{prefix}num_key_value_heads", groups, f"a divisor of the {heads} attention heads"
    text = settings.get("text_config", settings)
    size = text.get("vocab_size") if isinstance(text, dict) else None
    # Of the other ids transformers writes its families' defaults, which no embedding looks up.
    names = ["image_token_id", "image_token_index"] + (["pad_token_id"] if text is settings else [])
    for name, value in ((name, settings.get(name)) for name in names):
        if isinstance(size, int) and isinstance(value, int) and value >= size:
            yield prefix + name, value, f"a token of the vocabulary, below {size}"


def position_limit(config: Any) -> int:
    """Return how many positions a text config's model has, scaled ones included; where it names none, a bound on all."""
    most = getattr(config, "max_position_embeddings", None) or 1 << 28
    scaling = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    kind = scaling.get("rope_type", scaling.get("type"))
    original = scaling.get("original_max_position_embeddings") or most
    if kind in ("dynamic", "longrope"):  # beyond these, all angles depend on the longest row of a pass
        return int(original)
    return max(most, int(original * (scaling.get("factor") or 1))) if kind in ("linear", "yarn") else most
