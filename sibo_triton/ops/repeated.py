"""Calls that repeat: of layers with their frozen linears and LoRA, on the kernels, with gradients.

Training calls a layer with arguments of the same few forms again and again. All that lies between its arguments and the
recorded launches (`kernels/replay.py`) follows from those: checks, the backend, what is kept, which gradient is whose.
It is looked up once here and kept as a `Call`, in which a tensor is a place. On a small layer that way takes the host
as long as all the rest.

Nothing is computed here that `products.py` does not: the first call of a form, and every one that is not like it, goes
there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from sibo_triton.ops import products
from sibo_triton.ops.arguments import Inputs, Settings
from sibo_triton.ops.autograd import Node, applied, gradients, kept_of, node_of, saved_of
from sibo_triton.ops.dispatch import implementation
from sibo_triton.ops.products import PER_LAYER, asked_of_backward, asked_of_forward
from sibo_triton.ops.tensors import as_matrix

_PLAIN = {Tensor, nn.Parameter, type(None)}
_SHARED = ("x", "initial_residual")
_OWN = tuple(name for name in Inputs._fields if name not in (*_SHARED, "base", "down_bias"))
#: The gradients that recorded launches return as they are; what else is wanted, `products.py` computes of them.
_GRADIENTS = {"x", "initial_residual", "lora_a", "lora_b"}

_facts = attrgetter("dtype", "shape", "device", "requires_grad")
_strides = Tensor.stride


def given_of(x: Tensor, initial_residual: Tensor | None, layers: Sequence[tuple]) -> tuple[tuple, tuple]:
    """The tensors of a call, and its numbers.

    Args:
        layers: of each: weight, bias, lora_a, lora_b, lora_bias, lambda_, scaling, the seed and the rate of dropout.
    """
    tensors, numbers = [x, initial_residual], []
    for weight, bias, lora_a, lora_b, lora_bias, lambda_, scaling, seed, dropout_p in layers:
        number = share = None
        if isinstance(lambda_, Tensor):
            share = lambda_
        else:
            number = lambda_
        numbers += (number, dropout_p)
        if isinstance(scaling, Tensor):
            tensors += (weight, bias, lora_a, lora_b, lora_bias, share, scaling, seed)
        else:
            numbers.append(scaling)
            tensors += (weight, bias, lora_a, lora_b, lora_bias, share, None, seed)
    return tuple(tensors), tuple(numbers)


def key_of(tensors: tuple, numbers: tuple) -> Hashable:
    """All that a call depends on: numbers, and the forms of tensors. Autocast is off, and gradients are on."""
    given = [tensor for tensor in tensors if tensor is not None]
    exact = implementation("triton").float32_is_exact()
    return numbers, exact, tuple(map(type, tensors)), tuple(map(_facts, given)), tuple(map(_strides, given))


def outputs(key: Hashable, tensors: tuple) -> Sequence[Tensor] | None:
    """y of each layer, if such a call is known."""
    call = implementation("triton").calls.get(key)
    return None if call is None else call(tensors)


def remember(key: Hashable, tensors: tuple, settings: Sequence[Settings], inputs: Sequence[Inputs]) -> None:
    """Keep what follows of a call, if it is one that repeats and its launches are recorded."""
    node = node_of(settings, inputs)
    wanted = {Inputs._fields[field] for _, field in node.places}
    if not wanted or not wanted <= _GRADIENTS or not _PLAIN.issuperset(map(type, tensors)):
        return
    for own, of in zip(settings, inputs, strict=True):
        if own.backend != "triton" or own.activation is not None or of.base is not None or of.weight is None:
            return
        if not own.dtype == own.x_dtype == of.weight.dtype or own.adapter_dtype != of.lora_a.dtype:
            return
    ops = implementation("triton")
    asked = asked_of_forward(settings, inputs, [False] * len(inputs))
    tape = ops.tape_of(*asked)
    x, (matrix, *others) = tensors[0], asked[1]
    if tape is None or matrix.data_ptr() != x.data_ptr():  # else a copy is read, of an x that is no matrix
        return
    reads = _places([x, *others], tensors)
    # what is kept, of the tensors and of what the launches return, in which numbers stand for tensors
    stand_ins = [object() for _ in range(PER_LAYER * len(inputs))]
    downs = [products.Down(stand_ins[i], None, None) for i in range(0, len(stand_ins), PER_LAYER)]
    keeps = _places(kept_of(node, inputs, downs), (*tensors, *stand_ins))
    wants = _places([inputs[i][field] for i, field in node.places], tensors)
    if reads is not None and keeps is not None and wants is not None:
        ops.calls.keep(key, Call(node, tape, reads, keeps, wants))


def _places(of: Sequence[Any], among: Sequence[Any]) -> list[int] | None:
    """Where in ``(*among, None)`` each is; None where one tensor has two places, or none."""
    place = {id(one): i for i, one in enumerate(among) if one is not None}
    if len(place) < sum(one is not None for one in among):
        return None
    found = [len(among) if one is None else place.get(id(one)) for one in of]
    return None if None in found else found


def _picker(places: Sequence[int]) -> Any:
    """What picks these places of a tuple."""
    if len(places) == 1:
        return itemgetter(slice(places[0], places[0] + 1))
    return itemgetter(*places)


class Call:
    """What a call of some form comes to.

    Args:
        node: what its backward knows.
        tape: the launches of its forward.
        reads, wants: among its tensors: what those launches read, and what autograd gets.
        keeps: likewise, among its tensors and what the launches return: what is kept for the backward.
    """

    def __init__(self, node: Node, tape: Any, reads: list[int], keeps: list[int], wants: list[int]) -> None:
        self.node = node
        self._tape, self._reads, self._wants = tape, _picker(reads), _picker(wants)
        self.keeps = _picker(keeps)
        # of each layer: its weight among the tensors, its low-rank y among what the launches return
        count = len(node.settings)
        self.frozen = [(len(_SHARED) + len(_OWN) * i, PER_LAYER * (i + 1) - 1) for i in range(count)]
        self._dtype = node.settings[0].dtype
        self._backwards: dict[Hashable, _Backward] = {}

    def __call__(self, tensors: tuple) -> Sequence[Tensor] | None:
        """y of each layer; None where the launches are not for these tensors."""
        if not implementation("triton").repeats():
            return None
        tensors = (*tensors, None)
        found = self._tape(self._reads(tensors))
        return None if found is None else applied(_Repeated, self, tensors, found, *self._wants(tensors))

    def forward(self, tensors: tuple, found: list[Tensor | None]) -> list[Tensor]:
        """The frozen products, onto the low-rank ones."""
        x = tensors[0]
        matrix = as_matrix(x)
        with_frozen, dtype = products.with_frozen, self._dtype
        return [with_frozen(found[y], x, matrix, tensors[weight], dtype) for weight, y in self.frozen]

    def backward(self, kept: Sequence[Any], grads_y: Sequence[Any]) -> Sequence[Tensor | None] | None:
        """The gradients; None where the launches are not known, or not for these tensors."""
        gs = [as_matrix(grad_y) for grad_y in grads_y]
        known = self._backwards.get(self._key_of(gs))
        return None if known is None else known(kept, gs, grads_y[0].shape[:-1])

    def remember_backward(self, kept: Sequence[Any], grads_y: Sequence[Any]) -> None:
        """Keep what follows of a backward, once its launches are recorded."""
        node, gs = self.node, [as_matrix(grad_y) for grad_y in grads_y]
        key, read, _ = asked_of_backward(node.settings, saved_of(node, kept), gs, node.wants, node.in_series)
        tape = implementation("triton").tape_of(key, read)
        reads = _places(read, (*gs, *kept))
        if tape is not None and reads is not None and len(self._backwards) < _KEPT:
            self._backwards[self._key_of(gs)] = _Backward(node, tape, reads)

    @staticmethod
    def _key_of(gs: list[Tensor]) -> Hashable:
        exact = implementation("triton").float32_is_exact()
        return exact, tuple(map(_facts, gs)), tuple(map(_strides, gs))


_KEPT = 64  # of one call: forms of dY


class _Backward:
    """What the backward of a call comes to, for dY of some form."""

    def __init__(self, node: Node, tape: Any, reads: list[int]) -> None:
        count = len(node.settings)
        self._tape, self._reads = tape, _picker(reads)
        kept_of_layer = 9  # behind x and h0; the weight is the first
        self._weights = [2 + kept_of_layer * i for i in range(count)]
        by_field = {
            "x": lambda i: 0,
            "initial_residual": lambda i: 1,
            "lora_a": lambda i: 2 + i,
            "lora_b": lambda i: 2 + count + PER_LAYER * i + 1,
        }
        self._places = _picker([by_field[Inputs._fields[field]](i) for i, field in node.places])

    def __call__(self, kept: Sequence[Any], gs: list[Tensor], leading: torch.Size) -> Sequence[Tensor | None] | None:
        found = self._tape(self._reads((*gs, *kept, None)))
        if found is None:
            return None
        dx, dh0, *_ = found
        if dx is not None:
            for g, weight in zip(gs, self._weights, strict=True):
                dx.addmm_(g, kept[weight])
            found[0] = dx.view(*leading, dx.shape[1])
        if dh0 is not None:
            found[1] = dh0.view(*leading, dh0.shape[1])
        return self._places(found)


class _Repeated(torch.autograd.Function):
    """The node of a call: that of `ops/autograd.py` where its backward is of another kind."""

    @staticmethod
    def forward(ctx: Any, call: Call, tensors: tuple, found: list[Tensor | None], *_: Tensor) -> tuple[Tensor, ...]:
        ys = call.forward(tensors, found)
        ctx.call = call
        ctx.save_for_backward(*call.keeps((*tensors[:-1], *found, None)))
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads_y: Tensor | None) -> tuple[Tensor | None, ...]:
        call, kept, needed = ctx.call, ctx.saved_tensors, ctx.needs_input_grad[3:]
        repeats = (
            all(needed)
            and all([grad_y is not None for grad_y in grads_y])  # noqa: C419 (a list is faster)
            and not torch.is_grad_enabled()
            and not torch._C._is_any_autocast_enabled()
            and implementation("triton").repeats()
        )
        found = call.backward(kept, grads_y) if repeats else None
        if found is None:
            found = gradients(call.node, kept, needed, grads_y)
            if repeats:
                call.remember_backward(kept, grads_y)
        return (None, None, None, *found)
