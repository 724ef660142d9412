"""The providers that benchmarks compare: each puts its adapters on a model, and the benchmark runs the model.

All get the same frozen model and setting, and train adapters on the same linears. A provider that does not support a
setting says why. LoRA's are here, those of bottleneck adapters in `bottleneck_providers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.results_file import FLOOR
from benchmarks.settings import AdapterSetting, Setting
from sibo_triton import SiboLoraConfig, accelerate
from sibo_triton.layers.siblings import attach_siblings, detach_siblings

ADAPTER = "default"


class Provider:
    """The frozen model: the floor, and the base class of the others."""

    name = FLOOR
    mixes = False
    compiles = False  # by torch.compile
    takes: type[AdapterSetting] = AdapterSetting  # the kind of setting

    def unavailable(self, setting: AdapterSetting) -> str | None:
        """Why it does not support the setting, or None."""
        return None

    def wrap(self, model: nn.Module, setting: Any) -> nn.Module:
        """The model with adapters, training; `model` may be changed. Its parameters are frozen."""
        return model.train()


class Peft(Provider):
    """PEFT's LoRA, eager, as it is installed."""

    name = "PEFT LoRA"
    takes = Setting
    config: type[LoraConfig] = LoraConfig

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        config = self.config(
            r=setting.rank,
            lora_alpha=2 * setting.rank,
            lora_dropout=setting.dropout,
            target_modules=list(setting.targets),
            **self.more(setting),
        )
        return get_peft_model(model, config, autocast_adapter_dtype=setting.fp32_adapters).train()

    def more(self, setting: Setting) -> dict[str, Any]:
        """Further options of the config."""
        return {}


class PeftMixed(Peft):
    """PEFT's LoRA with one `torch.lerp` in front of the adapter: the simplest implementation of SIBO-LoRA.

    h0 is cast to the adapter's dtype in each layer, as PEFT casts x; it is detached, as the embeddings are frozen.
    """

    name = "PEFT LoRA + eager mix"
    mixes = True

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        h0 = kept_initial_residual(model)
        wrapped = super().wrap(model, setting)
        for name, layer in _lora_linears(wrapped):
            if name.endswith(setting.mixing):
                layer.lora_dropout[ADAPTER] = _MixThenDrop(h0, setting.lambda_, layer.lora_dropout[ADAPTER])
        return wrapped


class _MixThenDrop(nn.Module):
    """Replaces the dropout of PEFT's layer, which is called with x in the adapter's dtype."""

    def __init__(self, h0: list[Tensor], lambda_: float, dropout: nn.Module) -> None:
        super().__init__()
        self.h0, self.lambda_, self.dropout = h0, lambda_, dropout

    def forward(self, x: Tensor) -> Tensor:  # [..., K]
        return self.dropout(torch.lerp(x, self.h0[0].to(x.dtype), self.lambda_))


class Addmm(Peft):
    """Accumulates the up-projection in place on the frozen output, with a manual backward, as fast libraries do.

    A reimplementation. Libraries that work this way have no dropout, and multiply float32 adapters in the dtype of x. t
    is kept instead of recomputed, which moves fewer bytes.
    """

    name = "addmm_ scheme"
    groups_siblings = False

    def unavailable(self, setting: Setting) -> str | None:
        return "no dropout" if setting.dropout else None

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        wrapped = super().wrap(model, setting)
        layers = dict(_lora_linears(wrapped))
        for name in layers:
            parent, _, child = name.rpartition(".")
            groups = setting.linears.groups if self.groups_siblings else ()
            group = next((group for group in groups if child in group), (child,))
            if group[0] == child:
                _Siblings([layers[f"{parent}.{sibling}"] for sibling in group])
        return wrapped


class AddmmGrouped(Addmm):
    """The same with q, k and v as one function, and gate and up as another: x is kept once, and dx is summed in place.

    Other optimisations of such libraries, such as a kernel for the MLP's activation, would also speed up a frozen model
    and are left out.
    """

    name = "addmm_ scheme, siblings grouped"
    groups_siblings = True


class _Siblings:
    """Linears that share x: the first that is called computes all of them."""

    def __init__(self, layers: list[LoraLinear]) -> None:
        self.layers = layers
        self.x: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}
        for layer in layers:
            layer.__class__ = _AddmmLayer
            layer.siblings = self

    def output(self, layer: LoraLinear, x: Tensor) -> Tensor:
        if self.x is not x:
            self.x = x
            tensors = [
                module.weight
                for sibling in self.layers
                for module in (sibling.base_layer, sibling.lora_A[ADAPTER], sibling.lora_B[ADAPTER])
            ]
            biases = [sibling.base_layer.bias for sibling in self.layers]
            outputs = _AddmmLinears.apply(x, layer.scaling[ADAPTER], biases, *tensors)
            self.outputs = {id(sibling): y for sibling, y in zip(self.layers, outputs, strict=True)}
        y = self.outputs.pop(id(layer))
        if not self.outputs:
            self.x = None
        return y


class _AddmmLayer(LoraLinear):
    siblings: _Siblings

    def forward(self, x: Tensor) -> Tensor:  # [..., K]
        return self.siblings.output(self, x)


class _AddmmLinears(torch.autograd.Function):
    """``y = x W0^T``, then ``y += s t B^T`` with ``t = x A^T``, for each W0, A, B; biases are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scaling: float, biases: list[Tensor | None], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        matrix, outputs, kept = x.reshape(-1, x.shape[-1]), [], []
        for (weight, lora_a, lora_b), bias in zip(_triples(weights), biases, strict=True):
            t = matrix @ lora_a.to(x.dtype).T  # [M, r]
            y = F.linear(matrix, weight, bias)  # [M, N]
            y.addmm_(t, lora_b.to(x.dtype).T, alpha=scaling)
            kept.append(t)
            # a view must not be returned from an autograd function
            outputs.append(torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]]))
        ctx.save_for_backward(x, *kept, *weights)
        ctx.scaling = scaling
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        kept, weights = rest[: len(grads)], rest[len(grads) :]
        matrix, dx, gradients = x.reshape(-1, x.shape[-1]), None, []
        for grad_y, t, (weight, lora_a, lora_b) in zip(grads, kept, _triples(weights), strict=True):
            g = grad_y.reshape(-1, grad_y.shape[-1])  # [M, N]
            u = (g @ lora_b.to(x.dtype)).mul_(ctx.scaling)  # [M, r]
            grad_a, grad_b = u.T @ matrix, (g.T @ t).mul_(ctx.scaling)
            dx = g @ weight if dx is None else dx.addmm_(g, weight)  # [M, K]
            dx.addmm_(u, lora_a.to(x.dtype))
            gradients += [None, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype)]
        return dx.view(x.shape), None, None, *gradients


def _triples(weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(W0, A, B) of each linear."""
    return list(zip(weights[::3], weights[1::3], weights[2::3], strict=True))


class OursLora(Peft):
    """Plain LoRA, accelerated, as a user gets it."""

    name = "ours, lambda = 0"

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        return _with_siblings(accelerate(super().wrap(model, setting)).train(), setting)


class OursSibo(Peft):
    """SIBO-LoRA as a user gets it."""

    name = "ours, SIBO"
    mixes = True
    config = SiboLoraConfig

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        return _with_siblings(super().wrap(model, setting), setting)

    def more(self, setting: Setting) -> dict[str, Any]:
        return {"sibo_lambda": setting.lambda_, "sibo_target_modules": list(setting.mixing)}


class OursLoraApart(OursLora):
    """Each layer alone, to compare with shared passes."""

    name = "ours, lambda = 0, layers apart"

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        return _apart(super().wrap(model, setting))


class OursSiboApart(OursSibo):
    """The same for SIBO-LoRA."""

    name = "ours, SIBO, layers apart"

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        return _apart(super().wrap(model, setting))


def _with_siblings(model: nn.Module, setting: Setting) -> nn.Module:
    """Declare which layers share x where the library cannot find out: single linears are no transformer."""
    if any(isinstance(module, PreTrainedModel) for module in model.modules()):
        return model
    for name, module in model.named_modules():
        children = module._modules.keys()
        groups = tuple(group for group in setting.linears.groups if len(group) > 1 and children >= set(group))
        if groups:
            attach_siblings(model, {name: groups})
    return model


def _apart(model: nn.Module) -> nn.Module:
    for module in model.modules():
        detach_siblings(module)
    return model


#: In the order of tables, the floor first.
PROVIDERS: tuple[Provider, ...] = (Provider(), Peft(), Addmm(), AddmmGrouped(), OursLora(), PeftMixed(), OursSibo())
#: Ours without grouping of siblings; counted but not timed.
APART: tuple[Provider, ...] = (OursLoraApart(), OursSiboApart())


def first_block(model: nn.Module) -> nn.Module:
    """The first of a model's transformer blocks, whose input is h0."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]


def kept_initial_residual(model: nn.Module) -> list[Tensor]:
    """A list that contains h0 from the beginning of each forward, detached because the embeddings are frozen."""
    h0: list[Tensor] = []
    first_block(model).register_forward_pre_hook(lambda _, args: h0.__setitem__(slice(None), [args[0].detach()]))
    return h0


def _lora_linears(model: nn.Module) -> list[tuple[str, LoraLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]
