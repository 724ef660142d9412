"""Products of activations, tile by tile: what must happen to an element on the way happens while its tile is cached.

Part of ``plain.py``. On a CPU a pass over memory costs as much as a product of rank 16, and a fresh large tensor
several times that.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sibo_triton.ops.mask import KeepTiles
from sibo_triton.ops.tensors import Buffer

#: Elements of a tile: on a CPU for each thread, so that a tile and what it takes to mask it stay in the cache. Smaller
#: ones are no faster on one thread, and several meet more often: on a busy machine they then wait for one another.
CPU_TILE = 2**19
DEVICE_TILE = 2**24  # where a launch costs more than memory does
TILE_COLS = 4096  # at most; even, as two neighbours share a word of the mask


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
