"""Launches of the kernels as data: what goes in, the launcher's own call, and what float64 makes of it, on any device.

`tests/gpu` compares the values on the device. What only compiles (`make compile-check`, `make gpu` before its tests)
calls the launchers with tensors of the device "meta", which have shapes and strides and no memory.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sibo_triton import reference
from sibo_triton.kernels import up as up_module
from sibo_triton.kernels.down import down_siblings
from sibo_triton.kernels.down_input_gradient import down_input_gradient
from sibo_triton.kernels.down_weight_gradient import down_weight_gradient
from sibo_triton.kernels.siblings import DownProjection
from sibo_triton.kernels.up_backward import up_backward

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

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        siblings = [
            DownProjection(
                tensors[f"a{i}"],
                tensors[f"lambda{i}"] if self.lambda_is_tensor else self.lambda_of(i),
                self.p,
                tensors[f"seed{i}"],
                self.difference,
            )
            for i in range(len(self.ranks))
        ]
        results = down_siblings(tensors["x"], siblings, tensors.get("h0"))
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
                named[f"{name}{i}"] = Expected(exact, terms, by_torch, operands, len(read) > 1, self.k)
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
    strides: str = "contiguous"  # of B, unless "far", and of the base output

    def inputs(self, device: str) -> Inputs:
        far = self.strides == "far"
        tensors = {
            "t": matrix("t", self.m, self.rank, FP32, device),
            "b": matrix("b", self.n, self.rank, self.b_dtype, device, "contiguous" if far else self.strides),
            "scaling": torch.full((1,), self.scaling, device=device),
        }
        if self.has_bias:
            tensors["bias"] = matrix("bias", 1, self.n, self.b_dtype, device)[0]
        if self.adds:
            tensors["base"] = matrix("base", self.m, self.n, self.y_dtype, device, self.strides)
        return tensors

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        scaling = tensors["scaling"] if self.scaling_is_tensor else self.scaling
        bias = tensors.get("bias")
        if not self.adds:
            return {"y": up_module.up(tensors["t"], tensors["b"], scaling, self.y_dtype, bias)}
        return {"y": up_module.add_up(tensors["base"], tensors["t"], tensors["b"], scaling, bias)}

    def expected(self, tensors: Inputs) -> dict[str, Expected]:
        t, lora_b = tensors["t"], tensors["b"]
        bias, base = tensors.get("bias", t.new_zeros(())), tensors.get("base", t.new_zeros(()))
        s = float(tensors["scaling"])
        exact = base.double() + s * (t.double() @ lora_b.double().T + bias.double())
        terms = base.double().abs() + s * (t.double().abs() @ lora_b.double().abs().T + bias.double().abs())
        low_rank = t.to(lora_b.dtype) @ lora_b.T + bias.to(lora_b.dtype)
        by_torch = (base.float() + s * low_rank).to(self.y_dtype)
        operands = 0.0 if lora_b.dtype == FP32 else ROUNDING[lora_b.dtype]
        in_parts = lora_b.dtype == FP32 != self.y_dtype
        return {"y": Expected(exact, terms, by_torch, operands, in_parts, self.rank)}


@dataclass(frozen=True)
class UpBackward:
    """``u = s dY B`` and ``dB = s dY^T t``."""

    m: int
    n: int
    rank: int
    g_dtype: torch.dtype
    b_dtype: torch.dtype
    wants: tuple[bool, bool] = (True, True)
    scaling: float = 0.7
    scaling_is_tensor: bool = False
    strides: str = "contiguous"

    def inputs(self, device: str) -> Inputs:
        return {
            "grad_y": matrix("grad_y", self.m, self.n, self.g_dtype, device, self.strides),
            "t": matrix("t", self.m, self.rank, FP32, device),
            "b": matrix("b", self.n, self.rank, self.b_dtype, device),
            "scaling": torch.full((1,), self.scaling, device=device),
        }

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        scaling = tensors["scaling"] if self.scaling_is_tensor else self.scaling
        u, grad_b = up_backward(tensors["grad_y"], tensors["t"], tensors["b"], scaling, *self.wants)
        return {name: tensor for name, tensor in (("u", u), ("grad_b", grad_b)) if tensor is not None}

    def expected(self, tensors: Inputs) -> dict[str, Expected]:
        grad_y, dtype = tensors["grad_y"], self.b_dtype
        s = float(tensors["scaling"])
        in_parts = grad_y.dtype != dtype
        named = {}
        for name, g, w in (("u", grad_y, tensors["b"]), ("grad_b", grad_y.T, tensors["t"])):
            exact, terms = s * (g.double() @ w.double()), s * (g.double().abs() @ w.double().abs())
            by_torch = s * (g.to(dtype) @ w.to(dtype)).float()
            operands = 0.0 if in_parts or dtype == FP32 else ROUNDING[dtype]
            named[name] = Expected(exact, terms, by_torch, operands, in_parts, g.shape[1])
        return {name: value for (name, value), wanted in zip(named.items(), self.wants, strict=True) if wanted}


@dataclass(frozen=True)
class WeightGradient:
    """``dA = u^T drop((1 - lambda) x + lambda h0)``."""

    m: int
    k: int
    rank: int
    x_dtype: torch.dtype
    a_dtype: torch.dtype
    lambda_: float = 0.3
    p: float = 0.0
    lambda_is_tensor: bool = False
    h0_dtype: torch.dtype | None = None
    strides: str = "contiguous"

    @property
    def as_down(self) -> Down:
        """The forward pass with the same x, h0, lambda, mask and A."""
        return Down(
            self.m,
            self.k,
            (self.rank,),
            self.x_dtype,
            self.a_dtype,
            self.lambda_,
            self.p,
            lambda_is_tensor=self.lambda_is_tensor,
            h0_dtype=self.h0_dtype,
            strides=self.strides,
        )

    def inputs(self, device: str) -> Inputs:
        return self.as_down.inputs(device) | {"u": matrix("u", self.m, self.rank, FP32, device)}

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        lambda_ = tensors["lambda0"] if self.lambda_is_tensor else self.lambda_
        arguments = tensors["u"], tensors["x"], tensors.get("h0"), lambda_, self.p, tensors["seed0"]
        return {"grad_a": down_weight_gradient(*arguments, adapter_dtype=self.a_dtype)}

    def expected(self, tensors: Inputs) -> dict[str, Expected]:
        u, x, h0 = tensors["u"], tensors["x"], tensors.get("h0", tensors["x"])
        read = {x.dtype, self.a_dtype} | ({h0.dtype} if self.as_down.mixes else set())
        dtype = self.a_dtype if len(read) == 1 else FP32

        def gradient(dtype: torch.dtype, absolute: bool = False) -> Tensor:
            of_u, of_x, of_h = (tensor.to(dtype).abs() if absolute else tensor.to(dtype) for tensor in (u, x, h0))
            x_mixed = reference.mix(of_x, of_h, self.lambda_)
            return of_u.T @ reference.dropout(x_mixed, self.p, tensors["seed0"])

        operands = 0.0 if self.a_dtype == FP32 else 2 * ROUNDING[self.a_dtype]  # of u, and above rank 64 of the mix
        exact, terms = gradient(torch.float64), gradient(torch.float64, absolute=True)
        return {"grad_a": Expected(exact, terms, gradient(dtype), operands, len(read) > 1, self.m)}


@dataclass(frozen=True)
class InputGradient:
    """``dx = (1 - lambda) dx~`` and ``dh0 = lambda dx~``, where ``dx~ = drop'(u A)``."""

    m: int
    k: int
    rank: int
    x_dtype: torch.dtype  # of dx and dh0
    a_dtype: torch.dtype
    lambda_: float = 0.3
    p: float = 0.0
    adds: bool = False  # dx to the gradient of the frozen path
    wants_dh: bool = False
    lambda_is_tensor: bool = False
    strides: str = "contiguous"  # of what it adds to

    def inputs(self, device: str) -> Inputs:
        tensors = {
            "u": matrix("u", self.m, self.rank, FP32, device),
            "a": matrix("a", self.rank, self.k, self.a_dtype, device),
            "lambda": torch.full((1,), self.lambda_, device=device),
            "seed": torch.full((1,), -5, dtype=torch.int64, device=device),
        }
        return tensors | (
            {"base": matrix("base", self.m, self.k, self.x_dtype, device, self.strides)} if self.adds else {}
        )

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        into = None
        if self.adds:  # in place, and the inputs stay as they are
            into = torch.empty_strided(
                tensors["base"].shape, tensors["base"].stride(), dtype=self.x_dtype, device=tensors["base"].device
            )
            into.copy_(tensors["base"])
        dx, dh = down_input_gradient(
            tensors["u"],
            tensors["a"],
            tensors["lambda"] if self.lambda_is_tensor else self.lambda_,
            self.p,
            tensors["seed"],
            dtype=None if self.adds else self.x_dtype,
            accumulate_into=into,
            residual_dtype=self.x_dtype if self.wants_dh else None,
        )
        return {"dx": dx} | ({"dh": dh} if self.wants_dh else {})

    def expected(self, tensors: Inputs) -> dict[str, Expected]:
        u, lora_a, seed = tensors["u"], tensors["a"], tensors["seed"]
        base = tensors["base"] if self.adds else u.new_zeros(())
        product = reference.dropout(u.double() @ lora_a.double(), self.p, seed)
        terms = reference.dropout(u.double().abs() @ lora_a.double().abs(), self.p, seed)
        by_torch = reference.dropout(u.to(self.a_dtype) @ lora_a, self.p, seed)
        operands = 0.0 if self.a_dtype == FP32 else ROUNDING[self.a_dtype]
        in_parts = self.a_dtype == FP32 != self.x_dtype
        of_x = 1 - self.lambda_
        named = {
            "dx": Expected(
                base.double() + of_x * product,
                base.double().abs() + of_x * terms,
                (base.float() + of_x * by_torch.float()).to(self.x_dtype),
                operands,
                in_parts,
                self.rank,
            )
        }
        if self.wants_dh:
            of_h = self.lambda_
            by_torch = (of_h * by_torch.float()).to(self.x_dtype)
            named["dh"] = Expected(of_h * product, of_h * terms, by_torch, operands, in_parts, self.rank)
        return named


Launch = Down | Up | UpBackward | WeightGradient | InputGradient


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
