"""The hooks that drive an `InitialResidual`: registered on the base model's modules, and removed again."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from sibo_triton.initial_residual.binding import InitialResidual, first_hidden_state
from sibo_triton.initial_residual.checkpointing import CheckpointWithInitialResidual
from sibo_triton.initial_residual.stacks import BlockStack, inner_module, path_between, unwrap_block

# Attributes with the function that checkpoints a module: of transformers' blocks, of torch's checkpoint_wrapper.
_CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


class _Hook:
    """A hook with a type of its own that can be copied and pickled: it refers to no module.

    It looks modules up below the one that it is called with, which may be a replica (`nn.DataParallel`).
    """

    on_block = False

    def __init__(self, residual: InitialResidual) -> None:
        self.residual = residual


class _ModelEnter(_Hook):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.residual.enter_model(module, (args, kwargs))


class _ModelExit(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.residual.leave_model(module)


class _ScopeEnter(_Hook):
    """Opens the frame. It is on the stack's owner, or on the innermost ancestor that also holds the embedding.

    Names are relative to the module that the hook is on.
    """

    def __init__(self, residual: InitialResidual, owner: str, block_list: str, embedding: str | None) -> None:
        super().__init__(residual)
        self.owner = owner
        self.block_list = block_list
        self.embedding = embedding

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        frame = self.residual.open_forward()
        if not torch.compiler.is_compiling():
            frame.call = sys._getframe(1)  # torch's, which calls this hook, and then the module's forward
        if self.embedding is not None:  # at each forward: adapters may have wrapped it since
            self._come_last(module.get_submodule(self.embedding))
        # at each forward: checkpointing may be enabled, and blocks may be wrapped, at any time
        for i, block in enumerate(module.get_submodule(self.block_list).children()):
            if i == 0 and not _is_first(unwrap_block(block), self.residual):
                raise RuntimeError(
                    f"The first block of {self.residual.stack_name!r} is not that of when the adapter was injected, "
                    "and its input would be taken for the initial residual. Change blocks first, and then inject or "
                    "load the adapter. SIBO cannot run in stages of a pipeline, of which only the first has the "
                    "initial residual."
                )
            for wrapper in _with_inner_modules(block):
                if self._wrap_checkpointing(wrapper):
                    for below in wrapper.modules():  # its own blocks (Swin's stages), which recompute apart from it
                        self._wrap_checkpointing(below)
        self._wrap_checkpointing(module.get_submodule(self.owner), owner=True)

    def _come_last(self, embedding: nn.Module) -> None:
        """See what the embedding returns after all its hooks, also those that came since (NEFTune's noise)."""
        hooks: Any = embedding._forward_hooks
        own = None
        for key, hook in list(hooks.items()):
            if isinstance(hook, _EmbeddingExit):
                own = key if hook.residual is self.residual else own
            elif own is not None:
                _move_to_end(hooks, own)
                return
        if own is None:
            embedding.register_forward_hook(_EmbeddingExit(self.residual))

    def _wrap_checkpointing(self, module: nn.Module, owner: bool = False) -> bool:
        """Whether there is a function that checkpoints the module, and checkpoints are enabled."""
        wrapped = False
        for name in _CHECKPOINT_ATTRIBUTES:
            function = wrapper = module.__dict__.get(name)
            while isinstance(wrapper, CheckpointWithInitialResidual) and wrapper.residual is not self.residual:
                wrapper = wrapper.inner
            if function is not None and not isinstance(wrapper, CheckpointWithInitialResidual):
                module.__dict__[name] = CheckpointWithInitialResidual(function, self.residual, owner)
            wrapped |= function is not None
        return wrapped and module.training and getattr(module, "gradient_checkpointing", True)


@torch.compiler.disable  # Dynamo cannot trace it; it happens once, if ever
def _move_to_end(hooks: Any, key: int) -> None:
    hooks.move_to_end(key)


class _ScopeExit(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        frame, check = self.residual.close(), self.residual.check_read
        if check is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        # without an output the forward has raised
        if module.training and output is not None and frame is not None and frame.value is not None:
            if not frame.compiled and check(module, self.residual, frame.read):
                self.residual.check_read = None


class _BlockEnter(_Hook):
    on_block = True

    def __init__(self, residual: InitialResidual, is_first: bool) -> None:
        super().__init__(residual)
        self.is_first = is_first

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.residual.enter_block(module, first_hidden_state(args, kwargs))


class _BlockExit(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.residual.leave_block(output)


class _EmbeddingExit(_Hook):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.residual.keep_embedding(output)


def register_always_called(module: nn.Module, hook: Callable) -> None:
    """`register_forward_hook` with `always_call`, under a key that is the same for all modules.

    Compiled code is guarded by the keys of such hooks: with torch's, which are unique, no block could use another's.
    """
    handle = module.register_forward_hook(hook, always_call=True)
    key = next(-i for i in itertools.count(1) if -i not in module._forward_hooks)
    module._forward_hooks[key] = module._forward_hooks.pop(handle.id)
    module._forward_hooks_always_called[key] = module._forward_hooks_always_called.pop(handle.id)


def attach(root: nn.Module, stack: BlockStack, source: str, embedding_name: str | None = None) -> InitialResidual:
    """Register the hooks for `stack` on the modules of `root`, unless an earlier adapter has done so.

    Args:
        root: the base model.
        stack: one of its stacks.
        source: "block_input" or "embedding".
        embedding_name: for source "embedding", the token embedding's name from the root.

    Returns:
        The initial residual that the hooks drive.
    """
    scope_name, relative = stack.owner_name, None
    if embedding_name is not None:
        scope_name = _common_ancestor(root, stack.owner_name, embedding_name)
        relative = _name_below(root.get_submodule(scope_name), root.get_submodule(embedding_name))
    scope = root.get_submodule(scope_name)
    for hook in scope._forward_pre_hooks.values():
        if isinstance(hook, _ScopeEnter) and (hook.residual.stack_name, hook.residual.source) == (stack.name, source):
            return hook.residual

    residual = InitialResidual(stack.name, source)
    for module in path_between(root, scope_name):
        module.register_forward_pre_hook(_ModelEnter(residual), with_kwargs=True)
        register_always_called(module, _ModelExit(residual))
    owner, block_list = (name[len(scope_name) :].removeprefix(".") for name in (stack.owner_name, stack.name))
    scope.register_forward_pre_hook(_ScopeEnter(residual, owner, block_list, relative), with_kwargs=True)
    register_always_called(scope, _ScopeExit(residual))
    for i, block in enumerate(stack.blocks):
        block.register_forward_pre_hook(_BlockEnter(residual, is_first=i == 0), with_kwargs=True)
        register_always_called(block, _BlockExit(residual))
    return residual


def detach(root: nn.Module, residual: InitialResidual) -> None:
    """Remove the hooks of `residual` from the modules of `root`, and unwrap what checkpoints them."""
    for module in root.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Hook) and hook.residual is residual:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_always_called.pop(key, None)
        for name in _CHECKPOINT_ATTRIBUTES:
            if name in module.__dict__:
                module.__dict__[name] = _unwrapped(module.__dict__[name], residual)


def attached(root: nn.Module) -> list[InitialResidual]:
    """The initial residuals whose hooks are registered on the modules of `root`."""
    hooks = (hook for module in root.modules() for hook in module._forward_pre_hooks.values())
    return [hook.residual for hook in hooks if isinstance(hook, _ScopeEnter)]


def _is_first(block: nn.Module, residual: InitialResidual) -> bool:
    hooks = (hook for hook in block._forward_pre_hooks.values() if isinstance(hook, _BlockEnter))
    return any(hook.is_first for hook in hooks if hook.residual is residual)


def _with_inner_modules(block: nn.Module) -> Iterator[nn.Module]:
    """A block and, if it is a wrapper (checkpoint_wrapper, FSDP), each module inside, down to the block itself."""
    module: nn.Module | None = block
    while module is not None:
        yield module
        module = inner_module(module)


def _unwrapped(function: Any, residual: InitialResidual) -> Any:
    if not isinstance(function, CheckpointWithInitialResidual):
        return function
    inner = _unwrapped(function.inner, residual)
    if function.residual is residual:
        return inner
    return CheckpointWithInitialResidual(inner, function.residual, function.owner)


def _common_ancestor(root: nn.Module, owner_name: str, embedding_name: str) -> str:
    """The innermost ancestor of the owner, or the owner, that holds the embedding, possibly under another name."""
    embedding = root.get_submodule(embedding_name)
    name = owner_name
    while name and not any(module is embedding for module in root.get_submodule(name).modules()):
        name = name.rpartition(".")[0]
    return name


def _name_below(scope: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in scope.named_modules(remove_duplicate=False) if candidate is module)
