"""One decoding step of attention over keys and values kept in pages (PagedAttention: Kwon et al., 2023, arXiv 2309.06180).

Rows whose texts begin alike list the same pages, so that a shared prompt is kept once. Inference only: no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srcfast.runtime.attention import flash_takes, varlen_takes

FLASH_PAGE = 256  # FlashAttention 2 takes pages of multiples of this


@torch.no_grad()
def paged_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """Softmax attention of one query a row over the row's first `lengths` positions; scale 1/sqrt(d).

    Args:
        q: `[B, H, d]`.
        k_pages, v_pages: `[pages, page_size, Hkv, d]`; H is a multiple of Hkv.
        block_table: `[B, max_pages]` int32: the pages of each row in order. Entries past its length may be any page.
        lengths: `[B]` int32: how many positions a row sees, its own newest included; at least 1.

    Returns:
        `[B, H, d]`. Where FlashAttention takes the queries and the pages hold a multiple of 256 positions, by
        PyTorch's `varlen_attn` (2.12 and later); elsewhere by `paged_attention_reference`.
    """
    if not (flash_takes(q) and k_pages.shape[1] % FLASH_PAGE == 0 and varlen_takes("block_table")):
        return paged_attention_reference(q, k_pages, v_pages, block_table, lengths)
    from torch.nn.attention.varlen import varlen_attn

    room = block_table.shape[1] * k_pages.shape[1]
    rows = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    # Split, all rows but the first are wrong: github.com/pytorch/pytorch/issues/194167
    unsplit = {"num_splits": 1} if varlen_takes("num_splits") else {}
    return varlen_attn(
        q,
        k_pages,
        v_pages,
        rows,  # one query each
        rows * room,
        1,
        room,
        enable_gqa=q.shape[1] != k_pages.shape[2],
        seqused_k=lengths,
        block_table=block_table,
        **unsplit,
    )


def paged_attention_reference(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor
) -> Tensor:
    """`paged_attention` by its definition: pages gathered, what is past the length masked."""
    group = q.shape[1] // k_pages.shape[2]
    keys, values = (pages[block_table].flatten(1, 2) for pages in (k_pages, v_pages))  # [B, L, Hkv, d]
    hidden = torch.arange(keys.shape[1], device=q.device) >= lengths[:, None]  # [B, L]
    values = values.masked_fill(hidden[:, :, None, None], 0)  # memory never written may hold NaN, and 0 * NaN is NaN
    grouped = q.unflatten(1, (-1, group))  # [B, Hkv, H / Hkv, d]
    scores = torch.einsum("bhgd,blhd->bhgl", grouped, keys) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("bhgl,blhd->bhgd", weights, values).flatten(1, 2)
