"""The second stage of a sum that several programs share: each wrote its part, and the parts are added in fixed order.

So gradients are bitwise the same from run to run, which float atomics are not. Only ``up_backward`` calls it yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # elements to a program
BP = 8  # parts to a step


@triton.jit
def _sum_block(p_parts, p_total, parts, numel, i_block, BLOCK: tl.constexpr, BP: tl.constexpr):
    o = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    b_total = tl.zeros([BLOCK], dtype=tl.float32)  # [BLOCK]
    i_part = 0
    while i_part < parts:
        o_p = i_part + tl.arange(0, BP)  # [BP]
        m = (o_p < parts)[:, None] & (o < numel)[None, :]
        b_parts = tl.load(p_parts + o_p.to(tl.int64)[:, None] * numel + o[None, :], mask=m, other=0.0)  # [BP, BLOCK]
        b_total += tl.sum(b_parts, axis=0)
        i_part += BP
    tl.store(p_total + o, b_total, mask=o < numel)


@triton.jit
def sum_parts_kernel(
    p_parts1,  # [parts1, numel1], contiguous, float32
    p_total1,  # [numel1], likewise
    p_parts2,  # [parts2, numel2]
    p_total2,  # [numel2]
    parts1,
    parts2,
    numel1,
    numel2,
    BLOCK: tl.constexpr,
    BP: tl.constexpr,
):
    i = tl.program_id(0)
    blocks1 = tl.cdiv(numel1, BLOCK)
    if i < blocks1:
        _sum_block(p_parts1, p_total1, parts1, numel1, i, BLOCK, BP)
    else:
        _sum_block(p_parts2, p_total2, parts2, numel2, i - blocks1, BLOCK, BP)


def sum_parts(parts1: Tensor | None, parts2: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The sums over the first dimension of up to two tensors, in one launch.

    Args:
        parts1, parts2: float32, contiguous, on one device; or None.

    Returns:
        The two totals, each of its tensor's shape without the first dimension; a view where there is one part.
    """
    totals, jobs = [], []
    for parts in (parts1, parts2):
        if parts is None or len(parts) == 1:
            totals.append(None if parts is None else parts[0])
        else:
            totals.append(torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device))
            jobs.append((parts, totals[-1], totals[-1].numel()))
    if jobs:
        (p_parts1, p_total1, numel1), (p_parts2, p_total2, numel2) = jobs[0], jobs[-1]
        numel2 = numel2 if len(jobs) == 2 else 0
        with torch.cuda.device_of(p_parts1):  # Triton launches on the current device; does nothing for a CPU tensor
            sum_parts_kernel[(triton.cdiv(numel1, BLOCK) + triton.cdiv(numel2, BLOCK),)](
                p_parts1=p_parts1,
                p_total1=p_total1,
                p_parts2=p_parts2,
                p_total2=p_total2,
                parts1=len(p_parts1),
                parts2=len(p_parts2),
                numel1=numel1,
                numel2=numel2,
                BLOCK=BLOCK,
                BP=BP,
            )
    return tuple(totals)
