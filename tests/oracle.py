"""An independent SIBO: plain PEFT LoRA and hooks that mix in front of its dropout. It shares no code with ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def oracle_like(
    build: Callable[[], nn.Module], config_kwargs: dict, sibo_model: nn.Module, lambda_: float, mixing: Iterable[str]
) -> nn.Module:
    """A plain LoRA model with the weights of `sibo_model`, whose adapters on the modules in `mixing` read the mix.

    Args:
        build: makes the base model.
        config_kwargs: for `LoraConfig`.
        sibo_model: the `PeftModel` to be compared with.
        lambda_: the share of the initial residual.
        mixing: the full names of the mixing modules, from the base model's root.
    """
    model = get_peft_model(build(), LoraConfig(**config_kwargs))
    weights = {name: value for name, value in sibo_model.state_dict().items() if "sibo" not in name}
    model.load_state_dict(weights, strict=True)
    model.train(sibo_model.training)
    mix_by_hooks(model.get_base_model(), lambda_, mixing)
    return model


def mix_by_hooks(base: nn.Module, lambda_: float, mixing: Iterable[str], adapter: str = "default") -> None:
    """Register the hooks on a base model with plain LoRA layers."""
    modules = dict(base.named_modules())
    initial: dict[str, torch.Tensor] = {}

    def capture(stack: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            initial[stack] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    def mix(stack: str):
        def hook(module: nn.Module, args: tuple) -> tuple[torch.Tensor]:
            x, h0 = args[0], initial[stack]
            return ((1 - lambda_) * x + lambda_ * h0.reshape(x.shape).to(x.dtype),)

        return hook

    captured = set()
    for name in mixing:
        parts = name.split(".")
        stack = ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit())])
        if stack not in captured:
            modules[f"{stack}.0"].register_forward_pre_hook(capture(stack), with_kwargs=True)
            captured.add(stack)
        modules[f"{name}.lora_dropout.{adapter}"].register_forward_pre_hook(mix(stack))
