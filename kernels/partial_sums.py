"""The second stage of a sum that several programs share: each wrote its part, and the parts are added in fixed order.

So results are bitwise the same from run to run, which float atomics are not. All launchers add their parts here.
torch's ``sum(0)`` moves the same bytes, every part once and the total once, but takes a launch for each sum where a
pass over dY leaves two, and its order is its own, by heuristics that change with the version.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .targets import cdiv

BLOCK = 256  # elements to a program
BP = 8  # parts to a step


@triton.jit
def sum_parts_kernel(
    p_parts,  # tuples, with one element for each sum: [parts, numel], contiguous, float32
    p_total,  # [numel], likewise
    parts,
    numel,
    first_block,  # of the sum's blocks, among those of all sums
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BP: tl.constexpr,
):
    i_block = tl.program_id(0)
    p_parts_own, p_total_own, parts_own, numel_own, first_own = p_parts[0], p_total[0], parts[0], numel[0], 0
    for i in tl.static_range(1, SUMS):
        is_own = i_block >= first_block[i]
        p_parts_own = tl.where(is_own, p_parts[i], p_parts_own)
        p_total_own = tl.where(is_own, p_total[i], p_total_own)
        parts_own = tl.where(is_own, parts[i], parts_own)
        numel_own = tl.where(is_own, numel[i], numel_own)
        first_own = tl.where(is_own, first_block[i], first_own)

    o = (i_block - first_own).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < numel_own
    b_total = tl.zeros([BLOCK], dtype=tl.float32)  # [BLOCK]
    i_part = 0
    while i_part < parts_own:
        o_p = i_part + tl.arange(0, BP)  # [BP]
        b_p_parts = p_parts_own + o_p.to(tl.int64)[:, None] * numel_own + o[None, :]
        b_parts = tl.load(b_p_parts, mask=(o_p < parts_own)[:, None] & m[None, :], other=0.0)  # [BP, BLOCK]
        b_total += tl.sum(b_parts, axis=0)
        i_part += BP
    tl.store(p_total_own + o, b_total, mask=m)


def sum_parts(*parts: Tensor | None) -> list[Tensor | None]:
    """The sums of tensors over their first dimension, in one launch.

    Args:
        parts: float32, contiguous, on one device, with one part or more; or None.

    Returns:
        The totals, each of its tensor's shape without the first dimension; a view where there is one part, and None
        for None.
    """
    totals = [None if of is None else of[0] if len(of) == 1 else _empty_total(of) for of in parts]
    sums = [i for i, of in enumerate(parts) if of is not None and len(of) > 1]
    if sums:
        numels = [totals[i].numel() for i in sums]
        blocks = [cdiv(numel, BLOCK) for numel in numels]
        with torch.cuda.device_of(parts[sums[0]]):  # Triton launches on the current device; nothing for a CPU tensor
            sum_parts_kernel[(sum(blocks),)](
                p_parts=tuple(parts[i] for i in sums),
                p_total=tuple(totals[i] for i in sums),
                parts=tuple(len(parts[i]) for i in sums),
                numel=tuple(numels),
                first_block=tuple(sum(blocks[:i]) for i in range(len(blocks))),
                SUMS=len(sums),
                BLOCK=BLOCK,
                BP=BP,
            )
    return totals


def _empty_total(parts: Tensor) -> Tensor:
    return torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
