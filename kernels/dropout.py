"""The mask of ``sibo_triton.reference.dropout_mask`` inside a kernel, bit for bit. No kernel of its own.

A kernel hashes the rows of its tile once and asks for the mask of each tile along K::

    row1, row2, col_key1, col_key2 = dropout_rows(p_seed, first_row, o_m)            # before the loop
    b_keep = keep_tile(row1, row2, col_key1, col_key2, o_k + i_k * BK, keep_from)   # [BM, BK], in the loop
    b_x = b_x.to(DOT_DTYPE) * b_keep.to(DOT_DTYPE)  # times 0 or 1: NaN under the mask stays NaN

and multiplies by ``scale`` once, at the end; ``keep_from`` and ``scale`` come from :func:`keep_from_and_scale`. The
product is taken in DOT_DTYPE because the interpreter multiplies the raw bits of bfloat16.
"""

import math
from functools import cache

import triton
import triton.language as tl


@cache
def keep_from_and_scale(p: float) -> tuple[int, float]:
    """``keep_from``, an int32, and ``scale``, ``1 / (1 - p')``, for the probability ``p``, in [0, 1).

    p' is p on the grid of 16-bit decisions, ``T / 65536`` with ``T = min(floor(65536 p + 1/2), 65535)``. An element is
    kept if its decision is at least ``T - 2^15``; ``keep_from`` is that number in the high half of a word.
    """
    threshold = min(math.floor(p * 2**16 + 0.5), 2**16 - 1)
    return (threshold - 2**15) * 2**16, 1 / (1 - threshold / 2**16)


@triton.jit
def dropout_rows(
    p_seed,  # int64, [1]
    first_row,  # int64
    o_m,  # int32, [BM]: an arange
):
    """What :func:`keep_tile` needs of the seed and the rows: two numbers for each row, [BM], and two column keys."""
    row_key1, row_key2, col_key1, col_key2 = seed_keys(p_seed)
    row1, row2 = row_hashes(first_row, o_m, row_key1, row_key2)
    return row1, row2, col_key1, col_key2


@triton.jit
def seed_keys(p_seed):
    """The two row keys and the two column keys, for a kernel whose rows change inside its loop."""
    b_seed = tl.load(p_seed)
    left = b_seed.to(tl.uint32)
    right = (b_seed >> 32).to(tl.uint32)
    left ^= _mix32(right ^ 0x243F6A88)
    right ^= _mix32(left ^ 0x05A308D3)
    left ^= _mix32(right ^ 0x13198A2E)
    row_key1 = left
    right ^= _mix32(left ^ 0x03707344)
    row_key2 = right
    left ^= _mix32(right ^ 0x24093822)
    right ^= _mix32(left ^ 0x299F31D0)
    return row_key1, row_key2, left, right


@triton.jit
def row_hashes(first_row, o_m, row_key1, row_key2):
    """The two numbers that :func:`keep_tile` takes for each row, [BM].

    The upper halves of 64-bit rows are one number, hashed once: ``first_row`` is a multiple of BM, a power of two.
    """
    lower = first_row.to(tl.uint32) + o_m.to(tl.uint32)
    row1, row2 = _line_hash(lower, row_key1, row_key2 ^ _mix32((first_row >> 32).to(tl.uint32)))
    return row1 | 1, row2


@triton.jit
def keep_tile(
    row1,  # [BM]; these four from dropout_rows
    row2,  # [BM]
    col_key1,
    col_key2,
    o_k,  # int32, [BK]: the columns
    keep_from,  # see keep_from_and_scale
):
    """True where an element is kept, [BM, BK]."""
    col1, col2 = column_hashes(o_k, col_key1, col_key2)
    return keep_hashed(row1, row2, col1, col2, o_k, keep_from)


@triton.jit
def column_hashes(o_k, col_key1, col_key2):
    """The two numbers of each column's pair, [BK], for :func:`keep_hashed`: for a kernel whose loop changes rows."""
    col1, col2 = _line_hash((o_k >> 1).to(tl.uint32), col_key1, col_key2)
    return col1 | 1, col2


@triton.jit
def keep_hashed(
    row1,  # [BM]; these two from row_hashes
    row2,
    col1,  # [BK]; these two from column_hashes
    col2,
    o_k,  # int32, [BK]: the columns
    keep_from,
):
    """True where an element is kept, [BM, BK].

    Both columns of a pair compute its word, and the compiler sees that it is the same one where a thread holds both:
    where ``o_k`` is an arange plus a multiple of a power of two.
    """
    b_word = tl.mul(row1[:, None], col2[None, :], sanitize_overflow=False)  # [BM, BK]
    b_word = tl.add(b_word, row2[:, None], sanitize_overflow=False)
    b_word = tl.mul(b_word ^ (b_word >> 15), col1[None, :], sanitize_overflow=False)
    # The half that decides comes to the top; what lies below it cannot change the comparison.
    b_word = tl.where((o_k & 1)[None, :] != 0, b_word, b_word << 16)
    return b_word.to(tl.int32, bitcast=True) >= keep_from


@triton.jit
def _line_hash(index, key1, key2):
    """Of a 32-bit index; that of a wider one's upper half is in key2."""
    hash1 = _mix32(index ^ key1)
    return hash1, _mix32(hash1 ^ key2)


@triton.jit
def _mix32(h):
    h = tl.mul(h ^ (h >> 16), 0x7FEB352D, sanitize_overflow=False)
    h = tl.mul(h ^ (h >> 15), 0x846CA68B, sanitize_overflow=False)
    return h ^ (h >> 16)
