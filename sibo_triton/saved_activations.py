"""Count the bytes that autograd keeps between forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def saved_activation_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the storages that one training forward saves for its backward, without the model's own tensors.

    Every storage counts once with its full size, however many ops save it and however small the saved views: this is
    the memory that stays allocated. Parameters and buffers of `model` (and views of them, such as a transposed weight)
    do not count, since they are allocated anyway.

    Args:
        model: whose parameters and buffers are left out.
        forward: runs the forward pass and returns what `backward` would be called on. It is called once, with autograd
            as the caller left it; backward is not run and no gradient is touched.

    Returns:
        The number of bytes. Under gradient checkpointing it is what the checkpointed forward keeps, without the
        temporary memory of the recomputation.
    """
    model_storages = {_key(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[tuple[torch.device, int], torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = _key(tensor)
        if key not in model_storages:
            # Keep the storage alive: if it were freed during the forward, another could get the same address.
            kept.setdefault(key, tensor.untyped_storage())
        return tensor.detach()  # not `tensor`: an op that saves its own output would form a cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def _key(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage()._cdata  # not its address, which fake tensors lack
