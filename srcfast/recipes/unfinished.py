"""Save a recipe's training while it runs, so that a stop costs a few minutes."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from srcfast.data.jsonl import parse_object, write_json
from srcfast.errors import SrcfastError
from srcfast.models.checkpoint import read_file, save_tensors


class Unfinished:
    """One training in progress: weights, moments and number of steps, in a file that is replaced as a whole.

    What else a step depends on must follow from its number, so that a continued training gives the same weights.

    Args:
        file: safetensors.
        minutes: between two saves.
    """

    def __init__(self, file: Path, minutes: float = 5.0) -> None:
        self.file, self.minutes = file, minutes
        self._last = time.monotonic()

    def load(self, optimizer: torch.optim.Optimizer) -> int:
        """Load the saved weights and moments, if there are any; return the number of steps done.

        Raises:
            InputError: the file is damaged.
        """
        if not self.file.exists():
            return 0
        saved = dict(read_file(self.file))
        steps = int(saved.pop("steps"))
        state: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in saved.items():
            kind, index = name.split("/")
            state[int(index)][kind] = tensor
        with torch.no_grad():
            for number, weight in enumerate(_weights(optimizer)):
                weight.copy_(state[number].pop("weight"))
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return steps

    def save_if_due(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Save after so many steps if the last save is `minutes` ago."""
        if time.monotonic() - self._last < 60.0 * self.minutes:
            return
        tensors = {f"weight/{number}": weight for number, weight in enumerate(_weights(optimizer))}
        for number, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{kind}/{number}": tensor for kind, tensor in moments.items()}
        save_tensors(self.file, tensors | {"steps": torch.tensor(steps)})
        self._last = time.monotonic()


def _weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def check_recipe(output: Path, recipe: Mapping[str, Any]) -> None:
    """Write the recipe into the directory, or compare it with the one that is there.

    Raises:
        SrcfastError: the directory holds the work of another recipe.
    """
    file = output / "recipe.json"
    wanted = json.loads(json.dumps(recipe))
    if not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
    elif parse_object(file.read_bytes()) != wanted:
        raise SrcfastError(f"{output} holds the work of another recipe (recipe.json). Fix: name a new directory")
