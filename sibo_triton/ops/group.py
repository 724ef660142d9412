"""Layers that get the same x: their down-projections are one pass over it, and so is their backward.

Autograd sees one node that holds all their inputs, and one small node for each layer that is asked for its output:

    x, h0, and each layer's tensors  ->  Siblings  ->  a token for each layer  ->  SiblingOutput  ->  y

A token has the shape of y and no memory: every stride is 0. The gradient that comes back to it is dY itself, so that
the first node has every dY in hand: it sums dx in place, and reads x once. A layer that is never asked for its output
has no dY, and its tensors get no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sibo_triton.kernels.siblings import UpProjection
from sibo_triton.ops.autograd import (
    Down,
    Inputs,
    Saved,
    Settings,
    backward,
    down,
    down_arguments,
    name_of,
    output,
    refuse_second_derivative,
    saved_for,
    scaling_of,
    with_frozen,
    without_autocast,
)
from sibo_triton.ops.dispatch import implementation

#: Tokens up to which no pass is large, so that without gradients all low-rank products are made at once.
FEW_ROWS = 64


class _Own(NamedTuple):
    """The tensors of one layer, in the order in which autograd gets them."""

    weight: Any
    bias: Any
    lora_a: Any
    lora_b: Any
    lora_bias: Any
    down_bias: Any
    lambda_: Any
    scaling: Any
    seed: Any


class _Kept(NamedTuple):
    """What is kept of one layer beside x and h0."""

    weight: Any
    lora_a: Any
    lora_b: Any
    lora_bias: Any
    lambda_: Any
    scaling: Any
    seed: Any
    t: Any
    difference: Any


class Group:
    """The outputs of layers that share x, each to be asked for once, in any order.

    Args:
        settings, inputs: of each layer, as `low_rank` prepares them: with one backend, x, h0 (or None, where a
            layer does not mix), activation or none, and dtype of y, and no base output. Either all have a frozen weight
            or, in series, none.
    """

    def __init__(self, settings: Sequence[Settings], inputs: Sequence[Inputs]) -> None:
        self._settings, self._inputs = list(settings), list(inputs)
        self._ts: list[Tensor | None] = []
        self._ys: list[Tensor | None] = []  # the low-rank products, where they are made at once
        self._tokens: tuple[Tensor, ...] | None = None
        x, h0 = inputs[0].x, next((of.initial_residual for of in inputs if of.initial_residual is not None), None)
        tensors = [tensor for of in inputs for tensor in _own_of(of)]
        wanted = torch.is_grad_enabled()
        if wanted and any(tensor is not None and tensor.requires_grad for tensor in (x, h0, *tensors)):
            self._tokens = Siblings.apply(self, x, h0, *tensors)
        elif x.shape[:-1].numel() <= FEW_ROWS and settings[0].activation is None and inputs[0].weight is not None:
            self._low_rank()
        else:
            self._down(self._inputs, [False] * len(inputs))

    def output(self, i: int) -> Tensor:
        """y of layer i, ``[..., N]``."""
        settings, inputs = self._settings[i], self._inputs[i]
        if self._ys:
            y, self._ys[i] = self._ys[i], None
            assert y is not None
            return with_frozen(settings, inputs, y)
        t, self._ts[i] = self._ts[i], None
        assert t is not None
        if self._tokens is None:
            return output(settings, inputs, t)
        return SiblingOutput.apply(settings, inputs, t, self._tokens[i])

    def _down(self, inputs: Sequence[Inputs], wants_differences: Sequence[bool]) -> list[Down]:
        """Of each layer; what its output needs stays here until it is asked for."""
        results = down(self._settings, inputs, wants_differences)
        self._ts = [result.activated for result in results]
        return results

    def _low_rank(self) -> None:
        """The low-rank product of each layer, at once: for few rows, whose launches take longer than what they do."""
        settings = self._settings[0]
        with without_autocast(self._inputs[0].x.device.type):
            x, siblings, h0 = down_arguments(self._settings, self._inputs, [False] * len(self._inputs))
            ups = [
                UpProjection(of.lora_b.to(own.adapter_dtype), scaling_of(own, of), of.lora_bias, of.bias)
                for own, of in zip(self._settings, self._inputs, strict=True)
            ]
            ops = implementation(settings.backend)
            self._ys = ops.low_rank_siblings(x, siblings, ups, h0, settings.dtype)


class Siblings(torch.autograd.Function):
    """The shared node: down-projections forward, every gradient backward."""

    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor, h0: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        _, wants_x, wants_h0, *wants_own = ctx.needs_input_grad
        layers = _layers(_Own, tensors)
        mixing = [of.lambda_ is not None or own.lambda_ != 0 for own, of in zip(group._settings, layers, strict=True)]
        inputs = [_inputs(x, h0 if mixes else None, of) for mixes, of in zip(mixing, layers, strict=True)]
        wants = [
            _inputs(wants_x, wants_h0 and mixes, of) for mixes, of in zip(mixing, _layers(_Own, wants_own), strict=True)
        ]
        results = group._down(inputs, [wanted.lambda_ for wanted in wants])
        kept_x = kept_h0 = None
        flat: list[Tensor | None] = []
        for own, of, wanted, result in zip(group._settings, inputs, wants, results, strict=True):
            saved = saved_for(own, of, wanted, result.t, result.difference)
            kept_x = saved.x if kept_x is None else kept_x
            kept_h0 = saved.initial_residual if kept_h0 is None else kept_h0
            flat += [getattr(saved, name) for name in _Kept._fields]
        ctx.settings, ctx.wants, ctx.mixing = group._settings, wants, mixing
        ctx.in_series = group._inputs[0].weight is None
        ctx.save_for_backward(kept_x, kept_h0, *flat)
        ctx.set_materialize_grads(False)
        return tuple(
            # not expanded, which would be a view
            torch.empty_strided((*x.shape[:-1], n), (0,) * x.dim(), dtype=own.dtype, device=x.device)
            for own, n in zip(group._settings, (of.lora_b.shape[0] for of in inputs), strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads_y: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h0, *flat = ctx.saved_tensors
        kept = _layers(_Kept, flat)
        called = [i for i, grad_y in enumerate(grads_y) if grad_y is not None]
        nothing = (None,) * (3 + len(_Own._fields) * len(grads_y))
        if not called:
            return nothing
        settings, saved = [], []
        for i in called:
            of = kept[i]
            settings.append(ctx.settings[i])
            own_h0 = h0 if ctx.mixing[i] else None
            own = {name: getattr(of, name) for name in _Kept._fields}
            saved.append(Saved(x=x, initial_residual=own_h0, **own))
        dys = [grad_y for grad_y in grads_y if grad_y is not None]
        wanted = [ctx.wants[i] for i in called]
        with torch.no_grad():  # also under create_graph=True
            gradients = backward(settings, saved, dys, wanted, ctx.in_series)
        result: list[Tensor | None] = list(nothing)
        result[1], result[2] = gradients[0].x, gradients[0].initial_residual
        for i, of_layer in zip(called, gradients, strict=True):
            start = 3 + i * len(_Own._fields)
            result[start : start + len(_Own._fields)] = _own_of(of_layer)
        if torch.is_grad_enabled():
            return refuse_second_derivative(result, (x, h0, *flat, *dys), name_of(settings[0]))
        return tuple(result)


class SiblingOutput(torch.autograd.Function):
    """y of one layer; the gradient of its token is dY."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, inputs: Inputs, t: Tensor, token: Tensor) -> Tensor:
        return output(settings, inputs, t)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[None, None, None, Tensor]:
        return None, None, None, grad_y


def _own_of(inputs: Inputs) -> _Own:
    return _Own(*(getattr(inputs, name) for name in _Own._fields))


def _layers(kind: Any, flat: Sequence[Any]) -> list[Any]:
    """What stands in one row, layer by layer: `_Own` or `_Kept` of each."""
    size = len(kind._fields)
    return [kind(*flat[start : start + size]) for start in range(0, len(flat), size)]


def _inputs(x: Any, h0: Any, own: _Own) -> Inputs:
    return Inputs(base=None, x=x, initial_residual=h0, **own._asdict())
