"""SIBO-LoRA as operations: a dense linear with its adapter, several that share x, and an adapter on any layer's output.

    x~ = (1 - lambda) x + lambda h0        t = drop(x~) A^T        y = (x W0^T + b, or base) + s (t B^T + b_B)

`sibo_triton.reference` is the definition, and ``ops/products.py`` has the products, their order and their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from sibo_triton.ops import known_calls
from sibo_triton.ops.arguments import Inputs, Settings
from sibo_triton.ops.dispatch import implementation, kernels_compute
from sibo_triton.ops.group import Group
from sibo_triton.ops.prepare import Names, checked, group_of, run, shares_passes


class LoraArguments(NamedTuple):
    """The arguments of :func:`lora_linear` beside x, for one layer of :func:`lora_linear_group`."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float | Tensor
    initial_residual: Tensor | None = None
    lambda_: float | Tensor = 0.0
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    lora_bias: Tensor | None = None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    initial_residual: Tensor | None = None,
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    lora_bias: Tensor | None = None,
) -> Tensor:
    """``y = W0 x + b + s (B A drop(x~) + b_B)``: :func:`sibo_triton.reference.lora_linear`, fused.

    All tensors are on one device, those of lambda, scaling and the seed too. Under autocast the frozen product and the
    adapter compute in its dtype, as PEFT's modules do; x and h0 are read as they are. Where t or x~ would be rounded
    to 16 bits by the definition, they may not be here. Differentiable once, with respect to every tensor but
    ``scaling`` and the seed; ``SIBO_TRITON_BACKEND=reference`` runs the definition, which autograd differentiates any
    number of times.

    Args:
        x: ``[..., K]``, float16, bfloat16, float32 or float64; any strides.
        weight, bias: W0, ``[N, K]``, and b, ``[N]`` or None, in ``x.dtype`` unless autocast casts them.
        lora_a, lora_b: A, ``[r, K]``, and B, ``[N, r]``, in ``x.dtype`` or float32.
        scaling: s, a number or a tensor with one element, which gets no gradient.
        initial_residual: h0, of the shape of x, any floating dtype; None where ``lambda_`` is the number 0.
        lambda_: a number in [0, 1], or a floating point tensor with one element.
        dropout_p: the probability of dropping an element of x~, in [0, 1); pass 0.0 outside of training.
        dropout_seed: int64, ``[1]``, from :func:`sibo_triton.reference.draw_seed`; needed if ``dropout_p`` is not 0.
        lora_bias: b_B, ``[N]`` or None.

    Returns:
        y, ``[..., N]``, in ``x.dtype``, or autocast's.

    Raises:
        TypeError, ValueError: as the definition; ValueError also for dtypes that do not meet.
        RuntimeError: ``SIBO_TRITON_BACKEND=triton`` where the kernels cannot run; a second derivative.
    """
    layer = (weight, bias, lora_a, lora_b, scaling, initial_residual, lambda_, dropout_p, dropout_seed, lora_bias)
    return _output(None, x, initial_residual, layer)


def _output(base: Tensor | None, x: Tensor, initial_residual: Tensor | None, layer: tuple) -> Tensor:
    """y of a layer with these `LoraArguments`; without a weight it is added to ``base``."""
    form = call = None
    if _may_repeat(x):
        tensors, numbers = known_calls.flattened(x, initial_residual, (layer,), base)
        form = known_calls.form_of(tensors, numbers)
        call = known_calls.known(form, tensors)
        outputs = None if call is None else known_calls.outputs(call, tensors)
        if outputs is not None:
            return outputs[0]
    settings, inputs = _checked(base, x, *layer)
    y = run(settings, inputs)
    if form is not None and call is None:
        known_calls.remember(form, tensors, [settings], [inputs])
    return y


def lora_linear_group(x: Tensor, layers: Sequence[LoraArguments]) -> Group | None:
    """Layers that get the same x, so that one pass over it serves them all, forward and backward.

    Args:
        x: ``[..., K]``.
        layers: the other arguments of each. Those that mix in h0 get the same tensor.

    Returns:
        What gives each layer's y once, by its place; None where the layers must be called one by one: under
        `torch.compile`, where the definition runs (`dispatch.py`), on very small x, and where the dtypes of y or h0
        differ.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`lora_linear`.
    """
    form = call = None
    h0s = [layer.initial_residual for layer in layers if layer.initial_residual is not None]
    if _may_repeat(x) and all([h0 is h0s[0] for h0 in h0s]):  # noqa: C419 (a list is faster)
        tensors, numbers = known_calls.flattened(x, h0s[0] if h0s else None, layers)
        form = known_calls.form_of(tensors, numbers)
        call = known_calls.known(form, tensors)
        outputs = None if call is None else known_calls.outputs(call, tensors)
        if outputs is not None:
            return Group(outputs)
    if not shares_passes(x):
        return None
    settings, inputs = zip(*[_checked(None, x, *layer) for layer in layers], strict=True)
    result = group_of(settings, inputs)
    if result is not None and form is not None and call is None:
        known_calls.remember(form, tensors, settings, inputs)
    return result


def _may_repeat(x: Tensor) -> bool:
    """Whether a call on x may take the short path of `known_calls.py`."""
    return kernels_compute(x.device, x.dtype) and implementation("triton").repeats()


def add_lora(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    initial_residual: Tensor | None = None,
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    lora_bias: Tensor | None = None,
) -> Tensor:
    """``base + s (B A drop(x~) + b_B)``: the adapter on what a base layer of any kind returned for x.

    A new tensor: hooks may hold on to ``base``, and it may be a view.

    Args:
        base: ``[..., N]``, of the leading dimensions of x, any floating dtype.
        x, lora_a, lora_b, scaling, initial_residual, lambda_, dropout_p, dropout_seed, lora_bias: see
            :func:`lora_linear`.

    Returns:
        ``[..., N]``, in ``base.dtype``: the sum is taken in the wider dtype and rounded once.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`lora_linear`.
    """
    layer = (None, None, lora_a, lora_b, scaling, initial_residual, lambda_, dropout_p, dropout_seed, lora_bias)
    return _output(base, x, initial_residual, layer)


_NAMES = Names("lora_a", "lora_b", "lora_bias", "down_bias", "r")


def _checked(
    base: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    initial_residual: Tensor | None,
    lambda_: float | Tensor,
    dropout_p: float,
    dropout_seed: Tensor | None,
    lora_bias: Tensor | None,
) -> tuple[Settings, Inputs]:
    if isinstance(scaling, Tensor) and scaling.requires_grad:
        raise ValueError("scaling requires grad, and gets no gradient here: detach it, or use sibo_triton.reference")
    mixing = initial_residual, lambda_, dropout_p, dropout_seed
    return checked((base, x, weight, bias), (lora_a, lora_b, lora_bias, None), _NAMES, scaling, mixing)
