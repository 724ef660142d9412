"""The products of an adapter in the order that moves the fewest bytes, and their gradients, written by hand.

LoRA, ``t = drop(x~) A^T`` and ``y = x W0^T + b + s (t B^T + b_B)``, and the bottleneck adapter, which has a bias and an
activation f between its two products: ``p = drop(x~) W_down^T + b_down``, and f(p) takes the place of t.

Forward: t (and f of it), then the low-rank product into a fresh y, then the frozen GEMM accumulates onto it (beta = 1).
Backward: ``u = s (dY B) f'(p)`` and dB, then dA, then the low-rank part of dx into a fresh dx, onto which the frozen
GEMM accumulates.

Kept for the backward are x and h0 themselves, t (or p) and, if lambda learns, ``d = A drop(h0 - x)``, both ``[M, r]``,
and the seed of the mask: nothing of the size of x that was not there before, no cast of it, no mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sibo_triton.kernels.siblings import DownGradients, DownProjection, UpGradients
from sibo_triton.ops.activations import activation_gradient
from sibo_triton.ops.dispatch import implementation
from sibo_triton.reference import ACTIVATIONS


class Inputs(NamedTuple):
    """The tensors of one call, or what stands for each of them: its gradient, or whether it wants one.

    What the low-rank product is added to is the frozen product, if there is a weight, or else the base, or else x: the
    adapter in series.
    """

    base: Any  # [..., N], what the frozen layer returned; or None
    x: Any  # [..., K]
    weight: Any  # [N, K], of the frozen layer, or None
    bias: Any  # [N], or None
    lora_a: Any  # [r, K], or W_down
    lora_b: Any  # [N, r], or W_up
    lora_bias: Any  # [N], or None
    down_bias: Any  # [r], or None: with an activation
    initial_residual: Any  # like x, or None
    lambda_: Any  # one element, or None: a number, in Settings
    scaling: Any  # likewise
    seed: Any  # int64, [1], or None


class Settings(NamedTuple):
    """What is no tensor with a gradient.

    Attributes:
        backend: "triton" or "torch".
        scaling, lambda_: the numbers, where they are no tensors.
        dropout_p: the rate.
        dtype: of y and of the frozen product.
        x_dtype, residual_dtype: of x and of h0.
        adapter_dtype: of A and B, or autocast's.
        activation: f's name, or None.
    """

    backend: str
    scaling: float
    lambda_: float
    dropout_p: float
    dtype: torch.dtype
    x_dtype: torch.dtype
    residual_dtype: torch.dtype | None
    adapter_dtype: torch.dtype
    activation: str | None = None


class Saved(NamedTuple):
    """What the backward reads; None where the wanted gradients do not need it."""

    x: Any
    weight: Any
    lora_a: Any
    lora_b: Any
    lora_bias: Any
    initial_residual: Any
    lambda_: Any
    scaling: Any
    seed: Any
    t: Any
    difference: Any


class Down(NamedTuple):
    """Of one layer, ``[M, r]`` each."""

    t: Any  # or p, of a bottleneck adapter
    difference: Any
    activated: Any  # f(p), or t where there is no f


def down(settings: Sequence[Settings], inputs: Sequence[Inputs], wants_differences: Sequence[bool]) -> list[Down]:
    """The down-projections of layers that share x and h0, and either all have an activation or none."""
    with without_autocast(inputs[0].x.device.type):
        x, h0, matrices = read_by_down(settings, inputs)
        return _down(settings, x, down_projections(settings, inputs, matrices, wants_differences), h0)


def _down(settings: Sequence[Settings], x: Tensor, siblings: Sequence[DownProjection], h0: Tensor | None) -> list[Down]:
    ops, h0 = implementation(settings[0].backend), None if h0 is None else as_matrix(h0)
    if settings[0].activation is None:
        return [Down(t, difference, t) for t, difference in ops.down_siblings(x, siblings, h0)]
    return [Down(*result) for result in ops.down_activated_siblings(x, siblings, h0)]


def read_by_down(
    settings: Sequence[Settings], inputs: Sequence[Inputs]
) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
    """x, ``[M, K]``, h0 as it is, and each layer's A and B in its adapter's dtype."""
    h0 = next((of.initial_residual for of in inputs if of.initial_residual is not None), None)
    matrices = [
        (cast(of.lora_a, own.adapter_dtype), cast(of.lora_b, own.adapter_dtype))
        for own, of in zip(settings, inputs, strict=True)
    ]
    return as_matrix(inputs[0].x), h0, matrices


def down_projections(
    settings: Sequence[Settings],
    inputs: Sequence[Inputs],
    matrices: Sequence[tuple[Tensor, Tensor]],
    wants_differences: Sequence[bool],
) -> list[DownProjection]:
    """Each layer's part of the pass over x, as the backends take it."""
    return [
        DownProjection(
            a,
            own.lambda_ if of.lambda_ is None else of.lambda_,
            own.dropout_p,
            of.seed,
            wants,
            of.down_bias,
            own.activation,
        )
        for own, of, (a, _), wants in zip(settings, inputs, matrices, wants_differences, strict=True)
    ]


def forward(
    settings: Sequence[Settings], inputs: Sequence[Inputs], wants_differences: Sequence[bool]
) -> tuple[list[Tensor], list[Down]]:
    """y, ``[..., N]``, and what it is made of, of layers that share x and h0."""
    with without_autocast(inputs[0].x.device.type):
        x, h0, matrices = read_by_down(settings, inputs)
        tensors, bases = [x, h0], []
        for of, (a, b) in zip(inputs, matrices, strict=True):
            base = None if of.base is None else as_matrix(of.base)
            bases.append(base)
            tensors += (base, a, b, of.lora_bias, of.down_bias, of.bias, of.lambda_, of.scaling, of.seed)

        def compute() -> list[Tensor | None]:
            siblings = down_projections(settings, inputs, matrices, wants_differences)
            found: list[Tensor | None] = []
            for i, own in enumerate(_down(settings, x, siblings, h0)):
                f = None if settings[i].activation is None else own.activated
                y = _up(settings[i], inputs[i], x, bases[i], own.activated, matrices[i][1])
                found += (own.t, own.difference, f, y)
            return found

        key = tuple(settings), tuple(wants_differences), inputs[0].weight is None
        found = implementation(settings[0].backend).replayed(key, tensors, compute)
        ys, downs = [], []
        for i, (own, of) in enumerate(zip(settings, inputs, strict=True)):
            t, difference, f, y = found[4 * i : 4 * i + 4]
            downs.append(Down(t, difference, t if f is None else f))
            ys.append(fresh_like(of.x, y) if of.weight is None else with_frozen(own, of, x, y))
        return ys, downs


def output(settings: Settings, inputs: Inputs, x: Tensor, t: Tensor) -> Tensor:
    """y, ``[..., N]``, of x, ``[M, K]``, and t (or f(p)): the low-rank product and what it is added to."""
    with without_autocast(x.device.type):
        base = None if inputs.base is None else as_matrix(inputs.base)
        y = _up(settings, inputs, x, base, t, cast(inputs.lora_b, settings.adapter_dtype))
        return fresh_like(inputs.x, y) if inputs.weight is None else with_frozen(settings, inputs, x, y)


def _up(settings: Settings, inputs: Inputs, x: Tensor, base: Tensor | None, t: Tensor, b: Tensor) -> Tensor:
    """The low-rank product, ``[M, N]``, plus the base output, or x in series; plus the frozen bias else."""
    ops, scaling = implementation(settings.backend), scaling_of(settings, inputs)
    if inputs.weight is None:
        return ops.add_up(x if base is None else base, t, b, scaling, inputs.lora_bias)
    return ops.up(t, b, scaling, settings.dtype, inputs.lora_bias, inputs.bias)


def scaling_of(settings: Settings, tensors: Inputs | Saved) -> float | Tensor:
    """s, a number or a tensor with one element."""
    return settings.scaling if tensors.scaling is None else tensors.scaling


def with_frozen(settings: Settings, inputs: Inputs, x: Tensor, y: Tensor) -> Tensor:
    """y, ``[..., N]``: the low-rank product, ``[M, N]``, and onto it that of x, ``[M, K]``, and the frozen weight.

    Not under autocast.
    """
    matrix, weight = cast(x, settings.dtype), cast(inputs.weight, settings.dtype).t()
    if torch._C._len_torch_dispatch_stack() > 0:  # selective checkpointing keeps what an operator returned
        return shaped_like(inputs.x, torch.addmm(y, matrix, weight))
    y.addmm_(matrix, weight)
    return fresh_like(inputs.x, y)


def _through_t(wants: Inputs) -> tuple[bool, bool]:
    """Whether dx~ is wanted, and whether u, the gradient of t, is."""
    wants_input = wants.x or wants.initial_residual
    return wants_input, wants_input or wants.lora_a or wants.lambda_ or wants.down_bias


def saved_for(settings: Settings, inputs: Inputs, wants: Inputs, t: Tensor, difference: Tensor | None) -> Saved:
    """What to keep for the gradients that are wanted."""
    wants_input, wants_u = _through_t(wants)
    reads_p = settings.activation is not None and wants_u
    return Saved(
        x=inputs.x if wants.lora_a or wants.weight else None,
        weight=inputs.weight if wants.x else None,
        lora_a=inputs.lora_a if wants_input else None,
        lora_b=inputs.lora_b if wants_u or wants.lora_b or wants.scaling else None,
        lora_bias=inputs.lora_bias if wants.scaling else None,
        initial_residual=inputs.initial_residual if wants.lora_a else None,
        lambda_=inputs.lambda_,
        scaling=inputs.scaling,
        seed=inputs.seed,
        t=t if wants.lora_b or wants.scaling or reads_p else None,
        difference=difference if wants.lambda_ else None,
    )


def backward(
    settings: Sequence[Settings],
    saved: Sequence[Saved],
    grads_y: Sequence[Tensor],
    wants: Sequence[Inputs],
    in_series: bool = False,
) -> list[Inputs]:
    """The gradients that are wanted of layers that share x and h0; None for the others.

    Args:
        settings, saved, wants: of each layer. They agree in x, h0 and their dtypes.
        grads_y: dY of each, ``[..., N]``.
        in_series: whether x is what the low-rank products are added to, so that its gradient has dY as a part.

    Returns:
        For each layer the gradients of what is its own, each in a dtype that autograd casts to its tensor's; those of x
        and h0 are sums, and the first layer's.
    """
    with without_autocast(grads_y[0].device.type):
        gs = [as_matrix(grad_y) for grad_y in grads_y]  # [M, N]
        ups, grads_a, dx, dh = _low_rank_backward(settings, saved, gs, wants, in_series)
        leading = grads_y[0].shape[:-1]
        if dx is not None:
            for i, (own, kept, g) in enumerate(zip(settings, saved, gs, strict=True)):
                if kept.weight is not None:
                    dx.addmm_(g, cast(kept.weight, own.dtype))
                elif in_series and i > 0:
                    dx.add_(g)
            dx = cast(dx, settings[0].x_dtype).view(*leading, dx.shape[1])
        dh = None if dh is None else dh.view(*leading, dh.shape[1])
        gradients = []
        for i, (own, kept, wanted, g, up) in enumerate(zip(settings, saved, wants, gs, ups, strict=True)):
            of_x, of_h = (dx, dh) if i == 0 else (None, None)
            gradients.append(
                Inputs(
                    base=grads_y[i] if wanted.base else None,
                    x=of_x,
                    weight=g.t() @ cast(as_matrix(kept.x), own.dtype) if wanted.weight else None,
                    bias=up.sum if wanted.bias else None,
                    lora_a=grads_a[i],
                    lora_b=up.grad_b,
                    lora_bias=up.sum * scaling_of(own, kept) if wanted.lora_bias else None,
                    down_bias=up.u.sum(0) if wanted.down_bias else None,
                    initial_residual=of_h,
                    lambda_=(up.u * kept.difference).sum().reshape(kept.lambda_.shape) if wanted.lambda_ else None,
                    scaling=up.scaling,
                    seed=None,
                )
            )
    return gradients


def _low_rank_backward(
    settings: Sequence[Settings], saved: Sequence[Saved], gs: list[Tensor], wants: Sequence[Inputs], in_series: bool
) -> tuple[list[_Up], Sequence[Any], Tensor | None, Tensor | None]:
    """What comes of each dY, ``[M, N]``, dA of each layer, and the low-rank parts of dx and dh0, ``[M, K]``."""
    skip = gs[0] if in_series and wants[0].x else None
    x = next((kept.x for kept in saved if kept.x is not None), None)
    h0 = next((kept.initial_residual for kept in saved if kept.initial_residual is not None), None)
    tensors, matrices = [*gs, x, h0], []
    for own, kept in zip(settings, saved, strict=True):
        a = None if kept.lora_a is None else cast(kept.lora_a, own.adapter_dtype)
        b = None if kept.lora_b is None else cast(kept.lora_b, own.adapter_dtype)
        matrices.append((a, b))
        tensors += (a, b, kept.t, kept.lora_bias, kept.lambda_, kept.scaling, kept.seed)
    dtypes = [None if kept.lora_b is None else kept.lora_b.dtype for kept in saved]

    def compute() -> list[Tensor | None]:
        ups = _up_backward(settings, saved, gs, wants, matrices)
        shared = (None if x is None else as_matrix(x), None if h0 is None else as_matrix(h0), skip)
        grads_a, dx, dh = _down_backward(settings, saved, ups, wants, matrices, shared, has_frozen)
        found = [dx, dh, *grads_a]
        for up, wanted in zip(ups, wants, strict=True):
            u = up.u if wanted.lambda_ or wanted.down_bias else None
            found += (u, up.grad_b, up.sum, up.scaling)
        return found

    has_frozen = any(kept.weight is not None for kept in saved)
    key = tuple(settings), tuple(wants), in_series, has_frozen, tuple(dtypes)
    dx, dh, *rest = implementation(settings[0].backend).replayed(key, tensors, compute)
    count = len(gs)
    return [_Up(*rest[i : i + 4]) for i in range(count, 5 * count, 4)], rest[:count], dx, dh


class _Up(NamedTuple):
    """What comes of one layer's dY, where it is wanted."""

    u: Any = None
    grad_b: Any = None
    sum: Any = None  # of dY over its rows
    scaling: Any = None  # ds


def _up_backward(
    settings: Sequence[Settings],
    saved: Sequence[Saved],
    gs: list[Tensor],
    wants: Sequence[Inputs],
    matrices: Sequence[tuple[Any, Any]],  # A and B of each, in its adapter's dtype
) -> list[_Up]:
    ops, results, asked, places = implementation(settings[0].backend), [_Up()] * len(gs), [], []
    for i, (own, kept, g, wanted, (_, b)) in enumerate(zip(settings, saved, gs, wants, matrices, strict=True)):
        wants_u, wants_sum = _through_t(wanted)[1], wanted.bias or wanted.lora_bias
        if wanted.scaling:
            results[i] = _with_scaling(own, kept, g, wanted, b)
        elif wants_u or wanted.lora_b:
            grad_dtype = kept.lora_b.dtype if wanted.lora_b else None
            scaling = scaling_of(own, kept)
            asked.append(UpGradients(g, kept.t, b, scaling, wants_u, grad_dtype, wants_sum, own.activation))
            places.append(i)
        elif wants_sum:
            wide = torch.promote_types(torch.promote_types(own.adapter_dtype, torch.float32), g.dtype)
            results[i] = _Up(sum=g.sum(0, dtype=wide))
    if asked:
        for i, result in zip(places, ops.up_backward_siblings(asked), strict=True):
            results[i] = _Up(*result)
    return results


def _with_scaling(own: Settings, kept: Saved, g: Tensor, wanted: Inputs, b: Tensor) -> _Up:
    """With ``ds = <dY, t B^T + b_B>``, taken in the rank, from u without its s, which may be 0, and f'(p)."""
    wide = torch.promote_types(own.adapter_dtype, torch.float32)
    t = kept.t.to(wide)
    activated = t if own.activation is None else ACTIVATIONS[own.activation](t)
    grad_dtype = wide if wanted.lora_b else None
    wants_sum = wanted.bias or wanted.lora_bias or kept.lora_bias is not None
    asked = UpGradients(g, activated, b, 1.0, True, grad_dtype, wants_sum)
    ((u, grad_b, grad_sum),) = implementation(own.backend).up_backward_siblings([asked])
    grad_scaling = (u * activated).sum()
    if kept.lora_bias is not None:
        grad_scaling = grad_scaling + (grad_sum * kept.lora_bias).sum()
    scaling = kept.scaling.to(wide)
    u, grad_b = u * scaling, None if grad_b is None else grad_b * scaling
    if own.activation is not None:
        u = activation_gradient(own.activation, u, t, activated)
    return _Up(u, grad_b, grad_sum, grad_scaling.reshape(kept.scaling.shape))


def _down_backward(
    settings: Sequence[Settings],
    saved: Sequence[Saved],
    ups: Sequence[_Up],
    wants: Sequence[Inputs],
    matrices: Sequence[tuple[Any, Any]],
    shared: tuple[Tensor | None, Tensor | None, Tensor | None],  # x, h0 and what is added to dx
    has_frozen: bool,  # whether frozen products accumulate onto dx
) -> tuple[list[Any], Tensor | None, Tensor | None]:
    """dA of each layer, and the low-rank part of dx, plus the skip's, and of dh0, where wanted."""
    grads_a: list[Any] = [None] * len(ups)
    asked, places = [], []
    for i, (own, kept, up, wanted, (a, _)) in enumerate(zip(settings, saved, ups, wants, matrices, strict=True)):
        if wanted.lora_a or _through_t(wanted)[0]:
            lambda_ = own.lambda_ if kept.lambda_ is None else kept.lambda_
            mixing = (lambda_, own.dropout_p, kept.seed)
            grad_dtype = kept.lora_b.dtype if wanted.lora_a else None
            asked.append(DownGradients(up.u, a, own.adapter_dtype, *mixing, grad_dtype))
            places.append(i)
    if not asked:
        return grads_a, None, None
    own, (x, h0, skip) = settings[0], shared
    dx_dtype = None if not wants[0].x else own.dtype if has_frozen else own.x_dtype
    residual_dtype = next(
        (of.residual_dtype for of, w in zip(settings, wants, strict=True) if w.initial_residual), None
    )
    found, dx, dh = implementation(own.backend).down_backward_siblings(asked, x, h0, dx_dtype, residual_dtype, skip)
    for i, grad_a in zip(places, found, strict=True):
        grads_a[i] = grad_a
    return grads_a, dx, dh


def wants_gradients(inputs: Sequence[Inputs]) -> bool:
    """Whether autograd must know of a call on these."""
    if not torch.is_grad_enabled():
        return False
    if inputs[0].lora_b.requires_grad:  # as nearly always
        return True
    return any(tensor is not None and tensor.requires_grad for of in inputs for tensor in of)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply`` where no transform of `torch.func` is active, which `dispatch.py` has made sure of.

    Without a look at every argument for a tensor that outlived one, which takes as long as the call.
    """
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


class LowRank(torch.autograd.Function):
    """The operation in eager mode: an `autograd.Function` takes half of the host time of a registered operator."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, inputs: Inputs, *_: Tensor | None) -> Tensor:
        """y; what is looked at are the inputs, and autograd gets them one by one."""
        wants = Inputs._make(ctx.needs_input_grad[2:])
        (y,), (own,) = forward([settings], [inputs], [wants.lambda_])
        ctx.settings, ctx.in_series = settings, inputs.base is None and inputs.weight is None
        ctx.save_for_backward(*saved_for(settings, inputs, wants, own.t, own.difference))
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        wants, saved = Inputs._make(ctx.needs_input_grad[2:]), Saved._make(ctx.saved_tensors)
        rest = [ctx.settings], [saved], [grad_y], [wants], ctx.in_series
        if not torch.is_grad_enabled():
            return None, None, *backward(*rest)[0]
        with torch.no_grad():  # create_graph=True
            gradients = backward(*rest)[0]
        return None, None, *refuse_second_derivative(gradients, (grad_y, *saved), name_of(ctx.settings))


def name_of(settings: Settings) -> str:
    """For a message."""
    return "A SIBO-LoRA layer" if settings.activation is None else "A bottleneck adapter"


def refuse_second_derivative(
    gradients: Sequence[Tensor | None], depend_on: Sequence[Tensor | None], what: str
) -> tuple:
    """First derivatives, of which a second one says that there is none."""
    return _RefuseSecondDerivative.apply(what, len(gradients), *gradients, *depend_on)


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


def as_matrix(tensor: Tensor) -> Tensor:
    """``[M, K]``, a view where strides allow; also where a size is 0."""
    dims = tensor.dim()
    if dims == 2:
        return tensor
    return tensor.flatten(0, -2) if dims > 2 else tensor.reshape(1, tensor.shape[0])


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype; ``to`` takes its time also where there is nothing to do, and there nearly always is."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def shaped_like(x: Tensor, y: Tensor) -> Tensor:
    """A fresh y, ``[M, N]``, with the leading dimensions of x: ``[..., N]``.

    Not a view to autograd, which forbids writing into a view that a Function returned or that was made without
    gradients: q.mul_(...) is common.
    """
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[1]))


def fresh_like(x: Tensor, y: Tensor) -> Tensor:
    """Likewise, of a y without a history that nobody else has: by resizing it, which takes the host a tenth."""
    if x.dim() == 2:
        return y
    if torch._C._len_torch_dispatch_stack() > 0:
        return shaped_like(x, y)
    return y.resize_(*x.shape[:-1], y.shape[1])


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Autocast's dtype where it is on."""
    if not torch._C._is_any_autocast_enabled():
        return None
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


_unsafe_view = torch.ops.aten._unsafe_view.default
_AS_IT_IS = contextlib.nullcontext()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    return _AS_IT_IS if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)
