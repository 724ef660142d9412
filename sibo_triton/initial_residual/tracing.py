"""Find out what feeds each module of a block: the residual stream, or something else.

The model is run once on a tiny input. The tensor that enters the first block of a stack is marked, and the mark follows
the data through additions, normalisations, dropout, casts and views that keep the tokens' order. It ends at everything
else: a linear layer, an attention, an activation. A linear layer whose input carries its own stack's mark reads the
residual stream. No names of models or layers are used.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sibo_triton.initial_residual.binding import first_hidden_state
from sibo_triton.initial_residual.output_uses import OutputUses, is_linear_like, memory_of
from sibo_triton.initial_residual.stacks import BlockStack, path_between

_TOKENS = 5  # a prime, and no common width, so that shapes tell tokens from features

_numbers = itertools.count()

_ADDITIONS = {"add", "add_", "sub", "sub_", "rsub"}
_SCALINGS = {"mul", "mul_", "div", "div_"}
_KEEPING = {
    "_to_copy", "alias", "clone", "detach", "dropout", "native_dropout", "lift_fresh", "contiguous",
    "view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze",
    "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm",
}  # fmt: skip


@dataclass
class TrialRun:
    """What a trial run of a model saw.

    Attributes:
        marks: module name -> the marks that its inputs carried, over all calls: a stack's name, or None for no mark.
        inputs: module name -> a number for the input tensor of each call, equal for modules that got the same tensor.
        feed_forward: the linears whose output goes into other linears, token by token (`output_uses.py`).
        widths: stack name -> the width of its residual stream.
        problems: stack name -> why it could not be run.
        repeated: the stacks that one sequence passes several times, in separate calls of their owner.
    """

    marks: dict[str, set[str | None]] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    feed_forward: set[str] = field(default_factory=set)
    widths: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)

    def reads(self, module_name: str, stack: BlockStack) -> tuple[bool, str]:
        """Whether a module reads its stack's residual stream, and the reason."""
        if stack.name in self.problems:
            return False, "is fed by what is unknown: a trial run of its stack did not work"
        if stack.name in self.repeated:
            return False, f"lies in {stack.name}, which the model runs several times: name an outer list in sibo_blocks"
        marks = self.marks.get(module_name)
        if marks is None:
            return False, "did not run in the trial run of the model, so what feeds it is unknown"
        if marks == {stack.name}:
            return True, "reads the residual stream"
        others = sorted(mark for mark in marks if mark not in (None, stack.name))
        if others:
            return False, f"reads another stack's stream ({', '.join(others)})"
        if stack.name in marks:
            return False, "reads the residual stream in some of its calls only"
        return False, "is not fed by the residual stream"

    def reads_into_feed_forward(self, module_name: str, stack: BlockStack) -> bool:
        """Whether a module is a linear of a feed-forward network that reads its stack's residual stream."""
        return self.reads(module_name, stack)[0] and module_name in self.feed_forward


class _Finished(Exception):
    """Every kind of block has been seen: the rest of the model need not run."""


class _StreamMode(TorchDispatchMode):
    """Carries the marks from operation to operation; a tensor is identified by the memory that it shows."""

    def __init__(self) -> None:
        super().__init__()
        self._marks: dict[tuple, tuple[torch.Tensor, str]] = {}  # the tensor is kept so that its memory is not reused
        self._numbers: dict[int, tuple[torch.Tensor, int]] = {}  # likewise

    def number_of(self, tensor: torch.Tensor) -> int:
        """A number that is unique to the tensor, among all runs."""
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = tensor, next(_numbers)
        return self._numbers[id(tensor)][1]

    def mark(self, tensor: torch.Tensor, stream: str) -> None:
        self._marks[memory_of(tensor)] = (tensor, stream)

    def mark_of(self, tensor: Any) -> str | None:
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            return None
        return self._marks.get(memory_of(tensor), (None, None))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        stream = self._stream_of_result(func.overloadpacket.__name__, args)
        result = func(*args, **(kwargs or {}))
        output = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(output, torch.Tensor) and output.layout == torch.strided:
            if stream is not None and output.shape[-1:] == self._marked_width(args):
                self.mark(output, stream)
            else:  # written in place, or in memory that was another tensor's
                self._marks.pop(memory_of(output), None)
        return result

    def _stream_of_result(self, name: str, args: tuple) -> str | None:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if name in _KEEPING:
            return self.mark_of(tensors[0]) if tensors else None
        streams = {mark for mark in map(self.mark_of, tensors) if mark is not None}
        if len(streams) != 1:
            return None
        if name in _ADDITIONS:
            return streams.pop()
        if name in _SCALINGS:
            largest = max(tensor.numel() for tensor in tensors)
            if sum(tensor.numel() == largest for tensor in tensors) == 1:  # by a statistic or a weight, not by a gate
                return streams.pop()
        return None

    def _marked_width(self, args: tuple) -> torch.Size:
        return next(arg.shape[-1:] for arg in args if isinstance(arg, torch.Tensor) and self.mark_of(arg) is not None)


def trial_run(root: nn.Module, stacks: Sequence[BlockStack]) -> TrialRun:
    """Run `root`, or for a stack that this does not reach the model around it, and see what feeds each module.

    The model is left as it was: modes and the generators' states are restored, and no gradient is computed.
    """
    trial = TrialRun()
    for stack in stacks:
        if any(stack.holds(name) for name in trial.marks):
            continue
        problems: list[str] = []
        for module, inputs in _trial_runs(root, stack):
            try:
                _Observer(root, module, stacks, trial).run(inputs)
            except Exception as error:  # whatever a foreign model raises on an input it does not like
                problems.append(f"{type(module).__name__}({', '.join(inputs)}): {type(error).__name__}: {error}")
            if any(stack.holds(name) for name in trial.marks):
                break
        else:
            reasons = "; ".join(dict.fromkeys(problem.splitlines()[0][:200] for problem in problems))
            reasons = reasons or "no known kind of input"
            trial.problems[stack.name] = reasons
    return trial


class _Observer:
    """Runs a model once, with hooks on the modules of its stacks that note in `trial` what they see.

    Args:
        root: the base model, from which modules are named.
        module: the model that is run: `root`, or a part of it that holds a stack.
        stacks: of `root`.
        trial: where the results go.
    """

    def __init__(self, root: nn.Module, module: nn.Module, stacks: Sequence[BlockStack], trial: TrialRun) -> None:
        self.root = root
        self.module = module
        self.stacks = stacks
        self.trial = trial
        self.names = {id(submodule): name for name, submodule in root.named_modules()}
        self.streams, self.outputs = _StreamMode(), OutputUses()
        self.calls = {stack.name: 0 for stack in stacks}  # of the stack's owner
        self.seen: dict[str, set[tuple]] = {stack.name: set() for stack in stacks}  # kinds of blocks that have run
        reached = {id(submodule) for submodule in module.modules()}
        self.awaited = {stack.name: set(map(_kind, stack.blocks)) for stack in stacks if id(stack.owner) in reached}

    def run(self, inputs: dict[str, torch.Tensor]) -> None:
        """Run the model on `inputs`, until every kind of block has been seen."""
        handles = list(self._put_hooks_on())
        devices = {parameter.device for parameter in self.root.parameters() if parameter.device.type == "cuda"}
        modes = {submodule: submodule.training for submodule in self.root.modules()}
        try:
            self.root.eval()
            with torch.random.fork_rng(devices=list(devices)), torch.no_grad(), self.streams, self.outputs:
                with contextlib.suppress(_Finished):
                    self.module(**inputs)
        finally:
            for handle in handles:
                handle.remove()
            for submodule, training in modes.items():
                submodule.training = training
        self.trial.feed_forward.update(name for name in self.outputs.uses if self.outputs.feeds_forward(name))
        for stack in self.stacks:
            _spread_to_like_blocks(stack, self.trial, self.names)

    def _put_hooks_on(self) -> Iterator[RemovableHandle]:
        for stack in self.stacks:
            yield stack.owner.register_forward_pre_hook(partial(self._enter_owner, stack))
            for block in stack.blocks:
                yield block.register_forward_pre_hook(partial(self._enter_block, stack), with_kwargs=True)
                yield block.register_forward_hook(partial(self._leave_block, stack))
                for submodule in _modules_outside_adapters(block):
                    yield submodule.register_forward_pre_hook(self._see_input, with_kwargs=True)
                    if is_linear_like(submodule):
                        yield submodule.register_forward_pre_hook(self._enter_linear, with_kwargs=True)
                        yield submodule.register_forward_hook(self._leave_linear)
                    if _has_channel_weights_only(submodule):
                        yield submodule.register_forward_hook(self._leave_norm)

    def _enter_owner(self, stack: BlockStack, owner: nn.Module, args: tuple) -> None:
        self.calls[stack.name] += 1

    def _enter_block(self, stack: BlockStack, block: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden_states = first_hidden_state(args, kwargs)
        is_first = block is stack.blocks[0]
        if self.calls[stack.name] > 1 and is_first and self.streams.mark_of(hidden_states) == stack.name:
            self.trial.repeated.add(stack.name)  # what an earlier call returned comes in again
        if not self.seen[stack.name] and hidden_states is not None:
            self.streams.mark(hidden_states, stack.name)
            self.trial.widths[stack.name] = hidden_states.shape[-1]
        elif all(self.seen[name] == kinds for name, kinds in self.awaited.items()):
            raise _Finished

    def _leave_block(self, stack: BlockStack, block: nn.Module, args: tuple, output: Any) -> None:
        self.seen[stack.name].add(_kind(block))

    def _see_input(self, submodule: nn.Module, args: tuple, kwargs: dict) -> None:
        name, hidden_states = self.names[id(submodule)], first_hidden_state(args, kwargs)
        self.trial.marks.setdefault(name, set()).add(self.streams.mark_of(hidden_states))
        if hidden_states is not None:
            number = self.streams.number_of(hidden_states)
            self.trial.inputs[name] = (*self.trial.inputs.get(name, ()), number)

    def _enter_linear(self, linear: nn.Module, args: tuple, kwargs: dict) -> None:
        self.outputs.enter_linear(self.names[id(linear)], first_hidden_state(args, kwargs))

    def _leave_linear(self, linear: nn.Module, args: tuple, output: Any) -> None:
        self.outputs.leave_linear(self.names[id(linear)], output)

    def _leave_norm(self, submodule: nn.Module, args: tuple, output: Any) -> None:
        # norms may be one opaque kernel; what has per-channel weights only does not mix channels or tokens
        mark = self.streams.mark_of(args[0]) if args else None
        if mark is not None and isinstance(output, torch.Tensor) and output.shape == args[0].shape:
            self.streams.mark(output, mark)


def _spread_to_like_blocks(stack: BlockStack, trial: TrialRun, names: dict[int, str]) -> None:
    """Copy the results of a block that ran to the blocks of the same kind that did not."""
    examples: dict[tuple, str] = {}
    for block in stack.blocks:
        name = names[id(block)]
        if name in trial.marks or any(key.startswith(name + ".") for key in trial.marks):
            examples.setdefault(_kind(block), name)
    for block in stack.blocks:
        name, example = names[id(block)], examples.get(_kind(block))
        if example is None or example == name:
            continue
        for key in [key for key in trial.marks if key.startswith(example + ".")]:
            trial.marks.setdefault(name + key[len(example) :], set()).update(trial.marks[key])
            if key in trial.inputs:  # the numbers only compare within a block
                trial.inputs.setdefault(name + key[len(example) :], trial.inputs[key])
            if key in trial.feed_forward:
                trial.feed_forward.add(name + key[len(example) :])


def _trial_runs(root: nn.Module, stack: BlockStack) -> Iterator[tuple[nn.Module, dict[str, torch.Tensor]]]:
    """The models around a stack, outermost first, each with the inputs to try."""
    for module in path_between(root, stack.owner_name):
        if not isinstance(module, PreTrainedModel):
            continue
        kinds = dict.fromkeys([module.main_input_name, "input_ids", "pixel_values", "input_features", "input_values"])
        for kind in kinds:
            inputs = _inputs(module, kind)
            if inputs is not None:
                yield module, inputs


def _inputs(model: PreTrainedModel, kind: str) -> dict[str, torch.Tensor] | None:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    config: Any = model.config
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs: dict[str, torch.Tensor] = {}
    if kind == "input_ids":
        inputs["input_ids"] = torch.ones(1, _TOKENS, dtype=torch.long, device=device)
    elif kind == "pixel_values":
        vision = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", None)
        if size is None:
            return None
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        inputs["pixel_values"] = torch.zeros(1, channels, height, width, dtype=floating, device=device)
    elif kind == "input_features":
        if not hasattr(config, "num_mel_bins") or not hasattr(config, "max_source_positions"):
            return None
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        inputs["input_features"] = torch.zeros(shape, dtype=floating, device=device)
    elif kind == "input_values":
        inputs["input_values"] = torch.zeros(1, 16000, dtype=floating, device=device)  # a second of sound
    else:
        return None
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.ones(1, _TOKENS, dtype=torch.long, device=device)
    return inputs


def _modules_outside_adapters(block: nn.Module) -> Iterator[nn.Module]:
    for child in block.children():
        yield child
        if not isinstance(child, BaseTunerLayer):
            yield from _modules_outside_adapters(child)


def _has_channel_weights_only(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    if not parameters or isinstance(module, nn.PReLU):
        return False
    return all(parameter.dim() == 1 for parameter in parameters)


def _kind(block: nn.Module) -> tuple:
    return (type(block), tuple((name, type(module)) for name, module in block.named_modules()))
