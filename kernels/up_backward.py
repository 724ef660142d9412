"""The gradients of up-projections: ``u = s dY B`` and ``dB = s dY^T t``, from the gradient dY of each y.

dY is by far the largest tensor. One pass reads it once for both, but no order of its tiles finishes both sums: it
writes partial sums, which a second stage adds. They grow with the rank, so that from some rank on two passes, one for u
and one for dB, move fewer bytes: :func:`plan` counts them and chooses. Either way the order of every sum is fixed, and
gradients are bitwise the same from run to run. The second stage is one launch for all siblings (q, k, v).

Called by ``sibo_triton.ops``.

Compiled once for every rank, dtypes and plan; whatever M and N, but for what divides N and for STEPS, a power of two.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import targets
from .activations import activate, activate_parts, activation_gradient, activation_gradient_of_parts
from .autotune import tuned
from .checks import check_activation, check_dtype, check_low_rank, check_matrix, check_one_value
from .launching import BoundedCache, Launch, tensor_key, value_argument, value_key
from .partial_sums import sum_parts
from .precision import Operands, float32_is_exact, split_dot
from .siblings import UpGradients
from .up_backward_plan import Both, Pass, Plan, Prepared, Product, plan


@triton.jit(do_not_specialize=["M"])
def both_kernel(
    p_grad_y,  # [M, N]
    p_lora_b,  # [N, r]
    p_t,  # [M, r], contiguous; of a bottleneck adapter p, and then f(p) takes its place
    p_u,  # [tiles along N, M, r]: a part of u for every tile of columns, not yet times f'(p)
    p_grad_b,  # [programs along M, N, r]: a part of dB for every strip of rows
    p_sum,  # [programs along M, N], or None: a part of the sum of dY for every strip of rows
    scaling,  # a number, or a pointer to one
    M,
    N,
    stride_g_m,
    stride_g_n,
    stride_b_n,
    stride_b_r,
    R: tl.constexpr,
    STEPS: tl.constexpr,  # tiles of rows to a program: a constant, as the loop's bound
    SCALING_IS_TENSOR: tl.constexpr,
    HAS_SUM: tl.constexpr,
    ACTIVATION: tl.constexpr,  # f's name, or None
    SPLIT_G_U: tl.constexpr,
    SPLIT_B: tl.constexpr,
    DOT_DTYPE_U: tl.constexpr,
    SPLIT_G_B: tl.constexpr,
    SPLIT_T: tl.constexpr,
    DOT_DTYPE_B: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,  # at least r
):
    n_tiles = tl.cdiv(N, BN)
    i_m = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_n = (tl.program_id(0) % n_tiles).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)  # [BN]
    o_r = tl.arange(0, BR)  # [BR]
    m_n = o_n < N
    m_r = o_r < R
    if SCALING_IS_TENSOR:
        b_scaling = tl.load(scaling).to(tl.float32)
    else:
        b_scaling = scaling

    b_p_b = p_lora_b + o_n[:, None] * stride_b_n + o_r.to(tl.int64)[None, :] * stride_b_r
    b_b = tl.load(b_p_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]
    b_grad_b = tl.zeros([BN, BR], dtype=tl.float32)  # [BN, BR]
    b_sum = tl.zeros([BN], dtype=tl.float32)  # [BN]
    for i in range(STEPS):
        o_m = (i_m * STEPS + i) * BM + tl.arange(0, BM)  # [BM]
        m_m = o_m < M
        o_mr = o_m[:, None] * R + o_r[None, :]
        m_mr = m_m[:, None] & m_r[None, :]
        b_p_g = p_grad_y + o_m[:, None] * stride_g_m + o_n[None, :] * stride_g_n
        b_grad_y = tl.load(b_p_g, mask=m_m[:, None] & m_n[None, :], other=0.0)  # [BM, BN]
        b_t = tl.load(p_t + o_mr, mask=m_mr, other=0.0)  # [BM, BR]
        if ACTIVATION is not None:
            b_t = activate(b_t.to(tl.float32), ACTIVATION)
        if HAS_SUM:
            b_sum += tl.sum(b_grad_y.to(tl.float32), axis=0)
        b_u = tl.zeros([BM, BR], dtype=tl.float32)  # [BM, BR]
        b_u = split_dot(b_grad_y, b_b, b_u, SPLIT_G_U, SPLIT_B, DOT_DTYPE_U)
        tl.store(p_u + i_n * M * R + o_mr, b_scaling * b_u, mask=m_mr)
        b_grad_b = split_dot(tl.trans(b_grad_y), b_t, b_grad_b, SPLIT_G_B, SPLIT_T, DOT_DTYPE_B)

    o_nr = o_n[:, None] * R + o_r[None, :]
    tl.store(p_grad_b + i_m * N * R + o_nr, b_scaling * b_grad_b, mask=m_n[:, None] & m_r[None, :])
    if HAS_SUM:
        tl.store(p_sum + i_m * N + o_n, b_sum, mask=m_n)


@triton.jit
def product_kernel(
    p_g,  # [Q, J]: dY for u, its transpose for dB
    p_w,  # [J, r]: B for u, t for dB
    p_out,  # [parts, Q, r]
    p_sum,  # [parts, Q], or None: the sum of dY along J
    p_pre_activation,  # [Q, r], contiguous, or None: p, where the product is u and one part
    p_activated,  # likewise, or None: f(p)
    scaling,  # a number, or a pointer to one
    Q,
    J,
    stride_g_q,
    stride_g_j,
    stride_w_j,
    stride_w_r,
    R: tl.constexpr,
    STEPS: tl.constexpr,  # tiles along J to a program
    SCALING_IS_TENSOR: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_ACTIVATED: tl.constexpr,
    ACTIVATION: tl.constexpr,  # f's name, or None
    SPLIT_G: tl.constexpr,
    SPLIT_W: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BQ: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
):
    r_tiles = tl.cdiv(R, BR)
    q_tiles = tl.cdiv(Q, BQ)
    i_r = tl.program_id(0) % r_tiles  # neighbouring programs share a tile of dY, which then comes from the cache
    i_q = (tl.program_id(0) // r_tiles % q_tiles).to(tl.int64)
    i_part = (tl.program_id(0) // r_tiles // q_tiles).to(tl.int64)
    o_q = i_q * BQ + tl.arange(0, BQ)  # [BQ]
    o_r = i_r * BR + tl.arange(0, BR).to(tl.int64)  # [BR]
    m_q = o_q < Q
    m_r = o_r < R

    b_out = tl.zeros([BQ, BR], dtype=tl.float32)  # [BQ, BR]
    b_sum = tl.zeros([BQ], dtype=tl.float32)  # [BQ]
    for i in range(STEPS):
        o_j = (i_part * STEPS + i) * BJ + tl.arange(0, BJ)  # [BJ]
        m_j = o_j < J
        b_p_g = p_g + o_q[:, None] * stride_g_q + o_j[None, :] * stride_g_j
        b_p_w = p_w + o_j[:, None] * stride_w_j + o_r[None, :] * stride_w_r
        b_g = tl.load(b_p_g, mask=m_q[:, None] & m_j[None, :], other=0.0)  # [BQ, BJ]
        b_w = tl.load(b_p_w, mask=m_j[:, None] & m_r[None, :], other=0.0)  # [BJ, BR]
        b_out = split_dot(b_g, b_w, b_out, SPLIT_G, SPLIT_W, DOT_DTYPE)
        if HAS_SUM:
            b_sum += tl.sum(b_g.to(tl.float32), axis=1)

    if SCALING_IS_TENSOR:
        b_scaling = tl.load(scaling).to(tl.float32)
    else:
        b_scaling = scaling
    b_out *= b_scaling
    o_qr = o_q[:, None] * R + o_r[None, :]
    m_qr = m_q[:, None] & m_r[None, :]
    if ACTIVATION is not None:
        b_p = tl.load(p_pre_activation + o_qr, mask=m_qr, other=0.0).to(tl.float32)  # [BQ, BR]
        b_out = activation_gradient(b_out, b_p, ACTIVATION)
        if HAS_ACTIVATED:
            tl.store(p_activated + o_qr, activate(b_p, ACTIVATION).to(p_activated.dtype.element_ty), mask=m_qr)
    tl.store(p_out + i_part * Q * R + o_qr, b_out, mask=m_qr)
    if HAS_SUM:
        if i_r == 0:
            tl.store(p_sum + i_part * Q + o_q, b_sum, mask=m_q)


class UpResults(NamedTuple):
    """What :func:`up_backward_siblings` returns for each sibling; None for what is not wanted."""

    u: Tensor | None  # [M, r], float32
    grad_b: Tensor | None  # [N, r]
    grad_y_sum: Tensor | None  # [N], float32


def up_backward_siblings(siblings: Sequence[UpGradients]) -> list[UpResults]:
    """``u = s dY B``, ``dB = s dY^T t``, summed in float32 and rounded once, and the sum of dY over rows, for each.

    With an activation f: ``u = s (dY B) f'(p)`` and ``dB = s dY^T f(p)``, in the same passes.

    Where dY and B have one 16-bit dtype, t is rounded to it; elsewhere the products are within 1e-5 of float32's, by
    ``precision.split_dot``. Where both are float32, they are multiplied as float32 unless torch allows less.

    Args:
        siblings: on one device. Each has dY, ``[M, N]``, and B, ``[N, r]``, float16, bfloat16 or float32, with any
            strides; t, or p, ``[M, r]``, contiguous, any of these dtypes; s, a number, or a floating point tensor with
            one element; and what is wanted: u, dB in a dtype, the sum. M too may differ.

    Raises:
        TypeError: a dtype that the kernels do not take.
        ValueError: a shape that does not fit, t missing or not contiguous, or an activation that has no kernel.
    """
    launched = [_launch(sibling) for sibling in siblings]
    dtypes = [dtype for sibling in siblings for dtype in (torch.float32, sibling.grad_dtype, torch.float32)]
    sums = sum_parts([part for parts in launched for part in parts], dtypes)
    return [UpResults(*sums[i : i + 3]) for i in range(0, len(sums), 3)]


def _check(sibling: UpGradients) -> None:
    grad_y, t, lora_b, scaling, _, grad_dtype, _, activation = sibling
    check_activation(activation)
    check_matrix("lora_b", lora_b, "N", "r")
    reads_t = grad_dtype is not None or activation is not None
    if reads_t:
        if t is None:
            raise ValueError("t is None, but dB is wanted, or an activation: pass t (or p), or grad_dtype=None")
        check_low_rank("t", t)
        check_matrix("lora_b", lora_b, "N", t.shape[1], "t")
    if grad_dtype is not None:
        check_dtype("grad_dtype", grad_dtype)
    check_one_value("scaling", scaling)
    check_matrix("grad_y", grad_y, t.shape[0] if reads_t else "M", lora_b.shape[0], "t and lora_b")


_launches = BoundedCache()


def _launch(sibling: UpGradients) -> UpResults:
    """Each result in parts, of which there is a first dimension."""
    grad_y, t, lora_b, scaling, wants_u, grad_dtype, wants_sum, activation = sibling
    device = grad_y.device
    of_tensors = tensor_key(grad_y), tensor_key(t), tensor_key(lora_b), value_key(scaling)
    wanted = wants_u, grad_dtype, wants_sum, activation
    key = (of_tensors, wanted, device, targets.target_of(device), float32_is_exact())
    prepared = _launches.get(key)
    if prepared is None:
        prepared = _launches.keep(key, _prepared(sibling))
    both, of_u, of_grad_b = prepared
    if both is not None:
        u, grad_b, summed = _run_both(both, sibling)
        if activation is not None:
            u = activation_gradient_of_parts(u, t, activation)[None]
        return UpResults(u, grad_b, summed)
    wants_grad_b = grad_dtype is not None
    u = grad_b = summed = None
    if of_u is not None:
        # f(p) is written on the way, for the pass over dY that follows.
        activated = torch.empty_like(t) if activation is not None and wants_grad_b else None
        u, _ = _run_product(of_u, grad_y, lora_b, scaling, t, activated)
        if activation is not None and not of_u.activates:
            u = activation_gradient_of_parts(u, t, activation, activated)[None]
        t = t if activated is None else activated
    elif wants_u:
        u = torch.zeros((1, grad_y.shape[0], lora_b.shape[1]), dtype=torch.float32, device=device)
    elif of_grad_b is not None and activation is not None:
        _, t = activate_parts(t[None], None, activation, t.dtype)
    if of_grad_b is not None:
        grad_b, summed = _run_product(of_grad_b, grad_y, t, scaling)
        return UpResults(u, grad_b, summed)
    if wants_grad_b:
        grad_b = torch.zeros((1, *lora_b.shape), dtype=grad_dtype, device=device)
    return UpResults(u, grad_b, grad_y.sum(0, dtype=torch.float32)[None] if wants_sum else None)


def _prepared(sibling: UpGradients) -> Prepared:
    """The launches for such arguments, checked and planned."""
    _check(sibling)
    grad_y, t, lora_b, scaling, wants_u, grad_dtype, wants_sum, activation = sibling
    (M, N), r, device = grad_y.shape, lora_b.shape[1], grad_y.device
    if M == 0 or N == 0 or r == 0:
        return Prepared()
    target, activates = targets.target_of(device), activation is not None
    chosen = plan(M, N, r, grad_y.dtype, lora_b.dtype, target, float32_is_exact(), wants_sum, activates)
    if chosen.both is not None and wants_u and grad_dtype is not None:
        return Prepared(both=_both(chosen, sibling))
    of_u = of_grad_b = None
    if wants_u:
        activated = torch.empty_like(t) if activates and grad_dtype is not None else None
        rest = (False, activation, t, activated) if activation is not None else (False,)
        of_u = _product(chosen.u, chosen.dot_u, grad_y, lora_b, scaling, *rest)
    if grad_dtype is not None:
        of_grad_b = _product(chosen.grad_b, chosen.dot_grad_b, grad_y.T, t, scaling, wants_sum)
    return Prepared(u=of_u, grad_b=of_grad_b)


def _run_both(both: Both, sibling: UpGradients) -> tuple[Tensor, Tensor, Tensor | None]:
    """The parts of u, ``[parts, M, r]``, not yet times f'(p), of dB, ``[parts, N, r]``, and of the sum of dY."""
    grad_y, t, lora_b, scaling, *_ = sibling
    device = grad_y.device
    u = torch.empty(both.u, dtype=torch.float32, device=device)
    grad_b = torch.empty(both.grad_b, dtype=torch.float32, device=device)
    sums = None if both.sums is None else torch.empty(both.sums, dtype=torch.float32, device=device)
    both.launch(
        p_grad_y=grad_y,
        p_lora_b=lora_b,
        p_t=t,
        p_u=u,
        p_grad_b=grad_b,
        p_sum=sums,
        scaling=value_argument(scaling),
    )
    return u, grad_b, sums


def _both(chosen: Plan, sibling: UpGradients) -> Both:
    grad_y, t, lora_b, scaling, _, _, wants_sum, activation = sibling
    of, dot_u, dot_grad_b = chosen.both, chosen.dot_u, chosen.dot_grad_b
    (M, N), r, device = grad_y.shape, lora_b.shape[1], grad_y.device

    def prepare(config: dict[str, int]) -> Both:
        arguments = {
            "M": M,
            "N": N,
            "stride_g_m": grad_y.stride(0),
            "stride_g_n": grad_y.stride(1),
            "stride_b_n": lora_b.stride(0),
            "stride_b_r": lora_b.stride(1),
            "R": r,
            "SCALING_IS_TENSOR": isinstance(scaling, Tensor),
            "HAS_SUM": wants_sum,
            "ACTIVATION": activation,
            "SPLIT_G_U": dot_u.split_a,
            "SPLIT_B": dot_u.split_b,
            "DOT_DTYPE_U": dot_u.tl_dtype,
            "SPLIT_G_B": dot_grad_b.split_a,
            "SPLIT_T": dot_grad_b.split_b,
            "DOT_DTYPE_B": dot_grad_b.tl_dtype,
            **config,
        }
        launch = Launch(both_kernel, (of.programs,), device, arguments)
        sums = (of.grad_b_parts, N) if wants_sum else None
        return Both(launch, (of.parts, M, r), (of.grad_b_parts, N, r), sums)

    key = ("both gradients of up", M.bit_length(), N, r, grad_y.dtype, t.dtype, lora_b.dtype, dot_u, wants_sum)
    key += (activation, device, of.config["STEPS"])
    return prepare(tuned(key, of.config, lambda config: _run_both(prepare(config), sibling)))


def _run_product(
    product: Product,
    g: Tensor,
    w: Tensor,
    scaling: float | Tensor,
    p: Tensor | None = None,
    activated: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The parts of ``s g w``, ``[parts, Q, r]``, and of g's sum along J; g's strides are the launch's.

    Args:
        p, activated: the pre-activation, and room for f(p), where the launch activates.
    """
    out = torch.empty(product.out, dtype=torch.float32, device=g.device)
    sums = None if product.sums is None else torch.empty(product.sums, dtype=torch.float32, device=g.device)
    product.launch(
        p_g=g,
        p_w=w,
        p_out=out,
        p_sum=sums,
        p_pre_activation=p if product.activates else None,
        p_activated=activated if product.activates else None,
        scaling=value_argument(scaling),
    )
    return out, sums


def _product(
    of: Pass,
    dot: Operands,
    g: Tensor,
    w: Tensor,
    scaling: float | Tensor,
    wants_sum: bool = False,
    activation: str | None = None,
    p: Tensor | None = None,
    activated: Tensor | None = None,
) -> Product:
    """One pass for ``s g w``; g is ``[Q, J]``, w ``[J, r]``, and p is looked at where there is an activation."""
    (Q, J), r = g.shape, w.shape[1]
    activation = activation if of.parts == 1 else None

    def prepare(config: dict[str, int]) -> Product:
        arguments = {
            "Q": Q,
            "J": J,
            "stride_g_q": g.stride(0),
            "stride_g_j": g.stride(1),
            "stride_w_j": w.stride(0),
            "stride_w_r": w.stride(1),
            "R": r,
            "SCALING_IS_TENSOR": isinstance(scaling, Tensor),
            "HAS_SUM": wants_sum,
            "HAS_ACTIVATED": activation is not None and activated is not None,
            "ACTIVATION": activation,
            "SPLIT_G": dot.split_a,
            "SPLIT_W": dot.split_b,
            "DOT_DTYPE": dot.tl_dtype,
            **config,
        }
        launch = Launch(product_kernel, (of.programs,), g.device, arguments)
        return Product(launch, (of.parts, Q, r), (of.parts, Q) if wants_sum else None, activation is not None)

    key = ("a gradient of up", Q.bit_length(), J.bit_length(), r, g.dtype, w.dtype, dot, g.stride(1) == 1, wants_sum)
    key += (activation, g.device, of.config["STEPS"])
    return prepare(tuned(key, of.config, lambda config: _run_product(prepare(config), g, w, scaling, p, activated)))
