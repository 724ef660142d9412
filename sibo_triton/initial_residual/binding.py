"""Bind the initial residual to its own forward.

One `InitialResidual` stands for one stack of blocks. Hooks open a frame, per thread, when the stack's owner is called,
let the first block fill it, and close it when the owner returns or raises: nothing is kept past the forward.

Under gradient checkpointing the blocks run again in the backward, when other forwards may have come in between. What a
recompute sees must be its own forward's h0, so h0 travels with the checkpointed call, as a tensor argument: every
block's `_gradient_checkpointing_func` is wrapped. Under a checkpoint wrapper around the block (FSDP's activation
checkpointing) there is no such function; there the hidden state's own object carries h0.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

from sibo_triton.initial_residual.routes import any_requires_grad, needs_gradient

_TAG = "_sibo_initial_residual"


class Frame:
    """One run of a stack: the slot that h0 lies in while it lasts."""

    __slots__ = ("call", "carries_tags", "embedding", "recomputed_block", "value")

    def __init__(self, value: torch.Tensor | None = None) -> None:
        self.value = value
        self.embedding: torch.Tensor | None = None
        self.carries_tags = False  # a wrapper stands between the stack and its blocks
        self.recomputed_block: nn.Module | None = None
        self.call: FrameType | None = None  # the Python frame that runs the stack's owner, or the block

    def has_ended(self) -> bool:
        """Whether its forward was left by Ctrl-C or the like, for which torch calls no hooks."""
        if self.call is None:
            return False
        running: FrameType | None = sys._getframe(1)
        while running is not None and running is not self.call:
            running = running.f_back
        return running is None


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.calls: list[tuple[nn.Module, bool]] = []  # the models being called, outermost first


class InitialResidual:
    """The initial residual h0 of one stack of blocks, of whichever forward is running in the current thread.

    Holds no module and no tensor outside of a forward, so a model that refers to it can be copied and pickled.

    Args:
        stack_name: the block list's name from the base model's root.
        source: "block_input", what enters the first block, or "embedding", what the token embedding returned.
    """

    def __init__(self, stack_name: str, source: str) -> None:
        self.stack_name = stack_name
        self.source = source
        self._state = _ThreadState()

    def __getstate__(self) -> dict[str, str]:
        return {"stack_name": self.stack_name, "source": self.source}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def frame(self) -> Frame | None:
        """The frame of the forward (or recompute) that runs in this thread."""
        self._drop_ended()
        frames = self._state.frames
        return frames[-1] if frames else None

    def _drop_ended(self) -> None:
        frames = self._state.frames
        while frames and not torch.compiler.is_compiling() and frames[-1].has_ended():
            frames.pop()

    def open(self, frame: Frame) -> None:
        self._state.frames.append(frame)

    def close(self) -> None:
        if self._state.frames:
            self._state.frames.pop()

    def open_forward(self) -> Frame:
        """Open the frame of a new forward."""
        self._drop_ended()
        frame = Frame()
        self.open(frame)
        return frame

    def enter_model(self, model: nn.Module, inputs: Any) -> None:
        calls = self._state.calls
        for position, (called, _) in enumerate(calls):
            if called is model:  # left behind by an interrupted forward
                del calls[position:]
                break
        calls.append((model, not calls and any_requires_grad(inputs)))

    def leave_model(self, model: nn.Module) -> None:
        calls = self._state.calls
        while calls and calls.pop()[0] is not model:
            pass

    def fill(self, hidden_states: torch.Tensor | None) -> torch.Tensor:
        """Take h0 as the first block is reached, detached where its gradient would go nowhere."""
        frame = self.frame
        assert frame is not None
        value = hidden_states
        if self.source == "embedding":
            value = frame.embedding
            if value is None:
                raise RuntimeError(
                    f"sibo_source='embedding': the token embedding was not called before {self.stack_name!r} (the "
                    "model was called with inputs_embeds?). Call it with input_ids, or use sibo_source='block_input'."
                )
            if hidden_states is not None and value.shape != hidden_states.shape:
                raise ValueError(
                    f"sibo_source='embedding': the embedding returned {list(value.shape)}, but what enters "
                    f"{self.stack_name!r} is {list(hidden_states.shape)}. Use sibo_source='block_input'."
                )
        if value is None:
            raise RuntimeError(
                f"The first block of {self.stack_name!r} was called without a hidden state among its tensor arguments, "
                "so its initial residual is not known. Name the right block list in sibo_blocks."
            )
        outermost, called_with_gradient = self._state.calls[0] if self._state.calls else (None, False)
        if torch.is_grad_enabled() and not needs_gradient(value, called_with_gradient, outermost):
            value = value.detach()
        frame.value = value
        return value

    def get(self, module_name: str) -> torch.Tensor:
        """h0 of the forward that runs now: [..., hidden size], in the model's dtype.

        Raises:
            RuntimeError: no forward of the stack runs in this thread: the module, or its block, was called alone.
        """
        frame = self.frame
        if frame is None or frame.value is None:
            raise RuntimeError(
                f"{module_name} mixes in the initial residual of {self.stack_name!r}, but ran outside of a forward of "
                "that stack, so there is none. Call the whole model (or the module that owns the blocks) instead of a "
                "block or layer alone; if the model runs its blocks in another way, name their list in sibo_blocks. "
                "Checkpointing of a part of a block, or by a reentrant wrapper around it, is not supported: use "
                "gradient_checkpointing_enable(), or checkpoint_wrapper(..., checkpoint_impl=NO_REENTRANT) on blocks."
            )
        return frame.value


def first_hidden_state(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The hidden state among a block's arguments: the first floating-point tensor of at least two dimensions."""
    named = kwargs.get("hidden_states")
    for value in (*args, named, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2:
            return value
    return None


class RecomputeWithInitialResidual:
    """A checkpointed function that takes h0 as its first argument and opens a frame around itself."""

    def __init__(self, function: Callable, residual: InitialResidual) -> None:
        self.function = function
        self.residual = residual

    def __call__(self, initial_residual: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        frame = Frame(initial_residual)
        frame.recomputed_block = _NO_BLOCK
        self.residual.open(frame)
        try:
            return self.function(*args, **kwargs)
        finally:
            self.residual.close()


_NO_BLOCK = nn.Module()  # a recompute that closes its frame itself


class CheckpointWithInitialResidual:
    """A `_gradient_checkpointing_func` that hands the running forward's h0 to the checkpointed call."""

    def __init__(self, inner: Callable, residual: InitialResidual, blocks: tuple[nn.Module, ...] = ()) -> None:
        self.inner = inner
        self.residual = residual
        self.blocks = blocks  # for the function of a stack's owner, which may checkpoint other things too

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        called, block_args = function, args
        while isinstance(called, RecomputeWithInitialResidual):  # that of another source
            called, block_args = called.function, block_args[1:]
        keywords = called.keywords if isinstance(called, functools.partial) else {}
        if self.blocks:
            method = called.func if isinstance(called, functools.partial) else called
            if not any(block is getattr(method, "__self__", None) for block in self.blocks):
                return self.inner(function, *args, **kwargs)
        frame = self.residual.frame
        if frame is None:
            return self.inner(function, *args, **kwargs)
        if frame.value is None:  # the first block: its own hook has not run yet, or runs inside of the checkpoint
            self.residual.fill(first_hidden_state(block_args, keywords))
        return self.inner(RecomputeWithInitialResidual(function, self.residual), frame.value, *args, **kwargs)


def tag(hidden_states: torch.Tensor, residual: InitialResidual, value: torch.Tensor) -> None:
    """Let a hidden state carry h0 into a recompute. A tensor must not refer to itself: None stands for that."""
    tags = dict(getattr(hidden_states, _TAG, ()))
    tags[(residual.stack_name, residual.source)] = None if value is hidden_states else value
    setattr(hidden_states, _TAG, tags)


def tagged(hidden_states: torch.Tensor | None, residual: InitialResidual) -> torch.Tensor | None:
    """The h0 that `hidden_states` carries, or None."""
    tags = getattr(hidden_states, _TAG, {})
    key = (residual.stack_name, residual.source)
    if key not in tags:
        return None
    return hidden_states if tags[key] is None else tags[key]
