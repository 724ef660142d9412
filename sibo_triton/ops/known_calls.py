"""The short path of LoRA's operations on the kernels, for calls whose form has been seen before.

Training and generation call a layer with tensors of the same few shapes, strides and dtypes again and again. Everything
between the arguments and the recorded launches (`kernels/replay.py`) follows from those: checks, the backend, what is
saved for the backward, which gradient belongs to which tensor. It is worked out once, in the first such call, and kept
as a `Call`, in which each tensor is an index. On a small layer that work takes the host as long as all the rest.

Nothing is computed here that `products.py` does not compute: the first call of a form, and every call that differs from
it, goes there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sibo_triton.kernels.tuple_getter import tuple_getter
from sibo_triton.ops.arguments import Inputs, Settings
from sibo_triton.ops.autograd import (
    KEPT_PER_LAYER,
    KEPT_PER_LAYER_FIELDS,
    KEPT_SHARED,
    Node,
    apply_of,
    gradients,
    is_batched,
    kept_of,
    node_of,
    saved_of,
)
from sibo_triton.ops.dispatch import implementation
from sibo_triton.ops.group import few_rows_request, has_few_rows, is_at_once
from sibo_triton.ops.products import PER_LAYER, Down, backward_request, forward_request
from sibo_triton.ops.tensors import as_matrix, autocast_dtype, without_autocast

try:  # a private class of torch; where there is none, no call is remembered
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards: Any = None  # type: ignore[no-redef]

_PLAIN = {Tensor, nn.Parameter, type(None)}
#: The tensors of a call, in this order: these, and then those of each layer.
_SHARED = ("x", "initial_residual", "base")
_OF_LAYER = tuple(name for name in Inputs._fields if name not in (*_SHARED, "down_bias"))
_BASE = _SHARED.index("base")
#: The gradients that recorded launches return, dY itself, and that of lambda; others are left to `products.py`.
_GRADIENTS = {"x", "initial_residual", "lora_a", "lora_b", "bias", "base", "lambda_"}

#: What remembers a form keeps at most so many that differ in their tensors only, and of one call so many backwards.
_KEPT = 16


def flattened(
    x: Tensor, initial_residual: Tensor | None, layers: Sequence[tuple], base: Tensor | None = None
) -> tuple[tuple, tuple]:
    """The tensors of a call, None where there is none, and the rest of what identifies it.

    Args:
        initial_residual: h0 of those layers that have one.
        layers: the fields of `LoraArguments` of each.
        base: what a single layer without a frozen weight is added to.
    """
    tensors: list[Any] = [x, initial_residual, base]
    numbers: list[Any] = []
    for weight, bias, lora_a, lora_b, scaling, h0, lambda_, dropout_p, seed, lora_bias in layers:
        lambda_number = lambda_tensor = scaling_number = scaling_tensor = None
        if isinstance(lambda_, Tensor):
            lambda_tensor = lambda_
        else:
            lambda_number = lambda_
        if isinstance(scaling, Tensor):
            scaling_tensor = scaling
        else:
            scaling_number = scaling
        numbers += (lambda_number, scaling_number, dropout_p, h0 is None)
        tensors += (weight, bias, lora_a, lora_b, lora_bias, lambda_tensor, scaling_tensor, seed)
    return tuple(tensors), tuple(numbers)


def form_of(tensors: tuple, numbers: tuple) -> Hashable:
    """What a call depends on beside the forms of its tensors: numbers, and modes of torch. None: it has no form.

    The types of the tensors and the shape of x are in it, so that few calls have the same.
    """
    try:
        hash(numbers)
    except TypeError:  # an array with one element, which the long path converts
        return None
    x = tensors[0]
    autocast = autocast_dtype(x.device.type) if torch._C._is_any_autocast_enabled() else None
    modes = torch.is_grad_enabled(), autocast, implementation("triton").float32_is_exact()
    return numbers, modes, tuple(map(type, tensors)), x.shape


def known(form: Hashable, tensors: tuple) -> Any:
    """What is remembered for such a call, to be passed to :func:`outputs`; None: nothing yet."""
    remembered = implementation("triton").calls.get(form, ())
    return _first_that_fits(remembered, [tensor for tensor in tensors if tensor is not None])


def _first_that_fits(remembered: tuple, tensors: Sequence[Tensor]) -> Any:
    for guards, what in remembered:
        if guards.check(*tensors):
            return what
    return None


def _guards_of(tensors: Sequence[Tensor]) -> Any:
    """Tells whether other tensors have the types, dtypes, devices, shapes, strides and flags of these.

    The flags include `requires_grad`, and every state of torch that changes what an operation does with a tensor
    (autocast, inference mode, lazy negation). Dynamo asks the same of a compiled function's arguments; it takes the
    host a tenth of reading these from Python.
    """
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


def outputs(call: Any, tensors: tuple) -> Sequence[Tensor] | None:
    """y of each layer by a known call; None where the call must take the long path."""
    if call is _LONG_PATH:
        return None
    if not torch._C._is_any_autocast_enabled():
        return call(tensors)
    with without_autocast(tensors[0].device.type):
        return call(tensors)


#: Remembered for calls that always take the long path.
_LONG_PATH = object()


def remember(form: Hashable, tensors: tuple, settings: Sequence[Settings], inputs: Sequence[Inputs]) -> None:
    """Remember a call that was not known and has taken the long path, which has recorded its launches."""
    if not all(number == number for number in form[0]):  # type: ignore[index]  # NaN: a form that is never found
        return
    present = [tensor for tensor in tensors if tensor is not None]
    plain = settings[0].backend == "triton" and _PLAIN.issuperset(map(type, tensors)) and TensorGuards is not None
    if not plain or any(tensor.is_neg() for tensor in present):  # recorded launches read what the long path resolved
        return
    call = _call_for(tensors, settings, inputs)
    if call is not None:
        calls = implementation("triton").calls
        calls.keep(form, _with(calls.get(form, ()), present, call))


def _with(remembered: tuple, tensors: Sequence[Tensor], what: Any) -> tuple:
    return (*remembered[1 - _KEPT :], (_guards_of(tensors), what))


def _call_for(tensors: tuple, settings: Sequence[Settings], inputs: Sequence[Inputs]) -> Any:
    """What to remember for such a call; None: nothing."""
    node = node_of(settings, inputs) if torch.is_grad_enabled() else None
    if node is not None and not node.places:
        node = None
    few_rows = node is None and has_few_rows(settings[0], inputs[0])
    simple = all(map(_is_simple, settings, inputs))
    if node is None:
        simple &= few_rows or len(inputs) == 1 or is_at_once(settings, inputs)
    else:
        simple &= {Inputs._fields[field] for _, field in node.places} <= _GRADIENTS
    if not simple:
        return _LONG_PATH
    learns = [node is not None and node.wants[i].lambda_ for i in range(len(inputs))]
    call = _call_of(tensors, settings, inputs, None if few_rows else learns) if _differ(tensors) else None
    if call is None or node is None:
        return call
    # Which of the tensors and of the launches' results are saved for the backward: objects stand for the results.
    results = [object() for _ in range(PER_LAYER * len(inputs))]
    starts = range(0, len(results), PER_LAYER)
    downs = [Down(results[i], results[i + 1] if own else None, None) for i, own in zip(starts, learns, strict=True)]
    kept = kept_of(node, inputs, downs)
    keeps = _places([one for one in kept if one is not None], (*tensors, *results))
    wants = _places([inputs[i][field] for i, field in node.places], tensors)
    return CallWithGradients(call, node, keeps, [one is not None for one in kept], wants)


def _is_simple(settings: Settings, inputs: Inputs) -> bool:
    """Whether a layer is one that a `Call` can compute: kernels, LoRA, and a frozen linear of one dtype if any."""
    one_dtype = inputs.weight is None or settings.dtype == settings.x_dtype == inputs.weight.dtype
    return settings.backend == "triton" and settings.activation is None and one_dtype


def _call_of(
    tensors: tuple, settings: Sequence[Settings], inputs: Sequence[Inputs], learns: list[bool] | None
) -> Call | None:
    """The call without gradients; None where its launches are not recorded.

    Args:
        learns: of each layer, whether its lambda gets a gradient; None: the launches are those for few rows.
    """
    count = len(inputs)
    with without_autocast(tensors[0].device.type):
        if learns is None:
            key, read, matrices = few_rows_request(settings, inputs)
        else:
            key, read, matrices = forward_request(settings, inputs, learns)
    tape = implementation("triton").tape_of(key, read)
    if tape is None:
        return None
    # of x and of the base these are matrices: views of them, or copies where there can be none
    read, base = list(read), tensors[_BASE]
    for i, given in ((0, tensors[0]), (2, base)):
        if given is not None:
            matrix = read[i]
            if matrix is None or matrix.data_ptr() != given.data_ptr():
                return None
            read[i] = given
    # the index of each layer's low-rank y among the launches' results, and of its weight among the tensors
    ys = [i if learns is None else PER_LAYER * (i + 1) - 1 for i in range(count)]
    weights = [] if base is not None else [len(_SHARED) + len(_OF_LAYER) * i for i in range(count)]
    return Call(_Read(tape, read, tensors, _casts_of(inputs, matrices)), ys, weights)


def _casts_of(layers: Sequence[Any], matrices: Sequence[tuple]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each layer, as given and as read, where autocast casts them."""
    pairs = [
        (given, read)
        for layer, (a, b) in zip(layers, matrices, strict=True)
        for given, read in ((layer.lora_a, a), (layer.lora_b, b))
    ]
    return [(given, read) for given, read in pairs if given is not read]


class _Read:
    """Recorded launches, with the indices of the tensors that they read.

    Args:
        tape: the launches.
        read: the tensors that they read.
        among: the tensors of the call, to which the indices refer.
        casts: of the tensors that are cast first, the given and the cast one.
    """

    def __init__(
        self, tape: Any, read: Sequence[Any], among: Sequence[Any], casts: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self._tape = tape
        given = {id(cast): tensor for tensor, cast in casts}
        self._pick = tuple_getter(_places([given.get(id(tensor), tensor) for tensor in read], among))
        self._casts = [(i, tensor.dtype) for i, tensor in enumerate(read) if id(tensor) in given]

    def __call__(self, tensors: tuple) -> list[Tensor | None] | None:
        """The results for a call's tensors, followed by None; None where the launches do not fit these."""
        read = self._pick(tensors)
        if self._casts:
            read = list(read)
            for i, dtype in self._casts:
                read[i] = read[i].detach().to(dtype)
        return self._tape(read)


def _differ(tensors: Sequence[Any]) -> bool:
    """Whether all are distinct objects. If two are the same here, another call may have two in their places."""
    present = [id(tensor) for tensor in tensors if tensor is not None]
    return len(set(present)) == len(present)


def _places(objects: Sequence[Any], among: Sequence[Any]) -> list[int]:
    """The index of each object in ``(*among, None)``, whose entries are distinct."""
    place = {id(one): i for i, one in enumerate(among) if one is not None}
    return [len(among) if one is None else place[id(one)] for one in objects]


class Call:
    """A call of some form, without gradients.

    Args:
        launches: its launches.
        ys: of each layer: the index of its low-rank y among the launches' results.
        weights: of each layer: the index of its frozen weight among the tensors; empty where y is added to a base.
    """

    def __init__(self, launches: _Read, ys: list[int], weights: list[int]) -> None:
        self.launches, self._ys, self._weights = launches, ys, weights

    def __call__(self, tensors: tuple) -> Sequence[Tensor] | None:
        """y of each layer; None where the launches do not fit these tensors."""
        tensors = (*tensors, None)
        results = self.launches(tensors)
        return None if results is None else self.outputs(tensors, results)

    def outputs(self, tensors: tuple, results: list[Any]) -> list[Tensor]:
        """y of each layer: the frozen products accumulate onto the low-rank ones, as in `products.with_frozen`."""
        x, ys = tensors[0], [results[y] for y in self._ys]
        if self._weights:
            matrix = x if x.dim() == 2 else x.view(-1, x.shape[-1])
            for y, weight in zip(ys, self._weights, strict=True):
                y.addmm_(matrix, tensors[weight].t())
        if x.dim() == 2:
            return ys
        leading = x.shape[:-1]
        return [y.resize_(*leading, y.shape[1]) for y in ys]


class CallWithGradients:
    """A call of some form as one autograd node.

    Args:
        forward: the call without gradients.
        node: what its backward needs beside tensors.
        keeps: the indices of the tensors to save, among those of the call followed by the launches' results.
        is_kept: which entries of `kept_of` these are; the others are None.
        wants: the indices of the tensors that are passed to autograd.
    """

    def __init__(self, forward: Call, node: Node, keeps: list[int], is_kept: list[bool], wants: list[int]) -> None:
        self.node, self.forward, self.keeps = node, forward, tuple_getter(keeps)
        self._is_kept, self._wants = is_kept, tuple_getter(wants)
        self._backwards: dict[bool, tuple] = {True: (), False: ()}  # by whether products of float32 are exact

    def __call__(self, tensors: tuple) -> Sequence[Tensor] | None:
        """y of each layer; None where the launches do not fit these tensors."""
        tensors = (*tensors, None)
        results = self.forward.launches(tensors)
        return None if results is None else _apply(self, tensors, results, *self._wants(tensors))

    def all_kept(self, kept: Sequence[Any]) -> list[Any]:
        """The saved tensors as `kept_of` has them, with None between."""
        tensors = iter(kept)
        return [next(tensors) if is_kept else None for is_kept in self._is_kept]

    def backward(self, kept: Sequence[Any], grads_y: Sequence[Any]) -> Sequence[Tensor | None] | None:
        """The gradients; None where the launches are not known, or do not fit these tensors."""
        gs = [as_matrix(grad_y) for grad_y in grads_y]
        known = _first_that_fits(self._backwards[implementation("triton").float32_is_exact()], (*gs, *kept))
        return None if known is None else known(kept, gs, grads_y)

    def remember_backward(self, kept: Sequence[Any], grads_y: Sequence[Any]) -> None:
        """Remember a backward that has taken the long path, which has recorded its launches.

        The saved tensors may be others than the forward's: hooks on them may bring them back in another layout.
        """
        node, gs = self.node, [as_matrix(grad_y) for grad_y in grads_y]
        tensors, exact = (*gs, *kept), implementation("triton").float32_is_exact()
        if _first_that_fits(self._backwards[exact], tensors) is not None:  # its launches did not fit the addresses
            return
        if not _differ(tensors) or any(tensor.is_neg() for tensor in kept):
            return
        saved = saved_of(node, self.all_kept(kept))
        key, read, matrices = backward_request(node.settings, saved, gs, node.wants, node.in_series)
        tape = implementation("triton").tape_of(key, read)
        if tape is not None:
            launches = _Read(tape, read, tensors, _casts_of(saved, matrices))
            known = _Backward(node, launches, self._places_of("weight"), self._places_of("lambda_", "difference"))
            self._backwards[exact] = _with(self._backwards[exact], tensors, known)

    def _places_of(self, *fields: str) -> list[tuple[int, ...]]:
        """Of each layer that has the last of these fields of `Saved` among the saved tensors: their indices."""
        at = [KEPT_PER_LAYER_FIELDS.index(field) for field in fields]
        places = []
        for start in range(KEPT_SHARED, len(self._is_kept), KEPT_PER_LAYER):
            if self._is_kept[start + at[-1]]:
                places.append(tuple([sum(self._is_kept[: start + i]) for i in at]))
        return places


class _Backward:
    """The backward of a call, for dY of some form.

    Args:
        node: what it needs beside tensors.
        launches: its launches.
        weights: the index of each layer's frozen weight among the saved tensors; empty where there is none.
        learning: of each layer whose lambda gets a gradient: the indices of lambda and of d.
    """

    def __init__(
        self, node: Node, launches: _Read, weights: list[tuple[int, ...]], learning: list[tuple[int, ...]]
    ) -> None:
        count = len(node.settings)
        ups = range(2 + count, 2 + count + PER_LAYER * count, PER_LAYER)  # where each layer's u, dB... begin
        after = 2 + count + PER_LAYER * count  # what follows the results: dY, and the gradients of lambdas
        layers = [i for i, wanted in enumerate(node.wants) if wanted.lambda_]
        self._launches, self._weights = launches, [weight for (weight,) in weights]
        self._learning = [(ups[i], *places) for i, places in zip(layers, learning, strict=True)]
        by_field = {
            "x": lambda i: 0,
            "initial_residual": lambda i: 1,
            "lora_a": lambda i: 2 + i,
            "lora_b": lambda i: ups[i] + 1,
            "bias": lambda i: ups[i] + 2,
            "base": lambda i: after,
            "lambda_": lambda i: after + 1 + layers.index(i),
        }
        self._places = tuple_getter([by_field[Inputs._fields[field]](i) for i, field in node.places])

    def __call__(
        self, kept: Sequence[Any], gs: list[Tensor], grads_y: Sequence[Tensor]
    ) -> Sequence[Tensor | None] | None:
        results = self._launches((*gs, *kept, None))
        if results is None:
            return None
        leading = grads_y[0].shape[:-1]
        dx, dh0, *_ = results
        if dx is not None:
            if self._weights:
                for g, weight in zip(gs, self._weights, strict=True):
                    dx.addmm_(g, kept[weight])
            results[0] = dx.view(*leading, dx.shape[1])
        if dh0 is not None:
            results[1] = dh0.view(*leading, dh0.shape[1])
        results.append(grads_y[0])
        for u, lambda_, difference in self._learning:
            results.append((results[u] * kept[difference]).sum().reshape(kept[lambda_].shape))
        return self._places(results)


class _Repeated(torch.autograd.Function):
    """The node of a known call; `gradients` is the long path of its backward."""

    @staticmethod
    def forward(
        ctx: Any, call: CallWithGradients, tensors: tuple, results: list[Tensor | None], *_: Tensor
    ) -> tuple[Tensor, ...]:
        ys = call.forward.outputs(tensors, results)
        ctx.call = call
        ctx.save_for_backward(*call.keeps((*tensors[:-1], *results, None)))
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads_y: Tensor | None) -> tuple[Tensor | None, ...]:
        call, kept = ctx.call, ctx.saved_tensors
        repeats = (
            all([grad_y is not None for grad_y in grads_y])  # noqa: C419 (a list is faster)
            and not torch.is_grad_enabled()
            and not torch._C._is_any_autocast_enabled()  # unusual in a backward
            and not is_batched(grads_y[0])
            and implementation("triton").repeats()
        )
        grads = call.backward(kept, grads_y) if repeats else None
        if grads is None:
            grads = gradients(call.node, call.all_kept(kept), grads_y)
            if repeats:
                call.remember_backward(kept, grads_y)
        return (None, None, None, *grads)


_apply = apply_of(_Repeated)
