"""The operations to autograd, in eager mode: one node for all layers that share x, whose outputs are all their y.

An `autograd.Function` takes half of the host time of a registered operator, which compiled code needs
(`registered.py`), and one for each layer would take longer on the host than all that the layers launch. With every dY
in hand the node sums dx in place, and reads x once. A layer whose output is not used has no dY, and its tensors get no
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sibo_triton.ops.arguments import Inputs, Saved, Settings
from sibo_triton.ops.products import Down, backward, forward, saved_for

_FIELDS = range(len(Inputs._fields))
_X, _H0 = Inputs._fields.index("x"), Inputs._fields.index("initial_residual")


class Node(NamedTuple):
    """What the backward of some layers that share x and h0 knows beside tensors."""

    settings: Sequence[Settings]
    wants: Sequence[Inputs]  # whether each input of each layer wants a gradient
    places: Sequence[tuple[int, int]]  # of each tensor that autograd gets: which layer's, and which of its inputs
    mixing: Sequence[bool]
    in_series: bool


def node_of(settings: Sequence[Settings], inputs: Sequence[Inputs]) -> Node:
    """The node; what layers share is the first one's."""
    wants, places = [], []
    has_h0 = False
    for i, of in enumerate(inputs):
        wanted = [tensor is not None and tensor.requires_grad for tensor in of]
        wants.append(Inputs._make(wanted))
        for field in compress(_FIELDS, wanted):
            if not (field == _X and i > 0 or field == _H0 and has_h0):
                places.append((i, field))
                has_h0 = has_h0 or field == _H0
    mixing = [of.initial_residual is not None for of in inputs]
    return Node(settings, wants, places, mixing, inputs[0].weight is None and inputs[0].base is None)


def outputs_with_gradients(settings: Sequence[Settings], inputs: Sequence[Inputs]) -> Sequence[Tensor] | None:
    """y of each of some layers that share x and h0, differentiable; None where no gradient is wanted."""
    if not torch.is_grad_enabled():
        return None
    node = node_of(settings, inputs)
    tensors = [inputs[i][field] for i, field in node.places]
    return applied(Layers, node, inputs, *tensors) if tensors else None


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply`` where no transform of `torch.func` is active, which `dispatch.py` has made sure of.

    Without a look at every argument for a tensor that outlived one, which takes as long as the call.
    """
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


class Layers(torch.autograd.Function):
    """The node. What is looked at are `inputs`; autograd gets, one by one, those of them that want a gradient."""

    @staticmethod
    def forward(ctx: Any, node: Node, inputs: Sequence[Inputs], *_: Tensor) -> tuple[Tensor, ...]:
        ys, results = forward(node.settings, inputs, [wanted.lambda_ for wanted in node.wants])
        ctx.node = node
        ctx.save_for_backward(*kept_of(node, inputs, results))
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads_y: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *gradients(ctx.node, ctx.saved_tensors, grads_y))


def kept_of(node: Node, inputs: Sequence[Inputs], results: Sequence[Down]) -> list[Tensor | None]:
    """What is kept for :func:`gradients`: x, h0, and what is each layer's own."""
    x = h0 = None
    own: list[Tensor | None] = []
    for settings, of, wanted, result in zip(node.settings, inputs, node.wants, results, strict=True):
        saved = saved_for(settings, of, wanted, result.t, result.difference)
        x = saved.x if x is None else x
        h0 = saved.initial_residual if h0 is None else h0
        own += (*saved[1:5], *saved[6:])
    return [x, h0, *own]


#: What is kept of a layer beside x and h0, which come first; its weight is the first.
KEPT_OF_LAYER = len(Saved._fields) - 2


def saved_of(node: Node, kept: Sequence[Any]) -> list[Saved]:
    """Each layer's, of what :func:`kept_of` kept."""
    x, h0, *own = kept
    found = []
    for i, mixes in enumerate(node.mixing):
        of = own[KEPT_OF_LAYER * i : KEPT_OF_LAYER * (i + 1)]
        found.append(Saved._make((x, *of[:4], h0 if mixes else None, *of[4:])))
    return found


def gradients(node: Node, kept: Sequence[Tensor | None], grads_y: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Those of the tensors that autograd got: all, as it tells no node that it is asked for some only."""
    called = [i for i, grad_y in enumerate(grads_y) if grad_y is not None]
    if not called:
        return [None] * len(node.places)
    saved, dys = saved_of(node, kept), [grad_y for grad_y in grads_y if grad_y is not None]
    settings, of_called = (
        [node.settings[i] for i in called],
        ([saved[i] for i in called], dys, [node.wants[i] for i in called]),
    )
    if not torch.is_grad_enabled():
        return _by_place(node, called, backward(settings, *of_called, node.in_series))
    with torch.no_grad():  # create_graph=True
        found = _by_place(node, called, backward(settings, *of_called, node.in_series))
    what = "A SIBO-LoRA layer" if settings[0].activation is None else "A bottleneck adapter"
    return _RefuseSecondDerivative.apply(what, len(found), *found, *kept, *dys)


def _by_place(node: Node, called: list[int], found: Sequence[Inputs]) -> list[Tensor | None]:
    """Of the gradients of the layers that were called; of what they share they are the first one's."""
    own = dict(zip(called, found, strict=True))
    return [
        found[0][field] if field == _X or field == _H0 else own[i][field] if i in own else None
        for i, field in node.places
    ]


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
