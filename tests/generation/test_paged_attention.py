"""A decoding step over pages gives what attention over each row's own keys gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srcfast.runtime.paged_attention import paged_attention


def paged_case(
    lengths: list[int], heads: int, kv_heads: int, size: int, page_size: int, dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The arguments, pages in random order, what no row fills poisoned; and each row's own keys and values."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    used = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(used), generator=generator).to(torch.int32)
    pages = [torch.full((sum(used), page_size, kv_heads, size), float("nan"), dtype=dtype) for _ in range(2)]
    block_table = torch.zeros(len(lengths), max(used) + 1, dtype=torch.int32)
    own = []
    for row, (length, count, mine) in enumerate(zip(lengths, used, order.split(used), strict=True)):
        block_table[row, :count] = mine
        own.append((random(length, kv_heads, size), random(length, kv_heads, size)))
        for page, whole in zip(pages, own[-1], strict=True):
            for number, part in zip(mine.tolist(), whole.split(page_size), strict=True):
                page[number, : len(part)] = part
    q = random(len(lengths), heads, size)
    return [q, *pages, block_table, torch.tensor(lengths, dtype=torch.int32)], own


def row_by_row(q: Tensor, own: list[tuple[Tensor, Tensor]]) -> Tensor:
    outputs = []
    for query, (keys, values) in zip(q, own, strict=True):
        keys, values = (x.repeat_interleave(len(query) // x.shape[1], dim=1) for x in (keys, values))
        weights = (torch.einsum("hd,lhd->hl", query, keys) / query.shape[-1] ** 0.5).softmax(-1)
        outputs.append(torch.einsum("hl,lhd->hd", weights, values))
    return torch.stack(outputs)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("page_size", [1, 4, 7])
@pytest.mark.parametrize("lengths", [[1], [9, 1, 4, 8], [28, 5]], ids=str)
def test_a_step_over_pages_equals_attention_over_each_row_s_keys(
    heads: tuple[int, int], page_size: int, lengths: list[int]
) -> None:
    arguments, own = paged_case(lengths, *heads, 5, page_size, torch.float64, seed=len(lengths))
    torch.testing.assert_close(paged_attention(*arguments), row_by_row(arguments[0], own), rtol=1e-12, atol=1e-12)


def test_rows_may_share_a_prompt_s_pages() -> None:
    (q, k_pages, v_pages, _, _), own = paged_case([8, 3, 2], 2, 2, 4, 4, torch.float64, seed=3)
    (_, _, _, table, _), _ = paged_case([8, 3, 2], 2, 2, 4, 4, torch.float64, seed=3)
    shared = torch.cat(
        [table[:1, :2].expand(2, -1), table[1:, :1]], dim=1
    )  # the first row's two pages, then an own one
    lengths = torch.tensor([11, 10], dtype=torch.int32)
    joined = [tuple(torch.cat(both) for both in zip(own[0], own[row], strict=True)) for row in (1, 2)]
    output = paged_attention(q[:2], k_pages, v_pages, shared, lengths)
    torch.testing.assert_close(output, row_by_row(q[:2], joined), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("page_size", [256, 16])  # PyTorch's kernel, and the definition
def test_on_the_gpu_the_error_is_at_most_twice_plain_pytorch_s(
    dtype: torch.dtype, heads: tuple[int, int], page_size: int
) -> None:
    """Long rows and few of them: the case in which PyTorch would split the keys and get all rows but one wrong."""
    arguments, own = paged_case([1500, 1, 257, 1024], *heads, 64, page_size, dtype, seed=1)
    precise = row_by_row(arguments[0].float(), [(k.float(), v.float()) for k, v in own]).cuda()
    plain = row_by_row(arguments[0].cuda(), [(k.cuda(), v.cuda()) for k, v in own])
    ours = paged_attention(*(part.cuda() for part in arguments))
    error = (ours.float() - precise).abs().max()
    assert error <= 2 * (plain.float() - precise).abs().max() + 1e-5
