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
from sibo_triton.kernels.siblings import DownGradients, DownProjection, UpGradients
from sibo_triton.kernels.targets import cdiv
from sibo_triton.kernels.up_backward import up_backward_siblings

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
    """``u = s dY B`` and ``dB = s dY^T t``, for siblings of which the first is the widest."""

    m: int
    n: int
    ranks: tuple[int, ...]
    g_dtype: torch.dtype
    b_dtype: torch.dtype
    wants: tuple[bool, bool] = (True, True)
    scaling: float = 0.7
    scaling_is_tensor: bool = False
    strides: str = "contiguous"
    grad_dtype: torch.dtype = FP32

    def inputs(self, device: str) -> Inputs:
        tensors = {}
        for i, rank in enumerate(self.ranks):
            n = self.n if i == 0 else cdiv(self.n, 4)
            tensors |= {
                f"grad_y{i}": matrix(f"grad_y{i}", self.m, n, self.g_dtype, device, self.strides),
                f"t{i}": matrix(f"t{i}", self.m, rank, FP32, device),
                f"b{i}": matrix(f"b{i}", n, rank, self.b_dtype, device),
                f"scaling{i}": torch.full((1,), self.scaling / (i + 1), device=device),
            }
        return tensors

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        wants_u, wants_grad_b = self.wants
        siblings = [
            UpGradients(
                tensors[f"grad_y{i}"],
                tensors[f"t{i}"],
                tensors[f"b{i}"],
                tensors[f"scaling{i}"] if self.scaling_is_tensor else self.scaling / (i + 1),
                wants_u,
                self.grad_dtype if wants_grad_b else None,
            )
            for i in range(len(self.ranks))
        ]
        results = enumerate(up_backward_siblings(siblings))
        named = {
            f"{name}{i}": tensor for i, both in results for name, tensor in zip(("u", "grad_b"), both, strict=True)
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def expected(self, tensors: Inputs) -> dict[str, Expected]:
        dtype, named = self.b_dtype, {}
        in_parts = self.g_dtype != dtype
        operands = 0.0 if in_parts or dtype == FP32 else ROUNDING[dtype]
        for i in range(len(self.ranks)):
            grad_y, s = tensors[f"grad_y{i}"], float(tensors[f"scaling{i}"])
            u = ("u", grad_y, tensors[f"b{i}"], FP32)
            grad_b = ("grad_b", grad_y.T, tensors[f"t{i}"], self.grad_dtype)
            for name, g, w, result_dtype in [of for of, wanted in zip((u, grad_b), self.wants, strict=True) if wanted]:
                exact, terms = s * (g.double() @ w.double()), s * (g.double().abs() @ w.double().abs())
                by_torch = (s * (g.to(dtype) @ w.to(dtype)).float()).to(result_dtype)
                named[f"{name}{i}"] = Expected(exact, terms, by_torch, operands, in_parts, g.shape[1])
        return named


@dataclass(frozen=True)
class WeightGradient:
    """``dA = u^T drop((1 - lambda) x + lambda h0)``, for siblings that share x and h0."""

    m: int
    k: int
    ranks: tuple[int, ...]
    x_dtype: torch.dtype
    a_dtype: torch.dtype
    lambda_: float = 0.3
    p: float = 0.0
    lambda_is_tensor: bool = False
    h0_dtype: torch.dtype | None = None
    strides: str = "contiguous"
    last_is_plain: bool = False  # the last sibling neither mixes nor drops
    grad_dtype: torch.dtype = FP32

    @property
    def mixes(self) -> bool:
        return self.lambda_is_tensor or self.lambda_ != 0

    def inputs(self, device: str) -> Inputs:
        tensors = {"x": matrix("x", self.m, self.k, self.x_dtype, device, self.strides)}
        if self.mixes:
            tensors["h0"] = matrix("h0", self.m, self.k, self.h0_dtype or self.x_dtype, device, self.strides)
        return tensors | inputs_of_gradients(self, device)

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        grads_a = down_weight_gradient(siblings_of(self, tensors, self.grad_dtype), tensors["x"], tensors.get("h0"))
        return {f"grad_a{i}": grad_a for i, grad_a in enumerate(grads_a)}

    def expected(self, tensors: Inputs) -> dict[str, Expected]:
        x, h0, named = tensors["x"], tensors.get("h0", tensors["x"]), {}
        for i in range(len(self.ranks)):
            lambda_, p = share_and_rate(self, i)
            read = {x.dtype, self.a_dtype} | ({h0.dtype} if self.mixes and not is_plain(self, i) else set())
            dtype = self.a_dtype if len(read) == 1 else FP32

            def gradient(dtype, absolute=False, i=i, lambda_=lambda_, p=p):
                u, of_x, of_h = (of.to(dtype) for of in (tensors[f"u{i}"], x, h0))
                if absolute:
                    u, of_x, of_h = u.abs(), of_x.abs(), of_h.abs()
                return u.T @ reference.dropout(reference.mix(of_x, of_h, lambda_), p, tensors[f"seed{i}"])

            operands = 0.0 if self.a_dtype == FP32 else 2 * ROUNDING[self.a_dtype]  # of u, above rank 64 of the mix too
            exact, terms = gradient(torch.float64), gradient(torch.float64, absolute=True)
            by_torch = gradient(dtype).to(self.grad_dtype)
            named[f"grad_a{i}"] = Expected(exact, terms, by_torch, operands, len(read) > 1, self.m)
        return named


@dataclass(frozen=True)
class InputGradient:
    """``dx = sum of (1 - lambda) dx~`` and ``dh0 = sum of lambda dx~``, where ``dx~ = drop'(u A)``, over siblings."""

    m: int
    k: int
    ranks: tuple[int, ...]
    x_dtype: torch.dtype  # of dx and dh0
    a_dtype: torch.dtype
    lambda_: float = 0.3
    p: float = 0.0
    adds: bool = False  # dx to the gradient of the frozen path
    wants_dh: bool = False
    lambda_is_tensor: bool = False
    strides: str = "contiguous"  # of what it adds to
    last_is_plain: bool = False

    def inputs(self, device: str) -> Inputs:
        tensors = inputs_of_gradients(self, device)
        if self.adds:
            tensors["base"] = matrix("base", self.m, self.k, self.x_dtype, device, self.strides)
        return tensors

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        into = None
        if self.adds:  # in place, and the inputs stay as they are
            into = torch.empty_strided(
                tensors["base"].shape, tensors["base"].stride(), dtype=self.x_dtype, device=tensors["base"].device
            )
            into.copy_(tensors["base"])
        dx, dh = down_input_gradient(
            siblings_of(self, tensors, None),
            dtype=None if self.adds else self.x_dtype,
            accumulate_into=into,
            residual_dtype=self.x_dtype if self.wants_dh else None,
        )
        return {"dx": dx} | ({"dh": dh} if self.wants_dh else {})

    def expected(self, tensors: Inputs) -> dict[str, Expected]:
        base = tensors["base"] if self.adds else torch.zeros((), device=tensors["u0"].device)
        dx, dx_terms, dx_by_torch = base.double(), base.double().abs(), base.float()
        dh = dh_terms = dh_by_torch = 0.0
        for i in range(len(self.ranks)):
            u, lora_a, seed = (tensors[f"{name}{i}"] for name in ("u", "a", "seed"))
            lambda_, p = share_and_rate(self, i)
            product = reference.dropout(u.double() @ lora_a.double(), p, seed)
            terms = reference.dropout(u.double().abs() @ lora_a.double().abs(), p, seed)
            by_torch = reference.dropout(u.to(self.a_dtype) @ lora_a, p, seed).float()
            dx, dx_terms = dx + (1 - lambda_) * product, dx_terms + (1 - lambda_) * terms
            dh, dh_terms = dh + lambda_ * product, dh_terms + lambda_ * terms
            dx_by_torch, dh_by_torch = dx_by_torch + (1 - lambda_) * by_torch, dh_by_torch + lambda_ * by_torch
        operands = 0.0 if self.a_dtype == FP32 else ROUNDING[self.a_dtype]
        rest = operands, self.a_dtype == FP32 != self.x_dtype, sum(self.ranks)
        named = {"dx": Expected(dx, dx_terms, dx_by_torch.to(self.x_dtype), *rest)}
        if self.wants_dh:
            named["dh"] = Expected(dh, dh_terms, dh_by_torch.to(self.x_dtype), *rest)
        return named


def inputs_of_gradients(launch: WeightGradient | InputGradient, device: str) -> Inputs:
    """What each sibling brings."""
    tensors = {}
    for i, rank in enumerate(launch.ranks):
        tensors |= {
            f"u{i}": matrix(f"u{i}", launch.m, rank, FP32, device),
            f"a{i}": matrix(f"a{i}", rank, launch.k, launch.a_dtype, device),
            f"lambda{i}": torch.full((1,), share_and_rate(launch, i)[0], device=device),
            f"seed{i}": torch.full((1,), -5 - i, dtype=torch.int64, device=device),
        }
    return tensors


def is_plain(launch: WeightGradient | InputGradient, i: int) -> bool:
    return launch.last_is_plain and i == len(launch.ranks) - 1


def share_and_rate(launch: WeightGradient | InputGradient, i: int) -> tuple[float, float]:
    """A sibling's lambda, another one for each, and its rate of dropout."""
    return (0.0, 0.0) if is_plain(launch, i) else (launch.lambda_ / (i + 1), launch.p)


def siblings_of(
    launch: WeightGradient | InputGradient, tensors: Inputs, grad_dtype: torch.dtype | None
) -> list[DownGradients]:
    siblings = []
    for i in range(len(launch.ranks)):
        lambda_, p = share_and_rate(launch, i)
        if launch.lambda_is_tensor and not is_plain(launch, i):
            lambda_ = tensors[f"lambda{i}"]
        u, lora_a, seed = tensors[f"u{i}"], tensors[f"a{i}"], tensors[f"seed{i}"]
        siblings.append(DownGradients(u, lora_a, launch.a_dtype, lambda_, p, seed, grad_dtype))
    return siblings


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
