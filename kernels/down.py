"""The down-projection of a SIBO-LoRA layer as one Triton kernel: ``t = ((1 - lambda) x + lambda h0) A^T``.

A first kernel: no dropout, no split along K, one A at a time. Nothing calls it yet; ``sibo_triton.ops`` will, and will
choose between it and ``sibo_triton.reference.down``, which is the definition.

Both inputs are read once. In 16 bits and up to rank 64, the tiles of x and h0 go to the tensor cores as they are and
the two products are mixed in float32: no arithmetic on the [M, K] tiles, and nothing is rounded to 16 bits. Elsewhere
the second product would cost more than mixing the tiles, so they are mixed first, in float32, and rounded to the
operands' dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def down_kernel(
    p_x,  # [M, K]
    p_initial_residual,  # [M, K], or None
    p_lora_a,  # [r, K]
    p_t,  # [M, r], contiguous
    lambda_,  # a number, or a pointer to one
    M,
    r,
    stride_x_m,
    stride_x_k,
    stride_h_m,
    stride_h_k,
    stride_a_r,
    stride_a_k,
    K: tl.constexpr,  # so that the loop's bound is constant: some versions of the interpreter need that
    HAS_INITIAL_RESIDUAL: tl.constexpr,
    LAMBDA_IS_TENSOR: tl.constexpr,
    MIX_FIRST: tl.constexpr,  # mix the tiles and not the accumulators
    DOT_DTYPE: tl.constexpr,  # of both operands of a dot
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    r_tiles = tl.cdiv(r, BR)
    i_m = tl.program_id(0) // r_tiles  # neighbouring programs share rows of x, which then come from the cache
    i_r = tl.program_id(0) % r_tiles
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    o_r = i_r * BR + tl.arange(0, BR)  # [BR]
    o_k = tl.arange(0, BK)  # [BK]
    m_m = o_m < M
    m_r = o_r < r

    # int64 throughout: a row times its stride passes 2^31 in long batches.
    o_k64 = o_k.to(tl.int64)
    b_p_x = p_x + o_m[:, None] * stride_x_m + o_k64[None, :] * stride_x_k  # [BM, BK]
    b_p_a = p_lora_a + o_r.to(tl.int64)[:, None] * stride_a_r + o_k64[None, :] * stride_a_k  # [BR, BK]
    step_x = tl.cast(BK, tl.int64) * stride_x_k
    step_a = tl.cast(BK, tl.int64) * stride_a_k
    if HAS_INITIAL_RESIDUAL:
        b_p_h = p_initial_residual + o_m[:, None] * stride_h_m + o_k64[None, :] * stride_h_k  # [BM, BK]
        step_h = tl.cast(BK, tl.int64) * stride_h_k
        if LAMBDA_IS_TENSOR:
            b_lambda = tl.load(lambda_).to(tl.float32)
        else:
            b_lambda = lambda_

    b_t = tl.zeros([BM, BR], dtype=tl.float32)  # [BM, BR]
    b_t_h = tl.zeros([BM, BR], dtype=tl.float32)  # [BM, BR], the part of h0
    for i_k in range(tl.cdiv(K, BK)):
        if K % BK == 0:
            m_x = m_m[:, None]
            m_a = m_r[:, None]
        else:
            m_k = o_k < K - i_k * BK
            m_x = m_m[:, None] & m_k[None, :]
            m_a = m_r[:, None] & m_k[None, :]
        b_x = tl.load(b_p_x, mask=m_x, other=0.0)  # [BM, BK]
        b_a = tl.trans(tl.load(b_p_a, mask=m_a, other=0.0)).to(DOT_DTYPE)  # [BK, BR]
        if HAS_INITIAL_RESIDUAL:
            b_h = tl.load(b_p_h, mask=m_x, other=0.0)  # [BM, BK]
            if MIX_FIRST:
                b_x = (1.0 - b_lambda) * b_x.to(tl.float32) + b_lambda * b_h.to(tl.float32)
            else:
                b_t_h = tl.dot(b_h.to(DOT_DTYPE), b_a, b_t_h, input_precision="ieee")
            b_p_h += step_h
        b_t = tl.dot(b_x.to(DOT_DTYPE), b_a, b_t, input_precision="ieee")
        b_p_x += step_x
        b_p_a += step_a
    if HAS_INITIAL_RESIDUAL and not MIX_FIRST:
        b_t = (1.0 - b_lambda) * b_t + b_lambda * b_t_h

    tl.store(p_t + o_m[:, None] * r + o_r[None, :], b_t, mask=m_m[:, None] & m_r[None, :])


def tiles(rank: int, dot_dtype: torch.dtype) -> dict[str, int | bool]:
    """Tile sizes, order of mixing and launch options, by the rank and the dtype of the dots' operands.

    One choice for every GPU, by the smallest shared memory among the targets (64 KiB on gfx942).
    """
    BR = max(16, triton.next_power_of_2(rank))  # 16: the least that a dot takes
    if dot_dtype == torch.float32:
        # Multiplied without tensor cores, and so that operands pass through registers: larger tiles spill.
        return {"BM": 64, "BK": 16, "BR": min(BR, 64), "MIX_FIRST": True, "num_warps": 4, "num_stages": 3}
    if BR <= 64:
        return {"BM": 64, "BK": 64, "BR": BR, "MIX_FIRST": False, "num_warps": 4, "num_stages": 3}
    return {"BM": 64, "BK": 32, "BR": min(BR, 256), "MIX_FIRST": True, "num_warps": 8, "num_stages": 3}


def down(
    x: Tensor,  # [M, K]
    lora_a: Tensor,  # [r, K]
    initial_residual: Tensor | None = None,  # [M, K]
    lambda_: float | Tensor = 0.0,
) -> Tensor:  # [M, r]
    """``t = ((1 - lambda) x + lambda h0) A^T``, in float32 whatever the inputs' dtypes.

    The dots' operands have the dtype of x, h0 and A where all agree, else float32; float32 is multiplied as float32,
    without tensor cores. Forward only: gradients are for the op around it.

    Args:
        x: ``[M, K]``, float16, bfloat16 or float32, with any strides.
        lora_a: A, ``[r, K]``, any of these dtypes and any strides.
        initial_residual: h0, likewise, of the shape of x. Not read when ``lambda_`` is the number 0, and may then be
            None.
        lambda_: a number in [0, 1], or a floating point tensor with one element on the device of x.

    Returns:
        t, float32, ``[M, r]``, contiguous.

    Raises:
        TypeError: a dtype that the kernel does not take.
        ValueError: a shape that does not fit, or h0 missing.
    """
    mixes = isinstance(lambda_, Tensor) or lambda_ != 0
    if mixes and initial_residual is None:
        raise ValueError(f"initial_residual is None, but lambda_ is {lambda_}: pass h0, or lambda_=0.0 for no mixing")
    inputs = {"x": x, "lora_a": lora_a} | ({"initial_residual": initial_residual} if mixes else {})
    for name, tensor in inputs.items():
        if tensor.dtype not in _TL_DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}: the kernel takes {', '.join(map(str, _TL_DTYPES))}")
        expected = (lora_a.shape[0], x.shape[-1]) if name == "lora_a" else x.shape
        if tensor.dim() != 2 or tensor.shape != expected:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; x is [M, K] as is h0, and lora_a [r, K]")
    (M, K), r = x.shape, lora_a.shape[0]
    if M == 0 or K == 0 or r == 0:
        return torch.zeros((M, r), dtype=torch.float32, device=x.device)

    dtypes = {tensor.dtype for tensor in inputs.values()}
    dot_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    # The interpreter multiplies the raw bits of bfloat16.
    dot_dtype_run = dot_dtype if isinstance(down_kernel, triton.JITFunction) else torch.float32
    config = tiles(r, dot_dtype)
    t = torch.empty((M, r), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(M, config["BM"]) * triton.cdiv(r, config["BR"]),)
    with torch.cuda.device_of(x):  # Triton launches on the current device; does nothing for a CPU tensor
        down_kernel[grid](
            p_x=x,
            p_initial_residual=initial_residual if mixes else None,
            p_lora_a=lora_a,
            p_t=t,
            lambda_=lambda_ if isinstance(lambda_, Tensor) else float(lambda_),
            M=M,
            r=r,
            stride_x_m=x.stride(0),
            stride_x_k=x.stride(1),
            stride_h_m=initial_residual.stride(0) if mixes else 0,
            stride_h_k=initial_residual.stride(1) if mixes else 0,
            stride_a_r=lora_a.stride(0),
            stride_a_k=lora_a.stride(1),
            K=K,
            HAS_INITIAL_RESIDUAL=mixes,
            LAMBDA_IS_TENSOR=isinstance(lambda_, Tensor),
            DOT_DTYPE=_TL_DTYPES[dot_dtype_run],
            **config,
        )
    return t
