"""States of recurrent layers by row: whom a row continues, and where a sample's states are after it has moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from srcfast.data.forest import Forest, Segment, Tree
from srcfast.generation import row_states
from srcfast.generation.row_states import RowStates
from srcfast.models.recurrent import States
from srcfast.models.transformers_decoder import TokenRow


def filled(slots: int, width: int) -> RowStates:
    """Prompt s has the state 100 + s, row r the state r; the second layer's are negative and of another shape."""
    states = RowStates(slots, width)
    for key, shape, sign in (((0, "conv"), (2,), 1.0), ((3, "recurrent"), (2, 3), -1.0)):
        states.prompts[key] = sign * (100.0 + torch.arange(slots).view(-1, *[1] * len(shape)).expand(-1, *shape))
        states.rows[key] = sign * torch.arange(slots * width).view(-1, *[1] * len(shape)).expand(-1, *shape).clone()
        states.rows[key] = states.rows[key].float()
    return states


def values(states: RowStates) -> list[float]:
    first, second = states.rows[0, "conv"], states.rows[3, "recurrent"]
    assert torch.equal(first[:, 0], first[:, 1]) and torch.equal(-second[:, 0, 0], first[:, 0])
    assert torch.equal(second.flatten(1).amax(1), second.flatten(1).amin(1))
    return first[:, 0].tolist()


def test_a_row_continues_its_slot_s_prompt_or_its_parent() -> None:
    states = filled(3, 2)
    states.start(1, [2, 3], [None, None])
    assert values(states) == [0, 1, 101, 101, 4, 5]
    states.start(2, [4, 5], [5, 4])  # both are read before one is written
    assert values(states) == [0, 1, 101, 101, 5, 4]
    states.start(2, [5], [None])
    assert values(states) == [0, 1, 101, 101, 5, 102]
    states.start(0, [0, 1], [1, 1])
    assert values(states) == [1, 1, 101, 101, 5, 102]


def test_a_sample_that_moves_takes_its_rows_and_its_prompt_along() -> None:
    states = filled(3, 2)
    states.move(2, 0)
    assert values(states) == [4, 5, 2, 3, 4, 5]
    states.start(0, [0], [None])
    assert values(states) == [102, 5, 2, 3, 4, 5]


def test_a_prefill_stores_each_prompt_s_state_in_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second kind layer 3 has none; what other slots hold stays."""
    given: list[Any] = []
    monkeypatch.setattr(row_states, "forest_mix", lambda forest, store: given.append(store))
    states = RowStates(4, 2)
    for slots, first in (((2, 0, 3), 10.0), ((1, 2), 20.0)):
        forest = Forest.of([Tree((Segment(np.arange(2)),)) for _ in slots])
        states.recording(TokenRow(forest.token_ids, forest.positions), forest, slots)
        for tree in range(len(slots)):
            one = torch.full((1, 5), first + tree)
            given[-1](0, tree, States(conv=one, recurrent=-one[..., None]))
            given[-1](3, tree, States(conv=one + 100.0))
    assert states.prompts.keys() == states.rows.keys() == {(0, "conv"), (0, "recurrent"), (3, "conv")}
    expected = torch.tensor([11.0, 20.0, 21.0, 12.0])[:, None].expand(4, 5)  # slot 2 has another prompt by now
    assert torch.equal(states.prompts[0, "conv"], expected)
    assert torch.equal(states.prompts[0, "recurrent"], -expected[..., None])
    assert torch.equal(states.prompts[3, "conv"], expected + 100.0)
    assert states.rows[0, "recurrent"].shape == (8, 5, 1) and not states.rows[0, "recurrent"].any()


def test_without_recurrent_layers_nothing_is_stored() -> None:
    states = RowStates(2, 2)
    states.start(0, [0, 1], [None, None])
    assert not states.rows and not states.prompts
