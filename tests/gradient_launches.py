"""Launches of the gradients' kernels as data, in the way of `kernel_launches.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_launches import FP32, ROUNDING, Expected, Inputs, matrix
from torch import Tensor

from sibo_triton import reference
from sibo_triton.kernels.down_input_gradient import down_input_gradient
from sibo_triton.kernels.down_weight_gradient import down_weight_gradient
from sibo_triton.kernels.siblings import DownGradients, UpGradients, kept_dtype
from sibo_triton.kernels.targets import cdiv
from sibo_triton.kernels.up_backward import up_backward_siblings


@dataclass(frozen=True)
class UpBackward:
    """``u = s dY B`` and ``dB = s dY^T t``, for siblings of which the first is the widest.

    With an activation f: ``u = s (dY B) f'(t)`` and ``dB = s dY^T f(t)``.
    """

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
    wants_sum: bool = False
    activation: str | None = None

    def inputs(self, device: str) -> Inputs:
        tensors = {}
        for i, rank in enumerate(self.ranks):
            n = self.n if i == 0 else cdiv(self.n, 4)
            tensors |= {
                f"grad_y{i}": matrix(f"grad_y{i}", self.m, n, self.g_dtype, device, self.strides),
                f"t{i}": matrix(f"t{i}", self.m, rank, kept_dtype(self.g_dtype, self.b_dtype), device),
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
                self.wants_sum,
                self.activation,
            )
            for i in range(len(self.ranks))
        ]
        results = enumerate(up_backward_siblings(siblings))
        named = {f"{name}{i}": tensor for i, result in results for name, tensor in result._asdict().items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def expected(self, tensors: Inputs) -> dict[str, Expected]:
        dtype, named = self.b_dtype, {}
        in_parts = self.g_dtype != dtype
        operands = 0.0 if in_parts or dtype == FP32 else ROUNDING[dtype]
        for i in range(len(self.ranks)):
            grad_y, s = tensors[f"grad_y{i}"], float(tensors[f"scaling{i}"])
            t, slope = tensors[f"t{i}"], torch.ones((), dtype=torch.float64)
            if self.activation is not None:
                p = t.double().requires_grad_()
                with torch.enable_grad():
                    activated = reference.ACTIVATIONS[self.activation](p)
                    (slope,) = torch.autograd.grad(activated.sum(), p)
                t = activated.detach().to(t.dtype)
            u = ("u", grad_y, tensors[f"b{i}"], FP32)
            grad_b = ("grad_b", grad_y.T, t, self.grad_dtype)
            for name, g, w, result_dtype in [of for of, wanted in zip((u, grad_b), self.wants, strict=True) if wanted]:
                g = g.contiguous()  # strides past 2^31 are ours to take, not cuBLAS's
                exact, terms = s * (g.double() @ w.double()), abs(s) * (g.double().abs() @ w.double().abs())
                by_torch = (s * (g.to(dtype) @ w.to(dtype)).float()).to(result_dtype)
                if name == "u":
                    exact, terms, by_torch = exact * slope, terms * (slope.abs() + 0.1), by_torch * slope.float()
                rounded_to = t.dtype if name == "grad_b" and self.activation is not None else None  # f(p)
                named[f"{name}{i}"] = Expected(exact, terms, by_torch, operands, in_parts, g.shape[1], rounded_to)
            if self.wants_sum:
                sums = grad_y.double().sum(0), grad_y.double().abs().sum(0), grad_y.float().sum(0)
                named[f"grad_y_sum{i}"] = Expected(*sums, 0.0, False, self.m)
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

            def gradient(dtype, absolute=False, i=i, lambda_=lambda_, p=p, u_dtype=torch.float64):
                u, of_x, of_h = (of.to(dtype) for of in (tensors[f"u{i}"].to(u_dtype), x, h0))
                if absolute:
                    u, of_x, of_h = u.abs(), of_x.abs(), of_h.abs()
                return u.T @ reference.dropout(reference.mix(of_x, of_h, lambda_), p, tensors[f"seed{i}"])

            operands = 0.0 if self.a_dtype == FP32 else 2 * ROUNDING[self.a_dtype]  # of u, above rank 64 of the mix too
            exact, terms = gradient(torch.float64), gradient(torch.float64, absolute=True)
            by_torch = gradient(dtype, u_dtype=self.a_dtype).to(self.grad_dtype)
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
    adds: bool = False  # dx to the gradient of another path
    wants_dh: bool = False
    lambda_is_tensor: bool = False
    strides: str = "contiguous"  # of what it adds to
    last_is_plain: bool = False
    wants_dx: bool = True
    dh_dtype: torch.dtype | None = None  # of x if None

    def inputs(self, device: str) -> Inputs:
        tensors = inputs_of_gradients(self, device)
        if self.adds:
            tensors["base"] = matrix("base", self.m, self.k, self.x_dtype, device, self.strides)
        return tensors

    def launch(self, tensors: Inputs) -> dict[str, Tensor]:
        dx, dh = down_input_gradient(
            siblings_of(self, tensors, None),
            dtype=self.x_dtype if self.wants_dx else None,
            base=tensors.get("base"),
            residual_dtype=(self.dh_dtype or self.x_dtype) if self.wants_dh else None,
        )
        return {name: of for name, of in (("dx", dx), ("dh", dh)) if of is not None}

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
        dh_dtype = self.dh_dtype or self.x_dtype
        results = {self.x_dtype} if self.wants_dx else set()
        results |= {dh_dtype} if self.wants_dh else set()
        rest = operands, self.a_dtype == FP32 and results != {FP32}, sum(self.ranks)
        named = {}
        if self.wants_dx:
            named["dx"] = Expected(dx, dx_terms, dx_by_torch.to(self.x_dtype), *rest)
        if self.wants_dh:
            named["dh"] = Expected(dh, dh_terms, dh_by_torch.to(dh_dtype), *rest)
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
