"""A frozen base that no card holds alone: the matrices of its layers are shared out over a node's ranks.

Each rank keeps an even part of every matrix; a layer is put together on all of them while it computes, and taken apart
again behind it (PyTorch's FSDP2, `fully_shard`). Embedding, head, norms, vision tower and adapter stay whole on every rank.
The products are those of whole weights, bit for bit.

A layer is put together by all ranks or by none, so that all have to run the same passes in the same order. A rank that has
no work left runs passes over a single position, of which nothing comes, as long as another has work: see `keep_in_step`
(passes without gradients) and `empty_step` (with them).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srcfast import distributed
from srcfast.attention.forest_attention import forest_attend
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import ConfigError
from srcfast.models.dropout_keys import dropping
from srcfast.models.protocols import HasDecoder, TransformerDecoder

GATHERED_LAYERS = 2  # whole at once: the one that computes, and the next, which is on its way


def shard_layers(decoder: nn.Module, device: str | torch.device) -> None:
    """Share a decoder's layers out over the ranks of this node, before their weights are set; with one rank do nothing.

    Raises:
        ConfigError: nodes have different numbers of ranks.
    """
    from torch.distributed.fsdp import fully_shard  # half a second, which no other command waits for

    here = distributed.local_world_size()
    if len(set(distributed.gather(here))) > 1 or distributed.world_size() % here:
        raise ConfigError(
            f"distributed.shard: expected as many ranks on every node, found {here} of {distributed.world_size()} on this one. "
            "Fix: one --nproc-per-node for all nodes"
        )
    if here == 1:
        return
    mesh = distributed.node_mesh(torch.device(device).type)
    for layer in decoder.layers:  # type: ignore[union-attr]
        named = layer.named_parameters()
        small = {parameter for name, parameter in named if parameter.ndim < 2 and not name.endswith(".flat")}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=small)
    inside = {parameter for layer in decoder.layers for parameter in layer.parameters()}  # type: ignore[union-attr]
    whole = {parameter for parameter in decoder.parameters() if parameter not in inside}
    # The root has no share of its own: by it the next layer is on its way while one computes.
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    decoder.register_forward_pre_hook(_announce)
    decoder.register_forward_hook(_forget_order)
    decoder.is_sharded = True  # type: ignore[assignment]


def is_sharded(decoder: TransformerDecoder) -> bool:
    """Whether the decoder's layers are shared out over ranks."""
    return bool(getattr(decoder, "is_sharded", False))  # a model of the caller's may have any decoder


def is_share(parameter: Tensor) -> bool:
    """Whether a parameter is one that ranks share out (a DTensor): whole only while its layer computes."""
    return hasattr(parameter, "device_mesh")


def held(parameter: Tensor) -> Tensor:
    """What this rank has of a parameter: all of it, or its share."""
    return parameter.to_local() if is_share(parameter) else parameter  # type: ignore[operator]


@torch.no_grad()
def keep(parameter: Any, whole: Tensor) -> None:
    """Set a parameter, or this rank's share of it, from all of its values."""
    if not is_share(parameter):
        parameter.copy_(whole)
        return
    share, rows = held(parameter), -(-len(parameter) // parameter.device_mesh.size())  # of each rank but the last ones
    start = parameter.device_mesh.get_local_rank() * rows
    share.copy_(whole[start : start + len(share)])


def gathered_bytes(decoder: TransformerDecoder) -> int:
    """What is whole for a moment while layers compute, beside the shares."""
    if not is_sharded(decoder):
        return 0
    sizes = [
        sum(parameter.nbytes for parameter in layer.parameters() if is_share(parameter)) for layer in decoder.layers
    ]
    return GATHERED_LAYERS * max(sizes)


def keep_in_step(decoder: TransformerDecoder) -> None:
    """Take part in the other ranks' passes until none has work left; all ranks come here, each when it has none.

    Raises:
        SrcfastError: a rank stays away; it is named.
    """
    if not is_sharded(decoder):
        return
    with torch.no_grad():
        while _any_busy(False):
            _empty_pass(decoder)


def empty_step(decoder: TransformerDecoder) -> None:
    """Take part in a forward and a backward pass of other ranks; the gradients that it adds are 0."""
    hidden = _empty_pass(decoder)
    hidden.backward(torch.zeros_like(hidden))


def _announce(decoder: TransformerDecoder, arguments: Any) -> None:
    """Before a pass without gradients: the ranks without work learn that there is one."""
    if not torch.is_grad_enabled() and not decoder.idle:
        _any_busy(True)


def _forget_order(decoder: TransformerDecoder, arguments: Any, hidden: Tensor) -> None:
    """FSDP notes in which order layers ran, for the backward pass that clears it: where there is none, it would only grow."""
    if torch.is_grad_enabled():
        return
    for layer in decoder.layers:
        group = layer._get_fsdp_state()._fsdp_param_group
        group.comm_ctx.post_forward_order.clear()
        group._post_forward_indices.clear()


def _any_busy(busy: bool) -> bool:
    return bool(distributed.gather_tensor(torch.tensor([busy])).any())


def _empty_pass(decoder: TransformerDecoder) -> Tensor:
    """Hidden states [1, D] of a single position."""
    forest = Forest.of([Tree((Segment(np.zeros(1, dtype=np.int64)),))]).to(decoder.embed_tokens.weight.device)
    decoder.idle = True
    try:
        with dropping(decoder, torch.zeros_like(forest.positions)):
            return decoder(decoder.embed(forest.token_ids), forest.positions, forest_attend(forest))
    finally:
        decoder.idle = False


def in_step_with(model: HasDecoder) -> Callable[[], None]:
    """What a rank does that has no piece left: nothing, unless the model's layers are shared out over the ranks."""
    return partial(keep_in_step, model.decoder)
