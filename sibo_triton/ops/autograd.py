"""Autograd in eager mode: one node for all layers that share x.

An `autograd.Function` takes half of the host time of a registered operator (`registered.py`, for compiled code), and a
node for each layer would take longer on the host than all launches of the layers. Its backward has the dY of all
layers, so that it reads x once and accumulates dx in place. A layer whose output is not used has no dY, and its tensors
get no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from sibo_triton.ops.arguments import Inputs, Saved, Settings
from sibo_triton.ops.products import Down, backward, forward, saved_for

_FIELDS = range(len(Inputs._fields))
_X, _H0 = Inputs._fields.index("x"), Inputs._fields.index("initial_residual")


class Node(NamedTuple):
    """What the backward of layers that share x and h0 needs beside tensors."""

    settings: Sequence[Settings]
    wants: Sequence[Inputs]  # whether each input of each layer requires a gradient
    places: Sequence[tuple[int, int]]  # of each tensor passed to autograd: the layer, and the field of its inputs
    mixing: Sequence[bool]
    in_series: bool


def node_of(settings: Sequence[Settings], inputs: Sequence[Inputs]) -> Node:
    """The node for some layers. The places of x and h0, which they share, are in the first layer that has each."""
    wants, places = [], []
    has_h0 = False
    for i, layer in enumerate(inputs):
        wanted = [tensor is not None and tensor.requires_grad for tensor in layer]
        wants.append(Inputs._make(wanted))
        for field in compress(_FIELDS, wanted):
            if not (field == _X and i > 0 or field == _H0 and has_h0):
                places.append((i, field))
                has_h0 = has_h0 or field == _H0
    mixing = [layer.initial_residual is not None for layer in inputs]
    return Node(settings, wants, places, mixing, inputs[0].weight is None and inputs[0].base is None)


def outputs_with_gradients(settings: Sequence[Settings], inputs: Sequence[Inputs]) -> Sequence[Tensor] | None:
    """y of each of some layers that share x and h0, differentiable; None where no gradient is wanted."""
    if not torch.is_grad_enabled():
        return None
    node = node_of(settings, inputs)
    tensors = [inputs[i][field] for i, field in node.places]
    return _apply(node, inputs, *tensors) if tensors else None


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its search for dead `torch.func` wrappers, which takes as long as the rest of it.

    No transform is active here: under one, `dispatch.py` chooses the reference.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


class Layers(torch.autograd.Function):
    """The node. The tensors of `inputs` that require gradients are also passed one by one, for autograd to see them."""

    @staticmethod
    def forward(ctx: Any, node: Node, inputs: Sequence[Inputs], *_: Tensor) -> tuple[Tensor, ...]:
        ys, results = forward(node.settings, inputs, [wanted.lambda_ for wanted in node.wants])
        ctx.node = node
        ctx.save_for_backward(*kept_of(node, inputs, results))
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads_y: Tensor | None) -> tuple[Tensor | None, ...]:
        of = untraced_gradients if torch.compiler.is_compiling() else gradients  # traced by compiled autograd
        return (None, None, *of(ctx.node, ctx.saved_tensors, grads_y))


_apply = apply_of(Layers)


def kept_of(node: Node, inputs: Sequence[Inputs], results: Sequence[Down]) -> list[Tensor | None]:
    """The tensors saved for :func:`gradients`: x, h0, and then ``KEPT_PER_LAYER`` of each layer."""
    x = h0 = None
    of_layers: list[Tensor | None] = []
    for settings, layer, wanted, result in zip(node.settings, inputs, node.wants, results, strict=True):
        saved = saved_for(settings, layer, wanted, result.t, result.difference)
        x = saved.x if x is None else x
        h0 = saved.initial_residual if h0 is None else h0
        of_layers += saved[KEPT_SHARED:]
    return [x, h0, *of_layers]


#: x and h0, and the other fields of `Saved`.
KEPT_SHARED = 2
KEPT_PER_LAYER_FIELDS = Saved._fields[KEPT_SHARED:]
KEPT_PER_LAYER = len(KEPT_PER_LAYER_FIELDS)


def is_batched(grad_y: Tensor | None) -> bool:
    """Whether a gradient is a batch of them, as `torch.autograd.grad(is_grads_batched=True)` passes it."""
    return grad_y is not None and torch._C._functorch.is_legacy_batchedtensor(grad_y)


def saved_of(node: Node, kept: Sequence[Any]) -> list[Saved]:
    """What :func:`kept_of` returned, layer by layer."""
    x, h0, *of_layers = kept
    saved = []
    for i, mixes in enumerate(node.mixing):
        fields = of_layers[KEPT_PER_LAYER * i : KEPT_PER_LAYER * (i + 1)]
        saved.append(Saved(x, h0 if mixes else None, *fields))
    return saved


def gradients(node: Node, kept: Sequence[Tensor | None], grads_y: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients of all tensors that were passed to autograd; which of them it needs, it does not say.

    Raises:
        RuntimeError: dY is a batch of gradients.
    """
    if any(is_batched(grad_y) for grad_y in grads_y):
        raise RuntimeError(
            "The fused operation of a SIBO-LoRA layer or bottleneck adapter was asked for batched gradients "
            "(is_grads_batched=True, jacobian(vectorize=True)), but it computes one at a time. Run the definition, "
            "whose gradients can be batched: SIBO_TRITON_BACKEND=reference."
        )
    used = [i for i, grad_y in enumerate(grads_y) if grad_y is not None]
    if not used:
        return [None] * len(node.places)
    saved, dys = saved_of(node, kept), [grad_y for grad_y in grads_y if grad_y is not None]
    settings = [node.settings[i] for i in used]
    with torch.no_grad():  # with create_graph=True gradients are enabled here
        found = backward(settings, [saved[i] for i in used], dys, [node.wants[i] for i in used], node.in_series)
    by_layer = dict(zip(used, found, strict=True))
    grads = [
        # x and h0, which layers share, have theirs in the first
        found[0][field] if field in (_X, _H0) else by_layer[i][field] if i in by_layer else None
        for i, field in node.places
    ]
    if not torch.is_grad_enabled():
        return grads
    what = "A SIBO-LoRA layer" if settings[0].activation is None else "A bottleneck adapter"
    return _RefuseSecondDerivative.apply(what, len(grads), *grads, *kept, *dys)


#: For compiled autograd, which traces the backwards of eager forwards: this one launches kernels, or calls NumPy.
untraced_gradients = torch.compiler.disable(gradients)


class _RefuseSecondDerivative(torch.autograd.Function):
    """Returns the first derivatives, and raises if they are differentiated."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.what = what
        # the other tensors are those that the gradients depend on, so that autograd calls this backward
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        refuse_second_derivative(ctx.what)


def refuse_second_derivative(what: str) -> NoReturn:
    """Raise the RuntimeError that says how else `what` can be differentiated twice."""
    raise RuntimeError(
        f"{what} was differentiated twice, but its fused operation has first derivatives only. Run the definition, "
        "which autograd differentiates any number of times: SIBO_TRITON_BACKEND=reference."
    )
