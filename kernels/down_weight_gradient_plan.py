"""How a launch of ``down_weight_gradient.py`` multiplies, its tiles, and how it is cut into programs."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from .precision import Operands, operands
from .targets import Target, cdiv, rank_block


@dataclass(frozen=True)
class Plan:
    """How a launch multiplies, its tiles, and which of all columns of u^T a sibling has."""

    mix_first: bool
    product: Operands  # of x, or of the mixed tile, and u
    product_h: Operands  # of h0 and u
    config: dict[str, int]  # BM, BK, BR, num_warps, num_stages
    programs: int  # about how many for each multiprocessor
    shares_tiles: bool
    first: tuple[int, ...]
    columns: int


@lru_cache(maxsize=1024)
def plan(
    ranks: tuple[int, ...],
    x_dtype: torch.dtype,
    h0_dtype: torch.dtype | None,
    kind: tuple,
    target: Target,
    exact: bool = True,
) -> Plan:
    """The plan of a launch for siblings of these ranks, none 0; ``kind`` is :attr:`DownGradients.kind`.

    ``h0_dtype`` is None where nothing mixes; ``exact``: float32 is multiplied as float32.
    """
    adapter_dtype, mixes, drops = kind
    dtypes = {x_dtype, adapter_dtype} | ({h0_dtype} if mixes else set())
    throughout = dtypes == {torch.float32}
    exact = exact and throughout
    # Where the second product would cost more than mixing the tiles, and where nothing is lost by mixing them first.
    mix_first = mixes and (throughout or max(ranks) > 64)
    product = operands(x_dtype if len(dtypes) == 1 or not mix_first else torch.float32, adapter_dtype, exact)
    product_h = operands(h0_dtype, adapter_dtype, exact) if mixes and not mix_first else product

    # Where columns are few, a tile has those of all siblings, and x is read once. Not where x is mixed or masked for
    # one of them, nor on AMD's GPUs, whose compiler takes no tile of several pointers. Columns start at multiples of
    # 16, but u, whose pointer depends on the column, is loaded 4 bytes at a time.
    columns = sum(cdiv(r, 16) * 16 for r in ranks)
    shares_tiles = len(ranks) > 1 and columns <= 64 and not (mix_first or drops or target.hip)
    BR = triton.next_power_of_2(columns) if shares_tiles else rank_block(max(ranks))
    if product.dtype == torch.float32:
        # Multiplied without tensor cores, and so that operands pass through registers: larger tiles spill.
        BM, BR = 16, min(BR, 64)
        spills = target.capability in (80, 100) or target.capability == 90 and (len(ranks) > 1 or drops)
        spills |= target.capability == 120 and (len(ranks) > 2 and not drops or mixes and drops and max(ranks) > 64)
        num_warps = 8 if BR == 64 and spills else 4
    elif any(of.split_a or of.split_b for of in (product, product_h)):
        BM, BR, num_warps = 32, min(BR, 64), 4 if BR <= 32 else 8
        if target.capability == 120 and BR == 64 and product.split_a and product.split_b:
            # The parts of more rows would overflow registers; of siblings' masked tiles 4 warps spill.
            BM, num_warps = 16, 8 if len(ranks) >= 2 and mixes and drops else 4
        elif target.capability == 80 and BR == 64 and max(ranks) < 16 and product.split_a:
            BM = 16  # what is no 16 bytes wide is loaded by more pointers, for which registers have no room
        elif target.capability == 120 and BR == 16 and len(ranks) == 1 and mixes:
            num_warps = 8  # with 4, registers are spilled to make room for another program
        elif target.capability == 90 and BR == 16 and drops and mixes and not product.split_a:
            BM = 64  # measured: a tenth to a seventh faster than 32
    elif BR <= 32:
        BM, num_warps = 64, 4
    else:
        BM, BR, num_warps = 32, min(BR, 128), 4
        if target.capability == 120 and BR == 128 and len(ranks) == 2 and not (mixes or drops):
            num_warps = 8  # with 4, likewise
    if shares_tiles and BM >= 32 and (target.capability in (80, 120) or target.capability == 100 and mixes):
        # A pointer for each column takes registers, of which tensor cores that multiply from them have few.
        num_warps = 4 if target.capability == 100 and max(ranks) == 1 and product.dtype == x_dtype else 8
    BK, programs = 64, 4
    if target.capability == 90 and BR <= 64 and max(ranks) <= 32 and product.dtype.itemsize == 2 and not drops:
        BM, BK, programs = 32, 128, 2  # measured: a quarter faster than half as wide tiles, for q, k and v
    bytes_of_stage = BM * (BK * (x_dtype.itemsize + (h0_dtype.itemsize if mixes else 0)) + 4 * BR)
    # sm_80 spills fp16's mixed tiles in parts where 3 stages let it unroll the loop otherwise.
    least = 4 if target.capability == 80 and BM == 32 and BR == 64 and len(ranks) > 1 and mixes and not drops else 3
    num_stages = target.stages(least, bytes_of_stage, programs=2)
    config = {"BM": BM, "BK": BK, "BR": BR, "num_warps": num_warps, "num_stages": num_stages}
    widths = [cdiv(r, of) * of for of in (16 if shares_tiles else BR,) for r in ranks]
    first = tuple(sum(widths[:i]) for i in range(len(ranks)))
    return Plan(mix_first, product, product_h, config, programs, shares_tiles, first, sum(widths))


@lru_cache(maxsize=1024)
def cut(M: int, K: int, columns: int, BM: int, BK: int, BR: int, programs: int) -> tuple[int, int, int]:
    """Tiles of dA, parts of each, and the tiles of rows in a part, a power of two, for about so many programs."""
    tiles = cdiv(K, BK) * cdiv(columns, BR)
    m_tiles = cdiv(M, BM)
    steps = 1 << max(0, (m_tiles * tiles // programs).bit_length() - 1)
    return tiles, cdiv(m_tiles, steps), steps
