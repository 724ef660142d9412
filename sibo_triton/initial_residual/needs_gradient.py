"""Whether the initial residual needs a gradient, decided by what it was computed from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import FunctionType, MethodType, ModuleType

import torch
from torch import nn
from torch.autograd import forward_ad


def needs_gradient(initial_residual: torch.Tensor, called_with_gradient: bool, outermost: nn.Module | None) -> bool:
    """Whether somebody wants the gradient of h0, or a tangent reaches it.

    `requires_grad` alone does not tell: `enable_input_require_grads()` makes the output of a frozen embedding require
    grad, and computing it would cost an [M, K] accumulation for every mixing module. Where its hook is, a leaf that is
    no parameter is taken for its work.

    Args:
        initial_residual: h0, of any shape.
        called_with_gradient: whether the outermost model was called with a tensor that requires grad (`inputs_embeds`,
            soft prompts).
        outermost: the outermost model that was called, or None if it is not known.
    """
    if torch.compiler.is_compiling():  # what it was computed from cannot be traced; the gradient is never wrong
        return initial_residual.requires_grad
    if forward_ad._current_level >= 0 or torch._C._functorch.is_functorch_wrapped_tensor(initial_residual):
        return True
    if not initial_residual.requires_grad:
        return False
    if called_with_gradient or outermost is None:
        return True
    width = initial_residual.shape[-1]
    if initial_residual.grad_fn is None:
        return _is_wanted(initial_residual, width, outermost)
    return _reaches_wanted(initial_residual.grad_fn, width, outermost)


def _reaches_wanted(node: torch.autograd.graph.Node, width: int, outermost: nn.Module) -> bool:
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        leaf = getattr(node, "variable", None)  # AccumulateGrad
        if leaf is not None and _is_wanted(leaf, width, outermost):
            return True
        if node.name() == "CheckpointFunctionBackward":  # reentrant: it hides its graph and its parameters
            return True
        for successor, _ in node.next_functions:
            if successor is not None and successor not in seen:
                seen.add(successor)
                pending.append(successor)
    return False


def _is_wanted(leaf: torch.Tensor, width: int, outermost: nn.Module) -> bool:
    """Whether a leaf is a parameter, or another tensor whose gradient its owner asks for (attributions).

    Not one of another width than the hidden states: speech models make their inputs leaves, as hooks do embeddings.
    """
    # torch.func.functional_call puts plain tensors where the parameters were, which may have been computed of the leaf
    if isinstance(leaf, nn.Parameter):
        return True
    if any(leaf is parameter or not parameter.is_leaf for parameter in outermost.parameters()):
        return True
    if leaf.shape[-1:] != (width,):
        return False
    for module in outermost.modules():
        if any(map(_makes_leaves, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))):
            return False
    return True


def _makes_leaves(hook: object) -> bool:
    """Whether a forward hook only makes tensors require grad, for checkpoints: transformers', PEFT's, unsloth's."""
    if re.search("requires?_grad", getattr(hook, "__name__", "")):
        return True
    code = getattr(hook, "__code__", None)
    return code is not None and code.co_names == ("requires_grad_",) and not code.co_freevars  # and keeps nothing


def any_requires_grad(values: object) -> bool:
    """Whether a tensor among `values` requires grad: in containers and in attributes of objects, however nested.

    True also where there is too much to look at: h0's gradient is then computed, which is never wrong.
    """
    if torch.compiler.is_compiling():
        return _any_in_containers(values)
    pending, seen = [values], set()
    for _ in range(_MOST):
        if not pending:
            return False
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                return True
        elif not isinstance(value, _WITHOUT_TENSORS) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Mapping):
                pending += value.values()
            elif isinstance(value, (list, tuple, set, frozenset)):
                pending += value
            else:  # dataclasses, namespaces, caches of keys and values
                pending += getattr(value, "__dict__", {}).values()
    return True


def _any_in_containers(values: object, depth: int = 6) -> bool:
    """The same in what Dynamo can trace."""
    if isinstance(values, torch.Tensor):
        return values.requires_grad
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return False
    return depth > 0 and any(_any_in_containers(value, depth - 1) for value in values)


_MOST = 1000  # values to look at: a forward's arguments are far fewer
_WITHOUT_TENSORS = (str, bytes, int, float, type(None), type, nn.Module, ModuleType, FunctionType, MethodType)
