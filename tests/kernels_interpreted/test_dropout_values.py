"""The dropout mask inside kernels against the reference's, bit for bit, in every tiling."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from sibo_triton import reference
from sibo_triton.dropout import dropout_threshold
from sibo_triton.kernels.dropout import dropout_rows, keep_from_and_scale, keep_tile


@triton.jit
def mask_kernel(
    p_seed,
    p_mask,  # [M, K], int8, contiguous
    keep_from,
    row_offset,
    col_offset,
    M,
    K: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BM
    o_m = first_row + tl.arange(0, BM)
    row1, row2, col_key1, col_key2 = dropout_rows(p_seed, first_row + row_offset, tl.arange(0, BM))
    for i_k in range(tl.cdiv(K, BK)):
        o_k = tl.arange(0, BK) + i_k * BK
        b_keep = keep_tile(row1, row2, col_key1, col_key2, o_k + col_offset, keep_from)
        p_out = p_mask + o_m[:, None] * K + o_k[None, :]
        tl.store(p_out, b_keep.to(tl.int8), mask=(o_m < M)[:, None] & (o_k < K)[None, :])


def kernel_mask(rows, cols, p, seed, row_offset=0, col_offset=0, bm=64, bk=64):
    mask = torch.full((rows, cols), 2, dtype=torch.int8)
    mask_kernel[(triton.cdiv(rows, bm),)](
        p_seed=torch.tensor([seed]),
        p_mask=mask,
        keep_from=keep_from_and_scale(p)[0],
        row_offset=row_offset,
        col_offset=col_offset,
        M=rows,
        K=cols,
        BM=bm,
        BK=bk,
    )
    assert mask.max() <= 1
    return mask.bool()


def reference_mask(rows, cols, p, seed=None, **where):
    return reference.dropout_mask(rows, cols, p, SEEDS[-1] if seed is None else seed, **where)


SEEDS = (0, 1, -1, 2**62 + 12345, -(2**63), 0x1234_5678_9ABC_DEF0)


@pytest.mark.parametrize(("bm", "bk"), [(64, 64), (16, 128), (128, 32), (1, 256), (128, 2), (256, 1)])
def test_mask_of_every_tiling(bm, bk):
    # Odd sizes: a pair is cut at the end, and neither rows nor columns fill the tiles.
    rows, cols = (9 if bm == 1 else 131), (9 if bk <= 2 else 131)
    assert torch.equal(kernel_mask(rows, cols, 0.3, SEEDS[-1], bm=bm, bk=bk), reference_mask(rows, cols, 0.3))


@pytest.mark.parametrize(
    ("p", "seed"),
    [(p, SEEDS[-1]) for p in (1e-9, 2**-16, 0.05, 0.5, 0.75, 1 - 2**-16, 1 - 1e-12)]
    + [(0.3, seed) for seed in SEEDS[:-1]],
)
def test_mask_of_every_rate_and_seed(p, seed):
    assert torch.equal(kernel_mask(70, 300, p, seed, bm=128, bk=512), reference_mask(70, 300, p, seed))


@pytest.mark.parametrize("row_offset", [0, 2**31 - 64, 2**32 - 64, 2**62])
@pytest.mark.parametrize("col_offset", [0, 1, 2**31 - 128])
def test_mask_past_2_32(row_offset, col_offset):
    """The upper half of the rows is another one in the second tile. Columns are 32-bit in all kernels."""
    where = {"row_offset": row_offset, "col_offset": col_offset}
    assert torch.equal(kernel_mask(130, 70, 0.4, SEEDS[-1], **where, bk=128), reference_mask(130, 70, 0.4, **where))


@pytest.mark.parametrize("p", [0.0, 1e-9, 2**-17, 0.05, 0.1, 0.5, 0.99, 1 - 1e-12])
def test_drawn_is_the_references_rate(p):
    keep_from, scale = keep_from_and_scale(p)
    threshold = dropout_threshold(p)
    assert keep_from == (threshold - 2**15) * 2**16 and -(2**31) <= keep_from < 2**31
    if p > 0:
        assert scale == reference.dropout(torch.ones(8, 2**16, dtype=torch.float64), p, 1).max()
