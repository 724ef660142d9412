"""Counts what a training step moves and multiplies, on tensors without data: without a GPU, the same everywhere.

The step runs on fake CPU tensors; every operation of torch that would reach a device is counted, and the launches of
our kernels, which torch does not see, are recorded among them, in order. The rules:

* an operation's inputs and outputs count once each, so that an output in place counts twice, read and written;
* views and allocations are free; host time is not counted;
* what differs between GPU and CPU is done as on a GPU: dropout is `native_dropout`, one operation with a mask of bytes,
  and the frozen product accumulates in place;
* flops are those of matrix products and attention, by torch's own formulas. Causal attention counts like full
  attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.ahead_of_time.without_gpu import kernels_chosen
from benchmarks.launch_traffic import Traffic, recorded_launches
from sibo_triton.kernels import autotune, targets
from sibo_triton.ops import prepare
from sibo_triton.saved_activations import saved_activation_bytes

aten = torch.ops.aten

#: Operations that only allocate, or return their input.
FREE = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten.resize_,  # ours: of a fresh tensor to as many elements
    aten.detach,
    aten.alias,
    aten.lift_fresh,
}
#: In-place operations that do not read the previous contents.
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.bernoulli_, aten.random_, aten.uniform_, aten.normal_}


@dataclass(frozen=True)
class Gpu:
    """The speeds from which times are modelled."""

    name: str
    bytes_per_second: float
    flops_per_second: float


#: Of a copy, and of bfloat16 products.
H200 = Gpu("H200", 4.3e12, 780e12)


@dataclass(frozen=True)
class Counts:
    """Sums over launches; they can be added, subtracted and multiplied by a number.

    Attributes:
        launches: operations of torch that are not free, and launches of our kernels.
        read, written: bytes, each input and output of each launch once.
        reread: further bytes that our kernels load because tiles are loaded repeatedly.
        flops: of products.
        saved: bytes that autograd keeps from forward to backward, parameters left out.
        modelled_ms: the roofline's time, modelled and not measured: for each launch the larger of the time to copy its
            bytes and the time for its flops in bfloat16, whatever their dtype. Re-reads are assumed to cost nothing.
        modelled_ms_no_cache: the same if all our re-reads came from memory.
    """

    launches: float = 0
    read: float = 0
    written: float = 0
    reread: float = 0
    flops: float = 0
    saved: float = 0
    modelled_ms: float = 0
    modelled_ms_no_cache: float = 0

    @property
    def moved(self) -> float:
        return self.read + self.written

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Counts:
        return Counts(*(getattr(self, f.name) * factor for f in fields(self)))

    def __sub__(self, other: Counts) -> Counts:
        return self + other * -1


def summed(operations: list[Traffic], saved: int = 0, gpu: Gpu = H200) -> Counts:
    """The counts of a step."""

    def seconds(operation: Traffic, reread: int) -> float:
        moved = operation.read + operation.written + reread
        return max(moved / gpu.bytes_per_second, operation.flops / gpu.flops_per_second)

    return Counts(
        launches=len(operations),
        read=sum(operation.read for operation in operations),
        written=sum(operation.written for operation in operations),
        reread=sum(operation.reread for operation in operations),
        flops=sum(operation.flops for operation in operations),
        saved=saved,
        modelled_ms=1e3 * sum(seconds(operation, 0) for operation in operations),
        modelled_ms_no_cache=1e3 * sum(seconds(operation, operation.reread) for operation in operations),
    )


class OperationCounter(TorchDispatchMode):
    """Appends the traffic of every operation to `operations`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Traffic] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if func.namespace != "aten" or packet in FREE or _is_view(func):  # prim: a question about a tensor
            return out
        inputs = args[1:] if packet in OVERWRITES else args
        read = _distinct_bytes([inputs, kwargs])
        if packet is aten.embedding:  # of the table only the rows that are asked for
            read = _distinct_bytes([args[1], out])
        self.operations.append(Traffic(str(packet), read, _distinct_bytes(out), _flops(packet, args, kwargs, out)))
        return out


def _is_view(func: Any) -> bool:
    """Whether an output shares an input's memory and nothing is written."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _distinct_bytes(tree: Any) -> int:
    """Bytes of the tensors in a tree: the same one counts once, and so does a row that is expanded."""
    sizes = {}
    for tensor in tree_leaves(tree):
        if isinstance(tensor, Tensor):
            numel = 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                numel *= 1 if stride == 0 and size else size
            key = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
            sizes[key] = numel * tensor.element_size()
    return sum(sizes.values())


def _flops(packet: Any, args: tuple, kwargs: dict, out: Any) -> int:
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    formula = flop_registry.get(getattr(aten, packet.__name__.rstrip("_"), packet))  # addmm_ multiplies as addmm
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def _dropout_of_gpu(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


@contextmanager
def as_on_a_gpu(target: targets.Target) -> Iterator[None]:
    """Inside, operations use the kernels, planned for the target, and torch's operations behave as on a GPU."""
    with ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(kernels_chosen())
        stack.enter_context(patch(targets, "target_of", lambda device: target))
        stack.enter_context(patch(autotune, "ENABLED", False))
        stack.enter_context(patch(prepare, "lacks_memory", lambda backend, x: False))  # launches are counted instead
        stack.enter_context(patch(F, "dropout", _dropout_of_gpu))
        # A dispatch mode such as the counter makes the frozen product run out of place.
        stack.enter_context(patch(torch._C, "_len_torch_dispatch_stack", lambda: 0))
        yield


@contextmanager
def counted(target: targets.Target = targets.KNOWN["sm_90"]) -> Iterator[list[Traffic]]:
    """Operations that run inside, on fake tensors, are appended to the list in order."""
    counter = OperationCounter()
    with as_on_a_gpu(target), recorded_launches(counter.operations.append), counter:
        yield counter.operations


def to_fake(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The same model, with its parameters and buffers replaced by fake tensors of the mode."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: mode.from_tensor(tensor) for name, tensor in tensors.items() if tensor is not None}
    return model


def count_step(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[list[Traffic], int]:
    """The operations of one forward and backward on fake tensors, and the bytes kept between the two.

    Args:
        model: of fake tensors. Its parameters and buffers do not count as kept; its gradients are reset before and
            after.
        forward: returns the tensor that is differentiated.
    """
    outputs: list[Tensor] = []

    def forward_once() -> Tensor:
        outputs.append(forward())
        return outputs[0]

    model.zero_grad(set_to_none=True)
    with counted() as operations:
        saved = saved_activation_bytes(model, forward_once)
        outputs[0].backward(torch.empty_like(outputs[0]))
    model.zero_grad(set_to_none=True)
    return operations, saved
