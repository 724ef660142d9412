"""What the benchmarks compare: each provider puts its adapters on a model, and the benchmark runs the model.

All get the same frozen model and the same setting, and train A and B of the same linears. A provider that cannot do a
setting says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from sibo_triton.lora import SiboLoraConfig
from sibo_triton.lora.forward import FusedLinear, SiboLoraVariant
from sibo_triton.lora.layer import MixingSite
from sibo_triton.lora.paths import Notices

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MIXING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # they have the hidden state's width, as h0 has
ADAPTER = "default"


@dataclass(frozen=True)
class Setting:
    """How the adapters are made.

    Attributes:
        fp32_adapters: A and B in float32, PEFT's default; else in the frozen model's dtype.
        dropout: its rate.
        rank: r.
        lambda_: the share of h0, where a provider mixes.
    """

    fp32_adapters: bool
    dropout: float
    rank: int = 16
    lambda_: float = 0.1

    def __str__(self) -> str:
        return f"{'fp32' if self.fp32_adapters else 'bf16'} adapters, dropout {self.dropout:g}"


class Provider:
    """The frozen model itself: the floor. The others override what they do otherwise."""

    name = "frozen model"
    mixes = False

    def unavailable(self, setting: Setting) -> str | None:
        """Why it cannot do the setting, or None."""
        return None

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        """The model with adapters, training; `model` may be changed. Its parameters are frozen."""
        return model.train()


class Peft(Provider):
    """PEFT's LoRA, eager, as it is installed."""

    name = "PEFT LoRA"
    config: type[LoraConfig] = LoraConfig

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        config = self.config(
            r=setting.rank,
            lora_alpha=2 * setting.rank,
            lora_dropout=setting.dropout,
            target_modules=list(ALL_LINEARS),
            **self.more(setting),
        )
        return get_peft_model(model, config, autocast_adapter_dtype=setting.fp32_adapters).train()

    def more(self, setting: Setting) -> dict[str, Any]:
        """Further options of the config."""
        return {}


class PeftMixed(Peft):
    """PEFT's LoRA with one `torch.lerp` in front of the adapter: SIBO-LoRA as one would write it in a minute.

    h0 is cast to the adapter's dtype in each layer, as PEFT casts x; it is detached, as the embeddings are frozen.
    """

    name = "PEFT LoRA + eager mix"
    mixes = True

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        h0: list[Tensor] = []
        model.layers[0].register_forward_pre_hook(lambda block, args: h0.__setitem__(slice(None), [args[0].detach()]))
        wrapped = super().wrap(model, setting)
        for name, layer in _lora_linears(wrapped):
            if name.endswith(MIXING):
                layer.lora_dropout[ADAPTER] = _MixThenDrop(h0, setting.lambda_, layer.lora_dropout[ADAPTER])
        return wrapped


class _MixThenDrop(nn.Module):
    """Stands where PEFT's layer calls its dropout, with x in the adapter's dtype."""

    def __init__(self, h0: list[Tensor], lambda_: float, dropout: nn.Module) -> None:
        super().__init__()
        self.h0, self.lambda_, self.dropout = h0, lambda_, dropout

    def forward(self, x: Tensor) -> Tensor:  # [..., K]
        return self.dropout(torch.lerp(x, self.h0[0].to(x.dtype), self.lambda_))


class Addmm(Peft):
    """The up-projection accumulated in place on the frozen output, and a backward by hand, as fast libraries do.

    It is written here, for one linear at a time. Libraries that work this way have no dropout, and multiply float32
    adapters in the dtype of x. t is kept and not recomputed, which moves fewer bytes.
    """

    name = "addmm_ scheme"

    def unavailable(self, setting: Setting) -> str | None:
        return "no dropout" if setting.dropout else None

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        wrapped = super().wrap(model, setting)
        for _, layer in _lora_linears(wrapped):
            layer.__class__ = _AddmmLayer
        return wrapped


class _AddmmLayer(LoraLinear):
    def forward(self, x: Tensor) -> Tensor:  # [..., K]
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return _AddmmLinear.apply(x, self.base_layer.weight, a, b, self.scaling[ADAPTER])


class _AddmmLinear(torch.autograd.Function):
    """``y = x W0^T``, then ``y += s t B^T`` with ``t = x A^T``; without a bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        a, b, matrix = lora_a.to(x.dtype), lora_b.to(x.dtype), x.reshape(-1, x.shape[-1])
        t = matrix @ a.T  # [M, r]
        y = matrix @ weight.T  # [M, N]
        y.addmm_(t, b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b, t)
        ctx.scaling = scaling
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]])  # a view must not be returned

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, t = ctx.saved_tensors
        a, b, matrix = lora_a.to(x.dtype), lora_b.to(x.dtype), x.reshape(-1, x.shape[-1])
        g = grad_y.reshape(-1, grad_y.shape[-1])  # [M, N]
        u = (g @ b).mul_(ctx.scaling)  # [M, r]
        grad_a, grad_b = u.T @ matrix, (g.T @ t).mul_(ctx.scaling)
        dx = (g @ weight).addmm_(u, a)  # [M, K]
        return dx.view(x.shape), None, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype), None


class OursLora(Peft):
    """Our kernels at lambda = 0: PEFT's layers, ours by their class."""

    name = "ours, lambda = 0"

    def wrap(self, model: nn.Module, setting: Setting) -> nn.Module:
        wrapped = super().wrap(model, setting)
        for name, layer in _lora_linears(wrapped):
            layer.sibo_sites = {ADAPTER: MixingSite(name, None, "", Notices())}
            layer.lora_variant[ADAPTER] = SiboLoraVariant()
            layer.__class__ = FusedLinear
        return wrapped


class OursSibo(Peft):
    """SIBO-LoRA as a user gets it."""

    name = "ours, SIBO"
    mixes = True
    config = SiboLoraConfig

    def more(self, setting: Setting) -> dict[str, Any]:
        return {"sibo_lambda": setting.lambda_, "sibo_target_modules": list(MIXING)}


#: In the order of tables; the floor first.
PROVIDERS: tuple[Provider, ...] = (Provider(), Peft(), Addmm(), OursLora(), PeftMixed(), OursSibo())


def _lora_linears(model: nn.Module) -> list[tuple[str, LoraLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]
