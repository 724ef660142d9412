"""Find out what feeds each module of a block: the residual stream, or something else.

The model is run once on a tiny input. The tensor that enters the first block of a stack is marked, and the mark follows
the data through additions, normalisations, dropout, casts and views that keep the tokens' order. It ends at everything
else: a linear layer, an attention, an activation. A linear layer whose input carries its own stack's mark reads the
residual stream. No names of models or layers are used.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from sibo_triton.initial_residual.binding import first_hidden_state
from sibo_triton.initial_residual.output_uses import MIXES_TOKENS, OutputUses, is_linear_like, memory_of
from sibo_triton.initial_residual.stacks import BlockStack, path_between
from sibo_triton.initial_residual.trial_inputs import trial_inputs
from sibo_triton.initial_residual.unchanged import configs_of, unchanged

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
        output_shapes: module name -> the shapes of what it returned, over all calls.
        stream_shapes: stack name -> the shape of what entered its first block.
        intact: the stacks of which no block wrote into what entered the first one.
        seen: the stacks of which every kind of block has run, or all that the model runs on such an input.
        problems: stack name -> why it could not be run.
        read: the stacks of which a linear, or a module with an adapter, was seen to read the stream.
        repeated: the stacks that one sequence passes several times, in separate calls of their owner.
        owners: by stack, of those whose list's parent does not run: the innermost module around it that does.
    """

    marks: dict[str, set[str | None]] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    feed_forward: set[str] = field(default_factory=set)
    output_shapes: dict[str, set[torch.Size]] = field(default_factory=dict)
    stream_shapes: dict[str, torch.Size] = field(default_factory=dict)
    intact: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    owners: dict[str, str] = field(default_factory=dict)

    @property
    def widths(self) -> dict[str, int]:
        """Stack name -> the width of its residual stream."""
        return {name: shape[-1] for name, shape in self.stream_shapes.items()}

    def owned(self, root: nn.Module, stacks: Sequence[BlockStack]) -> list[BlockStack]:
        """The stacks, each with the module whose forward runs its blocks."""
        owned = []
        for stack in stacks:
            name = self.owners.get(stack.name, stack.owner_name)
            owned.append(replace(stack, owner=root.get_submodule(name), owner_name=name))
        return owned

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

    def is_unknown(self, module_name: str, stack: BlockStack) -> bool:
        """Whether what feeds a module is unknown: it did not run, or its stack loses the stream for all linears."""
        if stack.name in self.problems or module_name not in self.marks:
            return True
        return stack.name not in self.read and stack.name not in self.repeated

    def take(self, other: TrialRun, stack: BlockStack) -> None:
        """Take over what another trial run saw of a stack."""
        self.seen.add(stack.name)
        self.marks |= {name: marks for name, marks in other.marks.items() if stack.holds(name)}
        self.inputs |= {name: numbers for name, numbers in other.inputs.items() if stack.holds(name)}
        self.feed_forward |= {name for name in other.feed_forward if stack.holds(name)}
        self.output_shapes |= {name: shapes for name, shapes in other.output_shapes.items() if stack.holds(name)}
        self.stream_shapes |= {name: shape for name, shape in other.stream_shapes.items() if name == stack.name}
        self.intact |= other.intact & {stack.name}
        self.read |= other.read & {stack.name}
        self.repeated |= other.repeated & {stack.name}
        self.owners |= {name: owner for name, owner in other.owners.items() if name == stack.name}

    def returns_tokens(self, module_name: str, stack: BlockStack) -> bool:
        """Whether all that a module returned is of the tokens that entered its stack, in their order."""
        entered = self.stream_shapes[stack.name]
        fitting = entered[:-1], torch.Size([entered[:-1].numel()])
        return all(shape[:-1] in fitting for shape in self.output_shapes.get(module_name, ()))

    def reads_into_feed_forward(self, module_name: str, stack: BlockStack) -> bool:
        """Whether a module is a linear of a feed-forward network that reads its stack's residual stream."""
        return self.reads(module_name, stack)[0] and module_name in self.feed_forward


class _StreamMode(TorchDispatchMode):
    """Carries the marks from operation to operation; a tensor is identified by the memory that it shows."""

    def __init__(self) -> None:
        super().__init__()
        # the streams that a tensor is a sum of; the tensor is kept so that its memory is not reused
        self._marks: dict[tuple, tuple[torch.Tensor, frozenset[str]]] = {}
        self._numbers: dict[int, tuple[torch.Tensor, int]] = {}  # likewise

    def number_of(self, tensor: torch.Tensor) -> int:
        """A number that is unique to the tensor, among all runs."""
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = tensor, next(_numbers)
        return self._numbers[id(tensor)][1]

    def mark(self, tensor: torch.Tensor, *streams: str) -> None:
        self._marks[memory_of(tensor)] = (tensor, frozenset(streams))

    def mark_of(self, tensor: Any) -> str | None:
        """The stream that a tensor is; None also for a sum of several."""
        streams = self.streams_in(tensor)
        return next(iter(streams)) if len(streams) == 1 else None

    def streams_in(self, tensor: Any) -> frozenset[str]:
        """The streams that a tensor is a sum of."""
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            return frozenset()
        return self._marks.get(memory_of(tensor), (None, frozenset()))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        streams = self._streams_in_result(func.overloadpacket.__name__, args)
        result = func(*args, **(kwargs or {}))
        output = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(output, torch.Tensor) and output.layout == torch.strided:
            if streams and output.shape[-1:] == self._marked_width(args):
                self.mark(output, *streams)
            elif func._schema.is_mutable or memory_of(output) not in map(memory_of, _strided(args)):
                # written in place, or in memory that was another tensor's; not another view of what an argument shows
                self._marks.pop(memory_of(output), None)
        return result

    def _streams_in_result(self, name: str, args: tuple) -> frozenset[str]:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if name in _KEEPING:
            return self.streams_in(tensors[0]) if tensors else frozenset()
        streams = frozenset().union(*map(self.streams_in, tensors))
        if name in _ADDITIONS:
            return streams
        if name in _SCALINGS and sum(map(bool, map(self.streams_in, tensors))) == 1:
            largest = max(tensor.numel() for tensor in tensors)
            if sum(tensor.numel() == largest for tensor in tensors) == 1:  # by a statistic or a weight, not by a gate
                return streams
        return frozenset()

    def _marked_width(self, args: tuple) -> torch.Size:
        return next(arg.shape[-1:] for arg in args if isinstance(arg, torch.Tensor) and self.streams_in(arg))


def _strided(args: tuple) -> Iterator[torch.Tensor]:
    return (arg for arg in args if isinstance(arg, torch.Tensor) and arg.layout == torch.strided)


class _ThreadState(threading.local):
    runs = False


_state = _ThreadState()


def in_trial_run() -> bool:
    """Whether a trial run is what runs in this thread."""
    return _state.runs


def trial_run(root: nn.Module, stacks: Sequence[BlockStack]) -> TrialRun:
    """Run `root`, or for a stack that this does not reach the model around it, and see what feeds each module.

    The model is left as it was (`unchanged.py`), and so are the generators' states; no gradient is computed. Where a
    run fails, another is tried with eager attention: flash attention takes no weights that are still on the CPU, or in
    float32.
    """
    trial = TrialRun()
    for stack in stacks:
        if stack.name in trial.seen:
            continue
        problems: list[str] = []
        for eager, (module, inputs) in itertools.product((False, True), trial_inputs(root, stack)):
            if stack.name in trial.seen or eager and not problems:
                break
            observer = _Observer(root, module, stacks)
            try:
                with unchanged(root):
                    if eager:
                        _use_eager_attention(root)
                    observer.run(inputs)
            except Exception as error:  # whatever a foreign model raises on an input it does not like
                problems.append(f"{type(module).__name__}({', '.join(inputs)}): {type(error).__name__}: {error}")
            for reached in stacks:
                if reached.name in observer.trial.seen - trial.seen:
                    trial.take(observer.trial, reached)
        if stack.name not in trial.seen:
            reasons = "; ".join(dict.fromkeys(problem.splitlines()[0][:200] for problem in problems))
            trial.problems[stack.name] = reasons or "no known kind of input"
    return trial


def _use_eager_attention(root: nn.Module) -> None:
    for config in configs_of(root):
        if getattr(config, "_attn_implementation", None) is not None:
            config._attn_implementation = "eager"


class _Observer:
    """Runs a model once, with hooks on the modules of its stacks that note in `trial` what they see.

    As soon as every kind of block has run, the other blocks return what one of their kind returned: they cost nothing,
    and one can still see what the model does next.

    Args:
        root: the base model, from which modules are named.
        module: the model that is run: `root`, or a part of it that holds a stack.
        stacks: of `root`.
    """

    def __init__(self, root: nn.Module, module: nn.Module, stacks: Sequence[BlockStack]) -> None:
        self.root = root
        self.module = module
        self.stacks = stacks
        self.trial = TrialRun()
        self.names = {id(submodule): name for name, submodule in root.named_modules()}
        self.streams = _StreamMode()
        self.outputs = OutputUses(is_stream=self.streams.streams_in)
        self.running: list[str] = []  # the modules around stacks whose forward runs
        self.entered: dict[str, tuple[torch.Tensor, int]] = {}  # what entered the first block, and its version
        self.calls = {stack.name: 0 for stack in stacks}  # of the stack's owner
        self.returned: dict[str, dict[tuple, Any]] = {stack.name: {} for stack in stacks}  # by the kind of block
        reached = {id(submodule) for submodule in module.modules()}
        self.awaited = {stack.name: set(map(_kind, stack.blocks)) for stack in stacks if id(stack.owner) in reached}
        self.feed_forward: set[str] | None = None  # of when every kind of block had run

    def run(self, inputs: dict[str, torch.Tensor]) -> None:
        """Run the model on `inputs`.

        Raises:
            Exception: what the model raised before every kind of block had run; what was seen of the others counts.
        """
        handles = list(self._put_hooks_on())
        devices = {parameter.device for parameter in self.root.parameters() if parameter.device.type == "cuda"}
        blocks = [(stack, block, block.__dict__.get("forward")) for stack in self.stacks for block in stack.blocks]
        problem = None
        try:
            _state.runs = True
            self.root.eval()
            for stack, block, _ in blocks:
                block.__dict__["forward"] = partial(self._forward, stack, block, block.forward)
            # in inference mode modes like these do not see what operations are made of
            with torch.inference_mode(False), torch.random.fork_rng(devices=list(devices)), torch.no_grad():
                with self.streams, self.outputs:
                    self.module(**inputs)
        except Exception as error:
            problem = error
        finally:
            _state.runs = False
            for handle in handles:
                handle.remove()
            for _, block, forward in blocks:
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.__dict__["forward"] = forward
        self.trial.feed_forward = self._feed_forward() if self.feed_forward is None else self.feed_forward
        for stack in self.stacks:
            if self.returned[stack.name] and (problem is None or self._has_run(stack.name)):
                self.trial.seen.add(stack.name)
                h0, version = self.entered.get(stack.name, (None, None))
                if h0 is not None and h0._version == version:
                    self.trial.intact.add(stack.name)
                _spread_to_like_blocks(stack, self.trial, self.names)
        if problem is not None and not self._all_have_run():
            raise problem

    def _has_run(self, stack_name: str) -> bool:
        """Whether every kind of block of a stack has run."""
        return self.returned[stack_name].keys() >= self.awaited.get(stack_name, set())

    def _all_have_run(self) -> bool:
        return all(map(self._has_run, self.awaited))

    def _feed_forward(self) -> set[str]:
        """The linears whose output goes into linears only, and that do not lie beside those of an attention."""
        blocks = {self.names[id(block)] for stack in self.stacks for block in stack.blocks}
        attentions = {name.rpartition(".")[0] for name, uses in self.outputs.uses.items() if MIXES_TOKENS in uses}
        around = attentions - blocks
        found = filter(self.outputs.feeds_forward, self.outputs.uses)
        return {name for name in found if name.rpartition(".")[0] not in around}

    def _forward(self, stack: BlockStack, block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """In the place of a block's own forward."""
        if self._all_have_run():
            return self.returned[stack.name][_kind(block)]
        output = forward(*args, **kwargs)
        self.returned[stack.name].setdefault(_kind(block), output)
        if self._all_have_run():
            self.feed_forward = self._feed_forward()
        return output

    def _put_hooks_on(self) -> Iterator[RemovableHandle]:
        around = {module: None for stack in self.stacks for module in path_between(self.root, stack.owner_name)}
        for module in around:
            yield module.register_forward_pre_hook(self._enter_module)
            yield module.register_forward_hook(self._leave_module, always_call=True)
        for stack in self.stacks:
            yield stack.owner.register_forward_pre_hook(partial(self._enter_owner, stack))
            for block in stack.blocks:
                yield block.register_forward_pre_hook(partial(self._enter_block, stack), with_kwargs=True)
                for submodule in _modules_outside_adapters(block):
                    yield submodule.register_forward_pre_hook(self._see_input, with_kwargs=True)
                    yield submodule.register_forward_hook(self._see_output)
                    if is_linear_like(submodule):
                        yield submodule.register_forward_pre_hook(self._enter_linear, with_kwargs=True)
                        yield submodule.register_forward_hook(self._leave_linear)
                    if _has_channel_weights_only(submodule):
                        yield submodule.register_forward_hook(self._leave_norm)

    def _enter_module(self, module: nn.Module, args: tuple) -> None:
        self.running.append(self.names[id(module)])

    def _leave_module(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.running:  # another hook may have raised before the one that enters
            self.running.pop()

    def _enter_owner(self, stack: BlockStack, owner: nn.Module, args: tuple) -> None:
        self.calls[stack.name] += 1

    def _enter_block(self, stack: BlockStack, block: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden_states = first_hidden_state(args, kwargs)
        if self.calls[stack.name] > 1 and block is stack.blocks[0]:
            if stack.name in self.streams.streams_in(hidden_states):
                self.trial.repeated.add(stack.name)  # what an earlier call returned comes in again
        if not self.returned[stack.name] and hidden_states is not None:
            self.streams.mark(hidden_states, stack.name)
            self.trial.stream_shapes[stack.name] = hidden_states.shape
            if not hidden_states.is_inference():
                self.entered[stack.name] = hidden_states, hidden_states._version
            if stack.owner_name not in self.running:
                outer = [name for name in self.running if not name or stack.name.startswith(name + ".")]
                if outer:
                    self.trial.owners[stack.name] = max(outer, key=len)

    def _see_input(self, submodule: nn.Module, args: tuple, kwargs: dict) -> None:
        name, hidden_states = self.names[id(submodule)], first_hidden_state(args, kwargs)
        stream = self.streams.mark_of(hidden_states)
        self.trial.marks.setdefault(name, set()).add(stream)
        reads = is_linear_like(submodule) or isinstance(submodule, BaseTunerLayer)  # of which the inside is not seen
        if reads and stream is not None and name.startswith(stream + "."):
            self.trial.read.add(stream)
        if hidden_states is not None:
            number = self.streams.number_of(hidden_states)
            self.trial.inputs[name] = (*self.trial.inputs.get(name, ()), number)

    def _see_output(self, submodule: nn.Module, args: tuple, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(first, torch.Tensor):
            self.trial.output_shapes.setdefault(self.names[id(submodule)], set()).add(first.shape)

    def _enter_linear(self, linear: nn.Module, args: tuple, kwargs: dict) -> None:
        name, hidden_states = self.names[id(linear)], first_hidden_state(args, kwargs)
        self.outputs.enter_linear(name, hidden_states)

    def _leave_linear(self, linear: nn.Module, args: tuple, output: Any) -> None:
        self.outputs.leave_linear(self.names[id(linear)], output)

    def _leave_norm(self, submodule: nn.Module, args: tuple, output: Any) -> None:
        # norms may be one opaque kernel; what has per-channel weights only does not mix channels or tokens
        streams = self.streams.streams_in(args[0]) if args else None
        if streams and isinstance(output, torch.Tensor) and output.shape == args[0].shape:
            self.streams.mark(output, *streams)


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
            if key in trial.output_shapes:
                trial.output_shapes.setdefault(name + key[len(example) :], trial.output_shapes[key])


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
