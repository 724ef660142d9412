"""SIBO in plain PyTorch: the definition, and the oracle that the kernels are tested against.

It computes a layer only where ``sibo_triton/ops/dispatch.py`` chooses it: in transforms, traces and exports, and where
``SIBO_TRITON_BACKEND=reference`` asks for it.

The equations (Wen, Zhang, Fang: "SIBO: A Simple Booster for Parameter-Efficient Fine-Tuning", Findings of ACL 2024) are
in ``docs/definition.md`` with their gradients; autograd differentiates every function here::

    x~ = (1 - lambda) x + lambda h0                                     mix
    y  = W0 x + b + s B A drop(x~)                                      lora_linear: add_lora, of down and up
    y  = W0 (x + s W_up f(W_down drop(x~))) + b   and two other forms   bottleneck_adapter: of add_bottleneck

Names in shapes: ``...`` any leading dimensions (M tokens in all), K in_features, N out_features, r the rank. Floating
point tensors may be float16, bfloat16, float32 or float64, on any one device.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from sibo_triton.dropout import draw_seed, draw_seeds, dropout, dropout_mask

__all__ = [
    "ACTIVATIONS",
    "add_bottleneck",
    "add_lora",
    "bottleneck_adapter",
    "down",
    "draw_seed",
    "draw_seeds",
    "dropout",
    "dropout_mask",
    "lora_linear",
    "mix",
    "up",
]


def mix(x: Tensor, initial_residual: Tensor | None, lambda_: float | Tensor) -> Tensor:
    """``x~ = (1 - lambda) x + lambda h0``: the adapter's input, mixed with the initial residual.

    Computed in the widest of the two dtypes and float32, and rounded once, to ``x.dtype``. Neither input is skipped at
    lambda = 1, nor when a tensor holds 0: where either is not finite ``x~`` is not finite either, as 0 * inf = nan.

    Args:
        x: the layer's input, ``[..., K]``.
        initial_residual: h0, of the shape of ``x`` and of any floating dtype. Not read when ``lambda_`` is the
            number 0, and may then be None.
        lambda_: a number in [0, 1], or a floating point tensor with one element (its value is not checked, which would
            make a GPU wait). Gradients flow to such a tensor, to ``x`` and to ``initial_residual``.

    Returns:
        ``x`` itself when ``lambda_`` is the number 0, else a new tensor of its shape and dtype.

    Raises:
        TypeError: ``lambda_`` is neither a number nor a tensor, or an input is not floating point.
        ValueError: ``lambda_`` is NaN, outside [0, 1], or a tensor that is not one floating point value; h0 is missing
            or of another shape.
    """
    lambda_ = checked_mixing(x, initial_residual, lambda_)
    if not isinstance(lambda_, Tensor) and lambda_ == 0:
        return x
    assert initial_residual is not None
    if not (x.is_floating_point() and initial_residual.is_floating_point()):
        raise TypeError(f"x is {x.dtype} and initial_residual {initial_residual.dtype}: both must be floating point")
    dtype = torch.promote_types(torch.promote_types(x.dtype, initial_residual.dtype), torch.float32)
    if isinstance(lambda_, Tensor):
        lambda_ = lambda_.reshape(()).to(dtype)
    return ((1 - lambda_) * x.to(dtype) + lambda_ * initial_residual.to(dtype)).to(x.dtype)


def down(
    x: Tensor,
    lora_a: Tensor,
    initial_residual: Tensor | None = None,
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """``t = drop(x~) A^T``: the mixed input, projected to the rank.

    Args:
        x: ``[..., K]``; cast to ``lora_a.dtype`` first, as PEFT does, so that float32 adapters on a 16-bit model mix
            and project in float32.
        lora_a: A, ``[r, K]``.
        initial_residual, lambda_: see :func:`mix`.
        dropout_p, dropout_seed: see :func:`dropout`.

    Returns:
        t, ``[..., r]``, in ``lora_a.dtype``.

    Raises:
        TypeError, ValueError: as :func:`mix` and :func:`dropout`, and for a shape that does not fit.
    """
    check_shape("lora_a", lora_a, ("r", x.shape[-1]))
    x_mixed = mix(x.to(lora_a.dtype), initial_residual, lambda_)
    return F.linear(dropout(x_mixed, dropout_p, dropout_seed), lora_a)


def up(t: Tensor, lora_b: Tensor, scaling: float | Tensor, lora_bias: Tensor | None = None) -> Tensor:
    """``s (t B^T + b_B)``: the low-rank product of the adapter, with B's own bias if it has one.

    Args:
        t: ``[..., r]``; cast to ``lora_b.dtype``.
        lora_b: B, ``[N, r]``.
        scaling: s, ``alpha / r`` or ``alpha / sqrt(r)``; a number or a tensor with one element.
        lora_bias: b_B, ``[N]``, cast likewise, or None; PEFT's option of that name.

    Returns:
        ``[..., N]``, in ``lora_b.dtype``; wider if ``scaling`` is a wider tensor of shape [1].

    Raises:
        ValueError: ``lora_b`` is not ``[N, r]``, or ``lora_bias`` not ``[N]``.
    """
    check_shape("lora_b", lora_b, ("N", t.shape[-1]))
    if lora_bias is not None:
        check_shape("lora_bias", lora_bias, lora_b.shape[:1])
        lora_bias = lora_bias.to(lora_b.dtype)
    return F.linear(t.to(lora_b.dtype), lora_b, lora_bias) * scaling


def add_lora(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    initial_residual: Tensor | None = None,
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    lora_bias: Tensor | None = None,
) -> Tensor:
    """``y = base + s (B A drop(x~) + b_B)``: SIBO-LoRA on what a frozen layer of any kind returned for the unmixed x.

    The adapter computes in its own dtypes (:func:`down`, :func:`up`); the sum is taken in the wider one and rounded
    once, to that of ``base``.

    Args:
        base: ``[..., N]``.
        x: ``[..., K]``; the other arguments are those of :func:`down` and :func:`up`. Pass ``dropout_p=0.0`` outside
            of training.

    Returns:
        y, ``[..., N]``, in ``base.dtype``.

    Raises:
        TypeError, ValueError: as :func:`mix` and :func:`dropout`, and for a shape that does not fit.
    """
    if base.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"base has shape {list(base.shape)} and x {list(x.shape)}: both must hold the same tokens")
    check_shape("lora_b", lora_b, (base.shape[-1], lora_a.shape[0]))
    t = down(x, lora_a, initial_residual, lambda_, dropout_p, dropout_seed)
    return (base + up(t, lora_b, scaling, lora_bias)).to(base.dtype)


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
    dropout_seed: int | Tensor | None = None,
    lora_bias: Tensor | None = None,
) -> Tensor:
    """``y = W0 x + b + s (B A drop((1 - lambda) x + lambda h0) + b_B)``: a linear layer with SIBO-LoRA.

    lambda = 0 is plain LoRA. The frozen path reads the unmixed ``x``, in its own dtype; :func:`add_lora` adds the rest.

    Args:
        x: ``[..., K]``.
        weight, bias: W0, ``[N, K]``, and b, ``[N]`` or None, in ``x.dtype``.
        lora_a, lora_b: A, ``[r, K]``, and B, ``[N, r]``.
        scaling, lora_bias: see :func:`up`.
        initial_residual, lambda_: see :func:`mix`.
        dropout_p, dropout_seed: see :func:`dropout`. Pass ``dropout_p=0.0`` outside of training.

    Returns:
        y, ``[..., N]``, in the frozen path's dtype.

    Raises:
        TypeError, ValueError: as :func:`mix` and :func:`dropout`, and for a shape that does not fit.
    """
    check_shape("weight", weight, ("N", x.shape[-1]))
    base = F.linear(x, weight, bias)
    return add_lora(base, x, lora_a, lora_b, scaling, initial_residual, lambda_, dropout_p, dropout_seed, lora_bias)


#: The activations f of :func:`add_bottleneck`, by the names that transformers gives them.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "tanh": torch.tanh,
    }
)


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
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """``base + g(x)``, with the branch ``g(x) = s (W_up f(W_down drop(x~) + b_down) + b_up)``.

    ``x + g(x)``, the adapter in series, is this with x as its base. The branch computes in ``down_weight.dtype``; the
    sum is taken in the wider dtype and rounded once, to that of ``base``.

    Args:
        base: what the branch is added to, ``[..., N]``.
        x: what the branch reads, ``[..., K]``.
        down_weight: W_down, ``[bottleneck, K]``.
        up_weight: W_up, ``[N, bottleneck]``, in ``down_weight.dtype``, as the biases are.
        scaling: s, a number or a tensor with one element (which may be learnable).
        activation: f, a name in :data:`ACTIVATIONS`.
        down_bias, up_bias: b_down, ``[bottleneck]``, and b_up, ``[N]``; or None.
        initial_residual, lambda_: see :func:`mix`; h0 has the shape of x.
        dropout_p, dropout_seed: see :func:`dropout`. Pass ``dropout_p=0.0`` outside of training.

    Returns:
        ``[..., N]``, in ``base.dtype``.

    Raises:
        TypeError, ValueError: as :func:`mix` and :func:`dropout`, for a shape that does not fit, and for an unknown
            activation.
    """
    check_activation(activation)
    check_shape("down_weight", down_weight, ("bottleneck", x.shape[-1]))
    check_shape("up_weight", up_weight, (base.shape[-1], down_weight.shape[0]))
    if base.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"base has shape {list(base.shape)} and x {list(x.shape)}: both must hold the same tokens")
    x_mixed = mix(x.to(down_weight.dtype), initial_residual, lambda_)
    hidden = F.linear(dropout(x_mixed, dropout_p, dropout_seed), down_weight, down_bias)
    branch = F.linear(ACTIVATIONS[activation](hidden), up_weight, up_bias) * scaling
    return (base + branch).to(base.dtype)


def bottleneck_adapter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down_weight: Tensor,
    up_weight: Tensor,
    scaling: float | Tensor = 1.0,
    *,
    placement: str = "series",
    side: str = "input",
    activation: str = "tanh",
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    initial_residual: Tensor | None = None,
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """A linear layer with a SIBO bottleneck adapter; lambda = 0 is the plain adapter.

    With the branch g of :func:`add_bottleneck`::

        series, side "input"    y = W0 (x + g(x)) + b
        series, side "output"   y = z + g(z),  z = W0 x + b
        parallel                y = W0 x + b + g(x)

    The skip is the unmixed x (or z), as in the authors' code.

    Args:
        x: ``[..., K]``.
        weight, bias: W0, ``[N, K]``, and b, ``[N]`` or None, in ``x.dtype``.
        down_weight: W_down, ``[bottleneck, K]``; ``[bottleneck, N]`` in series on the output side.
        up_weight: W_up, ``[K, bottleneck]`` in series on the input side, else ``[N, bottleneck]``.
        placement: "series" or "parallel".
        side: "input" or "output", in series; a parallel adapter reads the input.
        initial_residual: h0, of the shape of what is mixed: x, or z on the output side.
        scaling, activation, down_bias, up_bias, lambda_, dropout_p, dropout_seed: see :func:`add_bottleneck`.

    Returns:
        y, ``[..., N]``, in ``x.dtype``.

    Raises:
        TypeError, ValueError: as :func:`add_bottleneck`, and for an unknown placement.
    """
    if (placement, side) not in (("series", "input"), ("series", "output"), ("parallel", "input")):
        raise ValueError(
            f"placement={placement!r} with side={side!r} is no adapter: "
            "choose 'series' with side 'input' or 'output', or 'parallel' with side 'input'"
        )
    check_shape("weight", weight, ("N", x.shape[-1]))
    add_branch = partial(
        add_bottleneck,
        down_weight=down_weight,
        up_weight=up_weight,
        scaling=scaling,
        activation=activation,
        down_bias=down_bias,
        up_bias=up_bias,
        initial_residual=initial_residual,
        lambda_=lambda_,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
    )
    if placement == "series" and side == "input":
        return F.linear(add_branch(x, x), weight, bias)
    z = F.linear(x, weight, bias)
    return add_branch(z, x if placement == "parallel" else z)


def check_activation(activation: str) -> None:
    """Raise a ValueError for the name of no activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not known: choose one of {', '.join(sorted(ACTIVATIONS))}")


def checked_mixing(x: Tensor, initial_residual: Tensor | None, lambda_: float | Tensor) -> float | Tensor:
    """lambda, a float or a tensor, after the checks of :func:`mix`.

    Raises:
        TypeError, ValueError: as :func:`mix`, but for what is not floating point.
    """
    lambda_ = _checked_lambda(lambda_)
    if not isinstance(lambda_, Tensor) and lambda_ == 0:
        return lambda_
    if initial_residual is None:
        raise ValueError(f"initial_residual is None, but lambda_ is {lambda_}: pass h0, or lambda_=0.0 for no mixing")
    if initial_residual.shape != x.shape:
        raise ValueError(
            f"initial_residual has shape {list(initial_residual.shape)} and x {list(x.shape)}: h0 must belong to the "
            "same tokens and have the same width as x; pass lambda_=0.0 where it cannot"
        )
    return lambda_


def _checked_lambda(lambda_: float | Tensor) -> float | Tensor:
    if isinstance(lambda_, Tensor):
        if not lambda_.is_floating_point() or lambda_.numel() != 1:
            description = f"a {lambda_.dtype} tensor of shape {list(lambda_.shape)}"
            raise ValueError(f"lambda_ is {description}: pass one floating point value, of shape [] or [1]")
        return lambda_
    if not isinstance(lambda_, Real) or isinstance(lambda_, bool):
        raise TypeError(f"lambda_ is {lambda_!r}: pass a number in [0, 1] or a tensor with one element")
    if not 0 <= lambda_ <= 1:  # also NaN
        raise ValueError(f"lambda_ is {lambda_}: it must lie in [0, 1]; 0 is the plain method")
    return float(lambda_)


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Raise unless the tensor has this shape; a name stands for any size."""
    if len(expected) == tensor.dim():
        for wanted, size in zip(expected, tensor.shape, strict=True):
            if wanted.__class__ is not str and wanted != size:
                break
        else:
            return
    fits = ", ".join(map(str, expected))
    raise ValueError(f"{name} has shape {list(tensor.shape)}, but [{fits}] fits the other arguments")
