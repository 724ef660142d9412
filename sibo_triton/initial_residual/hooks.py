"""The hooks that drive an `InitialResidual`: put on the base model's modules, and taken off again."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from sibo_triton.initial_residual.binding import (
    CheckpointWithInitialResidual,
    Frame,
    InitialResidual,
    first_hidden_state,
    tag,
    tagged,
)
from sibo_triton.initial_residual.stacks import BlockStack, path_between


class _Hook:
    """A hook that can be told from others, copied and pickled."""

    def __init__(self, residual: InitialResidual) -> None:
        self.residual = residual


class _ModelEnter(_Hook):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.residual.enter_model(module, (args, kwargs))


class _ModelExit(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.residual.leave_model(module)


class _ScopeEnter(_Hook):
    """Opens the frame: on the stack's owner, or on the first ancestor that holds the embedding too."""

    def __init__(self, residual: InitialResidual, stack: BlockStack, embedding_name: str | None) -> None:
        super().__init__(residual)
        self.block_list = stack.block_list
        self.blocks = stack.blocks
        self.owner = stack.owner
        self.embedding_name = embedding_name

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        frame = self.residual.open_forward()
        if not torch.compiler.is_compiling():
            frame.call = sys._getframe(1)
        frame.carries_tags = any(a is not b for a, b in zip(self.block_list.children(), self.blocks, strict=False))
        if self.embedding_name is not None:  # adapters may have wrapped it since
            embedding = module.get_submodule(self.embedding_name)
            hooks = embedding._forward_hooks.values()
            if not any(isinstance(hook, _EmbeddingExit) and hook.residual is self.residual for hook in hooks):
                embedding.register_forward_hook(_EmbeddingExit(self.residual))
        for block in self.blocks:  # here, not when attaching: checkpointing may be enabled at any time
            self._wrap_checkpointing(block)
        self._wrap_checkpointing(self.owner, self.blocks)

    def _wrap_checkpointing(self, module: nn.Module, blocks: tuple[nn.Module, ...] = ()) -> None:
        function = module.__dict__.get("_gradient_checkpointing_func")
        wrapper = function
        while isinstance(wrapper, CheckpointWithInitialResidual):
            if wrapper.residual is self.residual:
                return
            wrapper = wrapper.inner
        if function is not None:
            module.__dict__["_gradient_checkpointing_func"] = CheckpointWithInitialResidual(
                function, self.residual, blocks
            )


class _ScopeExit(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.residual.close()


class _BlockEnter(_Hook):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden_states = first_hidden_state(args, kwargs)
        frame = self.residual.frame
        if frame is None:
            # Nobody opened a frame: a wrapper around the block recomputes it in the backward, or somebody calls the
            # block alone. Only the first may take what the hidden state carries.
            value = tagged(hidden_states, self.residual) if torch._C._current_graph_task_id() != -1 else None
            if value is not None:
                frame = Frame(value)
                frame.recomputed_block = module
                if not torch.compiler.is_compiling():
                    frame.call = sys._getframe(1)
                self.residual.open(frame)
            return
        value = self.residual.fill(hidden_states) if frame.value is None else frame.value
        if frame.carries_tags and hidden_states is not None and torch.is_grad_enabled():
            tag(hidden_states, self.residual, value)


class _BlockExit(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        frame = self.residual.frame
        if frame is not None and frame.recomputed_block is module:
            self.residual.close()


class _EmbeddingExit(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        frame = self.residual.frame
        if frame is not None and frame.value is None and isinstance(output, torch.Tensor):
            frame.embedding = output


def attach(root: nn.Module, stack: BlockStack, source: str, embedding_name: str | None = None) -> InitialResidual:
    """Put the hooks for `stack` on the modules of `root`, or return what an earlier adapter put there.

    Args:
        root: the base model.
        stack: one of its stacks.
        source: "block_input" or "embedding".
        embedding_name: for source "embedding", the token embedding's name from the root.
    """
    scope_name, relative = stack.owner_name, None
    if embedding_name is not None:
        scope_name = _common_ancestor(root, stack.owner_name, embedding_name)
        relative = _name_below(root.get_submodule(scope_name), root.get_submodule(embedding_name))
    scope = root.get_submodule(scope_name)
    for hook in scope._forward_pre_hooks.values():
        if isinstance(hook, _ScopeEnter) and hook.block_list is stack.block_list and hook.residual.source == source:
            return hook.residual

    residual = InitialResidual(stack.name, source)
    for module in path_between(root, scope_name):
        module.register_forward_pre_hook(_ModelEnter(residual), with_kwargs=True)
        module.register_forward_hook(_ModelExit(residual), always_call=True)
    scope.register_forward_pre_hook(_ScopeEnter(residual, stack, relative), with_kwargs=True)
    scope.register_forward_hook(_ScopeExit(residual), always_call=True)
    for block in stack.blocks:
        block.register_forward_pre_hook(_BlockEnter(residual), with_kwargs=True)
        block.register_forward_hook(_BlockExit(residual), always_call=True)
    return residual


def detach(root: nn.Module, residual: InitialResidual | None = None) -> None:
    """Take the hooks of `residual`, or of all, off the modules of `root`, and its checkpoint functions out."""
    for module in root.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Hook) and (residual is None or hook.residual is residual):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_always_called.pop(key, None)
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, CheckpointWithInitialResidual):
            module.__dict__["_gradient_checkpointing_func"] = _unwrapped(function, residual)


def attached(root: nn.Module) -> list[InitialResidual]:
    """The initial residuals whose hooks are on the modules of `root`."""
    hooks = (hook for module in root.modules() for hook in module._forward_pre_hooks.values())
    return [hook.residual for hook in hooks if isinstance(hook, _ScopeEnter)]


def _unwrapped(function: Any, residual: InitialResidual | None) -> Any:
    if not isinstance(function, CheckpointWithInitialResidual):
        return function
    inner = _unwrapped(function.inner, residual)
    if residual is None or function.residual is residual:
        return inner
    return CheckpointWithInitialResidual(inner, function.residual, function.blocks)


def _common_ancestor(root: nn.Module, owner_name: str, embedding_name: str) -> str:
    """The innermost ancestor of the owner (or itself) that holds the embedding, possibly under another name."""
    embedding = root.get_submodule(embedding_name)
    name = owner_name
    while name and not any(module is embedding for module in root.get_submodule(name).modules()):
        name = name.rpartition(".")[0]
    return name


def _name_below(scope: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in scope.named_modules(remove_duplicate=False) if candidate is module)
