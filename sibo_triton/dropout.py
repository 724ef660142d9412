"""Dropout whose mask is a function of seed, row and column: the definition, which the kernels reproduce bit for bit.

``docs/definition.md`` explains the construction.
"""

import math
from numbers import Real

import torch
from torch import Tensor


def draw_seed(device: torch.device | str | None = None, generator: torch.Generator | None = None) -> Tensor:
    """A seed for :func:`dropout`, from torch's generator of the device, so that ``torch.manual_seed`` determines it.

    It stays a tensor, so that the host never waits for it. Gradient checkpointing, which restores the generator's
    state, draws the same seed again.

    Args:
        device: where the seed lives; torch's default device if None.
        generator: the generator to draw from, of that device; its default one if None.

    Returns:
        int64, ``[1]``.
    """
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


def draw_seeds(count: int, device: torch.device | str | None = None) -> tuple[Tensor, ...]:
    """Several seeds at once, as :func:`draw_seed` draws them; on the CPU the same ones as in as many calls.

    Returns:
        ``count`` tensors, each int64, ``[1]``, on ``device``.
    """
    seeds = torch.empty((count, 2), dtype=torch.int64, device=device)  # 16 bytes apart, as a kernel wants its pointers
    seeds[:, 0].random_(0, 2**63 - 1)
    return seeds[:, :1].unbind()


def dropout(x: Tensor, p: float, seed: int | Tensor | None) -> Tensor:
    """``drop(x) = x * mask / (1 - p')`` with the mask of :func:`dropout_mask`, in which p' is p on its 2^-16 grid.

    The expectation is exactly x. As with ``torch.nn.functional.dropout``, NaN and infinity give NaN where they are
    dropped (nan * 0 = nan): a mask does not hide an overflow.

    Args:
        x: ``[..., K]``; token m of the mask is row m of ``x.reshape(-1, K)``.
        p: the probability of dropping an element, in [0, 1). 0 returns ``x`` itself.
        seed: from :func:`draw_seed`, or an int; needed when p > 0.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: p is not a number, or the seed neither an int nor a tensor.
        ValueError: p is outside [0, 1), or the seed is missing, or a tensor that is not one int64 value.
    """
    check_dropout(p, seed)
    if p == 0 or seed is None:
        return x
    threshold = dropout_threshold(p)
    mask = dropout_mask(math.prod(x.shape[:-1]), x.shape[-1], p, seed, device=x.device).reshape(x.shape)
    # In this order autograd keeps only the mask, one byte per element.
    return x * mask / (1 - threshold / 2**16)


def dropout_mask(
    rows: int,
    cols: int,
    p: float,
    seed: int | Tensor,
    *,
    row_offset: int = 0,
    col_offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask of ``drop``: True where an element is kept. A pure function of (seed, row, column).

    A tile of the mask, given by its offsets, equals that slice of the whole mask. One 32-bit word decides two
    neighbouring elements: columns 2j and 2j + 1 are kept when the low and the high half of the word, as signed 16-bit
    integers, are at least ``T - 2^15``, with ``T = min(floor(65536 p + 1/2), 65535)``. In arithmetic modulo 2^32::

        row1, row2 = line_hash(m, row keys)     col1, col2 = line_hash(j, column keys)
        word = (row1 | 1) * col2 + row2;  word ^= word >> 15;  word *= col1 | 1

    ``docs/definition.md`` says why. The seed is the key of both hashes and is never combined with a counter directly,
    so that the masks of two seeds are not rearrangements of each other.

    Args:
        rows, cols: the shape of the tile.
        p: the probability of dropping an element, in [0, 1); T above rounds it.
        seed: 64 bits: an int64 tensor with one element, or an int (taken modulo 2^64).
        row_offset, col_offset: where the tile begins, in [0, 2^63).
        device: the mask's device; the seed's if None.

    Returns:
        bool, ``[rows, cols]``.

    Raises:
        TypeError, ValueError: as :func:`dropout`; ValueError for a negative size or offset.
    """
    threshold = dropout_threshold(p)
    if min(rows, cols, row_offset, col_offset) < 0:
        raise ValueError(f"negative size or offset: {rows=}, {cols=}, {row_offset=}, {col_offset=}")
    seed = checked_seed(seed, device)
    row_keys, col_keys = hash_keys(seed)
    first_word, odd = divmod(col_offset, 2)
    words = (odd + cols + 1) // 2
    row1, row2 = line_hash(row_offset + torch.arange(rows, device=seed.device).view(rows, 1), *row_keys)  # [rows, 1]
    col1, col2 = line_hash(first_word + torch.arange(words, device=seed.device), *col_keys)  # [words]
    word = (row1 | 1) * col2  # [rows, words]; in place from here: this is where the time goes
    word += row2
    word ^= _shift_right(word, 15)
    word *= col1 | 1
    # The view has the low half first on the (little-endian) machines that torch supports.
    return word.view(torch.int16).narrow(1, odd, cols) >= threshold - 2**15


def line_hash(index: Tensor, key1: Tensor, key2: Tensor) -> tuple[Tensor, Tensor]:
    """Two int32 hashes of each 64-bit index, a row's or a column pair's; each is distinct among 2^32 neighbours."""
    hash1 = _mix32(index.to(torch.int32) ^ key1)  # the cast keeps the low 32 bits
    return hash1, _mix32(hash1 ^ key2 ^ _mix32((index >> 32).to(torch.int32)))


#: Of :func:`hash_keys`: digits of pi, below 2^31.
ROUND_CONSTANTS = (0x243F6A88, 0x05A308D3, 0x13198A2E, 0x03707344, 0x24093822, 0x299F31D0)


def hash_keys(seed: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Two row keys and two column keys, int32: a Feistel network, so that either pair is a bijection of the seed."""
    left, right = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    keys = []
    for round_constant in ROUND_CONSTANTS:
        left, right = right, left ^ _mix32(right ^ round_constant)
        keys.append(right)
    return (keys[2], keys[3]), (keys[4], keys[5])


def _mix32(h: Tensor) -> Tensor:
    """A bijection of int32 that spreads every bit over all: Chris Wellons' "lowbias32" (hash-prospector)."""
    h = (h ^ _shift_right(h, 16)) * 0x7FEB352D
    h = (h ^ _shift_right(h, 15)) * (0x846CA68B - 2**32)  # as an int32
    return h ^ _shift_right(h, 16)


def _shift_right(h: Tensor, bits: int) -> Tensor:
    """The logical shift of an int32; torch's is arithmetic."""
    return (h >> bits) & ((1 << (32 - bits)) - 1)


def dropout_threshold(p: float) -> int:
    """T: an element is dropped with probability T / 65536."""
    if not isinstance(p, Real) or isinstance(p, bool):
        raise TypeError(f"dropout_p is {p!r}: pass a number in [0, 1)")
    if not 0 <= p < 1:  # also NaN
        raise ValueError(f"dropout_p is {p}: it must lie in [0, 1); 0.0 turns dropout off")
    return min(math.floor(p * 2**16 + 0.5), 2**16 - 1)


def check_dropout(p: float, seed: int | Tensor | None) -> None:
    """Raise unless p is a probability of dropping, in [0, 1), and comes with a seed where it is not 0.

    Raises:
        TypeError, ValueError: as :func:`dropout`; the seed is not looked at.
    """
    dropout_threshold(p)
    if p != 0 and seed is None:
        raise ValueError(f"dropout_p is {p}, but no seed was given: pass draw_seed(x.device), or dropout_p=0.0")


def check_seed(seed: object) -> None:
    """Raise a TypeError or ValueError for what is no seed as `draw_seed` returns it."""
    if not isinstance(seed, Tensor):
        raise TypeError(f"dropout_seed is {seed!r}: pass a tensor, as draw_seed(x.device) returns it")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        description = f"a {seed.dtype} tensor of shape {list(seed.shape)}"
        raise ValueError(f"dropout_seed is {description}: pass one int64 value, as draw_seed(x.device) returns it")


def checked_seed(seed: int | Tensor, device: torch.device | str | None) -> Tensor:
    """The seed, also an int here, as an int64 tensor of shape [], on the device."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        seed = torch.tensor((seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
    check_seed(seed)
    assert isinstance(seed, Tensor)
    return seed.reshape(()).to(device=device)
