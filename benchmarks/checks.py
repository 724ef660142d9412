"""Checks a provider before it is timed: outputs and gradients are compared with the definition's.

The reference is the same model in float32 whose linears are those of `benchmarks/definitions.py`, on the same weights.
Providers draw different dropout masks, so values are compared with the rate at 0; then the rate is restored and the
gradients must change by about as much as a mask changes them (`dropout_problem`).
"""

from __future__ import annotations

import copy
import math
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.bottleneck_providers import EagerAdapter, EagerMixedAdapter
from benchmarks.definitions import DEFINITIONS, Weights, weights_of
from benchmarks.models import copy_of
from benchmarks.providers import Peft, PeftMixed, Provider, kept_initial_residual
from benchmarks.results_file import FLOOR
from benchmarks.settings import AdapterSetting

#: The norm of the error divided by that of the result, as a whole and for the worst row and column. In bfloat16 PEFT's
#: own LoRA reaches half of it on small shapes. Where its error is larger, others may have three times its error; for
#: bottleneck adapters the eager adapter sets this limit.
TOLERANCE, TOLERANCE_OF_A_LINE = 0.03, 0.15
#: The frozen model and stock PyTorch or PEFT show how large rounding errors are.
STOCK = (Provider, Peft, PeftMixed, EagerAdapter, EagerMixedAdapter)
SLACK_OF_STOCK, SLACK_OVER_STOCK = 5.0, 3.0
Values = dict[str, Tensor]


def canonical(name: str) -> str:
    """A linear's name in the base model, without the prefixes of PEFT and torch.compile."""
    name = name.replace("_orig_mod.", "")
    return name.removeprefix("base_model.model.")


def adapters_for(frozen: nn.Module, setting: AdapterSetting) -> dict[str, Weights]:
    """The adapter's weights for each linear that gets one, random, seeded by its name.

    In float32, rounded to the adapter's dtype.
    """
    adapters = {}
    for name, linear in frozen.named_modules():
        if not isinstance(linear, nn.Linear) or not name.endswith(setting.targets):
            continue
        (N, K), device = linear.weight.shape, linear.weight.device
        dtype = torch.float32 if setting.fp32_adapters else linear.weight.dtype
        random = partial(torch.randn, generator=torch.Generator(device).manual_seed(zlib.crc32(name.encode())))

        def normal(*shape: int, std: float, random: Any = random, dtype: Any = dtype, device: Any = device) -> Tensor:
            return (random(*shape, device=device) * std).to(dtype).float()

        adapters[name] = DEFINITIONS[type(setting)].draw(K, N, setting, normal)
    return adapters


def put_adapters(model: nn.Module, adapters: dict[str, Weights]) -> None:
    """Give a provider's model these adapters' weights.

    Raises:
        ValueError: the model's adapters are not on exactly these linears, with exactly these weights.
    """
    placed = set()
    with torch.no_grad():
        for name, module in model.named_modules():
            weights = weights_of(module)
            if weights:
                adapter = adapters[canonical(name)]
                if weights.keys() != adapter.keys():
                    raise ValueError(f"{canonical(name)} has {sorted(weights)} instead of {sorted(adapter)}")
                for weight, tensor in weights.items():
                    tensor.copy_(adapter[weight])
                placed.add(canonical(name))
    if placed != set(adapters):
        raise ValueError(f"adapters are missing on {sorted(set(adapters) - placed)}")


@contextmanager
def without_known_warnings() -> Iterator[None]:
    """Suppress warnings that each provider of each row would repeat."""
    with warnings.catch_warnings():
        # the trial run finds nothing in a part of a model: its mixing linears are named
        warnings.filterwarnings("ignore", message="What feeds modules|Which layers get the same input")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


def built(
    provider: Provider, frozen: nn.Module, setting: AdapterSetting, adapters: dict[str, Weights], trains: bool
) -> nn.Module:
    """A provider's model on the weights of the frozen one, with these adapters, for training or for inference."""
    with without_known_warnings():
        model = provider.wrap(copy_of(frozen, trains), setting)
    if type(provider) is not Provider:
        put_adapters(model, adapters)
    return model.train(trains)


def reference_model(frozen: nn.Module, adapters: dict[str, Weights], setting: AdapterSetting, mixes: bool) -> nn.Module:
    """The definition on the weights of a frozen model, in float32; its h0 gets no gradient."""
    model = copy.deepcopy(frozen).float()
    if isinstance(model, PreTrainedModel):
        model.enable_input_require_grads()  # as in `copy_of`
    h0 = kept_initial_residual(model)
    for name, weights in adapters.items():
        parent, _, child = name.rpartition(".")
        mixed = mixes and name.endswith(setting.mixing)
        definition = DEFINITIONS[type(setting)]
        linear = definition(model.get_submodule(name), weights, setting, h0 if mixed else None)
        setattr(model.get_submodule(parent), child, linear)
    return model.train()


def gradients_of(model: nn.Module) -> Values:
    """The gradients of the adapters' weights in a provider's model or the reference, by names such as "q_proj.A"."""
    values = {}
    for name, module in model.named_modules():
        for weight, parameter in weights_of(module).items():
            if parameter.grad is None:
                raise ValueError(f"{canonical(name)}: {weight} has no gradient")
            values[f"gradient of {canonical(name)}.{weight}"] = parameter.grad.detach()
    return values


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    Attributes:
        worst: the largest error divided by the tolerance; above 1 the provider is wrong.
        what: the result that has this error.
        problem: what is wrong, or None.
    """

    worst: float
    what: str
    problem: str | None = None


def compare(actual: Values, expected: Values, allowed: dict[str, float] | None = None) -> Verdict:
    """Compare each result with the definition's, as a whole and by rows and columns; non-finite values are wrong.

    Args:
        actual, expected: with the same names.
        allowed: errors that are allowed beyond the tolerances, by the names of :func:`errors`.
    """
    if actual.keys() != expected.keys():
        return Verdict(math.inf, "results", f"has {sorted(actual)} instead of {sorted(expected)}")
    worst = Verdict(0.0, "nothing")
    for what, error in errors(actual, expected).items():
        relative = error / max(tolerance_of(what), (allowed or {}).get(what, 0.0))
        if not relative <= worst.worst:  # also NaN
            worst = Verdict(relative, what)
    if worst.worst <= 1:
        return worst
    return replace(worst, problem=f"{worst.what} is off by {worst.worst:.3g} times what is tolerated")


LINES = (", worst row", ", worst column")


def tolerance_of(what: str) -> float:
    """The relative error that is allowed, by the names of :func:`errors`."""
    return TOLERANCE_OF_A_LINE if what.endswith(LINES) else TOLERANCE


def errors(actual: Values, expected: Values) -> dict[str, float]:
    """The norm of each result's error divided by that of the result, also for the worst row and column."""
    table = {}
    for name, value in actual.items():
        exact = expected[name].float().reshape(-1, expected[name].shape[-1])
        error = value.float().reshape(exact.shape) - exact
        size = exact.norm()
        table[name] = float(error.norm() / size)
        for dim, what in enumerate(LINES):
            table[name + what] = float(error.norm(dim=1 - dim).max() * math.sqrt(exact.shape[dim]) / size)
    return table


class Yardsticks:
    """Verdicts on providers; a stock provider must precede those whose limits depend on its error."""

    def __init__(self) -> None:
        self.allowed: dict[bool, dict[str, float]] = {}  # by whether it mixes

    def verdict(self, provider: Provider, actual: Values, expected: Values) -> Verdict:
        """Compare what a provider computes without dropout with the definition."""
        stock = type(provider) in STOCK
        if not stock or actual.keys() != expected.keys():
            allowed = self.allowed.get(provider.mixes, next(iter(self.allowed.values()), None))
            return compare(actual, expected, allowed)
        stock_errors = errors(actual, expected)
        if type(provider) is not Provider:
            self.allowed[provider.mixes] = {what: SLACK_OVER_STOCK * error for what, error in stock_errors.items()}
        slack = {what: SLACK_OF_STOCK * tolerance_of(what) for what in stock_errors}
        return compare(actual, expected, slack)


class SharedWeights:
    """A comparison's frozen model and adapters, and the definition's results; shared by all providers.

    Args:
        frozen: in bfloat16, on the device.
        setting: of the adapters.
        evaluates: whether models run in evaluation mode.
    """

    def __init__(self, frozen: nn.Module, setting: AdapterSetting, evaluates: bool = False) -> None:
        self.frozen, self.setting, self.evaluates = frozen, setting, evaluates
        self.adapters = adapters_for(frozen, setting)
        self._expected: dict[str, Values] = {}
        self._yardsticks = Yardsticks()

    def model(self, provider: Provider) -> nn.Module:
        """A provider's model on these weights."""
        return built(provider, self.frozen, self.setting, self.adapters, not self.evaluates)

    def expected(self, provider: Provider, values: Callable[[nn.Module], Values]) -> Values:
        """The definition's results: `values` of its model, in float32."""
        kind = "frozen" if type(provider) is Provider else "mixed" if provider.mixes else "plain"
        if kind not in self._expected:
            adapters = {} if kind == "frozen" else self.adapters
            with without_known_warnings():
                model = reference_model(self.frozen, adapters, self.setting, provider.mixes).train(not self.evaluates)
            self._expected[kind] = values(model)
        return self._expected[kind]

    def verdict(self, provider: Provider, actual: Values, expected: Values) -> Verdict:
        """See :class:`Yardsticks`."""
        return self._yardsticks.verdict(provider, actual, expected)

    def check(self, provider: Provider, model: nn.Module, values: Callable[[], Values], expected: Values) -> Verdict:
        """Compare a provider's results with the definition's, and ask whether dropout changes them as a mask would.

        With dropout a compiled model is only asked the latter: another rate would be another graph.

        Args:
            model: the provider's.
            values: what it computes in training.
            expected: the same by the definition, without dropout.
        """
        rate = self.setting.dropout
        if rate and provider.compiles:
            verdict = Verdict(0.0, "nothing: how much dropout changes the gradients")
        else:
            verdict = self.verdict(provider, without_dropout(model, values), expected)
        if verdict.problem is None and rate and provider.name != FLOOR:
            verdict = replace(verdict, problem=dropout_problem(values(), expected, rate))
        return verdict


def dropouts(model: nn.Module) -> list[nn.Dropout]:
    return [module for module in model.modules() if isinstance(module, nn.Dropout)]


def without_dropout(model: nn.Module, values: Callable[[], Values]) -> Values:
    """What a model computes with every dropout rate at 0."""
    rates = [(module, module.p) for module in dropouts(model)]
    try:
        for module, _ in rates:
            module.p = 0.0
        return values()
    finally:
        for module, rate in rates:
            module.p = rate


def dropout_problem(actual: Values, expected: Values, rate: float) -> str | None:
    """What is wrong with the adapters' gradients under dropout, compared with those without; None if nothing is.

    A mask of rate p changes ``A x`` by a fraction ``sqrt(p / (1 - p))`` if x is random; in a whole layer gradients
    change by two or three times that. Missing gradients change by 1, wrong ones by more.
    """
    usual, changes = math.sqrt(rate / (1 - rate)), errors(actual, expected)
    matrices = tuple(f".{name}" for definition in DEFINITIONS.values() for name in definition.matrices)
    changes = {name: changes[name] for name in actual if name.startswith("gradient of") and name.endswith(matrices)}
    for name, change in changes.items():
        if not change >= usual / 6:
            return f"{name} changes by {change:.3g} of itself under dropout {rate}; about {usual:.2g} is usual"
    middle = sorted(changes.values())[len(changes) // 2]
    if not middle < 1:
        return f"half of the gradients change by {middle:.3g} and more of themselves under dropout {rate}"
    return None
