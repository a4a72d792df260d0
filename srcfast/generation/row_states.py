"""States of recurrent layers in decoding: each slot's prompt has one, each row continues one, and rows that fork copy theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from srcfast.data.forest import Forest
from srcfast.models.recurrent import Run, States, forest_mix
from srcfast.models.transformers_decoder import TokenRow
from srcfast_kernels.transfers import to_device


class RowStates:
    """The states by layer and kind ("conv", "recurrent"): of prompts [slots, ...], and of rows [rows, ...]."""

    def __init__(self, slots: int, width: int) -> None:
        self.slots, self.width = slots, width
        self.prompts: dict[tuple[int, str], Tensor] = {}
        self.rows: dict[tuple[int, str], Tensor] = {}

    def recording(self, row: TokenRow, forest: Forest, slots: Sequence[int]) -> TokenRow:
        """Return what a prefill begins with, whose pass stores the state of each prompt in its slot."""

        def store(layer: int, tree: int, states: States) -> None:
            for kind in ("conv", "recurrent"):
                state = getattr(states, kind)
                if state is None:
                    continue
                if (layer, kind) not in self.prompts:
                    self.prompts[layer, kind] = state.new_zeros(self.slots, *state.shape[1:])
                    self.rows[layer, kind] = state.new_zeros(self.slots * self.width, *state.shape[1:])
                self.prompts[layer, kind][slots[tree]] = state[0]

        return replace(row, mix=forest_mix(forest, store))

    def continuing(self, row: TokenRow, rows: Tensor) -> TokenRow:
        """Return what a step of these rows [R] begins with, whose pass replaces their states."""

        def mix(layer: int, run: Run, hidden: Tensor) -> Tensor:
            kinds = [kind for kind in ("conv", "recurrent") if (layer, kind) in self.rows]
            states = States(**{kind: self.rows[layer, kind][rows] for kind in kinds})
            output = run(hidden.transpose(0, 1), cache=states)  # [R, 1, D]
            for kind in kinds:
                self.rows[layer, kind][rows] = getattr(states, kind)
            return output.transpose(0, 1)

        return replace(row, mix=mix)

    def start(self, slot: int, rows: Sequence[int], parents: Sequence[int | None]) -> None:
        """Let each row continue its parent row, or the slot's prompt (None)."""
        if not self.rows or not rows:
            return
        device = next(iter(self.rows.values())).device
        offset = self.slots * self.width  # in the concatenation of rows and prompts
        sources = to_device([offset + slot if parent is None else parent for parent in parents], device)
        targets = to_device(list(rows), device)
        for key, stored in self.rows.items():
            is_prompt = (sources >= offset).view(-1, *(1,) * (stored.ndim - 1))
            copied = stored[sources.clamp(max=offset - 1)]
            stored[targets] = torch.where(is_prompt, self.prompts[key][slot], copied)

    def move(self, source: int, target: int) -> None:
        """Move a sample's states to a free slot."""
        old, new = (slice(slot * self.width, (slot + 1) * self.width) for slot in (source, target))
        for key, stored in self.rows.items():
            stored[new] = stored[old]
            self.prompts[key][target] = self.prompts[key][source]
