"""A known call: its recorded launches, and where each of their tensors is among those of the call.

`known_calls.py` makes these, and finds them again. Of the backward the first takes the long path, which records it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sibo_triton.kernels.tuple_getter import tuple_getter
from sibo_triton.ops.arguments import Inputs
from sibo_triton.ops.autograd import (
    KEPT_PER_LAYER,
    KEPT_PER_LAYER_FIELDS,
    KEPT_SHARED,
    Node,
    apply_of,
    gradients,
    is_batched,
    saved_of,
    untraced_gradients,
)
from sibo_triton.ops.dispatch import implementation
from sibo_triton.ops.guarded import first_that_fits, with_guards
from sibo_triton.ops.products import PER_LAYER, backward_request
from sibo_triton.ops.tensors import as_matrix


def casts_of(layers: Sequence[Any], matrices: Sequence[tuple]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each layer, as given and as read, where autocast casts them."""
    pairs = [
        (given, read)
        for layer, (a, b) in zip(layers, matrices, strict=True)
        for given, read in ((layer.lora_a, a), (layer.lora_b, b))
    ]
    return [(given, read) for given, read in pairs if given is not read]


class Read:
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
        self._pick = tuple_getter(places_among([given.get(id(tensor), tensor) for tensor in read], among))
        self._casts = [(i, tensor.dtype) for i, tensor in enumerate(read) if id(tensor) in given]

    def __call__(self, tensors: tuple) -> list[Tensor | None] | None:
        """The results for a call's tensors, followed by None; None where the launches do not fit these."""
        read = self._pick(tensors)
        if self._casts:
            read = list(read)
            for i, dtype in self._casts:
                read[i] = read[i].detach().to(dtype)
        return self._tape(read)


def differ(tensors: Sequence[Any]) -> bool:
    """Whether all are distinct objects. If two are the same here, another call may have two in their places."""
    present = [id(tensor) for tensor in tensors if tensor is not None]
    return len(set(present)) == len(present)


def places_among(objects: Sequence[Any], among: Sequence[Any]) -> list[int]:
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

    def __init__(self, launches: Read, ys: list[int], weights: list[int]) -> None:
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
        known = first_that_fits(self._backwards[implementation("triton").float32_is_exact()], (*gs, *kept))
        return None if known is None else known(kept, gs, grads_y)

    def remember_backward(self, kept: Sequence[Any], grads_y: Sequence[Any]) -> None:
        """Remember a backward that has taken the long path, which has recorded its launches.

        The saved tensors may be others than the forward's: hooks on them may bring them back in another layout.
        """
        node, gs = self.node, [as_matrix(grad_y) for grad_y in grads_y]
        tensors, exact = (*gs, *kept), implementation("triton").float32_is_exact()
        if first_that_fits(self._backwards[exact], tensors) is not None:  # its launches did not fit the addresses
            return
        if not differ(tensors) or any(tensor.is_neg() for tensor in kept):
            return
        saved = saved_of(node, self.all_kept(kept))
        key, read, matrices = backward_request(node.settings, saved, gs, node.wants, node.in_series)
        tape = implementation("triton").tape_of(key, read)
        if tape is not None:
            launches = Read(tape, read, tensors, casts_of(saved, matrices))
            known = _Backward(node, launches, self._places_of("weight"), self._places_of("lambda_", "difference"))
            self._backwards[exact] = with_guards(self._backwards[exact], tensors, known)

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
        self, node: Node, launches: Read, weights: list[tuple[int, ...]], learning: list[tuple[int, ...]]
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
        if torch.compiler.is_compiling():
            return (None, None, None, *untraced_gradients(call.node, call.all_kept(kept), grads_y))
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
