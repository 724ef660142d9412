"""The activations f of bottleneck adapters, and their derivatives, on float32 tiles.

By the names that transformers gives them; ``sibo_triton.reference.ACTIVATIONS`` is the definition. NaN stays NaN.

The kernels of the two projections apply them to their sums where one program has all of a sum. Where several share it,
:func:`activate_parts` and :func:`activation_gradient_of_parts` add the parts, in fixed order, and apply them then.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import BoundedCache, Launch, tensor_key
from .targets import cdiv

#: Every name that the two functions know.
NAMES = ("gelu", "gelu_pytorch_tanh", "relu", "sigmoid", "silu", "tanh")


@triton.jit
def tanh(p):
    """Within a few roundings of float32, also near 0, where ``(1 - e) / (1 + e)`` alone would cancel.

    Triton has none that also its interpreter and AMD's compiler take.
    """
    size = tl.abs(p)
    e = tl.exp(-2.0 * size)
    by_exp = (1.0 - e) / (1.0 + e)
    # The odd series, fitted up to 5/8.
    z = p * p
    series = -5.70498872745e-3
    series = series * z + 2.06390887954e-2
    series = series * z - 5.37397155531e-2
    series = series * z + 1.33314422036e-1
    series = series * z - 3.33332819422e-1
    series = size + size * z * series
    b = tl.where(size < 0.625, series, by_exp)
    return tl.where(p < 0, -b, b)


@triton.jit
def _tanh_argument(p):
    """Of GELU's approximation: ``sqrt(2 / pi) (p + 0.044715 p^3)``."""
    return 0.7978845608028654 * (p + 0.044715 * p * p * p)


@triton.jit
def activate(p, NAME: tl.constexpr):
    """f(p)."""
    if NAME == "gelu":
        return 0.5 * p * (1.0 + tl.erf(p * 0.7071067811865476))
    elif NAME == "gelu_pytorch_tanh":
        return 0.5 * p * (1.0 + tanh(_tanh_argument(p)))
    elif NAME == "relu":
        return tl.where(p <= 0, 0.0, p)
    elif NAME == "sigmoid":
        return tl.sigmoid(p)
    elif NAME == "silu":
        return p * tl.sigmoid(p)
    else:
        tl.static_assert(NAME == "tanh", "an activation that has no kernel")
        return tanh(p)


@triton.jit
def activation_gradient(u, p, NAME: tl.constexpr):
    """``u f'(p)``."""
    if NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * p * p)
        return u * (0.5 * (1.0 + tl.erf(p * 0.7071067811865476)) + p * density)
    elif NAME == "gelu_pytorch_tanh":
        b = tanh(_tanh_argument(p))
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * p * p)
        return u * (0.5 * (1.0 + b) + 0.5 * p * (1.0 - b * b) * inner)
    elif NAME == "relu":
        return tl.where(p <= 0, 0.0, u)
    elif NAME == "sigmoid":
        b = tl.sigmoid(p)
        return u * b * (1.0 - b)
    elif NAME == "silu":
        b = tl.sigmoid(p)
        return u * b * (1.0 + p * (1.0 - b))
    else:
        tl.static_assert(NAME == "tanh", "an activation that has no kernel")
        b = tanh(p)
        return u * (1.0 - b * b)


@triton.jit
def activate_parts_kernel(
    p_parts,  # [parts, M, r], each part contiguous
    p_bias,  # [r], or None
    p_pre_activation,  # [M, r], contiguous
    p_activated,  # likewise
    numel,  # M r
    r,
    parts,
    stride_part,
    stride_bias,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < numel
    b_p = _sum_of(p_parts + o, m, parts, stride_part, BLOCK)
    if HAS_BIAS:
        b_p += tl.load(p_bias + o % r * stride_bias, mask=m, other=0.0).to(tl.float32)
    tl.store(p_pre_activation + o, b_p.to(p_pre_activation.dtype.element_ty), mask=m)
    tl.store(p_activated + o, activate(b_p, ACTIVATION).to(p_activated.dtype.element_ty), mask=m)


@triton.jit
def activation_gradient_kernel(
    p_parts,  # [parts, M, r], contiguous
    p_pre_activation,  # [M, r], contiguous
    p_u,  # likewise
    p_activated,  # likewise, or None
    numel,  # M r
    parts,
    HAS_ACTIVATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < numel
    b_u = _sum_of(p_parts + o, m, parts, numel, BLOCK)
    b_p = tl.load(p_pre_activation + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_u + o, activation_gradient(b_u, b_p, ACTIVATION), mask=m)
    if HAS_ACTIVATED:
        tl.store(p_activated + o, activate(b_p, ACTIVATION).to(p_activated.dtype.element_ty), mask=m)


@triton.jit
def _sum_of(b_p_first, mask, parts, stride_part, BLOCK: tl.constexpr):
    """The sum of the parts, one after the other."""
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    i_part = 0
    while i_part < parts:
        b_sum += tl.load(b_p_first + tl.cast(i_part, tl.int64) * stride_part, mask=mask, other=0.0).to(tl.float32)
        i_part += 1
    return b_sum


BLOCK = 1024  # elements to a program

_launches, _gradient_launches = BoundedCache(), BoundedCache()


def activate_parts(
    parts: Tensor,  # [parts, M, r]
    bias: Tensor | None,  # [r]
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [M, r] each
    """p, the sum of its parts and the bias, and f(p), in a dtype; each matrix of a part is contiguous."""
    count, M, r = parts.shape
    p, activated = (torch.empty((M, r), dtype=dtype, device=parts.device) for _ in range(2))
    if M * r:
        key = (tensor_key(parts), tensor_key(bias), activation, dtype, parts.device)
        launch = _launches.get(key)
        if launch is None:
            arguments = {
                "numel": M * r,
                "r": r,
                "parts": count,
                "stride_part": parts.stride(0),
                "stride_bias": 0 if bias is None else bias.stride(0),
                "HAS_BIAS": bias is not None,
                "ACTIVATION": activation,
                "BLOCK": BLOCK,
            }
            launch = Launch(activate_parts_kernel, (cdiv(M * r, BLOCK),), parts.device, arguments)
            _launches.keep(key, launch)
        launch(p_parts=parts, p_bias=bias, p_pre_activation=p, p_activated=activated)
    return p, activated


def activation_gradient_of_parts(
    parts: Tensor,  # [parts, M, r]
    pre_activation: Tensor,  # [M, r]
    activation: str,
    activated: Tensor | None = None,  # [M, r]
) -> Tensor:  # [M, r]
    """The sum of the parts of u, times f'(p), in float32; all contiguous. f(p) is written where it is given room."""
    u = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    if u.numel():
        key = (tensor_key(parts), tensor_key(pre_activation), activation, tensor_key(activated), parts.device)
        launch = _gradient_launches.get(key)
        if launch is None:
            arguments = {
                "numel": u.numel(),
                "parts": len(parts),
                "HAS_ACTIVATED": activated is not None,
                "ACTIVATION": activation,
                "BLOCK": BLOCK,
            }
            launch = Launch(activation_gradient_kernel, (cdiv(u.numel(), BLOCK),), parts.device, arguments)
            _gradient_launches.keep(key, launch)
        launch(p_parts=parts, p_pre_activation=pre_activation, p_u=u, p_activated=activated)
    return u
