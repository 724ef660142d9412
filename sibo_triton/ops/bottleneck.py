"""The SIBO bottleneck adapter as one operation, on whatever it is added to, or with the linear that it is parallel to.

    x~ = (1 - lambda) x + lambda h0        p = drop(x~) W_down^T + b_down        y = base + s (f(p) W_up^T + b_up)

`sibo_triton.reference` is the definition, and ``ops/products.py`` has the products and their gradients: LoRA's, with f
between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sibo_triton import reference
from sibo_triton.ops.arguments import Inputs, Settings
from sibo_triton.ops.group import Group
from sibo_triton.ops.prepare import checked, fused, group_of, shares_passes
from sibo_triton.reference import check_activation


def add_bottleneck(
    base: Tensor,
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    scaling: float | Tensor = 1.0,
    *,
    activation: str = "tanh",
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    initial_residual: Tensor | None = None,
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """``base + s (W_up f(W_down drop(x~) + b_down) + b_up)``: :func:`sibo_triton.reference.add_bottleneck`, fused.

    ``add_bottleneck(x, x, ...)`` is the adapter in series. A new tensor, which may be written into. Under autocast the
    branch computes in its dtype, as PEFT's modules do; x and h0 are read as they are. Where p or x~ would be rounded to
    16 bits by the definition, they are not here. Differentiable once, with respect to every tensor but the seed;
    ``SIBO_TRITON_BACKEND=reference`` runs the definition, which autograd differentiates any number of times.

    Args:
        base: what the branch is added to, ``[..., N]``, any floating dtype.
        x: ``[..., K]``, float16, bfloat16, float32 or float64; any strides; of the leading dimensions of ``base``.
        down_weight: W_down, ``[bottleneck, K]``, in ``x.dtype`` or float32.
        up_weight: W_up, ``[N, bottleneck]``, in ``down_weight.dtype``.
        scaling: s, a number or a floating point tensor with one element, to which a gradient flows.
        activation: f, a name in :data:`sibo_triton.reference.ACTIVATIONS`.
        down_bias, up_bias: b_down, ``[bottleneck]``, and b_up, ``[N]``, in ``down_weight.dtype``; or None.
        initial_residual: h0, of the shape of x, any floating dtype; None where ``lambda_`` is the number 0.
        lambda_: a number in [0, 1], or a floating point tensor with one element.
        dropout_p: the probability of dropping an element of x~, in [0, 1); pass 0.0 outside of training.
        dropout_seed: int64, ``[1]``, from :func:`sibo_triton.reference.draw_seed`; needed if ``dropout_p`` is not 0.

    Returns:
        ``[..., N]``, in ``base.dtype``: the sum is taken in the wider dtype and rounded once.

    Raises:
        TypeError, ValueError: as the definition; ValueError also for weights of two dtypes.
        RuntimeError: ``SIBO_TRITON_BACKEND=triton`` where the kernels cannot run; a second derivative.
    """
    adapter = (down_weight, up_weight, scaling, activation, down_bias, up_bias)
    return _run(base, x, None, None, adapter, (initial_residual, lambda_, dropout_p, dropout_seed))


def bottleneck_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down_weight: Tensor,
    up_weight: Tensor,
    scaling: float | Tensor = 1.0,
    *,
    activation: str = "tanh",
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    initial_residual: Tensor | None = None,
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """``W0 x + b + s (W_up f(W_down drop(x~) + b_down) + b_up)``: the adapter in parallel with a dense linear, fused.

    :func:`sibo_triton.reference.bottleneck_adapter` with ``placement="parallel"``. Under autocast the frozen product
    computes in its dtype too.

    Args:
        x: ``[..., K]``, float16, bfloat16, float32 or float64; any strides.
        weight, bias: W0, ``[N, K]``, and b, ``[N]`` or None, in ``x.dtype`` unless autocast casts them.
        down_weight, up_weight, scaling, activation, down_bias, up_bias, initial_residual, lambda_, dropout_p,
            dropout_seed: see :func:`add_bottleneck`.

    Returns:
        ``[..., N]``, in ``x.dtype``, or autocast's.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`add_bottleneck`.
    """
    adapter = (down_weight, up_weight, scaling, activation, down_bias, up_bias)
    return _run(None, x, weight, bias, adapter, (initial_residual, lambda_, dropout_p, dropout_seed))


def bottleneck_group(x: Tensor, layers: Sequence[Mapping[str, Any]]) -> Group | None:
    """Adapters that read the same x, so that one pass over it serves them all, forward and backward.

    Args:
        x: ``[..., K]``.
        layers: the arguments of :func:`bottleneck_linear` for each, by their names, without x; or, without weight and
            bias, of the adapter in series, ``add_bottleneck(x, x, ...)``.

    Returns:
        As :func:`~sibo_triton.ops.lora.lora_linear_group`.
    """
    if not shares_passes(x):
        return None
    prepared = []
    for layer in layers:
        unknown = sorted(layer.keys() - _NAMES)
        if unknown:
            raise TypeError(f"bottleneck_group got an unexpected keyword argument {unknown[0]!r} for a layer")
        of = {**_DEFAULTS, **layer}
        weight = of["weight"]
        adapter = tuple(of[name] for name in _ADAPTER)
        mixing = tuple(of[name] for name in _MIXING)
        prepared.append(_prepared(x if weight is None else None, x, weight, of["bias"], adapter, mixing))
    return group_of([settings for settings, _ in prepared], [inputs for _, inputs in prepared])


_ADAPTER = ("down_weight", "up_weight", "scaling", "activation", "down_bias", "up_bias")
_MIXING = ("initial_residual", "lambda_", "dropout_p", "dropout_seed")
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("weight", "bias", "down_bias", "up_bias", "initial_residual", "dropout_seed")),
    "scaling": 1.0,
    "activation": "tanh",
    "lambda_": 0.0,
    "dropout_p": 0.0,
}
_NAMES = {*_DEFAULTS, *_ADAPTER}


def _run(
    base: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, adapter: tuple, mixing: tuple
) -> Tensor:
    settings, inputs = _prepared(base, x, weight, bias, adapter, mixing)
    if settings.backend != "reference":
        return fused(settings, inputs)
    names = {**dict(zip(_ADAPTER, adapter, strict=True)), **dict(zip(_MIXING, mixing, strict=True))}
    if weight is None:
        assert base is not None
        return reference.add_bottleneck(base, x, **names)
    return reference.bottleneck_adapter(x, weight, bias, placement="parallel", **names)


def _prepared(
    base: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, adapter: tuple, mixing: tuple
) -> tuple[Settings, Inputs]:
    """The arguments, checked, and what computes them."""
    down_weight, up_weight, scaling, activation, down_bias, up_bias = adapter
    tokens, out_features = (base.shape[:-1], base.shape[-1]) if base is not None else (x.shape[:-1], len(up_weight))
    _check_shapes(tokens, out_features, x, down_weight, up_weight, down_bias, up_bias)
    check_activation(activation)
    frozen = (None if base is x else base, x, weight, bias)
    return checked(frozen, (down_weight, up_weight, up_bias, down_bias), scaling, mixing, activation)


def _check_shapes(
    tokens: torch.Size,
    out_features: int,
    x: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
) -> None:
    if tokens != x.shape[:-1]:
        shape = [*tokens, out_features]
        raise ValueError(f"base has shape {shape} and x {list(x.shape)}: both must hold the same tokens")
    if down_weight.dim() != 2 or down_weight.shape[1] != x.shape[-1]:
        raise ValueError(f"down_weight has shape {list(down_weight.shape)}, but [bottleneck, {x.shape[-1]}] fits x")
    fitting = [out_features, down_weight.shape[0]]
    if list(up_weight.shape) != fitting:
        raise ValueError(f"up_weight has shape {list(up_weight.shape)}, but {fitting} fits base and down_weight")
    for name, bias, size in (("down_bias", down_bias, fitting[1]), ("up_bias", up_bias, fitting[0])):
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name} has shape {list(bias.shape)}, but [{size}] fits the weights")
        if bias is not None and bias.dtype != down_weight.dtype:
            raise ValueError(f"{name} is {bias.dtype} and down_weight {down_weight.dtype}: they need one dtype")
    if up_weight.dtype != down_weight.dtype:
        raise ValueError(f"down_weight is {down_weight.dtype} and up_weight {up_weight.dtype}: they need one dtype")
