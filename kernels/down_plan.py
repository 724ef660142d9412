"""How a launch of ``down.py`` multiplies, its tiles, how it is cut into programs, and what is kept of it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .checks import check_activation, check_bias, check_dropout, check_matrix, check_mix
from .launching import Launch, tensor_key, value_key
from .precision import Operands, operands
from .siblings import DownProjection
from .targets import Target, cdiv, rank_block


@dataclass(frozen=True)
class Plan:
    """How a launch multiplies, and its tiles."""

    operands: Operands
    mix_first: bool
    config: dict[str, int]  # BM, BK, BR, num_warps, num_stages


@lru_cache(maxsize=1024)
def plan(
    rank: int,
    x_dtype: torch.dtype,
    h0_dtype: torch.dtype | None,
    kind: tuple,
    target: Target,
    exact: bool = True,
    siblings: int = 1,
) -> Plan:
    """The plan for the largest rank of a launch; ``kind`` is :attr:`DownProjection.kind`, ``exact`` float32's."""
    a_dtype, mixes, drops, difference, _, activation = kind
    BR = rank_block(rank)
    alike = not mixes or x_dtype == h0_dtype
    throughout = alike and x_dtype == a_dtype == torch.float32
    whole = operands(x_dtype if alike else torch.float32, a_dtype, throughout and exact)
    mix_first = mixes and not difference and (BR > 64 or whole.split_a or whole.dtype == torch.float32)
    if mix_first and not (alike and x_dtype == a_dtype):
        whole = operands(torch.float32, a_dtype)  # the mixed tile is not to be rounded to 16 bits
    # On Blackwell 4 warps spill at rank 64; at rank 16, 8 would not load 16 bytes of A each.
    num_warps = 8 if BR > (16 if target.capability >= 100 else 64) else 4
    if whole.dtype == torch.float32:
        # Multiplied without tensor cores, and so that operands pass through registers: larger tiles spill.
        BK, BR, num_warps = 16, min(BR, 32 if difference else 64), 4
        if BR == 64 and siblings > 1 and not mixes and target.capability == 90:
            num_warps = 8  # there 4 spill
    elif whole.split_a or whole.split_b:
        BK, BR = 32, min(BR, 128)
        if target.capability == 90 and BR == 16 and not whole.split_a:
            BK = 64  # measured: a fifth faster than 32 with dropout, as fewer tiles have their columns hashed
        elif whole.split_a and BR == 64:
            BK, num_warps = 16, 4  # the parts of 32 columns of x would overflow sm_120's registers
        elif BR == 16 and not mixes and target.capability == 120:
            BK = 64  # with 32, registers are spilled to make room for another program
        elif BR == 128 and siblings > 1 and mixes and activation and not difference and target.capability >= 100:
            num_warps = 4  # with 8, likewise
        if target.hip:
            num_warps = 4  # of 64 threads; twice as many spill
    elif BR <= 64:
        BK = 64
        if BR == 64 and siblings == 1 and not (mixes or drops or activation is not None) and target.capability == 120:
            num_warps = 4  # with 8, registers are spilled to make room for a second program
    else:
        BK, BR = 32, min(BR, 128 if difference else 256)
        if BR == 256 and mixes and target.capability == 80:
            BK = 64  # with 32, registers are spilled to make room for a second program
        if BR == 128 and not mixes and target.capability == 100:
            num_warps = 4  # the only sum is in tensor memory; 8 spill
        if BR == 256 and siblings > 1 and not mixes and target.capability == 120:
            num_warps = 4  # with 8, registers are spilled to make room for a second program
    BM = 64  # what Hopper's tensor cores take at once; few rows (8192) are one program for a multiprocessor
    bytes_of_stage = BK * (BM * (x_dtype.itemsize + (h0_dtype.itemsize if mixes else 0)) + BR * a_dtype.itemsize)
    num_stages = target.stages(3, bytes_of_stage, programs=1)
    config = {"BM": BM, "BK": BK, "BR": BR, "num_warps": num_warps, "num_stages": num_stages}
    return Plan(whole, mix_first, config)


@dataclass(frozen=True)
class Cut:
    """The programs of a launch, and where its siblings' results lie in one buffer."""

    r_tiles: int
    first_tile: tuple[int, ...]
    programs: int
    k_steps: int
    splits: int
    t_start: tuple[int, ...]
    size: int


@lru_cache(maxsize=1024)
def cut(M: int, K: int, ranks: tuple[int, ...], results: int, BM: int, BK: int, BR: int, multiprocessors: int) -> Cut:
    """How a launch is cut for siblings of these ranks, each with so many results; there is something to sum."""
    tiles_of = [cdiv(r, BR) for r in ranks]
    first_tile = tuple(sum(tiles_of[:i]) for i in range(len(ranks)))
    programs = cdiv(M, BM) * sum(tiles_of)
    t_start, size = lay_out(M, ranks, results)
    k_steps = steps_of_split(programs, cdiv(K, BK), multiprocessors)
    splits = cdiv(cdiv(K, BK), k_steps)
    return Cut(sum(tiles_of), first_tile, programs, k_steps, splits, t_start, size)


def lay_out(M: int, ranks: tuple[int, ...], results: int) -> tuple[tuple[int, ...], int]:
    """Where each sibling's results start in one buffer, as aligned as Triton asks for vectors, and its size."""
    sizes = [cdiv(results * M * r, 16) * 16 for r in ranks]
    return tuple(sum(sizes[:i]) for i in range(len(ranks))), sum(sizes)


def steps_of_split(programs: int, steps: int, multiprocessors: int) -> int:
    """Steps along K for each program: all, or fewer where rows are too few to fill the GPU.

    Then they are a power of two, as a kernel is compiled for each number of steps, and the programs one to two for each
    multiprocessor; 4 steps are worth a program. Where all but a quarter of them have a program, a second launch to add
    the parts would take longer than the rest stands idle: 8192 rows are 128 programs on 132 multiprocessors.
    """
    if 4 * programs >= 3 * multiprocessors:
        return steps
    of_split = max(4, triton.next_power_of_2(cdiv(steps * programs, 2 * multiprocessors)))
    return min(steps, of_split)


def check_down(x: Tensor, siblings: Sequence[DownProjection], initial_residual: Tensor | None) -> None:
    """Raise unless the kernel takes the arguments."""
    check_matrix("x", x, "M", "K")
    M, K = x.shape
    for sibling in siblings:
        check_matrix("lora_a", sibling.lora_a, "r", K, "x")
        check_mix(sibling.lambda_, sibling.mixes, initial_residual)
        check_dropout(sibling.dropout_p, sibling.dropout_seed)
        check_bias("bias", sibling.bias, sibling.lora_a.shape[0], "lora_a")
        check_activation(sibling.activation)
        if sibling.bias is not None and sibling.activation is None:
            raise ValueError("a bias without an activation: only a bottleneck adapter has one here")
    if any(sibling.mixes for sibling in siblings):
        check_matrix("initial_residual", initial_residual, M, K, "x")


class PreparedLaunch(NamedTuple):
    """A launch for siblings of one kind, and how their results lie in one buffer."""

    siblings: list[int]  # which of all
    ranks: tuple[int, ...]
    t_start: tuple[int, ...]  # where each one's results start
    parts: tuple[int, int]  # [splits of K, size]
    dtype: torch.dtype  # of the results
    launch: Launch | None  # none where there is nothing to sum
    mixes: bool = False
    drops: bool = False
    adds_bias: bool = False
    activates: bool = False
    pending: bool = False  # whether the sums of the parts are yet to get their bias and f

    @property
    def finished(self) -> bool:
        """Whether the one part is the result."""
        return self.launch is not None and self.parts[0] == 1


def sibling_key(of: DownProjection) -> Hashable:
    """What a launch depends on of a sibling."""
    of_tensors = tensor_key(of.lora_a), value_key(of.lambda_), tensor_key(of.dropout_seed), tensor_key(of.bias)
    return of_tensors, of.dropout_p, of.difference, of.activation
