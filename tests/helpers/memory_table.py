"""Forecast published models under all presets, and write docs/memory.md: PYTHONPATH=tests python -m helpers.memory_table"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, get_args

from helpers.published_configs import PUBLISHED, write_published
from helpers.shapes_7b import write_configs
from srcfast.config.load import load_config
from srcfast.config.settings import Preset
from srcfast.memory.advice import with_setting
from srcfast.memory.forecast import recomputed_layers
from srcfast.memory.plan import Lengths, forecast_stage, policy_sizes, typical_tree
from srcfast.units import parse_bytes

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
BEGIN, END = "<!-- written by helpers.memory_table -->", "<!-- end -->"
PRESETS = get_args(Preset)
GIB = 1 << 30
TRAINING_HEAD = ("model", "parameters", "image tokens", "NF4", "16 bits", *PRESETS)
DECODING_HEAD = ("model", *PRESETS)


def tables() -> str:
    """Return both tables: of preference training, and of sampling candidates."""
    training, decoding = [], []
    with tempfile.TemporaryDirectory() as folder:
        scorer = write_configs(Path(folder))[1]
        for name in PUBLISHED:
            paths = [f"model.path={write_published(name, Path(folder))}", f"scorer.path={scorer}"]
            configs = {preset: load_config(None, [f"preset={preset}", *paths]) for preset in PRESETS}
            training.append([*sizes(name, configs), *map(training_cell, configs.values())])
            decoding.append([name, *map(decoding_cell, configs.values())])
    return f"{rows(TRAINING_HEAD, training)}\n{rows(DECODING_HEAD, decoding)}"


def rows(head: tuple[str, ...], cells: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sizes(name: str, configs: dict[str, Any]) -> list[str]:
    """A model's parameters in 1e9, a typical image's positions, and its weights' GiB in 4 and 16 bits."""
    config, found = configs["12GiB"], []
    for quantize in ("nf4", "none"):
        model = policy_sizes(with_setting(config, "model.quantize", quantize))
        whole = model.weight_bytes + model.quantisation_bytes + model.waiting_bytes
        found.append(f"{whole / GIB:.1f}")
    assert model.vision is not None
    return [name, f"{sum(model.parameters.values()) / 1e9:.2f}", str(model.vision.image_tokens), *found]


def training_cell(config: Any) -> str:
    """The peak of preference training in GiB, the share of layers that is computed again, the token budget a pair needs."""
    memory = parse_bytes(config.memory)
    forecast = forecast_stage(config, "dpo", memory=memory)
    if not forecast.fits(memory):
        return "-"
    layers = policy_sizes(config).shapes.layers
    again = recomputed_layers(layers, forecast.checkpoint_every)
    tokens = typical_tree(config, "dpo", Lengths()).num_tokens
    notes = [f"{again}/{layers} again"] if again else []
    notes += [f"budget {tokens}"] if tokens > config.dpo.token_budget else []
    note = f" ({', '.join(notes)})" if notes else ""
    return f"{forecast.peak / GIB:.1f}{note}"


def decoding_cell(config: Any) -> str:
    """The peak of sampling candidates in GiB, with the preset's batch size or the largest one below that fits."""
    memory = parse_bytes(config.memory)
    for batch_size in range(config.candidates.batch_size, 0, -1):
        smaller = with_setting(config, "candidates.batch_size", batch_size)
        forecast = forecast_stage(smaller, "candidates", memory=memory)
        if forecast.fits(memory):
            note = "" if batch_size == config.candidates.batch_size else f" (batch_size {batch_size})"
            return f"{forecast.peak / GIB:.1f}{note}"
    return "-"


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
