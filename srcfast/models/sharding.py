"""Shard a frozen base that does not fit on one card: the matrices of its layers are split across a node's ranks.

Each rank stores an even part of every matrix; a layer's are gathered on all ranks while it computes, and freed after it
(PyTorch's FSDP2, `fully_shard`). Embedding, head, norms, vision tower and adapter are whole on every rank. The products are
those of whole weights, bit for bit.

All ranks have to gather a layer together, and so to run the same passes in the same order. A rank without work runs passes
over a single position, whose results are dropped, as long as another rank has work: see `keep_in_step` (passes without
gradients) and `empty_step` (with them).
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

GATHERED_LAYERS = 2  # gathered at once: the layer that computes and the next one, which is prefetched


def shard_layers(decoder: nn.Module, device: str | torch.device) -> None:
    """Shard a decoder's layers over the ranks of this node, before their weights are set or after; with one rank do nothing.

    Weights that are set are moved to the device a layer at a time.

    Raises:
        ConfigError: nodes have different numbers of ranks.
    """
    from torch.distributed.fsdp import fully_shard  # imported here: it takes half a second

    ranks = distributed.local_world_size()
    if len(set(distributed.gather(ranks))) > 1 or distributed.world_size() % ranks:
        raise ConfigError(
            f"distributed.shard: expected as many ranks on every node, found {ranks} of {distributed.world_size()} on this one. "
            "Fix: one --nproc-per-node for all nodes"
        )
    if ranks == 1:
        return
    mesh = distributed.node_mesh(torch.device(device).type)
    for layer in decoder.layers:  # type: ignore[union-attr]
        named = layer.named_parameters()
        small = {parameter for name, parameter in named if parameter.ndim < 2 and not name.endswith(".flat")}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=small)
    layers = {parameter for layer in decoder.layers for parameter in layer.parameters()}  # type: ignore[union-attr]
    whole = {parameter for parameter in decoder.parameters() if parameter not in layers}
    # The root shards nothing; with it FSDP2 prefetches the next layer while one computes.
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    decoder.register_forward_pre_hook(_announce)
    decoder.register_forward_hook(_clear_order)
    decoder.is_sharded = True  # type: ignore[assignment]


def is_sharded(decoder: TransformerDecoder) -> bool:
    """Return whether the decoder's layers are sharded over ranks."""
    return bool(getattr(decoder, "is_sharded", False))  # a model of the caller's may have any decoder


def is_shard(parameter: Tensor) -> bool:
    """Return whether a parameter is sharded (a DTensor): it is whole only while its layer computes."""
    return hasattr(parameter, "device_mesh")


def local_values(parameter: Tensor) -> Tensor:
    """Return what this rank stores of a parameter: all of it, or its shard."""
    return parameter.to_local() if is_shard(parameter) else parameter  # type: ignore[operator]


@torch.no_grad()
def set_parameter(parameter: Any, whole: Tensor) -> None:
    """Set a parameter, or this rank's shard of it, from its whole values."""
    if not is_shard(parameter):
        parameter.copy_(whole)
        return
    shard = local_values(parameter)
    rows = -(-len(parameter) // parameter.device_mesh.size())  # of each rank but the last ones, which may have fewer
    start = parameter.device_mesh.get_local_rank() * rows
    shard.copy_(whole[start : start + len(shard)])


def gathered_bytes(decoder: TransformerDecoder) -> int:
    """Count the bytes of layers gathered at once, on top of the local shards."""
    if not is_sharded(decoder):
        return 0
    sizes = [
        sum(parameter.nbytes for parameter in layer.parameters() if is_shard(parameter)) for layer in decoder.layers
    ]
    return GATHERED_LAYERS * max(sizes)


def keep_in_step(decoder: TransformerDecoder) -> None:
    """Join the other ranks' passes until no rank has work left; all ranks call this, each when it has none.

    Raises:
        SrcfastError: a rank never calls it; it is named.
    """
    if not is_sharded(decoder):
        return
    with torch.no_grad():
        while _any_busy(False):
            _empty_pass(decoder)


def empty_step(decoder: TransformerDecoder) -> None:
    """Join a forward and a backward pass of other ranks; the gradients that it adds are 0."""
    hidden = _empty_pass(decoder)
    hidden.backward(torch.zeros_like(hidden))


def _announce(decoder: TransformerDecoder, arguments: Any) -> None:
    """Before a pass without gradients, tell the ranks without work that there is one."""
    if not torch.is_grad_enabled() and not decoder.idle:
        _any_busy(True)


def _clear_order(decoder: TransformerDecoder, arguments: Any, hidden: Tensor) -> None:
    """Clear FSDP's record of the order in which layers ran: only a backward pass clears it, and without one it would grow."""
    if torch.is_grad_enabled():
        return
    for layer in decoder.layers:
        group = layer._get_fsdp_state()._fsdp_param_group
        group.comm_ctx.post_forward_order.clear()
        group._post_forward_indices.clear()


def _any_busy(busy: bool) -> bool:
    return bool(distributed.gather_tensor(torch.tensor([busy])).any())


def _empty_pass(decoder: TransformerDecoder) -> Tensor:
    """Compute hidden states [1, D] of a single position."""
    forest = Forest.of([Tree((Segment(np.zeros(1, dtype=np.int64)),))]).to(decoder.embed_tokens.weight.device)
    decoder.idle = True
    try:
        with dropping(decoder, torch.zeros_like(forest.positions)):
            return decoder(decoder.embed_forest(forest), forest.positions, forest_attend(forest))
    finally:
        decoder.idle = False


def in_step_with(model: HasDecoder) -> Callable[[], None]:
    """Return what a rank without chunks left has to call: it does nothing unless the model's layers are sharded."""
    return partial(keep_in_step, model.decoder)
