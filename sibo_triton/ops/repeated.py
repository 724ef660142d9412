"""Calls that repeat: of layers with their frozen linears and LoRA, on the kernels.

Training and generation call a layer with arguments of the same few forms again and again. All that lies between its
arguments and the recorded launches (`kernels/replay.py`) follows from those: checks, the backend, what is kept, which
gradient is whose. It is looked up once here and kept as a `Call`, in which a tensor is a place. On a small layer that
way takes the host as long as all the rest.

Nothing is computed here that `products.py` does not: the first call of a form, and every one that is not like it, goes
there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from sibo_triton.kernels.picking import picker
from sibo_triton.ops import products
from sibo_triton.ops.arguments import Inputs, Settings
from sibo_triton.ops.autograd import KEPT_OF_LAYER, Node, applied, gradients, kept_of, node_of, saved_of
from sibo_triton.ops.dispatch import implementation
from sibo_triton.ops.group import asked_of_few_rows, has_few_rows
from sibo_triton.ops.products import PER_LAYER, Down, asked_of_backward, asked_of_forward
from sibo_triton.ops.tensors import as_matrix, autocast_dtype, without_autocast

_PLAIN = {Tensor, nn.Parameter, type(None)}
_SHARED = ("x", "initial_residual")
_OWN = tuple(name for name in Inputs._fields if name not in (*_SHARED, "base", "down_bias"))
#: The gradients that recorded launches return as they are; what else is wanted, `products.py` computes of them.
_GRADIENTS = {"x", "initial_residual", "lora_a", "lora_b"}

_facts = attrgetter("dtype", "shape", "device", "requires_grad")
_memory = attrgetter("dtype", "device")
_strides = Tensor.stride


def given_of(x: Tensor, initial_residual: Tensor | None, layers: Sequence[tuple]) -> tuple[tuple, tuple]:
    """The tensors of a call, and its numbers.

    Args:
        layers: of each: weight, bias, lora_a, lora_b, lora_bias, lambda_, scaling, the seed and the rate of dropout.
    """
    tensors: list[Any] = [x, initial_residual]
    numbers: list[Any] = []
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
    """All that a call depends on: numbers, the forms of tensors, and modes of torch. None of what cannot be a key."""
    try:
        hash(numbers)
    except TypeError:  # an array with one element, which the long way converts
        return None
    autocast = autocast_dtype(tensors[0].device.type)
    modes = torch.is_grad_enabled(), autocast, implementation("triton").float32_is_exact()
    given = [tensor for tensor in tensors if tensor is not None]
    return numbers, modes, tuple(map(type, tensors)), *map(_facts, given), *map(_strides, given)


def known(key: Hashable) -> Any:
    """What was remembered of such a call, for :func:`outputs`, where launches repeat now; None: nothing yet."""
    return implementation("triton").calls.get(key)


def outputs(call: Any, tensors: tuple) -> Sequence[Tensor] | None:
    """y of each layer by a known call; None where it must go the long way."""
    if call is _NEVER:
        return None
    if not torch._C._is_any_autocast_enabled():
        return call(tensors)
    with without_autocast(tensors[0].device.type):
        return call(tensors)


#: Of calls that are known to go the long way always.
_NEVER = object()


def remember(key: Hashable, tensors: tuple, settings: Sequence[Settings], inputs: Sequence[Inputs]) -> None:
    """Keep what follows of a call that was not known, once its launches are recorded; also that it never repeats."""
    if not all(number == number for number in key[0]):  # type: ignore[index]  # NaN: a key that is never found
        return
    node = node_of(settings, inputs) if torch.is_grad_enabled() else None
    if node is not None and not node.places:
        node = None
    few_rows = node is None and has_few_rows(settings[0], inputs[0])
    simple = _PLAIN.issuperset(map(type, tensors)) and all(map(_is_simple, settings, inputs))
    if node is None:
        simple &= few_rows or len(inputs) == 1  # else each y is made when it is asked for
    else:
        simple &= {Inputs._fields[field] for _, field in node.places} <= _GRADIENTS
    keep = implementation("triton").calls.keep
    if not simple:
        keep(key, _NEVER)
        return
    call: Any = _call_of(tensors, settings, inputs, few_rows) if _differ(tensors) else None
    if call is not None and node is not None:
        # what is kept, of the tensors and of what the launches return, for which others stand here
        stand_ins = [object() for _ in range(PER_LAYER * len(inputs))]
        downs = [Down(stand_ins[i], None, None) for i in range(0, len(stand_ins), PER_LAYER)]
        kept = kept_of(node, inputs, downs)
        keeps = _places([of for of in kept if of is not None], (*tensors, *stand_ins))
        wants = _places([inputs[i][field] for i, field in node.places], tensors)
        call = CallWithGradients(call, node, keeps, [of is not None for of in kept], wants)
    if call is not None:
        keep(key, call)


def _is_simple(settings: Settings, inputs: Inputs) -> bool:
    """Whether a layer has nothing but what a `Call` knows of."""
    has_frozen = inputs.base is None and inputs.weight is not None
    one_dtype = has_frozen and settings.dtype == settings.x_dtype == inputs.weight.dtype
    return settings.backend == "triton" and settings.activation is None and one_dtype


def _call_of(tensors: tuple, settings: Sequence[Settings], inputs: Sequence[Inputs], few_rows: bool) -> Call | None:
    """Without gradients; None where its launches are not recorded."""
    count = len(inputs)
    with without_autocast(tensors[0].device.type):
        if few_rows:
            key, read, matrices = asked_of_few_rows(settings, inputs)
        else:
            key, read, matrices = asked_of_forward(settings, inputs, [False] * count)
    tape = implementation("triton").tape_of(key, read)
    x, (matrix, *others) = tensors[0], read
    if tape is None or matrix is None or matrix.data_ptr() != x.data_ptr():  # a copy is read, of an x that is no matrix
        return None
    # of each layer: its weight among the tensors, and its low-rank y among what the launches return
    ys = [i if few_rows else PER_LAYER * (i + 1) - 1 for i in range(count)]
    frozen = [(len(_SHARED) + len(_OWN) * i, y) for i, y in enumerate(ys)]
    casts = _casts_of(inputs, matrices)
    return Call(_Read(tape, [x, *others], tensors, casts), frozen, settings[0].dtype)


def _casts_of(layers: Sequence[Any], matrices: Sequence[tuple]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each layer where autocast's dtype is another, and as they are read then."""
    pairs = [pair for of, (a, b) in zip(layers, matrices, strict=True) for pair in ((of.lora_a, a), (of.lora_b, b))]
    return [(of, read) for of, read in pairs if of is not read]


class _Read:
    """Launches, and what they read.

    Args:
        tape: the launches.
        read: the tensors that they read.
        among: where these are, but for what is cast.
        casts: what is cast, and as what it is read.
    """

    def __init__(
        self, tape: Any, read: Sequence[Any], among: Sequence[Any], casts: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self._tape = tape
        original = {id(of): tensor for tensor, of in casts}
        self._pick = picker(_places([original.get(id(of), of) for of in read], among))
        self._casts = [(i, of.dtype) for i, of in enumerate(read) if id(of) in original]

    def __call__(self, tensors: tuple) -> list[Tensor | None] | None:
        """What is returned, for tensors with None behind them; None where the launches are not for these."""
        read = self._pick(tensors)
        if self._casts:
            read = list(read)
            for i, dtype in self._casts:
                read[i] = read[i].detach().to(dtype)
        return self._tape(read)


def _differ(tensors: Sequence[Any]) -> bool:
    """Whether no two are one, which elsewhere they need not be."""
    given = [id(tensor) for tensor in tensors if tensor is not None]
    return len(set(given)) == len(given)


def _places(of: Sequence[Any], among: Sequence[Any]) -> list[int]:
    """Where in ``(*among, None)`` each is, among things that differ."""
    place = {id(one): i for i, one in enumerate(among) if one is not None}
    return [len(among) if one is None else place[id(one)] for one in of]


class Call:
    """What a call of some form comes to, without gradients.

    Args:
        launches: its launches.
        frozen: of each layer, where its frozen weight is among the tensors, and its low-rank y among what the launches
            return.
        dtype: of y.
    """

    def __init__(self, launches: _Read, frozen: list[tuple[int, int]], dtype: torch.dtype) -> None:
        self.launches, self._frozen, self._dtype = launches, frozen, dtype

    def __call__(self, tensors: tuple) -> Sequence[Tensor] | None:
        """y of each layer; None where the launches are not for these tensors."""
        tensors = (*tensors, None)
        found = self.launches(tensors)
        return None if found is None else self.with_frozen(tensors, found)

    def with_frozen(self, tensors: tuple, found: list[Any]) -> list[Tensor]:
        """The frozen products, onto the low-rank ones."""
        x = tensors[0]
        matrix = as_matrix(x)
        with_frozen, dtype = products.with_frozen, self._dtype
        return [with_frozen(found[y], x, matrix, tensors[weight], dtype) for weight, y in self._frozen]


class CallWithGradients:
    """Likewise, one node to autograd.

    Args:
        forward: without gradients.
        node: what its backward knows.
        keeps: what is kept for the backward, among its tensors and what the launches return: of `kept_of` what there
            is, which `is_kept` tells.
        wants: what autograd gets, among its tensors.
    """

    def __init__(self, forward: Call, node: Node, keeps: list[int], is_kept: list[bool], wants: list[int]) -> None:
        self.node, self.forward, self.keeps = node, forward, picker(keeps)
        self._is_kept, self._wants = is_kept, picker(wants)
        self._backwards: dict[Hashable, _Backward] = {}

    def __call__(self, tensors: tuple) -> Sequence[Tensor] | None:
        """y of each layer; None where the launches are not for these tensors."""
        tensors = (*tensors, None)
        found = self.forward.launches(tensors)
        return None if found is None else applied(_Repeated, self, tensors, found, *self._wants(tensors))

    def all_kept(self, kept: Sequence[Any]) -> list[Any]:
        """As `kept_of` has it, with None where nothing is kept."""
        given = iter(kept)
        return [next(given) if is_kept else None for is_kept in self._is_kept]

    def backward(self, kept: Sequence[Any], grads_y: Sequence[Any]) -> Sequence[Tensor | None] | None:
        """The gradients; None where the launches are not known, or not for these tensors."""
        gs = [as_matrix(grad_y) for grad_y in grads_y]
        found = self._backwards.get(self._key_of(kept, gs))
        return None if found is None else found(kept, gs, grads_y[0].shape[:-1])

    def remember_backward(self, kept: Sequence[Any], grads_y: Sequence[Any]) -> None:
        """Keep what follows of a backward, once its launches are recorded."""
        node, gs = self.node, [as_matrix(grad_y) for grad_y in grads_y]
        key_of_call = self._key_of(kept, gs)
        if key_of_call in self._backwards or len(self._backwards) >= _KEPT or not _differ((*gs, *kept)):
            return
        saved = saved_of(node, self.all_kept(kept))
        key, read, matrices = asked_of_backward(node.settings, saved, gs, node.wants, node.in_series)
        tape = implementation("triton").tape_of(key, read)
        if tape is not None:
            launches = _Read(tape, read, (*gs, *kept), _casts_of(saved, matrices))
            self._backwards[key_of_call] = _Backward(node, launches, self._weights())

    def _weights(self) -> list[int]:
        """Where each layer's frozen weight is among what is kept; not looked at where dx is not wanted."""
        starts = [len(_SHARED) + KEPT_OF_LAYER * i for i in range(len(self.node.settings))]
        return [sum(self._is_kept[:start]) for start in starts]

    @staticmethod
    def _key_of(kept: Sequence[Any], gs: list[Tensor]) -> Hashable:
        """What is kept may come back in another form: hooks on saved tensors pack them as they like."""
        forms = *map(_facts, gs), *map(_memory, kept), *map(_strides, (*gs, *kept))
        return implementation("triton").float32_is_exact(), forms


_KEPT = 64  # of one call: forms of dY and of what is kept


class _Backward:
    """What the backward of a call comes to, for dY of some form."""

    def __init__(self, node: Node, launches: _Read, weights: list[int]) -> None:
        count = len(node.settings)
        self._launches, self._weights = launches, weights
        by_field = {
            "x": lambda i: 0,
            "initial_residual": lambda i: 1,
            "lora_a": lambda i: len(_SHARED) + i,
            "lora_b": lambda i: len(_SHARED) + count + PER_LAYER * i + 1,
        }
        self._places = picker([by_field[Inputs._fields[field]](i) for i, field in node.places])

    def __call__(self, kept: Sequence[Any], gs: list[Tensor], leading: torch.Size) -> Sequence[Tensor | None] | None:
        found = self._launches((*gs, *kept, None))
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
    """The node of a known call; `gradients` is the long way of its backward."""

    @staticmethod
    def forward(
        ctx: Any, call: CallWithGradients, tensors: tuple, found: list[Tensor | None], *_: Tensor
    ) -> tuple[Tensor, ...]:
        ys = call.forward.with_frozen(tensors, found)
        ctx.call = call
        ctx.save_for_backward(*call.keeps((*tensors[:-1], *found, None)))
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads_y: Tensor | None) -> tuple[Tensor | None, ...]:
        call, kept = ctx.call, ctx.saved_tensors
        repeats = (
            all([grad_y is not None for grad_y in grads_y])  # noqa: C419 (a list is faster)
            and not torch.is_grad_enabled()
            and not torch._C._is_any_autocast_enabled()  # under it one does not go backward
            and implementation("triton").repeats()
        )
        found = call.backward(kept, grads_y) if repeats else None
        if found is None:
            found = gradients(call.node, call.all_kept(kept), grads_y)
            if repeats:
                call.remember_backward(kept, grads_y)
        return (None, None, None, *found)
