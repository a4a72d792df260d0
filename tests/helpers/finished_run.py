"""A run directory as `srcfast calibrate` leaves it after one round, with made-up results: settings, manifest, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from helpers.made_up_run import make_run
from srcfast.config.load import load_config
from srcfast.config.yaml import dump_yaml
from srcfast.run.directory import RunDirectory


def finished_run(path: Path, base: str, words: tuple[str, ...] = ()) -> Path:
    """Write the run and return its directory; `base`: what the settings and the adapters call the base."""
    make_run(path)
    config = load_config(None, [f"model.path={base}", f"output={path.parent}", f"name={path.name}", "lora.r=8", *words])
    (path / "config.yaml").write_text(dump_yaml(config.model_dump(mode="json"), sort_keys=False))
    (path / "metrics.jsonl").unlink()
    run = RunDirectory(path)
    stages: dict[str, dict[str, Any]] = {
        "rationale": {"pairs": 1200},
        "iteration-1/preferences": {"funnel": {"samples": 640}},
        "iteration-1/dpo": {"pairs": 512},
    }
    for number in (0, 1):
        write_adapter(run.adapter(number), base, number + 1.0)
    summary = json.loads((path / "summary.json").read_text())
    summary["stages"] = [{"name": name, "seconds": 1.0, "tokens_per_second": 1.0, "memory": None} for name in stages]
    (path / "summary.json").write_text(json.dumps(summary))  # of this run's end
    for name, entry in stages.items():
        run.finish_stage(name, {}, 1.0, peak_rss_bytes=1 << 30, **entry)
    return path


def write_adapter(directory: Path, base: str, value: float = 1.0) -> Path:
    """Write files that look like an adapter's."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"lora_A": torch.full((4, 4), value)}, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 8}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory
