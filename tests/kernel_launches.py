"""Launches of the forward kernels as data: what goes in, the launcher's own call, and what float64 makes of it.

On any device. `gradient_launches.py` has the other kernels'.

`tests/gpu` compares the values on the device. What only compiles (`make compile-check`, `make gpu` before its tests)
calls the launchers with tensors of the device "meta", which have shapes and strides and no memory.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from sibo_triton import reference
from sibo_triton.kernels import up as up_module
from sibo_triton.kernels.down import down_activated_siblings, down_siblings
from sibo_triton.kernels.few_rows import low_rank_siblings
from sibo_triton.kernels.siblings import DownProjection, UpProjection, kept_dtype
from sibo_triton.kernels.targets import cdiv

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
#: The largest relative error of one rounding to a dtype.
ROUNDING = {FP32: 2**-24, FP16: 2**-11, BF16: 2**-8}

Inputs = dict[str, Tensor]


@dataclass
class Expected:
    """One result in float64, and what its error is measured by."""

    exact: Tensor
    terms: Tensor  # the same sums over absolute values
    by_torch: Tensor  # of plain torch in the same dtypes, in float32 where they meet
    operands: float  # the relative error of a product where the kernel rounds float32 operands to 16 bits; else 0
    in_parts: bool  # whether float32 operands are multiplied in bfloat16 parts
    length: int  # of the sums
    rounded_to: torch.dtype | None = None  # 16 bits, to which an operand is rounded on the way


class Launch(Protocol):
    """A dataclass of these methods."""

    def inputs(self, device: str) -> Inputs: ...

    def launch(self, tensors: Inputs) -> dict[str, Tensor]: ...

    def expected(self, tensors: Inputs) -> dict[str, Expected]: ...


def matrix(name: str, rows: int, cols: int, dtype: torch.dtype, device: str, strides: str = "contiguous") -> Tensor:
    """Random values, by the name; if not contiguous, inside NaN, so that a read beyond them shows.

    Args:
        strides: "contiguous", "padded", "transposed", "expanded" (one row for all), or "far" (rows 2^30 elements and
            more apart, of which a CPU backs with memory only what is written).
    """
    if strides == "expanded":
        return matrix(name, 1, cols, dtype, device).expand(rows, cols)
    if strides == "far":
        view = torch.empty_strided((rows, cols), (2**30 + 8, 1), dtype=dtype, device=device)
    elif strides == "contiguous":
        view = torch.empty((rows, cols), dtype=dtype, device=device)
    else:
        shape = (rows + 2, cols + 1) if strides == "padded" else (cols + 1, rows + 2)
        buffer = torch.full(shape, math.nan, dtype=dtype, device=device)
        view = (buffer if strides == "padded" else buffer.T)[1 : rows + 1, :cols]
    if device == "meta":
        return view
    where = device if rows * cols > 2**22 else "cpu"  # the CPU would take seconds for what is large
    generator = torch.Generator(where).manual_seed(zlib.crc32(name.encode()))
    return view.copy_(torch.randn(rows, cols, generator=generator, device=where).to(dtype))


@dataclass(frozen=True)
class Down:
    """``t = drop((1 - lambda) x + lambda h0) A^T``, and ``d = drop(h0 - x) A^T``."""

    m: int
    k: int
    ranks: tuple[int, ...]
    x_dtype: torch.dtype
    a_dtype: torch.dtype
    lambda_: float = 0.3
    p: float = 0.0
    difference: bool = False
    lambda_is_tensor: bool = False
    h0_dtype: torch.dtype | None = None  # of x if None
    strides: str = "contiguous"

    @property
    def mixes(self) -> bool:
        return self.difference or self.lambda_is_tensor or self.lambda_ != 0

    def inputs(self, device: str) -> Inputs:
        tensors = {"x": matrix("x", self.m, self.k, self.x_dtype, device, self.strides)}
        if self.mixes:
            tensors["h0"] = matrix("h0", self.m, self.k, self.h0_dtype or self.x_dtype, device, self.strides)
        for i, rank in enumerate(self.ranks):
            tensors[f"a{i}"] = matrix(f"a{i}", rank, self.k, self.a_dtype, device)
            tensors[f"lambda{i}"] = torch.full((1,), self.lambda_of(i), device=device)
            tensors[f"seed{i}"] = torch.full((1,), 0x1234_5678_9ABC_DEF0 + i, dtype=torch.int64, device=device)
        return tensors

    def lambda_of(self, i: int) -> float:
        """Another one for each sibling."""
        return self.lambda_ / (i + 1)

    def siblings(self, tensors: Inputs) -> list[DownProjection]:
        return [
            DownProjection(
                tensors[f"a{i}"],
                tensors[f"lambda{i}"] if self.lambda_is_tensor else self.lambda_of(i),
                self.p,
                tensors[f"seed{i}"],
                self.difference,
            )
            for i in range(len(self.ranks))
        ]

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        results = down_siblings(tensors["x"], self.siblings(tensors), tensors.get("h0"))
        named = {}
        for i, (t, d) in enumerate(results):
            named |= {f"t{i}": t} | ({f"d{i}": d} if self.difference else {})
        return named

    def expected(self, tensors: Inputs) -> dict[str, Expected]:
        x, h0 = tensors["x"], tensors.get("h0", tensors["x"])
        read = {x.dtype, self.a_dtype} | ({h0.dtype} if self.mixes else set())
        dtype = self.a_dtype if len(read) == 1 else FP32
        mix_first = self.mixes and not self.difference and max(self.ranks) > 64
        operands = ROUNDING[dtype] if mix_first and dtype != FP32 else 0.0
        named = {}
        for i in range(len(self.ranks)):
            lora_a, seed, lambda_ = tensors[f"a{i}"], tensors[f"seed{i}"], self.lambda_of(i)
            weights = {"t": (1 - lambda_, lambda_), "d": (-1.0, 1.0)}
            for name in ("t", "d") if self.difference else ("t",):
                x64, h64 = (reference.dropout(tensor.double(), self.p, seed) for tensor in (x, h0))
                of_x, of_h = weights[name]
                exact = (of_x * x64 + of_h * h64) @ lora_a.double().T
                terms = (abs(of_x) * x64.abs() + abs(of_h) * h64.abs()) @ lora_a.double().abs().T
                x_one, h_one, a_one = x.to(dtype), h0.to(dtype), lora_a.to(dtype)
                if name == "t":
                    by_torch = reference.down(x_one, a_one, h_one, lambda_, self.p, seed)
                else:
                    by_torch = reference.down(h_one - x_one, a_one, None, 0.0, self.p, seed)
                by_torch = by_torch.to(kept_dtype(self.x_dtype, self.a_dtype))
                named[f"{name}{i}"] = Expected(exact, terms, by_torch, operands, len(read) > 1, self.k)
        return named


@dataclass(frozen=True)
class Activated:
    """``p = drop((1 - lambda) x + lambda h0) W^T + b`` and f(p), of bottleneck adapters that share x and h0."""

    m: int
    k: int
    ranks: tuple[int, ...]
    x_dtype: torch.dtype
    a_dtype: torch.dtype
    activation: str = "tanh"
    lambda_: float = 0.0
    p: float = 0.0
    has_bias: bool = True
    difference: bool = False
    lambda_is_tensor: bool = False
    h0_dtype: torch.dtype | None = None

    @property
    def down(self) -> Down:
        rest = self.lambda_, self.p, self.difference, self.lambda_is_tensor, self.h0_dtype
        return Down(self.m, self.k, self.ranks, self.x_dtype, self.a_dtype, *rest)

    def inputs(self, device: str) -> Inputs:
        tensors = self.down.inputs(device)
        if self.has_bias:
            tensors |= {f"bias{i}": matrix("bias", 1, r, self.a_dtype, device)[0] for i, r in enumerate(self.ranks)}
        return tensors

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        siblings = [
            own._replace(bias=tensors.get(f"bias{i}"), activation=self.activation)
            for i, own in enumerate(self.down.siblings(tensors))
        ]
        named = {}
        for i, (p, d, f) in enumerate(down_activated_siblings(tensors["x"], siblings, tensors.get("h0"))):
            named |= {f"p{i}": p, f"activated{i}": f} | ({f"d{i}": d} if self.difference else {})
        return named

    def expected(self, tensors: Inputs) -> dict[str, Expected]:
        kept, f, named = kept_dtype(self.x_dtype, self.a_dtype), reference.ACTIVATIONS[self.activation], {}
        of_down = self.down.expected(tensors)
        for i in range(len(self.ranks)):
            t = of_down[f"t{i}"]
            named |= {f"d{i}": of_down[f"d{i}"]} if self.difference else {}
            bias = tensors.get(f"bias{i}", tensors["x"].new_zeros(()))
            exact, terms = t.exact + bias.double(), t.terms + bias.double().abs()
            by_torch = (t.by_torch + bias.to(t.by_torch.dtype)).to(kept)
            rest = t.operands, t.in_parts, self.k
            named[f"p{i}"] = Expected(exact, terms, by_torch, *rest)
            # no activation is steeper than 1.13
            named[f"activated{i}"] = Expected(f(exact), 1.13 * terms, f(by_torch), *rest)
        return named


@dataclass(frozen=True)
class Up:
    """``y = s (t B^T + b)``, alone or added to a base output."""

    m: int
    n: int
    rank: int
    y_dtype: torch.dtype
    b_dtype: torch.dtype
    adds: bool = False
    has_bias: bool = False
    scaling: float = 0.7
    scaling_is_tensor: bool = False
    strides: str = "contiguous"  # of B and of the base output
    has_base_bias: bool = False  # of a fresh y

    def inputs(self, device: str) -> Inputs:
        tensors = {
            "t": matrix("t", self.m, self.rank, kept_dtype(self.y_dtype, self.b_dtype), device),
            "b": matrix("b", self.n, self.rank, self.b_dtype, device, self.strides),
            "scaling": torch.full((1,), self.scaling, device=device),
        }
        if self.has_bias:
            tensors["bias"] = matrix("bias", 1, self.n, self.b_dtype, device)[0]
        if self.adds:
            tensors["base"] = matrix("base", self.m, self.n, self.y_dtype, device, self.strides)
        elif self.has_base_bias:
            tensors["base_bias"] = matrix("base_bias", 1, self.n, self.y_dtype, device)[0]
        return tensors

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        scaling = tensors["scaling"] if self.scaling_is_tensor else self.scaling
        bias = tensors.get("bias")
        if not self.adds:
            base_bias = tensors.get("base_bias")
            return {"y": up_module.up(tensors["t"], tensors["b"], scaling, self.y_dtype, bias, base_bias)}
        return {"y": up_module.add_up(tensors["base"], tensors["t"], tensors["b"], scaling, bias)}

    def expected(self, tensors: Inputs) -> dict[str, Expected]:
        t, lora_b = tensors["t"], tensors["b"]
        zero = t.new_zeros(())
        bias, base = tensors.get("bias", zero), tensors.get("base", tensors.get("base_bias", zero))
        s = float(tensors["scaling"])
        exact = base.double() + s * (t.double() @ lora_b.double().T + bias.double())
        terms = base.double().abs() + abs(s) * (t.double().abs() @ lora_b.double().abs().T + bias.double().abs())
        low_rank = t.to(lora_b.dtype) @ lora_b.T + bias.to(lora_b.dtype)
        by_torch = (base.float() + s * low_rank).to(self.y_dtype)
        operands = 0.0 if lora_b.dtype == FP32 else ROUNDING[lora_b.dtype]
        in_parts = lora_b.dtype == FP32 != self.y_dtype
        return {"y": Expected(exact, terms, by_torch, operands, in_parts, self.rank)}


@dataclass(frozen=True)
class LowRank:
    """``y = s (t B^T + b) + b0`` for siblings that share x and h0, of which the first is the widest."""

    m: int
    k: int
    n: int
    ranks: tuple[int, ...]
    x_dtype: torch.dtype
    a_dtype: torch.dtype
    lambda_: float = 0.3
    p: float = 0.0
    has_bias: bool = False
    lambda_is_tensor: bool = False
    scaling: float = 0.7
    scaling_is_tensor: bool = False

    @property
    def down(self) -> Down:
        rest = {"lambda_is_tensor": self.lambda_is_tensor}
        return Down(self.m, self.k, self.ranks, self.x_dtype, self.a_dtype, self.lambda_, self.p, **rest)

    def inputs(self, device: str) -> Inputs:
        tensors = self.down.inputs(device)
        for i, rank in enumerate(self.ranks):
            n = self.n if i == 0 else cdiv(self.n, 4)
            tensors |= {
                f"b{i}": matrix(f"b{i}", n, rank, self.a_dtype, device),
                f"scaling{i}": torch.full((1,), self.scaling / (i + 1), device=device),
            }
            if self.has_bias:
                tensors[f"bias{i}"] = matrix(f"bias{i}", 1, n, self.a_dtype, device)[0]
                tensors[f"base_bias{i}"] = matrix(f"base_bias{i}", 1, n, self.x_dtype, device)[0]
        return tensors

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        ups = [
            UpProjection(
                tensors[f"b{i}"],
                tensors[f"scaling{i}"] if self.scaling_is_tensor else self.scaling / (i + 1),
                tensors.get(f"bias{i}"),
                tensors.get(f"base_bias{i}"),
            )
            for i in range(len(self.ranks))
        ]
        siblings = self.down.siblings(tensors)
        ys = low_rank_siblings(tensors["x"], siblings, ups, tensors.get("h0"), self.x_dtype)
        return {f"y{i}": y for i, y in enumerate(ys)}

    def expected(self, tensors: Inputs) -> dict[str, Expected]:
        named = {}
        for i, t in enumerate(self.down.expected(tensors).values()):
            b, s = tensors[f"b{i}"], float(tensors[f"scaling{i}"])
            zero = b.new_zeros(())
            bias, base = tensors.get(f"bias{i}", zero), tensors.get(f"base_bias{i}", zero)
            exact = s * (t.exact @ b.double().T + bias.double()) + base.double()
            terms = s * (t.terms @ b.double().abs().T + bias.double().abs()) + base.double().abs()
            by_torch = (s * (t.by_torch.to(b.dtype) @ b.T + bias) + base).to(self.x_dtype)
            operands = t.operands + (0.0 if b.dtype == FP32 else ROUNDING[b.dtype])  # t is rounded to B's dtype
            in_parts = t.in_parts or b.dtype == FP32 != self.x_dtype
            rounded_to = None if b.dtype == FP32 else b.dtype
            named[f"y{i}"] = Expected(exact, terms, by_torch, operands, in_parts, self.k + self.ranks[i], rounded_to)
        return named


SHORT = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}


def name_of(launch: Launch) -> str:
    """What sets a launch apart, as in a call."""
    values = {field: getattr(launch, field.name) for field in fields(launch)}
    shown = (
        (field.name, SHORT.get(value, value) if isinstance(value, torch.dtype) else value)
        for field, value in values.items()
        if value != field.default
    )
    return f"{type(launch).__name__}({', '.join(f'{name}={value}' for name, value in shown)})"
