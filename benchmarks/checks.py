"""Whether a provider computes what it should, before it is timed: outputs and gradients against the definition.

The reference is the same model in float32 whose linears are `sibo_triton.reference.lora_linear`, on the same weights.
Providers draw their dropout masks each in its own way, so values are compared with the rate at 0; then the rate is
put back and results must differ by about as much as such a mask makes them (`dropout_problem`).
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.providers import ADAPTER, Setting, first_block
from sibo_triton import reference

#: The norm of the error over that of the result: of all of it, and of its worst row and column. Where 16 bits compute,
#: PEFT's own LoRA has a third of it (`tests/test_benchmark_checks.py`).
TOLERANCE, TOLERANCE_OF_A_LINE = 0.06, 0.3
SCALING = 2.0  # alpha is 2 r

Values = dict[str, Tensor]


def canonical(name: str) -> str:
    """A linear's name from the base model's root, without what PEFT and torch.compile put around it."""
    name = name.replace("_orig_mod.", "")
    return name.removeprefix("base_model.model.")


def adapters_for(frozen: nn.Module, setting: Setting) -> dict[str, tuple[Tensor, Tensor]]:
    """A, ``[r, K]``, and B, ``[N, r]``, of each linear: random by its name, as wide as what the linear itself gives.

    In float32, with the values that the adapter's dtype can hold.
    """
    adapters = {}
    for name, linear in frozen.named_modules():
        if not isinstance(linear, nn.Linear) or not name.endswith(setting.linears.all):
            continue
        (N, K), weight = linear.weight.shape, linear.weight
        dtype = torch.float32 if setting.fp32_adapters else weight.dtype
        generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
        shapes = ((setting.rank, K, 1 / math.sqrt(K)), (N, setting.rank, 0.3 / math.sqrt(setting.rank)))
        lora_a, lora_b = (
            (torch.randn(rows, cols, generator=generator, device=weight.device) * std).to(dtype).float()
            for rows, cols, std in shapes
        )
        adapters[name] = lora_a, lora_b
    return adapters


def put_adapters(model: nn.Module, adapters: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Give a provider's model these A and B.

    Raises:
        ValueError: the model does not have adapters on just these linears.
    """
    found = set()
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and ADAPTER in module.lora_A:
                lora_a, lora_b = adapters[canonical(name)]
                module.lora_A[ADAPTER].weight.copy_(lora_a)
                module.lora_B[ADAPTER].weight.copy_(lora_b)
                found.add(canonical(name))
    if found != set(adapters):
        raise ValueError(f"adapters are missing on {sorted(set(adapters) - found)}")


class _ReferenceLinear(nn.Module):
    def __init__(self, linear: nn.Linear, lora_a: Tensor, lora_b: Tensor, h0: list[Tensor] | None, lambda_: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a, self.lora_b = (nn.Parameter(tensor.clone()) for tensor in (lora_a, lora_b))
        self.h0, self.lambda_ = h0, lambda_

    def forward(self, x: Tensor) -> Tensor:  # [..., K]
        mix = (None, 0.0) if self.h0 is None else (self.h0[0], self.lambda_)
        return reference.lora_linear(x, self.weight, self.bias, self.lora_a, self.lora_b, SCALING, *mix)


def reference_model(
    frozen: nn.Module, adapters: dict[str, tuple[Tensor, Tensor]], setting: Setting, mixes: bool
) -> nn.Module:
    """The definition on the weights of a frozen model, in float32; its h0 gets no gradient."""
    model = copy.deepcopy(frozen).float()
    h0: list[Tensor] = []
    first_block(model).register_forward_pre_hook(lambda _, args: h0.__setitem__(slice(None), [args[0].detach()]))
    for name, (lora_a, lora_b) in adapters.items():
        parent, _, own = name.rpartition(".")
        mixed = mixes and name.endswith(setting.linears.mixing)
        linear = _ReferenceLinear(
            model.get_submodule(name), lora_a, lora_b, h0 if mixed else None, setting.lambda_
        )
        setattr(model.get_submodule(parent), own, linear)
    return model.train()


def gradients_of(model: nn.Module) -> Values:
    """Those of A and B, by "q_proj.A" and the like, of a provider's model or the reference."""
    values = {}
    for name, module in model.named_modules():
        if isinstance(module, _ReferenceLinear):
            pair = module.lora_a, module.lora_b
        elif hasattr(module, "lora_A") and ADAPTER in module.lora_A:
            pair = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        else:
            continue
        for letter, parameter in zip("AB", pair, strict=True):
            if parameter.grad is None:
                raise ValueError(f"{canonical(name)}: {letter} has no gradient")
            values[f"gradient of {canonical(name)}.{letter}"] = parameter.grad.detach()
    return values


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        worst: the largest error, over the tolerance: above 1 it is wrong.
        what: of which result.
        problem: what is wrong, or None.
    """

    worst: float
    what: str
    problem: str | None = None


def compare(found: Values, expected: Values) -> Verdict:
    """Each result against the definition's, all of it and line by line; what is not finite is wrong."""
    if found.keys() != expected.keys():
        return Verdict(math.inf, "results", f"has {sorted(found)} instead of {sorted(expected)}")
    worst = Verdict(0.0, "nothing")
    for name, value in found.items():
        for what, error in _errors(value, expected[name]).items():
            relative = error / (TOLERANCE if what == "" else TOLERANCE_OF_A_LINE)
            if not relative <= worst.worst:  # also NaN
                worst = Verdict(relative, f"{name}{what}")
    if worst.worst <= 1:
        return worst
    return Verdict(worst.worst, worst.what, f"{worst.what} is off by {worst.worst:.3g} times what is tolerated")


def _errors(found: Tensor, expected: Tensor) -> dict[str, float]:
    exact = expected.float().reshape(-1, expected.shape[-1])
    error = found.float().reshape(exact.shape) - exact
    size = exact.norm()
    rows, cols = (math.sqrt(n) for n in exact.shape)
    return {
        "": float(error.norm() / size),
        ", its worst row,": float(error.norm(dim=1).max() * rows / size),
        ", its worst column,": float(error.norm(dim=0).max() * cols / size),
    }


def dropouts(model: nn.Module) -> list[nn.Dropout]:
    return [module for module in model.modules() if isinstance(module, nn.Dropout)]


def without_dropout(model: nn.Module, values: Callable[[], Values]) -> Values:
    """What a model computes with every rate at 0."""
    rates = [(module, module.p) for module in dropouts(model)]
    try:
        for module, _ in rates:
            module.p = 0.0
        return values()
    finally:
        for module, rate in rates:
            module.p = rate


def dropout_problem(found: Values, expected: Values, rate: float) -> str | None:
    """What is wrong with results under dropout, if something is, against those without.

    A mask of rate p changes ``A x`` by ``sqrt(p / (1 - p))`` of itself where x is random, and so the gradients of B
    with it; those of A, a sum over masked tokens, alike.
    """
    usual = math.sqrt(rate / (1 - rate))
    for name, value in found.items():
        if not name.startswith("gradient of"):
            continue
        change = _errors(value, expected[name])[""]
        if not usual / 4 <= change <= 4 * usual:
            return f"{name} changes by {change:.3g} of itself under dropout {rate}; about {usual:.2g} is usual"
    return None
