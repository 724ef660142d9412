"""Siblings, adapted layers that get the same x (q, k and v; gate and up), share their passes over it.

Which layers share x is found by a trial run of the model. At run time it is checked again: the first sibling that is
called computes the down-projections of all, and each of the others takes its own only if it is called in the same
forward of their parent, with the very same, unmodified x and the same adapter. Else it runs alone, which is always
correct.

A forward of the parent is a scope, opened and closed by hooks: nothing outlives it, threads do not share it, and a
recompute (gradient checkpointing) that runs the hooks again groups as its forward did. Where a checkpoint lies inside
of the hooks, around the parent's `forward` or a child, the recompute would not: there the layers run alone both times.

`Shares` is the interface of the layers.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from sibo_triton.initial_residual import TrialRun
from sibo_triton.initial_residual.hooks import register_always_called
from sibo_triton.ops import Group, autocast_dtype, shares_passes

Names = tuple[tuple[str, ...], ...]


class Shares(Protocol):
    """The interface of a layer that may share its passes."""

    sibo_sites: dict[str, Any]  # by adapter

    def fused_adapter(self, x: torch.Tensor) -> str | None:
        """The active adapter, if it is the only one and runs as one operation that siblings may share; else None."""

    def only_active(self) -> str | None:
        """The active adapter of this layer, if there is exactly one; else None."""

    def tensors_read(self, adapter_name: str) -> list[torch.Tensor]:
        """The tensors read when the first sibling is called: a change since then makes the result out of date."""

    @staticmethod
    def group_of(layers: Sequence[Any], adapter_name: str, x: torch.Tensor) -> Group | None:
        """One operation for layers that get the same x; None where each must run alone."""


class _Scopes(threading.local):
    def __init__(self) -> None:
        self.open: list[_Scope] = []


_scopes = _Scopes()


class _Run:
    """What was computed for a group of siblings, until each of them has taken its output."""

    def __init__(self, x: torch.Tensor, adapter_name: str, group: Group, read: dict[str, list[torch.Tensor]]) -> None:
        self._key = self._key_of(x, adapter_name)
        self._x = x
        self._group = group
        # by the child's name: its index in the group, and the tensors that were read, with their versions
        self.waiting = {name: (i, _with_versions(tensors)) for i, (name, tensors) in enumerate(read.items())}

    @staticmethod
    def _key_of(x: torch.Tensor, adapter_name: str) -> tuple:
        return x._version, adapter_name, autocast_dtype(x.device.type), _autograd_mode()

    def take_first(self, name: str) -> torch.Tensor:
        """The output of the layer whose call computed the group."""
        place, _ = self.waiting.pop(name)
        return self._group.output(place)

    def take(self, name: str, layer: Shares, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output, once; None if something has changed since it was computed."""
        place, read = self.waiting.pop(name)
        adapter_name = self._key[1]
        if x is not self._x or self._key_of(x, adapter_name) != self._key:
            return None
        if layer.only_active() != adapter_name or not _are_as_read(layer.tensors_read(adapter_name), read):
            return None
        return self._group.output(place)


def _autograd_mode() -> tuple[bool, Any]:
    """What a checkpoint changes inside: a reentrant one disables gradients, any other has hooks on saved tensors."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(False)


def _with_versions(tensors: list[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    return [(tensor, tensor._version) for tensor in tensors]


def _are_as_read(tensors: list[torch.Tensor], read: list[tuple[torch.Tensor, int]]) -> bool:
    """Whether these are the tensors that were read, unchanged. They are kept, so that no new one can have their id."""
    if len(tensors) != len(read):
        return False
    return all([of is was and of._version == version for of, (was, version) in zip(tensors, read, strict=True)])  # noqa: C419 (a list is faster)


def _have_versions(tensors: list[torch.Tensor]) -> bool:
    return not any([tensor.is_inference() for tensor in tensors])  # noqa: C419 (a list is faster)


class _Scope:
    """One forward of the siblings' parent."""

    def __init__(self, parent: nn.Module, names: Names) -> None:
        self.parent = parent
        self._names = names
        self._mode = _autograd_mode()
        self._runs: dict[tuple[str, ...], _Run | None] = {}

    def output(self, layer: Shares, x: torch.Tensor) -> torch.Tensor | None:
        children: dict[str, Any] = self.parent._modules
        for names in self._names:
            for name in names:
                if children.get(name) is layer:
                    return self._output(names, name, layer, x)
        return None

    def _output(self, names: tuple[str, ...], name: str, layer: Shares, x: torch.Tensor) -> torch.Tensor | None:
        if names not in self._runs:
            self._runs[names] = None  # kept where no group can be made: every layer then runs alone
            run = self._runs[names] = self._start(names, name, x)
            return None if run is None else run.take_first(name)
        run = self._runs[names]
        if run is None or name not in run.waiting:
            return None
        y = run.take(name, layer, x)
        if not run.waiting:
            del self._runs[names]  # a parent may run its children several times
        return y

    def _start(self, names: tuple[str, ...], first: str, x: torch.Tensor) -> _Run | None:
        if x.is_inference() or not shares_passes(x):  # inference tensors have no version, which would tell of writes
            return None
        if _autograd_mode() != self._mode:  # inside of a checkpoint that does not run the parent's hooks again
            return None
        layer: Any = self.parent._modules[first]
        adapter_name = layer.fused_adapter(x)
        if adapter_name is None:
            return None
        read = {first: layer.tensors_read(adapter_name)}
        if not _have_versions(read[first]):
            return None
        members = [layer]
        for name in names:
            sibling: Any = self.parent._modules.get(name)
            if name == first or type(sibling) is not type(layer) or sibling.fused_adapter(x) != adapter_name:
                continue
            tensors = sibling.tensors_read(adapter_name)
            if _have_versions(tensors):
                read[name] = tensors
                members.append(sibling)
        if len(members) < 2:
            return None
        group = type(layer).group_of(members, adapter_name, x)
        return None if group is None else _Run(x, adapter_name, group, read)


def shared_output(layer: Shares, x: torch.Tensor) -> torch.Tensor | None:
    """The output of a fused layer that shares x with siblings; None where it must run alone."""
    scopes = _scopes.open
    return scopes[-1].output(layer, x) if scopes else None


class _SiblingHook:
    """A hook of a parent. It has a type of its own, and holds only names, so that it can be copied and pickled."""

    def __init__(self, names: Names) -> None:
        self.names = names


class _OpenScope(_SiblingHook):
    def __call__(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        scopes = _scopes.open
        for place, scope in enumerate(scopes):
            if scope.parent is module:  # left behind by Ctrl-C or the like, for which torch calls no hooks
                del scopes[place:]
                break
        scopes.append(_Scope(module, self.names))


class _CloseScope(_SiblingHook):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        scopes = _scopes.open
        while scopes and scopes.pop().parent is not module:
            pass


def connect_siblings(model: nn.Module, layers: Iterable[tuple[str, Any]], trial: TrialRun, warn: bool) -> None:
    """Let the adapted layers of a base model that got the same tensor in the trial run share their passes over it.

    Args:
        model: its parents of siblings get hooks, in the place of an earlier adapter's.
        layers: the adapted layers of one PEFT method, each with its name from the model's root.
        trial: what the trial run saw.
        warn: whether to warn of stacks that could not be run: their layers run alone.
    """
    attach_siblings(model, find_siblings(layers, trial))
    if warn and trial.problems:
        reasons = "; ".join(f"{stack}: {problem}" for stack, problem in trial.problems.items())
        warnings.warn(
            f"Which layers get the same input was not found, so each reads it alone, which is right but slower: "
            f"{type(model).__name__} could not be run on a tiny input ({reasons}).",
            stacklevel=2,
        )


def find_siblings(layers: Iterable[tuple[str, Any]], trial: TrialRun) -> dict[str, Names]:
    """The children of one parent that got the same tensor in the trial run: parent's name -> its groups."""
    by_input: dict[str, dict[tuple[int, ...], list[str]]] = {}  # parent -> the tensors of the calls -> children
    for name, layer in layers:
        inputs = trial.inputs.get(name)
        if inputs and isinstance(layer.get_base_layer(), nn.Linear):
            parent, _, child = name.rpartition(".")
            by_input.setdefault(parent, {}).setdefault(inputs, []).append(child)
    groups = {
        parent: tuple(tuple(names) for names in children.values() if len(names) > 1)
        for parent, children in by_input.items()
    }
    return {parent: names for parent, names in groups.items() if names}


def attach_siblings(model: nn.Module, siblings: dict[str, Names]) -> None:
    """Register the hooks on the parents by which siblings share passes, in the place of an earlier adapter's."""
    for parent, names in siblings.items():
        module = model.get_submodule(parent)
        detach_siblings(module)
        module.register_forward_pre_hook(_OpenScope(names))
        register_always_called(module, _CloseScope(names))


def detach_unused_siblings(model: nn.Module) -> None:
    """Remove the hooks from parents that no longer have two fused layers of a group."""
    for module in model.modules():
        names = siblings_below(module)
        if names and not any(_count(module, group) > 1 for group in names):
            detach_siblings(module)


def siblings_below(module: nn.Module) -> Names:
    """The groups among the children of a module."""
    hooks = module._forward_pre_hooks.values()
    return next((hook.names for hook in hooks if isinstance(hook, _OpenScope)), ())


def _count(module: nn.Module, names: Iterable[str]) -> int:
    layers: list[Any] = [module._modules.get(name) for name in names]
    return sum(hasattr(type(layer), "group_of") and bool(getattr(layer, "sibo_sites", None)) for layer in layers)


def detach_siblings(module: nn.Module) -> None:
    """Remove the hooks of siblings from a module, whose children then run alone."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, _SiblingHook):
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
