"""The mask of dropout on the host, drawn tile by tile: for plain PyTorch, which would write it out to apply it.

Part of ``plain.py`` and ``small.py``. The definition is :mod:`sibo_triton.dropout`, bit for bit.
"""

from collections.abc import Iterable
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from sibo_triton.dropout import ROUND_CONSTANTS, checked_seed, dropout_threshold, hash_keys, line_hash
from sibo_triton.ops.tensors import Buffer

SMALL = 2**13  # words of a mask below which its passes are overhead
LANES = 128  # rows and column pairs up to which a Python integer hashes them faster than NumPy


@cache
def _keep_from_and_scale(p: float) -> tuple[int, float]:
    """What a 16-bit decision must reach for its element to be kept, and by what that is multiplied."""
    threshold = dropout_threshold(p)
    return threshold - 2**15, 1 / (1 - threshold / 2**16)


class KeepTiles:
    """The mask of :func:`~sibo_triton.dropout.dropout_mask`, bit for bit, one tile at a time.

    Rows and columns are hashed once, here; a tile then takes a few passes over its words, in place and in the cache:
    a fraction of what torch's dropout takes to draw. A small mask is drawn at once.
    """

    def __init__(self, rows: int, cols: int, p: float, seed: Tensor) -> None:
        """Args: the mask's shape; the rate p, in [0, 1); the seed, int64, of shape [], on the mask's device."""
        self._keep_from, self.scale = _keep_from_and_scale(p)  # the scale is for what is kept
        self._whole = (slice(0, rows), slice(0, cols))
        self._drawn: tuple[slice, slice] | None = None  # the tile that `_keep` is
        words = (cols + 1) // 2
        # A fake tensor holds no number; a GPU would make us wait for it.
        if type(seed) is Tensor and seed.device.type == "cpu":
            if rows * words <= SMALL:
                self._keep, self._drawn = _keep_in_numpy(rows, cols, self._keep_from, int(seed)), self._whole
                return
            lines = _hash_lines_in_numpy(rows, words, int(seed))
            row1, row2, col1, col2 = (torch.from_numpy(line.view(np.int32)) for line in lines)
        else:
            row_keys, col_keys = hash_keys(seed)
            row1, row2 = line_hash(torch.arange(rows, device=seed.device), *row_keys)
            col1, col2 = line_hash(torch.arange(words, device=seed.device), *col_keys)
            row1, col1 = row1 | 1, col1 | 1
        self._row1, self._row2, self._col1, self._col2 = row1[:, None], row2[:, None], col1, col2
        self._words = Buffer(torch.int32, seed.device)
        self._shifted = Buffer(torch.int32, seed.device)

    def tile(self, m: slice, k: slice) -> Tensor:
        """1 where an element is kept, else 0, to multiply with; ``k`` starts at an even column.

        Returns:
            An integer dtype; a view of a buffer that the next tile overwrites.
        """
        if self._drawn == (m, k):
            return self._keep
        if self._drawn == self._whole:
            return self._keep[m, k]
        words = slice(k.start // 2, (k.stop + 1) // 2)
        row1, row2, col1, col2 = self._row1, self._row2, self._col1, self._col2
        if m.stop - m.start < row1.shape[0]:
            row1, row2 = row1[m], row2[m]
        if words.stop - words.start < col1.shape[0]:
            col1, col2 = col1[words], col2[words]
        shape = row1.shape[0], col1.shape[0]
        word, shifted = self._words.view(*shape), self._shifted.view(*shape)
        torch.mul(row1, col2, out=word)
        word.add_(row2)
        torch.bitwise_right_shift(word, 15, out=shifted)  # arithmetic
        word.bitwise_xor_(shifted.bitwise_and_(2**17 - 1))
        word.mul_(col1)
        # In place, and a number: torch takes several times as long to write bool, and to multiply by it.
        self._keep = word.view(torch.int16).ge_(self._keep_from)[:, : k.stop - k.start]
        self._drawn = m, k
        return self._keep


def keep_whole(rows: int, cols: int, p: float, seed: Tensor, device: torch.device) -> tuple[Tensor, float]:
    """All of a small mask, ``[rows, cols]``, as :meth:`KeepTiles.tile` gives it, and the scale of what is kept.

    Raises:
        TypeError, ValueError: for what is no seed.
    """
    readable = type(seed) is Tensor and seed.device.type == "cpu" == device.type
    if readable and seed.dtype == torch.int64 and seed.numel() == 1 and rows * ((cols + 1) // 2) <= SMALL:
        keep_from, scale = _keep_from_and_scale(p)
        return _keep_in_numpy(rows, cols, keep_from, int(seed)), scale
    mask = KeepTiles(rows, cols, p, checked_seed(seed, device))
    return mask.tile(slice(0, rows), slice(0, cols)), mask.scale


def _keep_in_numpy(rows: int, cols: int, keep_from: int, seed: int) -> Tensor:
    """A small mask, ``[rows, cols]``, int8.

    Its small operations take a third of torch's, and less where they write into what is there and scalars are arrays
    already: on a small layer the mask is most of the host time.
    """
    words = (cols + 1) // 2
    hash_lines = _hash_lines_in_one_number if rows + words <= LANES else _hash_lines_in_numpy
    row1, row2, col1, col2 = hash_lines(rows, words, seed)
    word = row1[:, None] * col2
    np.add(word, row2[:, None], word)
    np.bitwise_xor(word, word >> _15, word)
    np.multiply(word, col1, word)
    keep = torch.from_numpy((word.view(np.int16) >= keep_from).view(np.int8))
    return keep[:, :cols] if cols % 2 else keep


def _hash_lines_in_one_number(rows: int, words: int, seed: int) -> tuple[np.ndarray, ...]:
    """As :func:`_hash_lines_in_numpy`, for few lines in a third of its time: a Python integer has 64 bits for each.

    Of which the upper 32 are free, so that no product reaches the next line.
    """
    row_key1, row_key2, col_key1, col_key2 = _keys(seed)
    index, is_row, is_col, ones, *masks = _lanes(rows, words)
    hash1 = _mix32_lanes(index ^ is_row * row_key1 ^ is_col * col_key1, *masks)
    hash2 = _mix32_lanes(hash1 ^ is_row * row_key2 ^ is_col * col_key2, *masks)
    pairs = np.frombuffer((hash1 | ones | hash2 << 32).to_bytes(8 * (rows + words), "little"), np.uint32).reshape(-1, 2)
    return pairs[:rows, 0], pairs[:rows, 1], pairs[rows:, 0], pairs[rows:, 1]


@lru_cache(maxsize=64)
def _lanes(rows: int, words: int) -> tuple[int, ...]:
    """In 64 bits for each row, then each column pair: its index; 1 for rows, for pairs, for all; and the masks."""

    def lanes(numbers: Iterable[int]) -> int:
        return sum(number << 64 * i for i, number in enumerate(numbers))

    is_row, is_col = lanes([1] * rows), lanes([0] * rows + [1] * words)
    ones = is_row | is_col
    return lanes([*range(rows), *range(words)]), is_row, is_col, ones, *(ones * (2**n - 1) for n in (32, 17, 16))


def _mix32_lanes(h: int, low32: int, low17: int, low16: int) -> int:
    """mix32 of the definition, of every line; the masks are of so many low bits of each."""
    h = (h ^ h >> 16 & low16) * 0x7FEB352D & low32
    h = (h ^ h >> 15 & low17) * 0x846CA68B & low32
    return h ^ h >> 16 & low16


def _hash_lines_in_numpy(rows: int, words: int, seed: int) -> tuple[np.ndarray, ...]:
    """``dropout.line_hash`` of rows and column pairs, uint32; the first of each pair is odd, as words need it."""
    row_key1, row_key2, col_key1, col_key2 = _keys(seed)
    hash1, hash2, shifted = np.empty((3, rows + words), dtype=np.uint32)
    index = _lines(max(rows, words))
    np.bitwise_xor(index[:rows], row_key1, hash1[:rows])
    np.bitwise_xor(index[:words], col_key1, hash1[rows:])
    _mix32_(hash1, shifted)
    np.bitwise_xor(hash1[:rows], row_key2, hash2[:rows])
    np.bitwise_xor(hash1[rows:], col_key2, hash2[rows:])
    _mix32_(hash2, shifted)
    np.bitwise_or(hash1, _1, hash1)
    return hash1[:rows], hash2[:rows], hash1[rows:], hash2[rows:]


@lru_cache(maxsize=64)
def _lines(count: int) -> np.ndarray:
    """0, 1, 2...; read only."""
    return np.arange(count, dtype=np.uint32)


def _mix32_(h: np.ndarray, shifted: np.ndarray) -> None:
    """mix32 of the definition, in place, on uint32; `shifted` is room for as many."""
    np.right_shift(h, _16, shifted)
    np.bitwise_xor(h, shifted, h)
    np.multiply(h, _MULTIPLIER1, h)
    np.right_shift(h, _15, shifted)
    np.bitwise_xor(h, shifted, h)
    np.multiply(h, _MULTIPLIER2, h)
    np.right_shift(h, _16, shifted)
    np.bitwise_xor(h, shifted, h)


# Arrays and not scalars, which NumPy would turn into arrays at every use.
_1, _15, _16, _MULTIPLIER1, _MULTIPLIER2 = (np.array(n, np.uint32) for n in (1, 15, 16, 0x7FEB352D, 0x846CA68B))


def _keys(seed: int) -> tuple[int, int, int, int]:
    """``dropout.hash_keys`` in Python's integers: two row keys and two column keys, below 2^32."""
    left, right = seed % 2**32, (seed >> 32) % 2**32
    keys = []
    for constant in ROUND_CONSTANTS:
        h = right ^ constant
        h = (h ^ h >> 16) * 0x7FEB352D % 2**32
        h = (h ^ h >> 15) * 0x846CA68B % 2**32
        left, right = right, left ^ h ^ h >> 16
        keys.append(right)
    return keys[2], keys[3], keys[4], keys[5]
