"""Bind the initial residual to its own forward.

Each stack of blocks has one `InitialResidual`. Hooks open a frame, per thread, when the stack's owner is called, let
the first block fill it, and close it when the owner returns or raises: nothing outlives the forward.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

from sibo_triton.initial_residual.needs_gradient import any_requires_grad, needs_gradient


class Frame:
    """One forward of a stack: it holds h0 while the forward lasts."""

    __slots__ = (
        "call",
        "compiled",
        "copies",
        "embedding",
        "entered",
        "first_block",
        "in_checkpoint",
        "inputs",
        "last_output",
        "read",
        "value",
        "version",
        "whole",
    )

    def __init__(self, value: torch.Tensor | None = None) -> None:
        self.value = value
        self.version = None if value is None else _version_of(value)
        self.whole: torch.Tensor | None = None  # h0 of all tokens, while a block has some of them
        self.copies: dict[tuple[torch.device, bool, bool], torch.Tensor] = {}  # on other devices
        self.embedding: torch.Tensor | None = None
        self.first_block: object = None  # the block that filled the frame, or what stands for it
        self.entered: object = None  # the block that runs
        self.last_output: torch.Tensor | None = None  # of the block that returned last
        #: Whether a block runs in a checkpoint that is compiled, where Dynamo forbids to open a frame: what is traced
        #: keeps this one, and what runs again in the backward, where there is none, opens its own.
        self.in_checkpoint = False
        self.compiled = False  # whether something has read h0 in compiled code, which notes no names
        self.call: FrameType | None = None  # the Python frame that runs the stack's owner
        self.read: set[str] = set()  # the modules that have read h0
        #: By module and adapter, for modules that run once in a block: what h0 was mixed into, in the block that runs.
        self.inputs: dict[tuple[str, str], weakref.ref[torch.Tensor]] = {}

    def value_on(self, device: torch.device) -> torch.Tensor:
        """h0 on `device`: a copy that all modules there share, as autograd would keep one for each."""
        assert self.value is not None
        if self.value.device == device:
            return self.value
        if torch.compiler.is_compiling():  # the compiler merges equal copies
            return self.value.to(device)
        # a copy made without a graph is wrong for a module that trains, and one made in inference mode for any other
        key = (device, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if key not in self.copies:
            self.copies[key] = self.value.to(device)
        return self.copies[key]

    def is_written(self) -> bool:
        """Whether h0 was written in place since the first block was reached."""
        assert self.value is not None
        version = _version_of(self.value)
        return None not in (version, self.version) and version != self.version

    def has_ended(self) -> bool:
        """Whether its forward was interrupted (by Ctrl-C or the like), for which torch calls no hooks."""
        if self.call is None:
            return False
        running: FrameType | None = sys._getframe(1)
        while running is not None and running is not self.call:
            running = running.f_back
        return running is None


def _version_of(tensor: torch.Tensor) -> int | None:
    """Tensors of inference mode have no version; compiled code has none to look at."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.calls: list[tuple[nn.Module, bool]] = []  # the models being called, outermost first


class InitialResidual:
    """The initial residual h0 of one stack of blocks, in the forward that is running in the current thread.

    It holds no module, and no tensor outside of a forward, so a model that refers to it can be copied and pickled.

    Args:
        stack_name: the block list's name from the base model's root.
        source: "block_input", what enters the first block, or "embedding", what the token embedding returned.
    """

    def __init__(self, stack_name: str, source: str) -> None:
        self.stack_name = stack_name
        self.source = source
        #: Whether no block is known to write into what entered the first one. Compiled code has no versions that tell.
        self.is_intact = False
        #: Called at the end of forwards with gradients, until it returns True: with the module whose call that was,
        #: this, and the names of the modules that have read h0. A module's function, so that it can be pickled.
        self.check_read: Callable[[nn.Module, InitialResidual, set[str]], bool] | None = None
        self._warned_of_streams = False
        self._state = _ThreadState()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_state"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _state=_ThreadState())

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

    def close(self) -> Frame | None:
        return self._state.frames.pop() if self._state.frames else None

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
        # without gradients it is not asked for, unless the model enables them inside
        calls.append((model, not calls and (not torch.is_grad_enabled() or any_requires_grad(inputs))))

    def leave_model(self, model: nn.Module) -> None:
        calls = self._state.calls
        while calls and calls.pop()[0] is not model:
            pass

    def fill(self, hidden_states: torch.Tensor | None) -> None:
        """Set h0 as the first block is reached, detached where nothing below it needs its gradient.

        Raises:
            RuntimeError: there is no hidden state, or no output of the embedding, to take h0 from.
            ValueError: what the embedding returned has not the shape of the hidden state.
        """
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
        # torch.jit.trace checks a trace against another, which it makes without gradients
        if torch.is_grad_enabled() and torch._C._get_tracing_state() is None:
            if not needs_gradient(value, called_with_gradient, outermost):
                value = value.detach()  # another object: checkpoint functions make hidden states require grad in place
        if torch.compiler.is_compiling():
            is_alias = not self.is_intact if self.source == "block_input" else frame.version is not None
            if is_alias:  # of the hidden states, or of an embedding that eager code kept
                value = value.clone()
        if self.source == "block_input":
            frame.version = _version_of(value)
        frame.value = value

    def keep_embedding(self, output: torch.Tensor) -> None:
        """The embedding has returned: what the first block's frame is filled with, if that is the source."""
        frame = self.frame
        if frame is not None and frame.value is None:
            if torch.compiler.is_compiling():
                output = output.clone()
            frame.embedding, frame.version = output, _version_of(output)

    def enter_block(self, block: object, hidden_states: torch.Tensor | None) -> None:
        """A block of the running forward is called: the first one fills its frame.

        Args:
            block: the block, or what stands for it.
            hidden_states: what it gets.

        Raises:
            RuntimeError: a second sequence enters; also as :meth:`fill`.
            ValueError: as :meth:`fill`.
        """
        frame = self.frame
        if frame is None or frame.in_checkpoint:
            return  # without a frame the block is called alone: the first layer that mixes raises
        if torch.compiler.is_compiling():
            frame.compiled = True
        else:
            frame.inputs.clear()
        if frame.value is None:
            self.fill(hidden_states)
            frame.first_block = block
        elif frame.first_block is block and frame.entered is None and not _is_same(hidden_states, frame.last_output):
            raise RuntimeError(
                f"The first block of {self.stack_name!r} was entered twice in one call of the module that owns the "
                "blocks, the second time not with what the last block returned: which input the initial residual "
                "belongs to cannot be told. Name in sibo_blocks a list that one sequence passes once per call."
            )
        else:
            self._match_tokens(frame, hidden_states)
        frame.entered = block

    @staticmethod
    def _match_tokens(frame: Frame, hidden_states: torch.Tensor | None) -> None:
        """Where a block gets some of the tokens, as in Gemma 4, h0 is that of these; and of all where it gets all."""
        value, tokens = frame.value, _tokens_kept(hidden_states, frame.last_output)
        assert value is not None
        if tokens is not None and value.shape[:2] == frame.last_output.shape[:2]:  # type: ignore[union-attr]
            frame.whole = value if frame.whole is None else frame.whole
            frame.value = value[:, tokens]  # a view, whose version is the same
            frame.copies.clear()
        elif frame.whole is not None and hidden_states is not None:
            if hidden_states.shape[:2] == frame.whole.shape[:2]:
                frame.value, frame.whole = frame.whole, None
                frame.copies.clear()

    def leave_block(self, output: Any) -> None:
        """A block of the running forward returns."""
        frame = self.frame
        if frame is not None and not frame.in_checkpoint:
            frame.last_output = output[0] if isinstance(output, (tuple, list)) and output else output
            frame.entered = None

    def get(self, module_name: str, device: torch.device) -> torch.Tensor:
        """h0 of the forward that runs now: [..., hidden size], in the model's dtype, on `device`.

        Raises:
            RuntimeError: no forward of the stack runs in this thread (the module, or its block, was called alone), or
                the model has written into h0.
        """
        frame = self.frame
        if frame is None or frame.value is None:
            raise RuntimeError(
                f"{module_name} mixes in the initial residual of {self.stack_name!r}, but ran outside of a forward of "
                "that stack, so there is none. "
                + (
                    "It was recomputed in the backward by a checkpoint around a part of a block, which cannot carry "
                    "it, or around the block's `forward` itself: checkpoint whole blocks "
                    "(gradient_checkpointing_enable(), or checkpoint_wrapper on the blocks)."
                    if torch._C._current_graph_task_id() != -1
                    else "Call the whole model (or the module that owns the blocks) instead of a block or layer alone; "
                    "if the model runs its blocks in another way, name their list in sibo_blocks."
                )
            )
        if frame.is_written():
            raise RuntimeError(
                f"{module_name} mixes in the initial residual of {self.stack_name!r}, but the model has written into "
                "that tensor since (in place), so it is lost. "
                + (
                    "Use sibo_source='block_input'."
                    if self.source == "embedding"
                    else "Let the model add out of place (x = x + y, not x += y)."
                )
            )
        self.note_read(module_name)
        return frame.value_on(device)

    def note_input(self, module_name: str, adapter_name: str, x: torch.Tensor) -> None:
        """A module that runs once in a block is about to mix h0 into `x`: warn, once, if it has so with another tensor.

        A block may call it again (after an error, in training only), and h0 is right. Or there are two streams.
        """
        frame = self._state.frames[-1]
        if torch.compiler.is_compiling() or frame.compiled:  # compiled code notes no blocks
            return
        key = module_name, adapter_name
        noted = frame.inputs.get(key)
        before = None if noted is None else noted()
        if before is None:
            frame.inputs[key] = weakref.ref(x)
        elif before is not x and not self._warned_of_streams:
            self._warned_of_streams = True
            warnings.warn(
                f"{module_name} was called twice in one block, with different inputs, and once in the trial run of the "
                f"model. The initial residual of {self.stack_name!r} is mixed into both. If the second is another "
                "stream than the first, which must not see its tokens (XLNet's, with target_mapping), leave the module "
                "out with sibo_target_modules.",
                stacklevel=2,
            )

    def note_read(self, module_name: str) -> None:
        """A module reads the h0 of the forward that runs now."""
        frame = self._state.frames[-1]
        if not torch.compiler.is_compiling():
            frame.read.add(module_name)
        elif not frame.in_checkpoint:
            frame.compiled = True


def _is_same(one: torch.Tensor | None, other: Any) -> bool:
    """Whether both are one tensor, or views of all of one: FSDP2 gives a block new objects."""
    if one is other or torch.compiler.is_compiling():
        return one is other
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.is_set_to(other)


def _tokens_kept(hidden_states: torch.Tensor | None, last_output: Any) -> slice | None:
    """Which tokens of what the last block returned enter the next, where those are a slice of it (as in Gemma 4)."""
    if torch.compiler.is_compiling() or hidden_states is None or not isinstance(last_output, torch.Tensor):
        return None
    some, every = hidden_states, last_output
    if some.dim() != every.dim() or some.dim() < 3 or some.shape[1] >= every.shape[1] or every.stride(1) == 0:
        return None
    same = some.shape[0] == every.shape[0] and some.shape[2:] == every.shape[2:] and some.stride() == every.stride()
    if not same or some.untyped_storage()._cdata != every.untyped_storage()._cdata:
        return None
    start, rest = divmod(int(some.storage_offset() - every.storage_offset()), every.stride(1))
    if rest or not 0 <= start <= every.shape[1] - some.shape[1]:
        return None
    return slice(start, start + some.shape[1])


def first_hidden_state(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A block's `hidden_states`, or its first floating-point argument of at least two dimensions."""
    for value in (kwargs.get("hidden_states"), *args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2:
            return value
    return None
