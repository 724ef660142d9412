"""The peers of the timed benchmarks only: PEFT's under torch.compile, and other libraries if they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from types import MethodType, ModuleType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from benchmarks.bottleneck_providers import BOTTLENECK_PROVIDERS, EagerAdapter, EagerMixedAdapter
from benchmarks.providers import ADAPTER, PROVIDERS, Peft, PeftMixed, Provider
from benchmarks.settings import AdapterSetting, Linears, Setting


class Compiled(Provider):
    """Another provider's model under `torch.compile`, at fixed shapes."""

    compiles = True

    def __init__(self, inner: Provider) -> None:
        self.inner, self.name, self.mixes = inner, f"{inner.name}, compiled", inner.mixes
        self.takes = inner.takes

    def unavailable(self, setting: AdapterSetting) -> str | None:
        return self.inner.unavailable(setting)

    def wrap(self, model: nn.Module, setting: AdapterSetting) -> nn.Module:
        wrapped: Any = torch.compile(self.inner.wrap(model, setting), dynamic=False)
        return wrapped


class Library(Peft):
    """A library that replaces the computation of PEFT's layers.

    Written from its source, and not run by us yet; all values are checked before it is timed.
    """

    module: str

    def unavailable(self, setting: Setting) -> str | None:
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            return f"{self.module} cannot be imported: it is not installed"
        try:
            self.functions()
        except Exception as error:  # whatever a library raises if it does not support the device or the other libraries
            return f"{self.module} cannot be imported: {type(error).__name__}: {error}".splitlines()[0][:300]
        return None

    def functions(self) -> ModuleType:
        return importlib.import_module(self.module)


class Unsloth(Library):
    """Unsloth's functions for q, k and v together, for o, and for the MLP of a Llama, as its own patches call them.

    They include its kernel for the MLP's activation. Importing it changes transformers for the whole process, which may
    affect the frozen model and the others.
    """

    name = "Unsloth"
    module = "unsloth.kernels"

    def unavailable(self, setting: Setting) -> str | None:
        if setting.dropout:
            return "no dropout: it falls back to PEFT's layers"
        if setting.linears != Linears():
            return "it has functions for whole layers of a Llama only"
        return super().unavailable(setting)

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        wrapped, functions = super().wrap(model, setting), self.functions()
        for module in wrapped.modules():
            if isinstance(getattr(module, "q_proj", None), LoraLinear):
                if module.q_proj.base_layer.bias is not None or hasattr(module, "q_norm"):
                    raise ValueError("Unsloth has no function for q, k and v of this model as transformers calls them")
                _QkvTogether(module, functions.apply_lora_qkv)
                module.o_proj.forward = _CallOf(functions.apply_lora_o, module)
            if isinstance(getattr(module, "gate_proj", None), LoraLinear):
                if getattr(module.config, "hidden_act", None) != "silu":
                    raise ValueError(f"its MLP is called here for silu only, not {module.config.hidden_act!r}")
                module.forward = MethodType(functions.apply_lora_mlp_swiglu, module)
        return wrapped


class _CallOf:
    """A function of an attention module, called with x alone."""

    def __init__(self, function: Any, attention: nn.Module) -> None:
        self.function, self.attention = function, attention

    def __call__(self, x: Tensor) -> Any:
        return self.function(self.attention, x)


class _QkvTogether:
    """The first of q, k and v that is called with a new x computes all three."""

    def __init__(self, attention: nn.Module, function: Any) -> None:
        self.call = _CallOf(function, attention)
        self.x: Tensor | None = None
        self.left: dict[str, Tensor] = {}
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(attention, name).forward = self._forward_of(name)

    def _forward_of(self, name: str) -> Any:
        def forward(x: Tensor) -> Tensor:
            if self.x is not x:
                self.x, self.left = x, dict(zip(("q_proj", "k_proj", "v_proj"), self.call(x), strict=True))
            y = self.left.pop(name)
            if not self.left:
                self.x = None
            return y

        return forward


class LoraFusion(Library):
    """LoRAFusion's fused linear in place of each of PEFT's, called as by its patch, but only for these layers."""

    name = "LoRAFusion"
    module = "lorafusion.ops.lora_v1"

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        wrapped, function = super().wrap(model, setting), self.functions().fused_linear_lora
        for module in wrapped.modules():
            if isinstance(module, LoraLinear):
                module.forward = _FusedLinearOf(function, module)
        return wrapped


class _FusedLinearOf:
    def __init__(self, function: Any, layer: LoraLinear) -> None:
        self.function, self.layer = function, layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        lora_a, dropout = layer.lora_A[ADAPTER].weight, layer.lora_dropout[ADAPTER]
        y = self.function(
            x=x.to(lora_a.dtype),
            linear_w=layer.base_layer.weight,
            lora_a=lora_a,
            lora_b=layer.lora_B[ADAPTER].weight,
            alpha=layer.scaling[ADAPTER],
            dropout_p=dropout.p if isinstance(dropout, nn.Dropout) and layer.training else 0.0,
            linear_bias=layer.base_layer.bias,
        )
        return y.to(x.dtype)


_COMPILED = tuple(Compiled(provider) for provider in (Peft(), PeftMixed(), EagerAdapter(), EagerMixedAdapter()))
#: The providers of the timed benchmarks: the floor first, then those that are also counted, then the others.
TIMED: tuple[Provider, ...] = (*PROVIDERS, *BOTTLENECK_PROVIDERS, *_COMPILED, LoraFusion(), Unsloth())
