"""Layers that get the same x: their down-projections are one pass over it, and so is their backward.

Autograd sees one node, whose inputs are all their tensors and whose outputs are all their y: one for each layer would
take longer on the host than all that the layer launches. So it has every dY in hand: it sums dx in place, and reads x
once. A layer whose output is not used has no dY, and its tensors get no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sibo_triton.kernels.siblings import UpProjection
from sibo_triton.ops.autograd import (
    Inputs,
    Saved,
    Settings,
    apply,
    as_matrix,
    backward,
    down,
    down_projections,
    forward,
    name_of,
    output,
    read_by_down,
    refuse_second_derivative,
    saved_for,
    scaling_of,
    wants_gradients,
    with_frozen,
    without_autocast,
)
from sibo_triton.ops.dispatch import implementation

#: Tokens up to which no pass is large, so that without gradients all low-rank products are made at once.
FEW_ROWS = 64


class Group:
    """The outputs of layers that share x, each to be asked for once, in any order.

    With gradients, and for few rows, all are computed here; else, as memory is then what lasts no longer than it is
    used, each when it is asked for.

    Args:
        settings, inputs: of each layer, as `low_rank` prepares them: with one backend, x, h0 (or None, where a
            layer does not mix), activation or none, and dtype of y, and no base output. Either all have a frozen weight
            or, in series, none.
    """

    def __init__(self, settings: Sequence[Settings], inputs: Sequence[Inputs]) -> None:
        self._settings, self._inputs = settings, inputs
        self._ts: list[Tensor | None] = []
        self._ys: list[Tensor | None] = []  # the outputs, or the low-rank products, where they are made at once
        self._are_whole = False
        x = inputs[0].x
        if wants_gradients(inputs):
            h0 = next((of.initial_residual for of in inputs if of.initial_residual is not None), None)
            tensors = [tensor for of in inputs for tensor in _own_of(of)]
            self._ys = list(apply(Siblings, settings, inputs, x, h0, *tensors))
            self._are_whole = True
            return
        self._x = as_matrix(x)
        if x.shape[:-1].numel() <= FEW_ROWS and settings[0].activation is None and inputs[0].weight is not None:
            self._low_rank()
        else:
            self._ts = [result.activated for result in down(settings, inputs, [False] * len(inputs))]

    def output(self, i: int) -> Tensor:
        """y of layer i, ``[..., N]``."""
        settings, inputs = self._settings[i], self._inputs[i]
        if self._ys:
            y, self._ys[i] = self._ys[i], None
            assert y is not None
            if self._are_whole:
                return y
            with without_autocast(self._x.device.type):
                return with_frozen(settings, inputs, self._x, y)
        t, self._ts[i] = self._ts[i], None
        assert t is not None
        return output(settings, inputs, self._x, t)

    def _low_rank(self) -> None:
        """The low-rank product of each layer, at once: for few rows, whose launches take longer than what they do."""
        settings, inputs = self._settings, self._inputs
        ops, dtype = implementation(settings[0].backend), settings[0].dtype
        with without_autocast(self._x.device.type):
            x, h0, matrices = read_by_down(settings, inputs)
            tensors = [x, h0]
            for of, (a, b) in zip(inputs, matrices, strict=True):
                tensors += (a, b, of.lora_bias, of.bias, of.lambda_, of.scaling, of.seed)

            def compute() -> list[Tensor]:
                siblings = down_projections(settings, inputs, matrices, [False] * len(inputs))
                ups = [
                    UpProjection(b, scaling_of(own, of), of.lora_bias, of.bias)
                    for own, of, (_, b) in zip(settings, inputs, matrices, strict=True)
                ]
                return ops.low_rank_siblings(x, siblings, ups, None if h0 is None else as_matrix(h0), dtype)

            self._ys = list(ops.replayed(("few rows", tuple(settings)), tensors, compute))


def _own_of(inputs: Inputs) -> tuple:
    """What a layer does not share, in the order in which autograd gets it; without the seed, which has no gradient."""
    return (*inputs[2:8], *inputs[9:11])  # weight, bias, lora_a, lora_b, lora_bias, down_bias; lambda_, scaling


_OWN = 8
_FIRST = 4  # settings, inputs, x and h0 come before


def _wanted(own: Sequence[bool], x: bool, h0: bool) -> Inputs:
    """Which gradients of one layer are wanted; the inverse of `_own_of`."""
    return Inputs._make((False, x, *own[:6], h0, *own[6:], False))


def _kept_of(saved: Saved) -> tuple:
    """What is kept of one layer beside x and h0."""
    return (*saved[1:5], *saved[6:])


_KEPT = len(Saved._fields) - 2


def _saved(kept: Sequence[Any], x: Any, h0: Any) -> Saved:
    """The inverse of `_kept_of`."""
    return Saved._make((x, *kept[:4], h0, *kept[4:]))


class Siblings(torch.autograd.Function):
    """The node."""

    @staticmethod
    def forward(
        ctx: Any, settings: Sequence[Settings], inputs: Sequence[Inputs], x: Tensor, h0: Tensor | None, *_: Any
    ) -> tuple[Tensor, ...]:
        wants_x, wants_h0, *wants_own = ctx.needs_input_grad[2:]
        mixing = [of.initial_residual is not None for of in inputs]
        starts = range(0, len(wants_own), _OWN)
        wants = [
            _wanted(wants_own[start : start + _OWN], wants_x, wants_h0 and mixes)
            for start, mixes in zip(starts, mixing, strict=True)
        ]
        ys, results = forward(settings, inputs, [wanted.lambda_ for wanted in wants])
        kept_x = kept_h0 = None
        flat: list[Tensor | None] = []
        for own, of, wanted, result in zip(settings, inputs, wants, results, strict=True):
            saved = saved_for(own, of, wanted, result.t, result.difference)
            kept_x = saved.x if kept_x is None else kept_x
            kept_h0 = saved.initial_residual if kept_h0 is None else kept_h0
            flat += _kept_of(saved)
        ctx.settings, ctx.wants, ctx.mixing, ctx.in_series = settings, wants, mixing, inputs[0].weight is None
        ctx.save_for_backward(kept_x, kept_h0, *flat)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads_y: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h0, *flat = ctx.saved_tensors
        settings, saved, wanted, dys, called = [], [], [], [], []
        for i, grad_y in enumerate(grads_y):
            if grad_y is not None:
                own_h0 = h0 if ctx.mixing[i] else None
                saved.append(_saved(flat[_KEPT * i : _KEPT * (i + 1)], x, own_h0))
                settings.append(ctx.settings[i])
                wanted.append(ctx.wants[i])
                dys.append(grad_y)
                called.append(i)
        result: list[Tensor | None] = [None] * (_FIRST + _OWN * len(grads_y))
        if not called:
            return tuple(result)
        with torch.no_grad():  # also under create_graph=True
            gradients = backward(settings, saved, dys, wanted, ctx.in_series)
        result[2], result[3] = gradients[0].x, gradients[0].initial_residual
        for i, of_layer in zip(called, gradients, strict=True):
            start = _FIRST + i * _OWN
            result[start : start + _OWN] = _own_of(of_layer)
        if torch.is_grad_enabled():
            return refuse_second_derivative(result, (x, h0, *flat, *dys), name_of(settings[0]))
        return tuple(result)
