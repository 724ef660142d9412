"""How the launches of ``up_backward.py`` multiply, their tiles, and whether one pass over dY or two move less."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from .launching import Launch
from .precision import Operands, operands
from .targets import Target, cdiv, rank_block


@dataclass(frozen=True)
class Pass:
    """One pass over dY, in one launch, and how it cuts its sums."""

    config: dict[str, int]  # tile sizes, STEPS, num_warps, num_stages
    programs: int
    parts: int  # of the sum; of u where dB is another
    grad_b_parts: int = 1


@dataclass(frozen=True)
class Plan:
    """How the two products are taken: in one pass over dY, or each in its own."""

    dot_u: Operands  # of dY and B
    dot_grad_b: Operands  # of dY and t
    both: Pass | None
    u: Pass
    grad_b: Pass


#: About how many programs a launch has for each multiprocessor, or up to twice as many, where there is work for them.
PROGRAMS = 2

#: What a launch more is worth: the bytes that an H200 moves in a microsecond, about what it takes to start a kernel. By
#: count, not measured.
BYTES_OF_LAUNCH = 4 * 2**20


@lru_cache(maxsize=1024)
def plan(
    M: int,
    N: int,
    r: int,
    grad_y_dtype: torch.dtype,
    lora_b_dtype: torch.dtype,
    target: Target,
    exact: bool = True,
    sums: bool = False,
    activates: bool = False,
) -> Plan:
    """The plan for sizes of at least 1: one pass where two move no fewer bytes, or fewer than a launch.

    Args:
        exact: float32 is multiplied as float32.
        sums: the sum of dY is wanted too.
        activates: t is the pre-activation.
    """
    exact = exact and grad_y_dtype == lora_b_dtype == torch.float32
    t_dtype = grad_y_dtype if grad_y_dtype == lora_b_dtype else torch.float32  # t counts as 16-bit where both are
    dots = operands(grad_y_dtype, lora_b_dtype, exact), operands(grad_y_dtype, t_dtype, exact)
    itemsize = grad_y_dtype.itemsize
    both = launch_of_both(M, N, r, *dots, itemsize, target, sums or activates)
    u = launch_of_product(M, N, r, dots[0], itemsize, target)
    grad_b = launch_of_product(N, M, r, dots[1], itemsize, target, sums)
    if both is not None:
        sizes = (M, N, r, itemsize, lora_b_dtype.itemsize)
        one = bytes_moved(*sizes, 1, both.parts, both.grad_b_parts)
        if one >= bytes_moved(*sizes, 2, u.parts, grad_b.parts) + BYTES_OF_LAUNCH:
            both = None
    return Plan(*dots, both, u, grad_b)


def launch_of_both(
    M: int, N: int, r: int, dot_u: Operands, dot_grad_b: Operands, itemsize: int, target: Target, more: bool = False
) -> Pass | None:
    """One pass over dY for u and dB; None where the two sums do not fit into registers.

    The wider a tile, the fewer the parts of u; its height costs nothing, as a program walks down a strip of rows.
    ``more``: it sums dY too, or activates.
    """
    split = dot_u.split_a or dot_u.split_b or dot_grad_b.split_b
    BR = rank_block(r)
    if BR > (32 if dot_u.dtype != torch.float32 and not split else 16):
        return None
    if r == 1 and dot_u.split_a and dot_u.split_b:
        return None  # ptxas 12.8 assembles it wrongly for sm_90: see benchmarks/ahead_of_time/binaries.py
    num_warps, programs = 8, PROGRAMS
    if dot_u.dtype == torch.float32:
        BN, num_stages = 64, 2
    elif dot_u.split_a or dot_grad_b.split_a:
        # The parts of dY take the registers. AMD's 4 warps are 256 threads, as 8 elsewhere, and 8 spill.
        BN, num_stages, num_warps = 128, 1, 4 if target.hip else 8
    else:
        # One stage ahead spills on gfx942; where B or t is split, registers leave room for one program.
        in_flight = 1 if split else PROGRAMS
        if target.capability == 90 and not more:
            # On an H100 one program with longer strips is faster than two, and in parts 4 warps by a fifth: 8 would
            # multiply the 64 rows of u twice.
            programs, in_flight, num_warps = 1, 1, 4 if split else 8
        # Of a wide dY u has many parts: tiles of twice as many columns halve them. By count, not measured; from 128 to
        # 256 columns the launches for 14,336 took a sixth less.
        BN = 512 if programs == 1 and not split and BR == 16 and N >= 8192 else 256
        num_stages = 1 if target.hip else target.stages(2, 64 * (BN * itemsize + 4 * BR), in_flight)
    narrow = split and (target.capability == 80 and r == 1 or target.capability in (100, 120) and r < 16)
    if target.capability in (80, 120) and more or narrow:
        BN //= 2  # tensor cores that multiply from registers, which more would overflow, or pointers to narrow rows
        if target.capability == 120 and dot_u.dtype != torch.float32 and not split and BR == 16:
            num_warps = 4  # with 8, registers are spilled to make room for a second program
    BM = 64
    u_parts = cdiv(N, BN)
    steps, grad_b_parts = cut(cdiv(M, BM), u_parts, programs * target.multiprocessors, nearest=programs == 1)
    config = {"BM": BM, "BN": BN, "BR": BR, "STEPS": steps, "num_warps": num_warps, "num_stages": num_stages}
    return Pass(config, u_parts * grad_b_parts, u_parts, grad_b_parts)


def launch_of_product(Q: int, J: int, r: int, dot: Operands, itemsize: int, target: Target, sums: bool = False) -> Pass:
    """One pass over dY, ``[Q, J]`` or transposed, for one of the two, and its sum along J."""
    BR = rank_block(r)
    sm_120 = target.capability == 120
    if dot.dtype == torch.float32:
        # Multiplied without tensor cores, from registers: larger tiles spill, on sm_120 4 warps too.
        BJ, BR, num_warps = 16, min(BR, 64), 8 if sm_120 and BR > 16 else 4
    elif dot.split_a or dot.split_b:
        BJ, BR, num_warps = 32, min(BR, 128), 4 if target.hip else 8  # 256 threads load 16 bytes of a 16-bit dY each
        # Tensor cores that multiply from registers: 8 warps would spill to make room for another program.
        if sm_120 and BR == 16:
            BJ, num_warps = 64, 4
        elif (sm_120 or target.capability == 80) and BR == 64:
            num_warps = 8 if sm_120 and sums else 4
    else:
        BJ, BR, num_warps = 64, min(BR, 128), 8 if BR > (16 if sm_120 else 64) else 4
        if sums and target.capability == 100 and BR >= 64:
            num_warps = 4 if BR == 128 else 8  # the other spills
    BQ = 64
    tiles = cdiv(Q, BQ) * cdiv(r, BR)
    steps, parts = cut(cdiv(J, BJ), tiles, PROGRAMS * target.multiprocessors)
    num_stages = target.stages(2, BJ * (BQ * itemsize + BR * 4), PROGRAMS)
    config = {"BQ": BQ, "BJ": BJ, "BR": BR, "STEPS": steps, "num_warps": num_warps, "num_stages": num_stages}
    return Pass(config, tiles * parts, parts)


def cut(tiles: int, programs: int, wanted: int, nearest: bool = False) -> tuple[int, int]:
    """Steps, a power of two (a kernel is compiled for each), and parts of a sum that goes over so many tiles.

    As many parts, if there are tiles for them, as make about the wanted programs of the programs for one part, or up to
    twice as many. ``nearest``: half of these parts, where that makes nine tenths of the wanted programs.
    """
    steps = 1 << max(1, tiles // max(1, wanted // programs)).bit_length() - 1
    if nearest and 2 * steps <= tiles and 10 * programs * cdiv(tiles, 2 * steps) >= 9 * wanted:
        steps *= 2
    return steps, cdiv(tiles, steps)


def bytes_moved(
    M: int, N: int, r: int, grad_y_itemsize: int, lora_b_itemsize: int, passes: int, u_parts: int, grad_b_parts: int
) -> int:
    """What passes through memory: each input once a pass, the parts of a sum twice, its total once.

    Left out are the reads that the cache answers: B's and t's by other programs, dY's by other tiles of the rank.
    """

    def of_sum(parts: int, numel: int) -> int:
        return 4 * numel * (2 * parts + 1 if parts > 1 else 1)

    inputs = passes * M * N * grad_y_itemsize + N * r * lora_b_itemsize + M * r * 4
    return inputs + of_sum(u_parts, M * r) + of_sum(grad_b_parts, N * r)


class Both(NamedTuple):
    """One pass over dY for u and dB."""

    launch: Launch
    u: tuple[int, int, int]  # [parts, M, r]
    grad_b: tuple[int, int, int]  # [parts, N, r]
    sums: tuple[int, int] | None  # [parts, N]


class Product(NamedTuple):
    """One pass over dY for one of them."""

    launch: Launch
    out: tuple[int, int, int]  # [parts, Q, r]
    sums: tuple[int, int] | None  # [parts, Q]
    activates: bool  # the one part of u is multiplied by f'(p) at once


class Prepared(NamedTuple):
    """The passes over dY for a sibling: one for both, one for each that is wanted, or none where it is empty."""

    both: Both | None = None
    u: Product | None = None
    grad_b: Product | None = None
