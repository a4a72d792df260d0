"""Attention over slots gives each row what attention over its own path gives, whatever the others do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srcfast.attention.options import AttentionOptions
from srcfast.errors import SrcfastError
from srcfast.generation.kv_cache import SlotCache
from srcfast.generation.kv_store import GROWTH, HALVES, Layout
from srcfast_kernels import native

LAYERS, KV_HEADS, WIDTH = 3, 2, 3
# Of the layers: windows that end within prompts and within continuations.
OPTIONS = [AttentionOptions(), AttentionOptions(window=7), AttentionOptions(window=11, softcap=1.5)]
needs_library = pytest.mark.skipif(not native.available(), reason=f"native library: {native.why_not()}")
# fp64 through PyTorch; fp32 with 16 and 48 numbers a head through the native library, each sum of some dozen products. Of halves
# keys, values and results are rounded, and nothing between: half a unit in the last place, and what fp32 sums may add.
WAYS = [
    pytest.param(torch.float64, 4, (1e-12, 1e-12), id="pytorch"),
    pytest.param(torch.float32, 4, (1e-5, 1e-5), id="pytorch, fp32"),
    pytest.param(torch.bfloat16, 4, (2**-8, 1e-5), id="pytorch, bf16"),
    pytest.param(torch.float32, 16, (1e-5, 1e-5), id="native", marks=needs_library),
    pytest.param(torch.float32, 48, (1e-5, 1e-5), id="native, wider", marks=needs_library),
    pytest.param(torch.bfloat16, 16, (2**-8, 1e-5), id="native, bf16", marks=needs_library),
    pytest.param(torch.float16, 16, (2**-11, 1e-5), id="native, fp16", marks=needs_library),
]


class Paths:
    """The cache beside each row's keys and values by layer, kept as plain lists."""

    def __init__(
        self,
        way: tuple[torch.dtype, int, tuple[float, float]],
        heads: int,
        fixed: bool,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.dtype, self.size, (self.rtol, self.atol) = way
        self.device, self.weights_unit = device, 0.0  # relative rounding of softmax's weights
        # Layers whose heads of keys and values have different shapes, and different options.
        self.shapes = [(KV_HEADS, self.size), (1, self.size * 2), (KV_HEADS, self.size)][:LAYERS]
        self.options = OPTIONS
        config = SimpleNamespace(
            num_layers=LAYERS, num_heads=heads, num_kv_heads=KV_HEADS, head_dim=self.size, kv_shapes=self.shapes
        )
        self.random = torch.Generator().manual_seed(seed)
        self.heads = heads
        layout = Layout.of(4, WIDTH, 40, 80, on_gpu=fixed, spare=fixed)
        self.cache = SlotCache(config, layout, torch.zeros(1, dtype=self.dtype, device=device))
        self.prompt: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.own: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by place
        self.lengths = torch.zeros(layout.rows, dtype=torch.int64)

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def admit(self, lengths: dict[int, int]) -> None:
        self.cache.admit(list(lengths), list(lengths.values()))
        total = sum(lengths.values())
        layers = [(self.drawn(total, *shape), self.drawn(total, *shape)) for shape in self.shapes]
        for layer, (k, v) in enumerate(layers):
            self.cache.record(layer, k.to(self.device), v.to(self.device))
        begin = 0
        for slot, length in lengths.items():
            self.prompt[slot] = [(k[begin : begin + length], v[begin : begin + length]) for k, v in layers]
            begin += length

    def start(self, slot: int, parents: list[int], lengths: list[int]) -> list[int]:
        old = dict(self.own)
        for place in range(slot * WIDTH, (slot + 1) * WIDTH):
            self.own.pop(place, None)
        places = self.cache.start(slot, parents, lengths)
        assert len(set(places)) == len(places) and all(place // WIDTH == slot for place in places)
        empty = [(self.drawn(0, *shape), self.drawn(0, *shape)) for shape in self.shapes]
        for index, (place, length) in enumerate(zip(places, lengths, strict=True)):
            held = old[parents[index]] if parents else empty
            self.own[place] = [(k[:length], v[:length]) for k, v in held]
            self.lengths[place] = length
        return places

    def step(self, places: list[int], used: int, spare: int = 0) -> None:
        """Of the rows at these places, filled up by some of the spare row's."""
        places = sorted(places)
        rows = torch.tensor(places)
        longest = int(self.lengths[rows].max()) + 1
        taken = torch.tensor(places + spare * [4 * WIDTH])
        attend = self.cache.begin(taken.to(self.device), self.lengths.to(self.device), used, longest)
        for layer, (shape, options) in enumerate(zip(self.shapes, self.options, strict=True)):
            kv_heads, size = shape
            q = self.drawn(len(taken), self.heads, size)
            k, v = self.drawn(len(taken), *shape), self.drawn(len(taken), *shape)
            output = attend(layer, *(x.to(self.device) for x in (q, k, v)), options).cpu()
            assert output.dtype == self.dtype and bool(output.isfinite().all())
            for row, place in enumerate(places):
                held = self.own[place][layer]
                self.own[place][layer] = (
                    torch.cat((held[0], k[row : row + 1])),
                    torch.cat((held[1], v[row : row + 1])),
                )
                prompt = self.prompt[place // WIDTH][layer]
                keys, values = (torch.cat((prompt[i], self.own[place][layer][i])) for i in (0, 1))
                keys, values = (x.double().repeat_interleave(self.heads // kv_heads, dim=1) for x in (keys, values))
                if options.window is not None:
                    keys, values = keys[-options.window :], values[-options.window :]
                scores = torch.einsum("hd,lhd->hl", q[row].double(), keys) / size**0.5
                if options.softcap is not None:
                    scores = options.softcap * torch.tanh(scores / options.softcap)
                weights = scores.softmax(-1)
                expected = torch.einsum("hl,lhd->hd", weights, values)
                rounded = self.weights_unit * torch.einsum("hl,lhd->hd", weights, values.abs())
                difference = (output[row].double() - expected).abs()
                assert bool((difference <= self.rtol * expected.abs() + self.atol + rounded).all())
        self.lengths[rows] += 1


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("dtype", "size", "tolerance"), WAYS)
def test_each_row_sees_its_prompt_and_its_own_positions(
    dtype: torch.dtype, size: int, tolerance: tuple[float, float], heads: int, fixed: bool
) -> None:
    paths = Paths((dtype, size, tolerance), heads, fixed, seed=heads)
    follow(paths, fixed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float64, (1e-12, 1e-12), id="fp64"),
        pytest.param(torch.float32, (1e-5, 1e-5), id="fp32"),
        pytest.param(torch.bfloat16, (2**-8, 1e-5), id="bf16"),
        pytest.param(torch.float16, (2**-11, 1e-5), id="fp16"),
    ],
)
def test_on_the_gpu_each_row_sees_the_same(dtype: torch.dtype, tolerance: tuple[float, float], heads: int) -> None:
    paths = Paths((dtype, 16, tolerance), heads, True, heads, "cuda")
    if dtype in HALVES:  # as in FlashAttention, softmax's weights are rounded, too, and nothing else between
        paths.weights_unit = tolerance[0]
    follow(paths, True)


def follow(paths: Paths, fixed: bool) -> None:
    """Samples come and go, rows are continued, forked and left behind."""
    assert paths.cache._native == (paths.size % 16 == 0 and not fixed)
    paths.admit({0: 5, 1: 9})
    first, second = paths.start(0, [], [0, 0, 0]), paths.start(1, [], [0, 0])
    paths.step([*first, *second], 2)
    paths.step([first[0], first[2], second[1]], 2)  # the others have ended
    paths.admit({2: 17})  # longer than what there was room for
    third = paths.start(2, [], [0])
    paths.step([first[0], second[0], *third], 3)
    # Two of the first sample's rows are continued, one of them twice and from before its last position.
    first = paths.start(0, [first[0], first[0], first[2]], [2, 3, 2])
    for _ in range(GROWTH + 3):
        paths.step([*first, *third], 3)
    paths.cache.release(1)
    paths.admit({1: 3})
    second = paths.start(1, [], [0, 0, 0])
    paths.step([*second, first[1]], 3)
    paths.step([*second, *first, *third], 3)
    if fixed:  # rows that only fill up change nothing, however many
        paths.step([*second, first[1]], 4, spare=5)
        paths.step([*second, *first, *third], 4, spare=2)


@pytest.mark.parametrize(("dtype", "size", "tolerance"), WAYS)
def test_a_sample_may_move_to_a_free_slot(dtype: torch.dtype, size: int, tolerance: tuple[float, float]) -> None:
    paths = Paths((dtype, size, tolerance), 4, False, seed=1)
    paths.admit({0: 4, 1: 6, 2: 5})
    paths.start(0, [], [0])
    places = paths.start(2, [], [0, 0])
    paths.step(places, 3)
    paths.cache.release(0)
    paths.cache.move(2, 0)
    paths.prompt[0] = paths.prompt[2]
    for place in places:
        paths.own[place - 2 * WIDTH] = paths.own.pop(place)
        paths.lengths[place - 2 * WIDTH] = paths.lengths[place]
    places = [place - 2 * WIDTH for place in places]
    paths.step(places, 1)
    places = paths.start(0, [places[1], places[1], places[0]], [2, 1, 2])
    paths.step(places, 1)


# Forks ------------------------------------------------------------------------------------------------------


class Numbers:
    """A slot's rows beside the list of what each holds; keys and values are numbers, each written once."""

    SLOT, HEADS = 1, 2

    def __init__(self, width: int) -> None:
        config = SimpleNamespace(num_layers=1, num_heads=self.HEADS, num_kv_heads=self.HEADS, head_dim=1)
        self.width = width
        self.cache = SlotCache(config, Layout.of(2, width, 16, 64, on_gpu=True), torch.zeros(1, dtype=torch.float64))
        self.cache.admit([self.SLOT], [1])
        self.rows: dict[int, list[float]] = {}  # by index
        self.written = 0

    def stored(self, row_id: int) -> tuple[Tensor, Tensor]:
        """Views of a row's keys and values, [Hkv, positions] each."""
        (store,) = self.cache.stores
        keys, values = (store.by_slot(x) for x in (store.row_keys, store.row_values))
        row = row_id % self.width
        return keys[0, self.SLOT, :, row, 0], values[0, self.SLOT, :, row, :, 0]

    def start(self, parents: list[int], lengths: list[int]) -> list[int]:
        sources = [self.rows[parent] for parent in parents] or [[] for _ in lengths]
        row_ids = self.cache.start(self.SLOT, parents, lengths)
        assert len(set(row_ids)) == len(row_ids)
        self.rows = {row_id: row[:length] for row_id, row, length in zip(row_ids, sources, lengths, strict=True)}
        for row_id, row in self.rows.items():
            for numbers in self.stored(row_id):
                numbers[:, len(row) :] = -2  # nothing behind what a row continues may be relied on
        return row_ids

    def write(self, row_ids: list[int]) -> None:
        rows = torch.tensor(sorted(row_ids))
        lengths = torch.zeros(2 * self.width, dtype=torch.int64)
        for row_id, row in self.rows.items():
            lengths[row_id] = len(row)
        attend = self.cache.begin(rows, lengths, 2, int(lengths.max()) + 1)
        numbers = self.written + torch.arange(len(rows) * self.HEADS, dtype=torch.float64).view(-1, self.HEADS, 1)
        attend(0, torch.zeros_like(numbers), numbers, numbers)
        for row_id, number in zip(rows.tolist(), numbers[:, 0, 0].tolist(), strict=True):
            self.rows[row_id].append(number)
        self.written += numbers.numel()

    def release(self) -> None:
        self.cache.release(self.SLOT)
        self.rows = {}

    def check(self) -> None:
        for row_id, row in self.rows.items():
            expected = torch.tensor([[number + head for number in row] for head in range(self.HEADS)])
            for numbers in self.stored(row_id):
                assert numbers[:, : len(row)].tolist() == expected.tolist()
        taken = [row_id % self.width for row_id in self.rows]
        assert sorted(taken + self.cache._free[self.SLOT]) == list(range(self.width))  # none is lost or given out twice


actions = st.lists(
    st.tuples(
        st.sampled_from(["new", "fork", "cut", "write", "write", "release"]), st.lists(st.integers(0, 99), min_size=1)
    ),
    max_size=30,
)


@given(actions, st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_every_row_holds_what_it_and_its_ancestors_wrote(steps: list[tuple[str, list[int]]], width: int) -> None:
    numbers = Numbers(width)
    for action, which in steps:
        chosen = [list(numbers.rows)[index % len(numbers.rows)] for index in which[:width] if numbers.rows]
        if action == "new" or not chosen:
            numbers.start([], [0] * (1 + which[0] % width))
        elif action == "fork":
            numbers.start(chosen, [len(numbers.rows[row_id]) for row_id in chosen])
        elif action == "cut":  # forks of beginnings
            pairs = zip(which, chosen, strict=False)
            numbers.start(chosen, [index % (len(numbers.rows[row_id]) + 1) for index, row_id in pairs])
        elif action == "write":
            for _ in range(1 + which[0] % 3):
                numbers.write(list(set(chosen)))
        else:
            numbers.release()
        numbers.check()
    numbers.release()
    numbers.check()


def test_the_last_row_that_continues_a_parent_takes_its_index_and_the_others_copy() -> None:
    numbers = Numbers(4)
    first = [4, 5, 6]  # the indices behind slot 0's
    assert numbers.start([], [0, 0, 0]) == first
    numbers.write(first)
    # Index 6, which has just been freed, is given out before 7.
    assert numbers.start([5, 5, 4, 5], [1, 1, 1, 1]) == [6, 7, 4, 5]
    numbers.check()
    # The first and last rows continue 0 positions, so they take free indices: 5, which was freed last, then 4.
    assert numbers.start([7, 7, 6], [0, 1, 0]) == [5, 7, 4]
    numbers.check()
    numbers.release()
    assert numbers.start([], [0]) == [4]


def test_copies_of_different_lengths_are_made_together() -> None:
    numbers = Numbers(4)
    for row_ids in (numbers.start([], [0, 0]), [4, 5], [4, 5]):
        numbers.write(row_ids)
    assert numbers.start([4, 4, 5, 5], [1, 1, 3, 3]) == [6, 4, 7, 5]
    numbers.check()


def test_more_rows_than_a_slot_has_are_an_error() -> None:
    numbers = Numbers(2)
    with pytest.raises(SrcfastError, match="at most 2 rows in a slot, found 3. Fix: "):
        numbers.cache.start(1, [], [0, 0, 0])
    numbers.start([], [0])
    with pytest.raises(AssertionError, match="one of its slot"):
        numbers.cache.start(1, [3], [1])
