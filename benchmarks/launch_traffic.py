"""What each launch of our kernels loads, stores and multiplies, counted from its grid and arguments.

A kernel's entry gives how often its programs load each operand. Every element of a result is stored once. Masked lanes
load and store nothing, but tensor cores multiply whole tiles: flops are those of the padded tiles, including every dot
of `precision.split_dot`. Only dots count as flops.

`tests/kernels_interpreted/test_traffic_of_launches.py` compares these numbers with what Triton's interpreter does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor

from sibo_triton.kernels import down
from sibo_triton.kernels.targets import cdiv

Arguments = dict[str, Any]
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Traffic:
    """The memory traffic of a launch, or of an operation of torch.

    Attributes:
        name: of the kernel or the operation.
        read: bytes of its inputs, each once.
        written: bytes of its outputs, each once.
        reread: bytes that its programs load in addition to `read`, because several of them need the same tile; caches
            serve most of them. Known for our kernels only: 0 for operations of torch, whose tiles are unknown.
        flops: of matrix products.
        grid: of a launch of ours; None for an operation of torch.
    """

    name: str
    read: int
    written: int
    flops: int
    reread: int = 0
    grid: tuple[int, ...] | None = None

    @property
    def loaded(self) -> int:
        """All that the programs load."""
        return self.read + self.reread


@dataclass
class _Loads:
    """Sums over operands of their bytes, once and times how often they are loaded."""

    once: int = 0
    all: int = 0

    def add(self, tensor: Any, times: int) -> None:
        """A number adds nothing: it is passed with the launch."""
        if isinstance(tensor, Tensor):
            self.once += bytes_of(tensor)
            self.all += bytes_of(tensor) * times


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_of_all(*tensors: Tensor | None) -> int:
    return sum(bytes_of(tensor) for tensor in tensors if tensor is not None)


def _dots(split_a: bool, split_b: bool) -> int:
    """Dots in one `precision.split_dot`."""
    return 1 + split_a + split_b


def _down(grid: tuple[int, ...], a: Arguments, loads: _Loads) -> tuple[int, int]:
    """A program has BM rows and one tile of one sibling's rank, so x and h0 are loaded by every tile of the ranks.

    Each sibling's A is loaded by every tile of rows. Every program loads every sibling's lambda, and its own seed.
    """
    programs, splits = grid[0], grid[1]
    m_tiles = programs // a["r_tiles"]
    mixes = a["HAS_INITIAL_RESIDUAL"]
    loads.add(a["p_x"], a["r_tiles"])
    for lora_a in a["p_lora_a"]:
        loads.add(lora_a, m_tiles)
    if mixes:
        loads.add(a["p_initial_residual"], a["r_tiles"])
        for lambda_ in a["lambda_"]:
            loads.add(lambda_, programs * splits)
    if a["HAS_DROPOUT"]:
        ends = (*a["first_tile"][1:], a["r_tiles"])
        for seed, first, end in zip(a["p_seed"], a["first_tile"], ends, strict=True):
            loads.add(seed, (end - first) * m_tiles * splits)
    for bias in a["p_bias"] or ():
        loads.add(bias, m_tiles * splits)
    written = splits * a["M"] * sum(a["r"]) * a["p_t"].element_size() * (2 if a["HAS_DIFFERENCE"] else 1)
    written += _bytes_of_all(a["p_activated"])
    products = 2 if mixes and not a["MIX_FIRST"] else 1
    dots = products * _dots(a["SPLIT_X"], a["SPLIT_A"])
    return written, programs * splits * a["K_STEPS"] * dots * 2 * a["BM"] * a["BK"] * a["BR"]


def _sum_parts(grid: tuple[int, ...], a: Arguments, loads: _Loads) -> tuple[int, int]:
    """Every part once, every total once."""
    for parts in a["p_parts"]:
        loads.add(parts, 1)
    return sum(map(bytes_of, a["p_total"])), 0


def _up(grid: tuple[int, ...], a: Arguments, loads: _Loads) -> tuple[int, int]:
    """A tile of y: t is loaded by every tile of columns, B and the biases by every tile of rows, the base once."""
    n_tiles = cdiv(a["N"], a["BN"])
    m_tiles = grid[0] // n_tiles
    loads.add(a["p_t"], n_tiles)
    for name, times in (("p_lora_b", m_tiles), ("p_lora_bias", m_tiles), ("p_base_bias", m_tiles), ("p_base", 1)):
        loads.add(a[name], times)
    loads.add(a["scaling"], grid[0])
    dots = cdiv(a["R"], a["BR"]) * _dots(a["SPLIT_T"], a["SPLIT_B"])
    return bytes_of(a["p_y"]), grid[0] * dots * 2 * a["BM"] * a["BN"] * a["BR"]


def _up_siblings(grid: tuple[int, ...], a: Arguments, loads: _Loads) -> tuple[int, int]:
    """A tile of a sibling's y: all parts of its t by every such tile of columns, the rest as for one alone."""
    n_tiles = a["n_tiles"]
    m_tiles = grid[0] // n_tiles
    dots = 0
    for i, t in enumerate(a["p_t"]):
        own_tiles = a["first_tile"][i + 1] - a["first_tile"][i]
        loads.add(t, own_tiles)
        for name in ("p_lora_b", "p_lora_bias", "p_base_bias"):
            loads.add(a[name][i], m_tiles)
        loads.add(a["scaling"][i], own_tiles * m_tiles)
        dots += own_tiles * m_tiles * cdiv(a["R"][i], a["BR"]) * _dots(a["SPLIT_T"], a["SPLIT_B"])
    return sum(map(bytes_of, a["p_y"])), dots * 2 * a["BM"] * a["BN"] * a["BR"]


def _both(grid: tuple[int, ...], a: Arguments, loads: _Loads) -> tuple[int, int]:
    """A strip of STEPS tiles of rows and one of columns: dY once, B by every strip, t by every tile of columns.

    It stores a part of u for every tile of columns, and a part of dB for every strip.
    """
    n_tiles = cdiv(a["N"], a["BN"])
    strips = grid[0] // n_tiles
    loads.add(a["p_grad_y"], 1)
    loads.add(a["p_lora_b"], strips)
    loads.add(a["p_t"], n_tiles)
    loads.add(a["scaling"], grid[0])
    dots = _dots(a["SPLIT_G_U"], a["SPLIT_B"]) + _dots(a["SPLIT_G_B"], a["SPLIT_T"])
    written = FLOAT32 * a["R"] * (n_tiles * a["M"] + strips * a["N"]) + _bytes_of_all(a["p_sum"])
    return written, grid[0] * a["STEPS"] * dots * 2 * a["BM"] * a["BN"] * a["BR"]


def _product(grid: tuple[int, ...], a: Arguments, loads: _Loads) -> tuple[int, int]:
    """One of u and dB: dY by every tile of the rank, the other operand by every tile of dY's side that stays."""
    r_tiles, q_tiles = cdiv(a["R"], a["BR"]), cdiv(a["Q"], a["BQ"])
    loads.add(a["p_g"], r_tiles)
    loads.add(a["p_w"], q_tiles)
    loads.add(a["p_pre_activation"], 1)
    loads.add(a["scaling"], grid[0])
    parts = grid[0] // r_tiles // q_tiles
    dots = a["STEPS"] * _dots(a["SPLIT_G"], a["SPLIT_W"])
    written = parts * a["Q"] * a["R"] * FLOAT32 + _bytes_of_all(a["p_sum"], a["p_activated"])
    return written, grid[0] * dots * 2 * a["BQ"] * a["BJ"] * a["BR"]


def _down_weight_gradient(grid: tuple[int, ...], a: Arguments, loads: _Loads) -> tuple[int, int]:
    """A tile of all siblings' columns over a part of the rows: x and h0 by every such tile, each u by every tile of K.

    Every program loads every sibling's lambda, and its own seed.
    """
    K, r_tiles, k_tiles = a["K"], a["r_tiles"], cdiv(a["K"], a["BK"])
    parts = grid[0] // r_tiles // k_tiles
    for u in a["p_u"]:
        loads.add(u, k_tiles)
    loads.add(a["p_x"], r_tiles)
    mixes = a["HAS_INITIAL_RESIDUAL"]
    if mixes:
        loads.add(a["p_initial_residual"], r_tiles)
        for lambda_ in a["lambda_"]:
            loads.add(lambda_, grid[0])
    if a["HAS_DROPOUT"]:
        for seed, r in zip(a["p_seed"], a["r"], strict=True):
            loads.add(seed, cdiv(r, a["BR"]) * k_tiles * parts)
    dots = _dots(a["SPLIT_X"], a["SPLIT_U"])
    if mixes and not a["MIX_FIRST"]:
        dots += _dots(a["SPLIT_H"], a["SPLIT_U_H"])
    return parts * sum(a["r"]) * K * FLOAT32, grid[0] * a["STEPS"] * dots * 2 * a["BM"] * a["BK"] * a["BR"]


def _down_input_gradient(grid: tuple[int, ...], a: Arguments, loads: _Loads) -> tuple[int, int]:
    """STEPS tiles of dx and dh0, for all siblings: each u by every tile of columns, A by every tile of rows.

    Or, if a program keeps its tile of A, by every strip of STEPS. What dx is added to is loaded once. Every program
    loads every lambda and every seed.
    """
    k_tiles = cdiv(a["K"], a["BK"])
    dots = 0
    for i, u in enumerate(a["p_u"]):
        keeps = a["KEEPS_TILES"] and a["R"][i] <= a["BR"]
        loads.add(u, k_tiles)
        loads.add(a["p_lora_a"][i], grid[0] // k_tiles * (1 if keeps else a["STEPS"]))
        if a["HAS_DROPOUT"][i]:
            loads.add(a["p_seed"][i], grid[0])
        if a["MIXES"][i]:
            loads.add(a["lambda_"][i], grid[0])
        dots += cdiv(a["R"][i], a["BR"]) * _dots(a["SPLIT_U"], a["SPLIT_A"])
    loads.add(a["p_base"], 1)
    return _bytes_of_all(a["p_dx"], a["p_dh"]), grid[0] * a["STEPS"] * dots * 2 * a["BM"] * a["BK"] * a["BR"]


def _activate_parts(grid: tuple[int, ...], a: Arguments, loads: _Loads) -> tuple[int, int]:
    """Every part once, the bias for every row."""
    loads.add(a["p_parts"], 1)
    loads.add(a["p_bias"], a["numel"] // a["r"])
    return _bytes_of_all(a["p_pre_activation"], a["p_activated"]), 0


def _activation_gradient(grid: tuple[int, ...], a: Arguments, loads: _Loads) -> tuple[int, int]:
    """Every part once, and p."""
    loads.add(a["p_parts"], 1)
    loads.add(a["p_pre_activation"], 1)
    return _bytes_of_all(a["p_u"], a["p_activated"]), 0


#: For each kernel: bytes written and flops; its loads are added to the third argument.
KERNELS: dict[str, Callable[[tuple[int, ...], Arguments, _Loads], tuple[int, int]]] = {
    "down_kernel": _down,
    "sum_parts_kernel": _sum_parts,
    "up_kernel": _up,
    "up_siblings_kernel": _up_siblings,
    "both_kernel": _both,
    "product_kernel": _product,
    "activate_parts_kernel": _activate_parts,
    "activation_gradient_kernel": _activation_gradient,
    "down_weight_gradient_kernel": _down_weight_gradient,
    "down_input_gradient_kernel": _down_input_gradient,
}


def traffic_of_launch(name: str, grid: tuple[int, ...], arguments: Arguments) -> Traffic:
    """What a launch loads, stores and multiplies.

    Raises:
        KeyError: the kernel has no entry in `KERNELS`.
    """
    loads = _Loads()
    written, flops = KERNELS[name](grid, arguments, loads)
    return Traffic(name, loads.once, written, flops, loads.all - loads.once, tuple(grid))


@contextmanager
def recorded_launches(record: Callable[[Traffic], None], run: bool = False) -> Iterator[None]:
    """Passes every launch of a Triton kernel inside to `record`, and runs it only with `run`."""
    kind = type(down.down_kernel)  # the interpreter has a class of its own
    launch = kind.run

    def recording(self: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **keywords: Any) -> Any:
        named = dict(zip(self.arg_names, arguments, strict=False)) | keywords
        record(traffic_of_launch(self.__name__, grid, named))
        return launch(self, *arguments, grid=grid, warmup=warmup, **keywords) if run else None

    with mock.patch.object(kind, "run", recording):
        yield
