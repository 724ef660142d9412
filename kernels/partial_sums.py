"""The second stage of a sum that several programs share: each wrote its part, and the parts are added in fixed order.

So results are bitwise the same from run to run, which float atomics are not. Some are added where the sum is used:
`few_rows.py` adds them in its kernel, `activations.py` before f, and `down.py` those of d of a bottleneck whose K is
split, by torch's sum, so that such a call is not recorded (`replay.py`).

torch's ``sum(0)`` moves the same bytes, every part once and the total once, but takes a launch for each sum where a
pass over dY leaves two, and its order is its own, by heuristics that change with the version.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import BoundedCache, Launch
from .targets import cdiv

BLOCK = 256  # elements to a program
BP = 8  # parts to a step


@triton.jit
def sum_parts_kernel(
    p_parts,  # tuples, with one element for each sum: [parts, numel], contiguous, float32
    p_total,  # [numel], contiguous
    numel,
    parts,  # these two by `odd`
    first_block,  # of the sum's blocks, among those of all sums
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BP: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_own, p_parts_own, numel_own, parts_own, first_own = 0, p_parts[0], numel[0], parts[0] // 2, 0
    for i in tl.static_range(1, SUMS):
        is_own = i_block >= first_block[i] // 2
        i_own = tl.where(is_own, i, i_own)
        p_parts_own = tl.where(is_own, p_parts[i], p_parts_own)
        numel_own = tl.where(is_own, numel[i], numel_own)
        parts_own = tl.where(is_own, parts[i] // 2, parts_own)
        first_own = tl.where(is_own, first_block[i] // 2, first_own)

    o = (i_block - first_own).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m = o < numel_own
    b_sums = tl.zeros([BP, BLOCK], dtype=tl.float32)  # [BP, BLOCK], added up once: warps share it in shared memory
    i_part = 0
    while i_part < parts_own:
        o_p = i_part + tl.arange(0, BP)  # [BP]
        b_p_parts = p_parts_own + o_p.to(tl.int64)[:, None] * numel_own + o[None, :]
        b_parts = tl.load(b_p_parts, mask=(o_p < parts_own)[:, None] & m[None, :], other=0.0)  # [BP, BLOCK]
        b_sums += b_parts
        i_part += BP
    b_total = tl.sum(b_sums, axis=0)  # [BLOCK]
    for i in tl.static_range(SUMS):  # each total has a dtype of its own
        if i_own == i:
            tl.store(p_total[i] + o, b_total.to(p_total[i].dtype.element_ty), mask=m)


def sum_parts(parts: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    """The sums of tensors over their first dimension, in one launch: in float32, and rounded once.

    Args:
        parts: float32, contiguous, on one device, with one part or more; or None.
        dtypes: of the totals; of no meaning where there are no parts.

    Returns:
        The totals, each of its tensor's shape without the first dimension; a view where there is one part in the
        total's dtype, and None for None.
    """
    key = tuple(None if of is None else (of.shape, of.dtype, dtype) for of, dtype in zip(parts, dtypes, strict=True))
    if not any(key):
        return [None] * len(key)
    device = next(of.device for of in parts if of is not None)
    prepared = _launches.get((key, device))
    if prepared is None:
        prepared = _launches.keep((key, device), _prepared(parts, dtypes, device))
    launch, sums = prepared
    totals: list[Tensor | None] = []
    for i, of in enumerate(parts):
        if i in sums:
            totals.append(torch.empty(of.shape[1:], dtype=dtypes[i], device=device))
        else:
            totals.append(None if of is None else of[0])
    if sums:
        launch(p_parts=tuple(parts[i] for i in sums), p_total=tuple(totals[i] for i in sums))
    return totals


_launches = BoundedCache()


def _prepared(
    parts: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None], device: torch.device
) -> tuple[Launch, list[int]]:
    """The launch, and which sums are taken in it."""
    sums = [i for i, of in enumerate(parts) if of is not None and (len(of) > 1 or dtypes[i] != of.dtype)]
    numels = [parts[i][0].numel() for i in sums]
    blocks = [cdiv(numel, BLOCK) for numel in numels]
    arguments = {
        "numel": tuple(numels),
        "parts": tuple(odd(len(parts[i])) for i in sums),
        "first_block": tuple(odd(sum(blocks[:i])) for i in range(len(blocks))),
        "SUMS": len(sums),
        "BLOCK": BLOCK,
        "BP": BP,
    }
    return Launch(sum_parts_kernel, (sum(blocks),), device, arguments), sums


def odd(number: int) -> int:
    """A number whose half, rounded down, is the given one.

    Triton compiles a kernel again where an integer in a tuple is 1, or divisible by 16, and was not: which of several
    sums it is so of would differ with every M.
    """
    return 2 * number + 1
