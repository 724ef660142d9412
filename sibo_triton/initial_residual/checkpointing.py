"""Pass the initial residual to blocks that are checkpointed.

Under gradient checkpointing the blocks run again in the backward, when other forwards may have run in between. A
recompute must see its own forward's h0, so h0 is passed to the checkpointed call as a tensor argument: the function
that checkpoints a block, transformers' or that of torch's `checkpoint_wrapper`, is wrapped.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sibo_triton.initial_residual.binding import Frame, InitialResidual, first_hidden_state
from sibo_triton.initial_residual.stacks import unwrap_block


class RecomputeWithInitialResidual:
    """A checkpointed function that takes h0 as its last argument and opens a frame around itself.

    Functions that checkpoint look at the first argument, the hidden states, and at attributes of what they are to call
    (LLaMA-Factory's, axolotl's, unsloth's): this has those of the function.
    """

    def __init__(self, function: Callable, residual: InitialResidual) -> None:
        self.function = function
        self.residual = residual

    def __getattr__(self, name: str) -> Any:
        if name == "function":  # of an instance that is being copied
            raise AttributeError(name)
        function = self.function
        if name == "__self__" and isinstance(function, functools.partial):
            function = function.func
        return getattr(function, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = self.residual.frame
        if running is not None and running.in_checkpoint:
            return self.function(*args[:-1], **kwargs)
        frame = Frame(args[-1])
        self.residual.open(frame)
        try:
            return self.function(*args[:-1], **kwargs)
        finally:
            self.residual.close()
            outer = self.residual.frame  # none in the backward
            if outer is not None:
                outer.read |= frame.read


class CheckpointWithInitialResidual:
    """A function that checkpoints a block, and passes the running forward's h0 to the checkpointed call."""

    def __init__(self, inner: Callable, residual: InitialResidual, owner: bool = False) -> None:
        self.inner = inner
        self.residual = residual
        self.owner = owner  # whether it is that of a stack's owner, which may checkpoint more than blocks

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        called, block_args = function, args
        while isinstance(called, RecomputeWithInitialResidual):  # of another source of h0
            called, block_args = called.function, block_args[:-1]
        keywords = {**kwargs, **called.keywords} if isinstance(called, functools.partial) else kwargs
        frame, block = self.residual.frame, self._block_of(called)
        if frame is None or (self.owner and block is None):
            return self.inner(function, *args, **kwargs)
        is_outermost = frame.entered is None
        if is_outermost:  # the block's own hooks run inside of the checkpoint, on another frame
            self.residual.enter_block(self if block is None else block, first_hidden_state(block_args, keywords))
        outer, frame.in_checkpoint = frame.in_checkpoint, torch.compiler.is_compiling()
        if not frame.in_checkpoint and frame.value is not None and frame.value.requires_grad:
            self._warn_of_lost_gradients()
        output = self.inner(RecomputeWithInitialResidual(function, self.residual), *args, frame.value, **kwargs)
        frame.in_checkpoint = outer
        if is_outermost:
            self.residual.leave_block(output)
        return output

    def _warn_of_lost_gradients(self) -> None:
        inner: Any = self.inner
        while isinstance(inner, (functools.partial, CheckpointWithInitialResidual)):
            inner = inner.func if isinstance(inner, functools.partial) else inner.inner
        owner = str(getattr(inner, "__module__", ""))
        if owner.partition(".")[0] in ("torch", "deepspeed"):  # theirs return the gradients of all arguments
            return
        warnings.warn(
            f"The initial residual of {self.residual.stack_name!r} requires grad. If {owner}."
            f"{getattr(inner, '__name__', inner)}, by which blocks are checkpointed, returns the gradient of its first "
            "argument only, and somebody needs this one, it is lost: use gradient_checkpointing_enable() without it.",
            stacklevel=2,
        )

    def _block_of(self, called: Callable) -> nn.Module | None:
        """The block that a checkpointed function runs, if it is one of the stack's."""
        called = called.func if isinstance(called, functools.partial) else called
        module = called if isinstance(called, nn.Module) else getattr(called, "__self__", None)
        if not isinstance(module, nn.Module):
            return None
        block = unwrap_block(module)
        return block if is_block_of(block, self.residual) else None


def is_block_of(module: nn.Module, residual: InitialResidual) -> bool:
    """Whether `module` is one of the stack's blocks, which have its hooks."""
    hooks = module._forward_pre_hooks.values()
    return any(getattr(hook, "on_block", False) and getattr(hook, "residual", None) is residual for hook in hooks)
