"""The providers of bottleneck adapters. PEFT has none, so the peers are plain torch, written here."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.providers import Provider, kept_initial_residual
from benchmarks.settings import BottleneckSetting
from sibo_triton import SiboAdapterConfig, reference


class EagerAdapter(Provider):
    """Plain modules under autograd, as one would write them: Dropout, Linear, f, Linear, and the sum."""

    name = "eager adapter"
    takes = BottleneckSetting

    def wrap(self, model: nn.Module, setting: BottleneckSetting) -> nn.Module:
        h0 = kept_initial_residual(model) if self.mixes else None
        for name, linear in list(model.named_modules()):
            if name.endswith(setting.targets) and isinstance(linear, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, EagerLayer(linear, setting, h0))
        return model.train()


class EagerMixedAdapter(EagerAdapter):
    """The same with one `torch.lerp` in front of the dropout; h0 is detached, as the embeddings are frozen."""

    name = "eager adapter + eager mix"
    mixes = True


class EagerLayer(nn.Module):
    """A frozen linear with an adapter in front of it or parallel to it; in the forward, h0 is the list's only entry.

    A float32 adapter gets x and h0 cast to float32, and the sum is rounded once, as PEFT's LoRA layers do it.
    """

    def __init__(self, base_layer: nn.Linear, setting: BottleneckSetting, h0: list[Tensor] | None) -> None:
        super().__init__()
        weight = base_layer.weight
        dtype = torch.float32 if setting.fp32_adapters else weight.dtype
        written = weight.shape[1] if setting.placement == "series" else weight.shape[0]
        self.base_layer, self.setting, self.h0 = base_layer, setting, h0
        self.dropout = nn.Dropout(setting.dropout) if setting.dropout else nn.Identity()
        self.down, self.up = (
            nn.Linear(K, N, bias=setting.biases, device=weight.device, dtype=dtype)
            for K, N in ((weight.shape[1], setting.bottleneck_size), (setting.bottleneck_size, written))
        )
        self.activation = reference.ACTIVATIONS[setting.activation]

    def forward(self, x: Tensor) -> Tensor:  # [..., K]
        v = x.to(self.down.weight.dtype)
        if self.h0 is not None:
            v = torch.lerp(v, self.h0[0].to(v.dtype), self.setting.lambda_)
        branch = self.up(self.activation(self.down(self.dropout(v))))
        in_series = self.setting.placement == "series"
        base = x if in_series else self.base_layer(x)
        # a scaling of 1 costs no launch, forward or backward
        y = torch.add(base, branch, alpha=self.setting.scaling).to(x.dtype)
        return self.base_layer(y) if in_series else y


class OursAdapter(Provider):
    """The plain bottleneck adapter, as a user gets it."""

    name = "ours, adapter, lambda = 0"
    takes = BottleneckSetting

    def wrap(self, model: nn.Module, setting: BottleneckSetting) -> nn.Module:
        config = SiboAdapterConfig(
            bottleneck_size=setting.bottleneck_size,
            activation=setting.activation,
            placement=setting.placement,
            adapter_dropout=setting.dropout,
            adapter_bias=setting.biases,
            scaling=setting.scaling,
            target_modules=list(setting.targets),
            sibo_lambda=setting.lambda_ if self.mixes else 0.0,
            sibo_target_modules=list(setting.mixing) if self.mixes else None,
        )
        return get_peft_model(model, config, autocast_adapter_dtype=setting.fp32_adapters).train()


class OursSiboAdapter(OursAdapter):
    """SIBO's bottleneck adapter as a user gets it."""

    name = "ours, SIBO adapter"
    mixes = True


#: In the order of tables; the frozen model, which comes first, is shared with LoRA's.
BOTTLENECK_PROVIDERS: tuple[Provider, ...] = (EagerAdapter(), OursAdapter(), EagerMixedAdapter(), OursSiboAdapter())
