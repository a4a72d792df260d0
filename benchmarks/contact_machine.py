"""What machine this is: `python -m srcfast_benchmarks.contact_machine` prints device, driver and versions as JSON."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import torch

from srcfast.attention.forest_attention import available_backends
from srcfast.memory.allocator import VARIABLES
from srcfast.run.environment import environment, version
from srcfast_benchmarks.harness import PEERS
from srcfast_kernels import native

OTHERS = ("numpy", "pydantic", "pytest", "safetensors", "tokenizers")


def machine() -> dict[str, Any]:
    """Device, driver and versions; `gpu` is None where there is no CUDA device."""
    known = {key: value for key, value in environment().items() if key != "git_commit"}
    known |= {
        "cuda": torch.version.cuda,
        "native_library": native.why_not() or "loaded",
        "versions": {name: installed for name in (*PEERS, *OTHERS) if (installed := version(name))},
        "allocator": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if not torch.cuda.is_available():
        return known | {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    return known | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "gpu_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver(),
        "attention_backends": available_backends(),
    }


def driver() -> str | None:
    """The driver's version, by nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None if done.returncode == 0 else None


if __name__ == "__main__":
    print(json.dumps(machine()))
