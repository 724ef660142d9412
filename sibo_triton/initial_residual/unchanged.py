"""Leave a model as it was, whatever running it once changes: caches, counters, swapped attentions, scaled weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

_CONTAINERS = (dict, list, set)


@contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Context after which the modules, attributes, configs, parameters and buffers of a model are those from before.

    BigBird replaces its attentions for short inputs, and RWKV divides its weights when it is evaluated. What a weight
    was is copied only where it is written to. Of models that FSDP has sharded, only modes and configs are put back.
    """
    modes = {module: module.training for module in root.modules()}
    # what FSDP notes when its modules first run, and the parameters that it swaps, must stay
    is_sharded = any(type(module).__module__.startswith("torch.distributed") for module in modes)
    states = [_State(owner) for owner in (*([] if is_sharded else modes), *configs_of(root))]
    writes = _Writes(root)
    try:
        with writes:
            yield
    finally:
        for state in states:
            state.restore()
        for module, mode in modes.items():
            module.training = mode
        writes.undo()


def configs_of(root: nn.Module) -> list[PreTrainedConfig]:
    """The configs of a model and of its parts, each once."""
    pending = [getattr(module, "config", None) for module in root.modules()]
    configs: dict[int, PreTrainedConfig] = {}
    while pending:
        config = pending.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in configs:
            configs[id(config)] = config
            pending += vars(config).values()
    return list(configs.values())


class _State:
    """An object's attributes, and what those that are containers hold."""

    def __init__(self, owner: Any) -> None:
        self._of = owner.__dict__
        self._values = dict(self._of)
        self._contents = {name: of.copy() for name, of in self._values.items() if isinstance(of, _CONTAINERS)}

    def restore(self) -> None:
        for name in self._of.keys() - self._values.keys():
            del self._of[name]
        for name, value in self._values.items():
            if self._of.get(name, self) is not value:
                self._of[name] = value
        for name, content in self._contents.items():
            container: Any = self._values[name]
            if _identities(container) != _identities(content):
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)


def _identities(container: Any) -> Any:
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return list(map(id, container)) if isinstance(container, list) else set(map(id, container))


class _Writes(TorchDispatchMode):
    """Copies parameters and buffers before an operation writes to them."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        tensors = [*root.parameters(), *root.buffers()]
        self._given = {_storage_of(of): of for of in tensors if of.layout == torch.strided and of.device.type != "meta"}
        self._before: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, declared in enumerate(func._schema.arguments):
                if declared.alias_info is not None and declared.alias_info.is_write:
                    self._copy(args[i] if i < len(args) else kwargs.get(declared.name))
        return func(*args, **kwargs)

    def _copy(self, written: torch.Tensor | list | None) -> None:
        for tensor in written if isinstance(written, (list, tuple)) else (written,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = _storage_of(tensor)
                if storage in self._given and storage not in self._before:
                    self._before[storage] = self._given[storage].detach().clone()

    def undo(self) -> None:
        for storage, before in self._before.items():
            self._given[storage].data.copy_(before)


def _storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
