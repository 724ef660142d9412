"""What a LoRA layer computes for a SIBO adapter: find h0, and call one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant

from sibo_triton import reference
from sibo_triton.layers.adapters import LORA_LAMBDA_NAME
from sibo_triton.layers.obstacles import apply_dropout, parameter
from sibo_triton.layers.siblings import shared_output
from sibo_triton.layers.sites import initial_residual_for, mixing_arguments, site_of
from sibo_triton.lora.paths import adapter_modules, obstacle_to_fusing, obstacle_to_lora
from sibo_triton.lora.refusals import refuse_merge
from sibo_triton.ops import Group, LoraArguments, add_lora, lora_linear, lora_linear_group


class FusedLinear(LoraLinear):
    """PEFT's lora.Linear; if a single SIBO adapter is active, it and the frozen linear run as one operation.

    Otherwise, for example with a plain adapter, PEFT's own forward runs. `install.match_class` turns a layer that PEFT
    made into one of these, and back, by setting its class.
    """

    def _get_name(self) -> str:
        return "Linear"  # printed as before: what it holds is the same

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            y = shared_output(self, x)
            if y is not None:
                return y
        adapter_name = self._own_adapter(x)
        if adapter_name is None:
            return super().forward(x)
        obstacle = obstacle_to_fusing(self, x)
        if obstacle is None:
            return lora_linear(x, *self.arguments_of([self], adapter_name, x)[0])
        site = site_of(self, adapter_name)
        site.notices.warn_once(site.name, "the frozen layer and its adapter run apart", obstacle)
        return add_lora(self.base_layer(x), x, *_adapter_arguments([self], adapter_name, x)[0])

    @staticmethod
    def arguments_of(layers: Sequence[FusedLinear], adapter_name: str, x: torch.Tensor) -> list[LoraArguments]:
        """The arguments of `lora_linear` for each of these layers, which get the same x."""
        arguments = []
        for layer, of_adapter in zip(layers, _adapter_arguments(layers, adapter_name, x), strict=True):
            base: Any = layer._modules["base_layer"]
            arguments.append(LoraArguments._make((parameter(base, "weight"), parameter(base, "bias"), *of_adapter)))
        return arguments

    @staticmethod
    def group_of(layers: Sequence[FusedLinear], adapter_name: str, x: torch.Tensor) -> Group | None:
        """One operation for these layers, which get the same x; None where each must run alone."""
        return lora_linear_group(x, FusedLinear.arguments_of(layers, adapter_name, x))

    def tensors_read(self, adapter_name: str) -> list[torch.Tensor]:
        """The tensors that the operation reads: weights and biases, and those of lambda where it mixes."""
        base: Any = self._modules["base_layer"]
        tensors: list[torch.Tensor] = []
        for module in (base, *adapter_modules(self, adapter_name)[:2]):
            bias = parameter(module, "bias")
            tensors += (parameter(module, "weight"),) if bias is None else (parameter(module, "weight"), bias)
        lambdas: Any = self._modules.get(LORA_LAMBDA_NAME)
        if lambdas is not None and adapter_name in lambdas:
            tensors += lambdas[adapter_name].stored
        return tensors

    def fused_adapter(self, x: torch.Tensor) -> str | None:
        """The active adapter, if it is the only one and can run as one operation with the frozen linear; else None."""
        name = self._own_adapter(x)
        return None if name is None or obstacle_to_fusing(self, x) is not None else name

    def _own_adapter(self, x: torch.Tensor) -> str | None:
        """The active adapter, if it is the only one, SIBO or accelerated, and runs as one operation; else None.

        Else PEFT's forward calls the variant, which looks again and warns.
        """
        name = self.only_active()
        if name is None or name not in self.__dict__.get("sibo_sites", ()):
            return None
        return None if obstacle_to_lora(self, name, x) is not None else name

    def only_active(self) -> str | None:
        """The active adapter of this layer, if there is exactly one and none is merged; else None."""
        if self._disable_adapters or self.merged_adapters:
            return None
        active = self.active_adapter
        if isinstance(active, str):
            active = (active,)
        has: Any = self._modules["lora_A"]._modules
        names = [name for name in active if name in has]
        return names[0] if len(names) == 1 else None


class SiboLoraVariant(LoraVariant):
    """Adds an adapter to what PEFT's layer computed: result + s * B A drop((1 - lambda) * x + lambda * h0)."""

    def supports_lora_conversion(self) -> bool:
        return False  # an update of the weight that gives the same output does not exist

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """Does nothing: `install` sets the adapter up, after PEFT has made the layer."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Add the adapter's output to `result` = W0 x + b.

        Args:
            module: the LoRA layer.
            active_adapter: the adapter that runs.
            x: [..., K].
            result: [..., N].

        Returns:
            y, [..., N].

        Raises:
            RuntimeError: no forward of the layer's stack runs in this thread.
            ValueError: h0 and x are not of the same tokens.
        """
        obstacle = obstacle_to_lora(module, active_adapter, x)
        if obstacle is None:
            return add_lora(result, x, *_adapter_arguments([module], active_adapter, x)[0])
        site = site_of(module, active_adapter)
        site.notices.warn_once(site.name, "the adapter's modules are called one by one", obstacle)
        if getattr(module, "cast_input_dtype_enabled", True):  # as PEFT does where no variant is ours
            x = x.to(module.lora_A[active_adapter].weight.dtype)
        if site.residual is not None:
            h0 = initial_residual_for(module, active_adapter, x)
            x = reference.mix(x, h0, getattr(module, LORA_LAMBDA_NAME)[active_adapter]())
        down = module.lora_A[active_adapter](apply_dropout(module.lora_dropout[active_adapter], x))
        return result + module.lora_B[active_adapter](down) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        refuse_merge(f"{site_of(module, active_adapter).name}, adapter {active_adapter!r}")

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        refuse_merge(f"{site_of(module, active_adapter).name}, adapter {active_adapter!r}")

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        refuse_merge(f"{site_of(module, active_adapter).name}, adapter {active_adapter!r}")


class AcceleratedLora(SiboLoraVariant):
    """Plain LoRA (lambda = 0) by the fused operations. PEFT merges and converts it as if this were not there."""

    def supports_lora_conversion(self) -> bool:
        return True


def _adapter_arguments(layers: Sequence[LoraLayer], adapter_name: str, x: torch.Tensor) -> list[tuple]:
    """The arguments of the operations, from A on, for one adapter of each layer."""
    modules = [adapter_modules(layer, adapter_name) for layer in layers]
    mixings = mixing_arguments(layers, adapter_name, x, [dropout for *_, dropout in modules], LORA_LAMBDA_NAME)
    arguments = []
    for layer, (lora_a, lora_b, _), mixing in zip(layers, modules, mixings, strict=True):
        weights = parameter(lora_a, "weight"), parameter(lora_b, "weight")
        arguments.append((*weights, layer.scaling[adapter_name], *mixing, parameter(lora_b, "bias")))
    return arguments
