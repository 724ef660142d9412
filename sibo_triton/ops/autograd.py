"""The operations to autograd, in eager mode: one node for all layers that share x, whose outputs are all their y.

An `autograd.Function` takes half of the host time of a registered operator, which compiled code needs
(`registered.py`), and one for each layer would take longer on the host than all that the layers launch. With every dY
in hand the node sums dx in place, and reads x once. A layer whose output is not used has no dY, and its tensors get no
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from sibo_triton.ops.arguments import Inputs, Saved, Settings
from sibo_triton.ops.products import backward, forward, saved_for

_FIELDS = range(len(Inputs._fields))
_X, _H0 = Inputs._fields.index("x"), Inputs._fields.index("initial_residual")


def outputs_with_gradients(settings: Sequence[Settings], inputs: Sequence[Inputs]) -> list[Tensor] | None:
    """y of each of some layers that share x and h0, differentiable; None where no gradient is wanted."""
    if not torch.is_grad_enabled():
        return None
    wants, places, tensors = [], [], []
    has_h0 = False
    for i, of in enumerate(inputs):
        wanted = [tensor is not None and tensor.requires_grad for tensor in of]
        wants.append(Inputs._make(wanted))
        for field in compress(_FIELDS, wanted):
            if field == _X and i > 0 or field == _H0 and has_h0:  # which they share
                continue
            has_h0 = has_h0 or field == _H0
            places.append((i, field))
            tensors.append(of[field])
    if not tensors:
        return None
    # No transform of `torch.func` is active, `dispatch.py` has made sure of it. So this is `Layers.apply` without its
    # look at every argument for a tensor that outlived one, which takes as long as the call.
    apply: Any = super(torch.autograd.Function, Layers).apply  # type: ignore[misc]
    return list(apply(settings, inputs, wants, places, *tensors))


_BEFORE = 4  # settings, inputs, wants and places come before the tensors


class Layers(torch.autograd.Function):
    """The node. What is looked at are `inputs`; autograd gets, one by one, those of them that want a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: Sequence[Settings],
        inputs: Sequence[Inputs],
        wants: Sequence[Inputs],  # whether each wants a gradient
        places: Sequence[tuple[int, int]],  # of each tensor: which layer's, and which of its inputs
        *_: Tensor,
    ) -> tuple[Tensor, ...]:
        ys, results = forward(settings, inputs, [wanted.lambda_ for wanted in wants])
        x = h0 = None
        flat: list[Tensor | None] = []
        for own, of, wanted, result in zip(settings, inputs, wants, results, strict=True):
            saved = saved_for(own, of, wanted, result.t, result.difference)
            x = saved.x if x is None else x
            h0 = saved.initial_residual if h0 is None else h0
            flat += _kept_of(saved)
        ctx.settings, ctx.wants, ctx.places = settings, wants, places
        ctx.mixing = [of.initial_residual is not None for of in inputs]
        ctx.in_series = inputs[0].weight is None and inputs[0].base is None
        ctx.save_for_backward(x, h0, *flat)
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads_y: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h0, *flat = ctx.saved_tensors
        wants = ctx.wants
        if not all(ctx.needs_input_grad[_BEFORE:]):  # torch.autograd.grad asks for some
            wants = _restricted(wants, ctx.places, ctx.needs_input_grad[_BEFORE:])
        settings, saved, wanted, dys = [], [], [], []
        called: dict[int, int] = {}  # the place of each layer that was called, among those
        for i, grad_y in enumerate(grads_y):
            if grad_y is not None:
                called[i] = len(called)
                saved.append(_saved(flat[_KEPT * i : _KEPT * (i + 1)], x, h0 if ctx.mixing[i] else None))
                settings.append(ctx.settings[i])
                wanted.append(wants[i])
                dys.append(grad_y)
        before: list[Tensor | None] = [None] * _BEFORE
        if not called:
            return (*before, *[None] * len(ctx.places))
        if not torch.is_grad_enabled():
            found = backward(settings, saved, dys, wanted, ctx.in_series)
            return (*before, *_by_place(found, ctx.places, called))
        with torch.no_grad():  # create_graph=True
            found = backward(settings, saved, dys, wanted, ctx.in_series)
        what = "A SIBO-LoRA layer" if settings[0].activation is None else "A bottleneck adapter"
        gradients = _by_place(found, ctx.places, called)
        return (*before, *_RefuseSecondDerivative.apply(what, len(gradients), *gradients, x, h0, *flat, *dys))


def _by_place(
    gradients: Sequence[Inputs], places: Sequence[tuple[int, int]], called: dict[int, int]
) -> list[Tensor | None]:
    """Of the layers' gradients those of the tensors that autograd got; what they share is the first one's."""
    return [
        gradients[0][field] if field == _X or field == _H0 else gradients[called[i]][field] if i in called else None
        for i, field in places
    ]


def _restricted(wants: Sequence[Inputs], places: Sequence[tuple[int, int]], needs: Sequence[bool]) -> list[Inputs]:
    """Which gradients are wanted, where of the tensors at these places only some need one."""
    found = [list(wanted) for wanted in wants]
    for (i, field), needed in zip(places, needs, strict=True):
        if not needed:
            for layer in range(len(found)) if field in (_X, _H0) else (i,):
                found[layer][field] = False
    return [Inputs._make(wanted) for wanted in found]


def _kept_of(saved: Saved) -> tuple:
    """What is kept of one layer beside x and h0."""
    return (*saved[1:5], *saved[6:])


_KEPT = len(Saved._fields) - 2


def _saved(kept: Sequence[Any], x: Any, h0: Any) -> Saved:
    """The inverse of `_kept_of`."""
    return Saved._make((x, *kept[:4], h0, *kept[4:]))


class _RefuseSecondDerivative(torch.autograd.Function):
    """Hands on first derivatives, and says, if they are differentiated, that they cannot be."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.what = what
        # the others are what the gradients depend on: through them autograd comes here
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.what} was differentiated twice, but its fused operation has first derivatives only. Run the "
            "definition, which autograd differentiates any number of times: SIBO_TRITON_BACKEND=reference."
        )
