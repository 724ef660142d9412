"""The definition of each kind of adapter as a module in place of a frozen linear; access to providers' weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bottleneck_providers import EagerLayer
from benchmarks.providers import ADAPTER
from benchmarks.settings import AdapterSetting, BottleneckSetting, Setting
from sibo_triton import reference

SCALING = 2.0  # alpha is 2 r

Weights = dict[str, Tensor]


class Definition(nn.Module):
    """A linear with an adapter, which holds its own copy of the weights.

    Args:
        linear: frozen.
        weights: with the names of :meth:`draw`.
        setting: of the adapter.
        h0: contains the initial residual during the forward; None if the adapter does not mix.
    """

    #: The weights without the biases; dropout changes their gradients.
    matrices: tuple[str, ...]

    def __init__(self, linear: nn.Linear, weights: Weights, setting: Any, h0: list[Tensor] | None) -> None:
        super().__init__()
        self.weight, self.bias, self.setting, self.h0 = linear.weight, linear.bias, setting, h0
        self.adapter = nn.ParameterDict({name: tensor.clone() for name, tensor in weights.items()})

    @staticmethod
    def draw(K: int, N: int, setting: Any, normal: Callable[..., Tensor]) -> Weights:
        """Random weights for which the branch is about as large as the tensor to which it is added.

        Args:
            K, N: of the linear.
            setting: of the adapter.
            normal: makes a tensor from its shape and ``std``.
        """
        raise NotImplementedError

    @staticmethod
    def weights_of(module: nn.Module) -> Weights:
        """The weights of a provider's module by name; empty if it has no adapter of this kind."""
        raise NotImplementedError

    def mix(self) -> tuple[Tensor | None, float]:
        return (None, 0.0) if self.h0 is None else (self.h0[0], self.setting.lambda_)


class LoraDefinition(Definition):
    """A is ``[r, K]``, B ``[N, r]``."""

    matrices = ("A", "B")

    @staticmethod
    def draw(K: int, N: int, setting: Setting, normal: Callable[..., Tensor]) -> Weights:
        r = setting.rank
        return {"A": normal(r, K, std=1 / math.sqrt(K)), "B": normal(N, r, std=0.3 / math.sqrt(r))}

    @staticmethod
    def weights_of(module: Any) -> Weights:
        if not hasattr(module, "lora_A") or ADAPTER not in module.lora_A:
            return {}
        return {"A": module.lora_A[ADAPTER].weight, "B": module.lora_B[ADAPTER].weight}

    def forward(self, x: Tensor) -> Tensor:  # [..., K]
        lora_a, lora_b = self.adapter["A"], self.adapter["B"]
        return reference.lora_linear(x, self.weight, self.bias, lora_a, lora_b, SCALING, *self.mix())


class BottleneckDefinition(Definition):
    """W_down is ``[bottleneck, K]``, W_up ``[K, bottleneck]`` in series and ``[N, bottleneck]`` in parallel."""

    matrices = ("down", "up")

    @staticmethod
    def draw(K: int, N: int, setting: BottleneckSetting, normal: Callable[..., Tensor]) -> Weights:
        size, written = setting.bottleneck_size, K if setting.placement == "series" else N
        weights = {"down": normal(size, K, std=1 / math.sqrt(K)), "up": normal(written, size, std=1 / math.sqrt(size))}
        if setting.biases:
            weights |= {"down_bias": normal(size, std=0.3), "up_bias": normal(written, std=0.3)}
        return weights

    @staticmethod
    def weights_of(module: Any) -> Weights:
        if isinstance(module, EagerLayer):
            down, up = module.down, module.up
        elif ADAPTER in getattr(module, "sibo_adapter_down", ()):
            down, up = module.sibo_adapter_down[ADAPTER], module.sibo_adapter_up[ADAPTER]
        else:
            return {}
        biases = {} if down.bias is None else {"down_bias": down.bias, "up_bias": up.bias}
        return {"down": down.weight, "up": up.weight, **biases}

    def forward(self, x: Tensor) -> Tensor:  # [..., K]
        in_series = self.setting.placement == "series"
        base = x if in_series else F.linear(x, self.weight, self.bias)
        h0, lambda_ = self.mix()
        y = reference.add_bottleneck(
            base,
            x,
            self.adapter["down"],
            self.adapter["up"],
            self.setting.scaling,
            activation=self.setting.activation,
            down_bias=self.adapter["down_bias"] if self.setting.biases else None,
            up_bias=self.adapter["up_bias"] if self.setting.biases else None,
            initial_residual=h0,
            lambda_=lambda_,
        )
        return F.linear(y, self.weight, self.bias) if in_series else y


DEFINITIONS: dict[type[AdapterSetting], type[Definition]] = {
    Setting: LoraDefinition,
    BottleneckSetting: BottleneckDefinition,
}


def weights_of(module: nn.Module) -> Weights:
    """The adapter's weights of a provider's module or of a definition, by name; empty if it has no adapter."""
    if isinstance(module, Definition):
        return dict(module.adapter.items())
    for definition in DEFINITIONS.values():
        if weights := definition.weights_of(module):
            return weights
    return {}
