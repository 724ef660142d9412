"""The dropout mask: its bits, by an implementation in NumPy's uint32; its statistics, in sigmas; and dropout itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from sibo_triton.reference import draw_seed, dropout, dropout_mask

#: A right implementation fails one of these tests by chance less than once in a thousand draws of the constants below.
SIGMAS = 5.0


# Written from the definition in docs/definition.md, with other types and other operations than the reference's.


def numpy_mix(h):
    h = h.astype(np.uint32)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def numpy_words(index, key1, key2):
    low = np.array([i % 2**32 for i in index], dtype=np.uint32)
    high = np.array([i >> 32 for i in index], dtype=np.uint32)
    first = numpy_mix(low ^ key1)
    return first, numpy_mix(numpy_mix(high) ^ first ^ key2)


def numpy_mask(rows, cols, p, seed, row_offset=0, col_offset=0):
    left, right = np.array([seed % 2**32], np.uint32), np.array([seed // 2**32 % 2**32], np.uint32)
    keys = []
    for constant in (0x243F6A88, 0x05A308D3, 0x13198A2E, 0x03707344, 0x24093822, 0x299F31D0):
        left, right = right, left ^ numpy_mix(right ^ np.uint32(constant))
        keys.append(right)
    columns = [col_offset + k for k in range(cols)]
    row1, row2 = (word[:, None] for word in numpy_words([row_offset + m for m in range(rows)], *keys[2:4]))
    col1, col2 = (word[None, :] for word in numpy_words([k // 2 for k in columns], *keys[4:6]))
    word = (row1 | np.uint32(1)) * col2 + row2
    word = (word ^ (word >> np.uint32(15))) * (col1 | np.uint32(1))
    odd = np.array([k % 2 == 1 for k in columns], dtype=bool)
    half = np.where(odd, word >> np.uint32(16), word & np.uint32(0xFFFF)).astype(np.int64)
    signed = np.where(half >= 2**15, half - 2**16, half)
    return signed >= rounded(p) * 2**16 - 2**15


def rounded(p):
    """The rate that the mask is drawn at: p on the grid of 16-bit decisions."""
    return min(math.floor(p * 2**16 + 0.5), 2**16 - 1) / 2**16


def standardised(mask, p):
    """The mask as float64 with mean 0 and variance 1."""
    drop = rounded(p)
    return (mask.double() - (1 - drop)) / math.sqrt(drop * (1 - drop))


def assert_uncorrelated(vectors):
    """No two of these vectors (one a row, standardised) are correlated: neither the worst pair nor all together."""
    count, length = vectors.shape
    z = (vectors @ vectors.T / math.sqrt(length))[torch.ones(count, count).triu(1).bool()]
    worst = math.sqrt(2) * torch.special.erfinv(torch.tensor(1 - 1e-5 / len(z), dtype=torch.float64))
    assert z.abs().max() < 1.5 * worst  # half as much again: the tails are a little heavier than a Gaussian's
    assert abs(z.square().mean() - 1) < SIGMAS * math.sqrt(2 / len(z)) + 1 / length


SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 2**32, 0x9E3779B97F4A7C15, 123456789)
OFFSETS = ((0, 0), (5, 3), (2**32 - 3, 2**33 - 5), (2**40 + 7, 2**45 + 1), (2**63 - 100, 2**62 + 1))


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_an_independent_implementation(seed, offsets):
    row_offset, col_offset = offsets
    mask = dropout_mask(9, 23, 0.37, seed, row_offset=row_offset, col_offset=col_offset)
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask.numpy(), numpy_mask(9, 23, 0.37, seed, row_offset, col_offset))


def test_is_what_earlier_versions_drew():
    """A run that a newer version resumes should go on with the same masks: change the definition knowingly."""
    mask = dropout_mask(4, 32, 0.5, 2024, row_offset=1000, col_offset=77)
    rows = [int("".join("1" if kept else "0" for kept in row), 2) for row in mask.tolist()]
    assert [f"{row:08x}" for row in rows] == ["9ddc2a68", "609e397e", "ba9e8a57", "38537704"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 40),
    row_offset=st.integers(0, 2**40),
    col_offset=st.integers(0, 2**40),
    inner=st.tuples(*[st.floats(0, 1)] * 4),
    seed=st.integers(-(2**63), 2**64 - 1),
)
def test_a_tile_equals_that_slice_of_the_whole(rows, cols, row_offset, col_offset, inner, seed):
    whole = dropout_mask(rows, cols, 0.4, seed, row_offset=row_offset, col_offset=col_offset)
    assert whole.shape == (rows, cols)
    top, bottom = sorted(int(share * rows) for share in inner[:2])
    left, right = sorted(int(share * cols) for share in inner[2:])
    tile = dropout_mask(
        bottom - top, right - left, 0.4, seed, row_offset=row_offset + top, col_offset=col_offset + left
    )
    assert torch.equal(tile, whole[top:bottom, left:right])


@pytest.mark.parametrize("shape", [(1, 1 << 20), (1 << 20, 1), (1021, 1023), (7, 99991), (4096, 512)])
@pytest.mark.parametrize("p", [2**-16, 1e-3, 0.05, 0.1, 1 / 3, 0.5, 0.9, 1 - 2**-16])
def test_rate(p, shape):
    mask = dropout_mask(*shape, p, seed=11)
    dropped, count = mask.numel() - int(mask.sum()), mask.numel()
    drop = rounded(p)
    assert abs(drop - p) <= 2**-17
    assert abs(dropped - count * drop) <= SIGMAS * math.sqrt(count * drop * (1 - drop))


@pytest.mark.parametrize(("p", "kept"), [(0.0, 1.0), (2**-18, 1.0), (1 - 2**-18, 2**-16)])
def test_rates_beyond_the_grid(p, kept):
    """Below 2^-17 nothing is dropped; above 1 - 2^-16 as much as the grid allows, but never all."""
    mask = dropout_mask(512, 2048, p, seed=3)
    expected = mask.numel() * kept
    assert abs(int(mask.sum()) - expected) <= SIGMAS * math.sqrt(expected * (1 - kept))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_rows_columns_and_halves_have_the_same_rate(p):
    z = standardised(dropout_mask(1024, 2048, p, seed=21), p)
    for part in (z, z.T, z[:, ::2], z[:, 1::2], z[:, ::2].T, z[:, 1::2].T):
        sums = part.sum(1) / math.sqrt(part.shape[1])
        assert sums.abs().max() < SIGMAS
        assert abs(sums.square().mean() - 1) < SIGMAS * math.sqrt(2 / len(sums)) + 1 / part.shape[1]


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("columns", [slice(None), slice(0, None, 2), slice(1, None, 2)], ids=["all", "even", "odd"])
def test_rows_are_independent(p, columns):
    assert_uncorrelated(standardised(dropout_mask(384, 4096, p, seed=5), p)[:, columns])


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_columns_are_independent(p):
    """Neighbours, which share a word, among them."""
    assert_uncorrelated(standardised(dropout_mask(4096, 384, p, seed=6), p).T)


def test_no_two_of_many_rows_agree_in_one_half_of_their_words():
    """Joining the hashes of row and column by XOR fails here: the low half of a word hardly feels its top bits."""
    mask = dropout_mask(1 << 17, 128, 0.5, seed=7)
    for half in (mask[:, 0::2], mask[:, 1::2]):
        packed = np.packbits(half.numpy(), axis=1).view(np.uint64)[:, 0]
        assert len(np.unique(packed)) == len(packed)


SEED_SETS = {
    "steps": range(100, 164),
    "single bits": [0, *(1 << bit for bit in range(64))],
    "layers": [int(seed) for seed in np.random.default_rng(8).integers(0, 2**63, 64)],
}


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("seeds", SEED_SETS.values(), ids=SEED_SETS)
def test_seeds_are_independent(seeds, p):
    """Of layers, whose seeds are far apart, and of steps, where a careless caller counts them up."""
    masks = torch.stack([dropout_mask(64, 128, p, seed).reshape(-1) for seed in seeds])
    assert_uncorrelated(standardised(masks, p))


@pytest.mark.parametrize("seeds", SEED_SETS.values(), ids=SEED_SETS)
def test_masks_of_two_seeds_are_not_rearrangements(seeds):
    """seed XOR counter draws the same rows, or columns, for every seed, in another order."""
    lines = []
    for seed in seeds:
        mask = dropout_mask(64, 64, 0.5, seed)
        for side in (mask, mask.T):
            lines += np.packbits(side.contiguous().numpy(), axis=1).view(np.uint64)[:, 0].tolist()
    assert len(set(lines)) == len(lines)
    # Nor with the other side rearranged as well: a line's number of kept elements would remain.
    for side in (0, 1):
        counts = {tuple(dropout_mask(512, 512, 0.5, seed).sum(side).sort().values.tolist()) for seed in seeds}
        assert len(counts) == len(seeds)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(("row_step", "col_step"), [(1, 1), (1, 2), (2, 1), (16, 16), (256, 128), (3, 5)])
def test_blocks_of_four(p, row_step, col_step):
    """The 16 patterns of 2x2 blocks, of neighbours and of lines further apart, come as often as they should.

    A hash of row and column joined to one word makes the four words of a block dependent: this is where it would show.
    """
    mask = dropout_mask(2048, 2048, p, seed=9)
    rows = torch.arange(2048 - row_step)
    rows = rows[rows // row_step % 2 == 0]  # so that no element belongs to two blocks
    cols = torch.arange(2048 - col_step)
    cols = cols[cols // col_step % 2 == 0]
    corners = [mask[rows + dr][:, cols + dc] for dr in (0, row_step) for dc in (0, col_step)]
    patterns = sum(corner.long() << bit for bit, corner in enumerate(corners))
    counts = torch.bincount(patterns.reshape(-1), minlength=16).double()
    keep = 1 - rounded(p)
    kept = torch.tensor([bin(pattern).count("1") for pattern in range(16)], dtype=torch.float64)
    expected = counts.sum() * keep**kept * (1 - keep) ** (4 - kept)
    assert ((counts - expected) ** 2 / expected).sum() < 56.5  # chi-squared of 15 degrees: once in a million


def test_dropout_scales_what_it_keeps():
    x = torch.randn(3, 5, 33)
    mask = dropout_mask(15, 33, 0.25, seed=4).reshape(x.shape)
    torch.testing.assert_close(dropout(x, 0.25, 4), torch.where(mask, x / 0.75, 0.0))


def test_dropout_keeps_the_expectation_where_p_is_rounded():
    ones = torch.ones(2048, 2048)
    p = 1.4 * 2**-16  # drawn at 2^-16: dividing by 1 - p itself would be off by 6e-6
    mask = dropout_mask(2048, 2048, p, seed=4)
    torch.testing.assert_close(dropout(ones, p, 4)[mask], ones[mask] / (1 - 2**-16), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dropout_keeps_shape_and_dtype(dtype):
    for shape in ((0, 4), (4, 0), (1,), (7,), (2, 3, 5)):
        x = torch.ones(shape, dtype=dtype)
        y = dropout(x, 0.5, draw_seed())
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert set(y.unique().tolist()) <= {0.0, 2.0}


def test_dropout_of_rate_zero_is_its_input():
    x = torch.randn(3, 4)
    assert dropout(x, 0.0, None) is x


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_dropout_hides_nothing_that_is_not_finite(value):
    """As torch.nn.functional.dropout."""
    x = torch.full((64, 64), value)
    assert not dropout(x, 0.5, 0).isfinite().any()
    assert not torch.nn.functional.dropout(x, 0.5).isfinite().any()


def test_dropout_saves_one_byte_an_element():
    saved = []
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        dropout(x, 0.5, 0)
    assert [tensor.dtype for tensor in saved if tensor.numel() > 1] == [torch.bool]


def test_seed_comes_from_torch_and_stays_a_tensor():
    torch.manual_seed(1)
    first, second = draw_seed(), draw_seed()
    torch.manual_seed(1)
    assert torch.equal(draw_seed(), first) and not torch.equal(first, second)
    assert (first.dtype, first.shape) == (torch.int64, (1,))
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(draw_seed(generator=generator), draw_seed(generator=torch.Generator().manual_seed(7)))
    assert draw_seed("meta").device.type == "meta"
    seeds = torch.cat([draw_seed() for _ in range(2000)])
    for bit in range(63):
        assert abs((seeds >> bit & 1).double().mean() - 0.5) < SIGMAS * 0.5 / math.sqrt(2000)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_mask_again(use_reentrant):
    x = torch.randn(16, 16, requires_grad=True)

    def layer(x):
        return dropout(x, 0.5, draw_seed()).square()

    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch.manual_seed(3)
    y = checkpoint(layer, x, use_reentrant=use_reentrant).sum()
    draw_seed()  # what the next layer draws
    y.backward()
    assert torch.equal(x.grad, expected)


def test_an_int_and_a_tensor_are_the_same_seed():
    for seed in SEEDS:
        signed = torch.tensor((seed + 2**63) % 2**64 - 2**63)
        expected = dropout_mask(4, 40, 0.5, seed)
        assert torch.equal(dropout_mask(4, 40, 0.5, signed), expected)
        assert torch.equal(dropout_mask(4, 40, 0.5, signed.reshape(1)), expected)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_rate_outside_its_range_is_refused(p):
    with pytest.raises(ValueError, match=r"dropout_p is .*\[0, 1\)"):
        dropout(torch.ones(2, 2), p, 0)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "dropout_p is '0.1'", {"p": "0.1", "seed": 0}),
        (TypeError, "dropout_p is True", {"p": True, "seed": 0}),
        (TypeError, "seed is 0.5", {"p": 0.5, "seed": 0.5}),
        (ValueError, "no seed was given: pass draw_seed", {"p": 0.5, "seed": None}),
        (ValueError, "torch.float32", {"p": 0.5, "seed": torch.zeros(1)}),
        (ValueError, r"shape \[2\]", {"p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}),
    ],
)
def test_wrong_arguments_are_named(error, message, arguments):
    with pytest.raises(error, match=message):
        dropout(torch.ones(2, 2), **arguments)


def test_a_negative_offset_is_refused():
    with pytest.raises(ValueError, match="col_offset=-1"):
        dropout_mask(2, 2, 0.5, 0, col_offset=-1)
