"""Products of activations, tile by tile: what must happen to an element on the way happens while its tile is cached.

Part of ``plain.py``. On a CPU a pass over memory costs as much as a product of rank 16, and a fresh large tensor
several times that.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference import ROUND_CONSTANTS, dropout_threshold, hash_keys

#: Elements of a tile: on a CPU for each thread, so that a tile and what it takes to mask it stay in the cache. Smaller
#: ones are no faster on one thread, and several meet more often: on a busy machine they then wait for one another.
CPU_TILE = 2**19
DEVICE_TILE = 2**24  # where a launch costs more than memory does
TILE_COLS = 4096  # at most; even, as two neighbours share a word of the mask


class KeepTiles:
    """The mask of :func:`~sibo_triton.reference.dropout_mask`, bit for bit, one tile at a time.

    Rows and columns are hashed once, here; a tile then takes a few passes over its words, in place and in the cache:
    a fraction of what torch's dropout takes to draw.
    """

    def __init__(self, rows: int, cols: int, p: float, seed: Tensor) -> None:
        """Args: the mask's shape; the rate p, in [0, 1); the seed, int64, of shape [], on the mask's device."""
        threshold = dropout_threshold(p)
        self.scale = 1 / (1 - threshold / 2**16)  # what is kept is to be multiplied by it
        self._keep_from = threshold - 2**15
        hash1, hash2 = _hash_lines(rows, (cols + 1) // 2, seed)
        hash1.bitwise_or_(1)
        self._row1, self._row2 = hash1[:rows].view(rows, 1), hash2[:rows].view(rows, 1)
        self._col1, self._col2 = hash1[rows:], hash2[rows:]
        self._words = Buffer(torch.int32, seed.device)
        self._shifted = Buffer(torch.int32, seed.device)

    def tile(self, m: slice, k: slice) -> Tensor:
        """1 where an element is kept, else 0, to multiply with; ``k`` starts at an even column.

        Returns:
            int16, a view of a buffer that the next tile overwrites.
        """
        words = slice(k.start // 2, (k.stop + 1) // 2)
        shape = m.stop - m.start, words.stop - words.start
        word, shifted = self._words.view(*shape), self._shifted.view(*shape)
        torch.mul(self._row1[m], self._col2[words], out=word)
        word.add_(self._row2[m])
        _xor_shifted_(word, 15, shifted)
        word.mul_(self._col1[words])
        # In place, and a number: torch takes several times as long to write bool, and to multiply by it.
        return word.view(torch.int16).ge_(self._keep_from)[:, : k.stop - k.start]


def _hash_lines(rows: int, words: int, seed: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.line_hash`` of the rows and, behind them, of the column pairs: int32, ``[rows + words]``.

    In a quarter of its operations, for numbers below 2^31: on small layers its overhead would outweigh the mask.
    """
    (row_key1, row_key2), (col_key1, col_key2) = _keys(seed)
    hash1 = torch.cat([torch.arange(n, dtype=torch.int32, device=seed.device) for n in (rows, words)])
    hash1[:rows].bitwise_xor_(row_key1)
    hash1[rows:].bitwise_xor_(col_key1)
    shifted = torch.empty_like(hash1)
    hash2 = _mix32_(hash1, shifted).clone()
    hash2[:rows].bitwise_xor_(row_key2)
    hash2[rows:].bitwise_xor_(col_key2)
    return hash1, _mix32_(hash2, shifted)


def _mix32_(h: Tensor, shifted: Tensor) -> Tensor:
    """mix32 of the definition, in place."""
    _xor_shifted_(h, 16, shifted).mul_(0x7FEB352D)
    _xor_shifted_(h, 15, shifted).mul_(0x846CA68B - 2**32)  # as an int32
    return _xor_shifted_(h, 16, shifted)


def _xor_shifted_(h: Tensor, bits: int, shifted: Tensor) -> Tensor:
    """``h ^= h >> bits``, where torch's own shift of an int32 is arithmetic."""
    torch.bitwise_right_shift(h, bits, out=shifted)
    return h.bitwise_xor_(shifted.bitwise_and_(2 ** (32 - bits) - 1))


def _keys(seed: Tensor) -> tuple[tuple[int | Tensor, int | Tensor], tuple[int | Tensor, int | Tensor]]:
    """``reference.hash_keys``; in Python's integers where the seed can be read, which saves 70 tiny operations."""
    if type(seed) is not Tensor or seed.device.type != "cpu":  # a fake tensor holds no number; a GPU would make us wait
        return hash_keys(seed)
    number = int(seed)
    left, right = number % 2**32, (number >> 32) % 2**32
    keys = []
    for constant in ROUND_CONSTANTS:
        h = right ^ constant
        h = (h ^ h >> 16) * 0x7FEB352D % 2**32
        h = (h ^ h >> 15) * 0x846CA68B % 2**32
        left, right = right, left ^ h ^ h >> 16
        keys.append((right + 2**31) % 2**32 - 2**31)  # as an int32
    return (keys[2], keys[3]), (keys[4], keys[5])


class Buffer:
    """Memory for one tile after another."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(0, dtype=dtype, device=device)

    def view(self, rows: int, cols: int) -> Tensor:
        """``[rows, cols]``, contiguous, not initialised."""
        if self._flat.numel() < rows * cols:
            self._flat = self._flat.new_empty(rows * cols)
        return self._flat[: rows * cols].view(rows, cols)


def _tiles(rows: int, cols: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Tiles of a matrix by their rows and columns, those of the same columns after one another."""
    elements = CPU_TILE * torch.get_num_threads() if device.type == "cpu" else DEVICE_TILE
    width = min(cols, TILE_COLS)
    height = max(1, elements // max(1, width))
    for k in range(0, cols, TILE_COLS):
        for m in range(0, rows, height):
            yield slice(m, min(m + height, rows)), slice(k, min(k + TILE_COLS, cols))


def read_tiles(
    x: Tensor,
    dtype: torch.dtype,
    mask: KeepTiles | None = None,
    initial_residual: Tensor | None = None,
    lambda_: float | Tensor = 0.0,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of x, in the dtype, with their rows and columns: mixed if h0 is given, and masked if the mask is.

    x itself is the only tile where nothing has to be done to it. A tile is to be read, and before the next is taken.
    """
    rows, cols = x.shape
    if mask is None and initial_residual is None and x.dtype == dtype:
        yield slice(0, rows), slice(0, cols), x
        return
    share = lambda_.reshape(()).to(dtype) if isinstance(lambda_, Tensor) else lambda_
    buffer, buffer_h = Buffer(dtype, x.device), Buffer(dtype, x.device)
    for m, k in _tiles(rows, cols, x.device):
        tile = x[m, k]
        out = buffer.view(*tile.shape)
        if tile.dtype != dtype:
            tile = out.copy_(tile)
        if initial_residual is not None:
            tile_h = initial_residual[m, k]
            if tile_h.dtype != dtype:
                tile_h = buffer_h.view(*tile.shape).copy_(tile_h)
            tile = torch.lerp(tile, tile_h, share, out=out)
        if mask is not None:
            tile = torch.mul(tile, mask.tile(m, k), out=out)  # and no AND: NaN under the mask stays
        yield m, k, tile


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left right``, for a small out, perhaps of a wider dtype."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)


def write_product(
    out: Tensor, left: Tensor, right: Tensor, add: Tensor | None = None, mask: KeepTiles | None = None
) -> None:
    """``out = left right``, times the mask, plus ``add``, which may be ``out``; for an out as large as activations."""
    dtype = left.dtype
    if mask is None and out.dtype == dtype:
        if add is None:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(add, left, right, out=out)
        return
    buffer = Buffer(dtype, out.device)
    rows, cols = out.shape
    for m, k in _tiles(rows, cols, out.device):
        out_tile = out[m, k]
        tile = torch.mm(left[m], right[:, k], out=buffer.view(*out_tile.shape))
        if mask is not None:
            tile.mul_(mask.tile(m, k))
        if add is None:
            out_tile.copy_(tile)
        else:
            torch.add(add[m, k], tile, out=out_tile)
