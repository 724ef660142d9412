"""The gradients of up-projections: ``u = s dY B`` and ``dB = s dY^T t``, from the gradient dY of each y.

dY is by far the largest tensor. One pass reads it once for both, but no order of its tiles finishes both sums: it
writes partial sums, which a second stage adds. They grow with the rank, so that from some rank on two passes, one for u
and one for dB, move fewer bytes: :func:`plan` counts them and chooses. Either way the order of every sum is fixed, and
gradients are bitwise the same from run to run. The second stage is one launch for all siblings (q, k, v).

Called by ``sibo_triton.ops``.

Compiled once for every rank, dtypes and plan; whatever M and N, but for what divides N and for STEPS, a power of two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import targets
from .autotune import tuned
from .checks import check_dtype, check_low_rank, check_matrix, check_one_value
from .partial_sums import sum_parts
from .precision import Operands, float32_is_exact, operands, split_dot
from .siblings import UpGradients
from .targets import Target, cdiv


@triton.jit(do_not_specialize=["M"])
def both_kernel(
    p_grad_y,  # [M, N]
    p_lora_b,  # [N, r]
    p_t,  # [M, r], contiguous
    p_u,  # [tiles along N, M, r]: a part of u for every tile of columns
    p_grad_b,  # [programs along M, N, r]: a part of dB for every strip of rows
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
    for i in range(STEPS):
        o_m = (i_m * STEPS + i) * BM + tl.arange(0, BM)  # [BM]
        m_m = o_m < M
        o_mr = o_m[:, None] * R + o_r[None, :]
        m_mr = m_m[:, None] & m_r[None, :]
        b_p_g = p_grad_y + o_m[:, None] * stride_g_m + o_n[None, :] * stride_g_n
        b_grad_y = tl.load(b_p_g, mask=m_m[:, None] & m_n[None, :], other=0.0)  # [BM, BN]
        b_t = tl.load(p_t + o_mr, mask=m_mr, other=0.0)  # [BM, BR]
        b_u = tl.zeros([BM, BR], dtype=tl.float32)  # [BM, BR]
        b_u = split_dot(b_grad_y, b_b, b_u, SPLIT_G_U, SPLIT_B, DOT_DTYPE_U)
        tl.store(p_u + i_n * M * R + o_mr, b_scaling * b_u, mask=m_mr)
        b_grad_b = split_dot(tl.trans(b_grad_y), b_t, b_grad_b, SPLIT_G_B, SPLIT_T, DOT_DTYPE_B)

    o_nr = o_n[:, None] * R + o_r[None, :]
    tl.store(p_grad_b + i_m * N * R + o_nr, b_scaling * b_grad_b, mask=m_n[:, None] & m_r[None, :])


@triton.jit
def product_kernel(
    p_g,  # [Q, J]: dY for u, its transpose for dB
    p_w,  # [J, r]: B for u, t for dB
    p_out,  # [parts, Q, r]
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
    for i in range(STEPS):
        o_j = (i_part * STEPS + i) * BJ + tl.arange(0, BJ)  # [BJ]
        m_j = o_j < J
        b_p_g = p_g + o_q[:, None] * stride_g_q + o_j[None, :] * stride_g_j
        b_p_w = p_w + o_j[:, None] * stride_w_j + o_r[None, :] * stride_w_r
        b_g = tl.load(b_p_g, mask=m_q[:, None] & m_j[None, :], other=0.0)  # [BQ, BJ]
        b_w = tl.load(b_p_w, mask=m_j[:, None] & m_r[None, :], other=0.0)  # [BJ, BR]
        b_out = split_dot(b_g, b_w, b_out, SPLIT_G, SPLIT_W, DOT_DTYPE)

    if SCALING_IS_TENSOR:
        b_scaling = tl.load(scaling).to(tl.float32)
    else:
        b_scaling = scaling
    b_p_out = p_out + i_part * Q * R + o_q[:, None] * R + o_r[None, :]
    tl.store(b_p_out, b_scaling * b_out, mask=m_q[:, None] & m_r[None, :])


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, and how it cuts its sums."""

    config: dict[str, int]  # tile sizes, STEPS, num_warps, num_stages
    programs: int
    parts: int  # of the sum; of u where dB is another
    grad_b_parts: int = 1


@dataclass(frozen=True)
class Plan:
    """How the two products are taken: in one pass over dY, or each in its own."""

    dot_u: Operands  # of dY and B
    dot_grad_b: Operands  # of dY and t
    both: Launch | None
    u: Launch
    grad_b: Launch


#: About how many programs a launch has for each multiprocessor, or up to twice as many, where there is work for them.
PROGRAMS = 2

#: What a launch more is worth: the bytes that an H200 moves in a microsecond, about what it takes to start a kernel. By
#: count, not measured.
BYTES_OF_LAUNCH = 4 * 2**20


@lru_cache(maxsize=1024)
def plan(
    M: int, N: int, r: int, grad_y_dtype: torch.dtype, lora_b_dtype: torch.dtype, target: Target, exact: bool = True
) -> Plan:
    """The plan for sizes of at least 1: one pass where two move no fewer bytes, or fewer than a launch."""
    exact = exact and grad_y_dtype == lora_b_dtype == torch.float32
    t_dtype = grad_y_dtype if grad_y_dtype == lora_b_dtype else torch.float32  # t counts as 16-bit where both are
    dots = operands(grad_y_dtype, lora_b_dtype, exact), operands(grad_y_dtype, t_dtype, exact)
    itemsize = grad_y_dtype.itemsize
    both = launch_of_both(M, N, r, *dots, itemsize, target)
    u = launch_of_product(M, N, r, dots[0], itemsize, target)
    grad_b = launch_of_product(N, M, r, dots[1], itemsize, target)
    if both is not None:
        sizes = (M, N, r, itemsize, lora_b_dtype.itemsize)
        one = bytes_moved(*sizes, 1, both.parts, both.grad_b_parts)
        if one >= bytes_moved(*sizes, 2, u.parts, grad_b.parts) + BYTES_OF_LAUNCH:
            both = None
    return Plan(*dots, both, u, grad_b)


def launch_of_both(
    M: int, N: int, r: int, dot_u: Operands, dot_grad_b: Operands, itemsize: int, target: Target
) -> Launch | None:
    """One pass over dY for u and dB; None where the two sums do not fit into registers.

    The wider a tile, the fewer the parts of u; its height costs nothing, as a program walks down a strip of rows.
    """
    split = dot_u.split_a or dot_u.split_b or dot_grad_b.split_b
    BR = max(16, triton.next_power_of_2(r))  # 16: the least that a dot takes
    if BR > (32 if dot_u.dtype != torch.float32 and not split else 16):
        return None
    num_warps = 8
    if dot_u.dtype == torch.float32:
        BN, num_stages = 64, 2
    elif dot_u.split_a or dot_grad_b.split_a:
        # The parts of dY take the registers. AMD's 4 warps are 256 threads, as 8 elsewhere, and 8 spill.
        BN, num_stages, num_warps = 128, 1, 4 if target.hip else 8
    else:
        # One stage ahead spills on gfx942; where B or t is split, registers leave room for one program.
        BN, num_stages = 256, 1 if target.hip else target.stages(2, 64 * (256 * itemsize + 4 * BR), 1 if split else 2)
    BM = 64
    u_parts = cdiv(N, BN)
    steps, grad_b_parts = _cut(cdiv(M, BM), u_parts, target)
    config = {"BM": BM, "BN": BN, "BR": BR, "STEPS": steps, "num_warps": num_warps, "num_stages": num_stages}
    return Launch(config, u_parts * grad_b_parts, u_parts, grad_b_parts)


def launch_of_product(Q: int, J: int, r: int, dot: Operands, itemsize: int, target: Target) -> Launch:
    """One pass over dY, ``[Q, J]`` or transposed, for one of the two."""
    BR = max(16, triton.next_power_of_2(r))
    sm_120 = target.capability == 120
    if dot.dtype == torch.float32:
        # Multiplied without tensor cores, from registers: larger tiles spill, on sm_120 4 warps too.
        BJ, BR, num_warps = 16, min(BR, 64), 8 if sm_120 and BR > 16 else 4
    elif dot.split_a or dot.split_b:
        BJ, BR, num_warps = 32, min(BR, 128), 4 if target.hip else 8  # 256 threads load 16 bytes of a 16-bit dY each
        # Tensor cores that multiply from registers: 8 warps would spill to make room for another program.
        if sm_120 and BR == 16:
            BJ, num_warps = 64, 4
        elif (sm_120 or target.capability == 80) and BR == 64:
            num_warps = 4
    else:
        BJ, BR, num_warps = 64, min(BR, 128), 8 if BR > (16 if sm_120 else 64) else 4
    BQ = 64
    tiles = cdiv(Q, BQ) * cdiv(r, BR)
    steps, parts = _cut(cdiv(J, BJ), tiles, target)
    num_stages = target.stages(2, BJ * (BQ * itemsize + BR * 4), PROGRAMS)
    config = {"BQ": BQ, "BJ": BJ, "BR": BR, "STEPS": steps, "num_warps": num_warps, "num_stages": num_stages}
    return Launch(config, tiles * parts, parts)


def _cut(tiles: int, programs: int, target: Target) -> tuple[int, int]:
    """Steps, a power of two (a kernel is compiled for each), and parts of a sum that goes over so many tiles.

    As many parts, if there are tiles for them, as make PROGRAMS for each multiprocessor of the programs for one part.
    """
    wanted = max(1, PROGRAMS * target.multiprocessors // programs)
    steps = 1 << max(1, tiles // wanted).bit_length() - 1
    return steps, cdiv(tiles, steps)


def bytes_moved(
    M: int, N: int, r: int, grad_y_itemsize: int, lora_b_itemsize: int, passes: int, u_parts: int, grad_b_parts: int
) -> int:
    """What passes through memory: each input once a pass, the parts of a sum twice, its total once.

    Left out are the reads that the cache answers: B's and t's by other programs, dY's by other tiles of the rank.
    """

    def of_sum(parts: int, numel: int) -> int:
        return 4 * numel * (2 * parts + 1 if parts > 1 else 1)

    inputs = passes * M * N * grad_y_itemsize + N * r * lora_b_itemsize + M * r * 4
    return inputs + of_sum(u_parts, M * r) + of_sum(grad_b_parts, N * r)


def up_backward_siblings(siblings: Sequence[UpGradients]) -> list[tuple[Tensor | None, Tensor | None]]:
    """``u = s dY B``, in float32, and ``dB = s dY^T t``, summed in float32 and rounded once, for each sibling.

    Where dY and B have one 16-bit dtype, t is rounded to it; elsewhere the products are within 1e-4 of float32's, by
    ``precision.split_dot``. Where both are float32, they are multiplied as float32 unless torch allows less.

    Args:
        siblings: on one device. Each has dY, ``[M, N]``, and B, ``[N, r]``, float16, bfloat16 or float32, with any
            strides; t, float32, ``[M, r]``, contiguous; s, a number, or a floating point tensor with one element; and
            what is wanted: u, and dB in a dtype. M too may differ.

    Returns:
        For each sibling u, ``[M, r]``, and dB, ``[N, r]``, contiguous; None for what is not wanted.

    Raises:
        TypeError: a dtype that the kernels do not take.
        ValueError: a shape that does not fit, t missing or not contiguous.
    """
    for sibling in siblings:
        _check(sibling)
    parts = [part for sibling in siblings for part in _launch(sibling)]
    dtypes = [dtype for sibling in siblings for dtype in (torch.float32, sibling.grad_dtype)]
    sums = sum_parts(parts, dtypes)
    return list(zip(sums[::2], sums[1::2], strict=True))


def _check(sibling: UpGradients) -> None:
    grad_y, t, lora_b, scaling, _, grad_dtype = sibling
    check_matrix("lora_b", lora_b, "N", "r")
    if grad_dtype is not None:
        if t is None:
            raise ValueError("t is None, but dB is wanted: pass t, or grad_dtype=None")
        check_low_rank("t", t)
        check_matrix("lora_b", lora_b, "N", t.shape[1], "t")
        check_dtype("grad_dtype", grad_dtype)
    check_one_value("scaling", scaling)
    rows = "M" if grad_dtype is None else t.shape[0]
    check_matrix("grad_y", grad_y, rows, lora_b.shape[0], "t and lora_b")


def _launch(sibling: UpGradients) -> tuple[Tensor | None, Tensor | None]:
    """The parts of u, ``[parts, M, r]``, and of dB, ``[parts, N, r]``, where they are wanted."""
    grad_y, t, lora_b, scaling, wants_u, grad_dtype = sibling
    wants_grad_b = grad_dtype is not None
    (M, N), r = grad_y.shape, lora_b.shape[1]
    if M == 0 or N == 0 or r == 0:
        u = torch.zeros((1, M, r), dtype=torch.float32, device=grad_y.device) if wants_u else None
        return u, torch.zeros((1, N, r), dtype=grad_dtype, device=grad_y.device) if wants_grad_b else None
    chosen = plan(M, N, r, grad_y.dtype, lora_b.dtype, targets.target_of(grad_y.device), float32_is_exact())
    with torch.cuda.device_of(grad_y):  # Triton launches on the current device; does nothing for a CPU tensor
        if chosen.both is not None and wants_u and wants_grad_b:
            return _launch_both(chosen, grad_y, t, lora_b, scaling)
        return (
            _launch_product(chosen.u, grad_y, lora_b, scaling, chosen.dot_u) if wants_u else None,
            _launch_product(chosen.grad_b, grad_y.T, t, scaling, chosen.dot_grad_b) if wants_grad_b else None,
        )


def _launch_both(
    chosen: Plan, grad_y: Tensor, t: Tensor, lora_b: Tensor, scaling: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The parts of u, ``[parts, M, r]``, and of dB, ``[parts, N, r]``."""
    launch, dot_u, dot_grad_b = chosen.both, chosen.dot_u, chosen.dot_grad_b
    (M, N), r = grad_y.shape, lora_b.shape[1]
    u_parts = torch.empty((launch.parts, M, r), dtype=torch.float32, device=grad_y.device)
    grad_b_parts = torch.empty((launch.grad_b_parts, N, r), dtype=torch.float32, device=grad_y.device)

    def run(config: dict[str, int]) -> None:
        both_kernel[(launch.programs,)](
            p_grad_y=grad_y,
            p_lora_b=lora_b,
            p_t=t,
            p_u=u_parts,
            p_grad_b=grad_b_parts,
            scaling=scaling if isinstance(scaling, Tensor) else float(scaling),
            M=M,
            N=N,
            stride_g_m=grad_y.stride(0),
            stride_g_n=grad_y.stride(1),
            stride_b_n=lora_b.stride(0),
            stride_b_r=lora_b.stride(1),
            R=r,
            SCALING_IS_TENSOR=isinstance(scaling, Tensor),
            SPLIT_G_U=dot_u.split_a,
            SPLIT_B=dot_u.split_b,
            DOT_DTYPE_U=dot_u.tl_dtype,
            SPLIT_G_B=dot_grad_b.split_a,
            SPLIT_T=dot_grad_b.split_b,
            DOT_DTYPE_B=dot_grad_b.tl_dtype,
            **config,
        )

    key = ("both gradients of up", M.bit_length(), N, r, grad_y.dtype, lora_b.dtype, dot_u, grad_y.device)
    run(tuned((*key, launch.config["STEPS"]), launch.config, run))
    return u_parts, grad_b_parts


def _launch_product(launch: Launch, g: Tensor, w: Tensor, scaling: float | Tensor, dot: Operands) -> Tensor:
    """The parts of ``s g w``, ``[parts, Q, r]``; g is ``[Q, J]``, w ``[J, r]``."""
    (Q, J), r = g.shape, w.shape[1]
    out = torch.empty((launch.parts, Q, r), dtype=torch.float32, device=g.device)

    def run(config: dict[str, int]) -> None:
        product_kernel[(launch.programs,)](
            p_g=g,
            p_w=w,
            p_out=out,
            scaling=scaling if isinstance(scaling, Tensor) else float(scaling),
            Q=Q,
            J=J,
            stride_g_q=g.stride(0),
            stride_g_j=g.stride(1),
            stride_w_j=w.stride(0),
            stride_w_r=w.stride(1),
            R=r,
            SCALING_IS_TENSOR=isinstance(scaling, Tensor),
            SPLIT_G=dot.split_a,
            SPLIT_W=dot.split_b,
            DOT_DTYPE=dot.tl_dtype,
            **config,
        )

    key = ("a gradient of up", Q.bit_length(), J.bit_length(), r, g.dtype, w.dtype, dot, g.stride(1) == 1, g.device)
    run(tuned((*key, launch.config["STEPS"]), launch.config, run))
    return out
