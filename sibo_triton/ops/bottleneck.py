"""The SIBO bottleneck adapter as one operation, on whatever it is added to, or with the linear that it is parallel to.

    x~ = (1 - lambda) x + lambda h0        p = drop(x~) W_down^T + b_down        y = base + s (f(p) W_up^T + b_up)

`sibo_triton.reference` is the definition, and ``ops/products.py`` has the products and their gradients: LoRA's, with f
between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from sibo_triton.ops.arguments import Inputs, Settings
from sibo_triton.ops.group import Group
from sibo_triton.ops.prepare import Names, checked, group_of, run, shares_passes
from sibo_triton.reference import check_activation


class BottleneckArguments(NamedTuple):
    """The arguments of :func:`bottleneck_linear` beside x, for one layer of :func:`bottleneck_group`.

    In series there is no weight and no bias.
    """

    down_weight: Tensor
    up_weight: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    scaling: float | Tensor = 1.0
    activation: str = "tanh"
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    initial_residual: Tensor | None = None
    lambda_: float | Tensor = 0.0
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None


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
    adapter = BottleneckArguments(
        *(down_weight, up_weight, None, None, scaling, activation, down_bias, up_bias),
        *(initial_residual, lambda_, dropout_p, dropout_seed),
    )
    return run(*_checked(base, x, adapter))


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
    if weight is None:
        raise TypeError("weight is None: add_bottleneck is the adapter without a linear beside it")
    adapter = BottleneckArguments(
        *(down_weight, up_weight, weight, bias, scaling, activation, down_bias, up_bias),
        *(initial_residual, lambda_, dropout_p, dropout_seed),
    )
    return run(*_checked(None, x, adapter))


def bottleneck_group(x: Tensor, layers: Sequence[BottleneckArguments]) -> Group | None:
    """Adapters that read the same x, so that one pass over it serves them all, forward and backward.

    Args:
        x: ``[..., K]``.
        layers: the other arguments of each: of :func:`bottleneck_linear`, or, without a weight, of the adapter in
            series, ``add_bottleneck(x, x, ...)``.

    Returns:
        As :func:`~sibo_triton.ops.lora.lora_linear_group`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`add_bottleneck`.
    """
    if not shares_passes(x):
        return None
    settings, inputs = zip(*[_checked(None, x, layer) for layer in layers], strict=True)
    return group_of(settings, inputs)


_NAMES = Names("down_weight", "up_weight", "up_bias", "down_bias", "bottleneck")


def _checked(base: Tensor | None, x: Tensor, layer: BottleneckArguments) -> tuple[Settings, Inputs]:
    check_activation(layer.activation)
    frozen = (None if base is x else base, x, layer.weight, layer.bias)
    adapter = (layer.down_weight, layer.up_weight, layer.up_bias, layer.down_bias)
    mixing = (layer.initial_residual, layer.lambda_, layer.dropout_p, layer.dropout_seed)
    return checked(frozen, adapter, _NAMES, layer.scaling, mixing, layer.activation)
