"""Tiny models with bottleneck adapters, and an independent oracle: a frozen model and hooks that write the equations.

Nothing of sibo_triton or PEFT runs in the oracle; it takes the weights from the model's state dict.
"""

from __future__ import annotations

import copy

import torch
from adapter_models import base_model
from peft import PeftModel, get_peft_model
from torch import nn

from sibo_triton import SiboAdapterConfig

LLAMA_DEFAULT = ("gate_proj", "up_proj")
ACTIVATIONS = {
    "gelu": lambda p: p * (1 + torch.erf(p / 2**0.5)) / 2,
    "relu": lambda p: p.clamp(min=0),
    "silu": lambda p: p * torch.sigmoid(p),
    "tanh": torch.tanh,
}

SERIES_INPUT = {"placement": "series", "side": "input"}
SERIES_OUTPUT = {"placement": "series", "side": "output", "target_modules": ["down_proj", "o_proj"]}
PARALLEL = {"placement": "parallel"}


def adapter(value=0.3, **options):
    """A config with weights that show: biases, a scaling that is not 1."""
    return SiboAdapterConfig(
        **{"bottleneck_size": 6, "sibo_lambda": value, "adapter_bias": True, "scaling": 1.5, **options}
    )


def randomise(model, std=0.3):
    """Give every weight of every adapter random values: with W_up = 0 no test of its input could fail."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sibo_adapter_down." in name or ".sibo_adapter_up." in name:
                parameter.normal_(0.0, std)
            elif ".sibo_adapter_scaling." in name:
                parameter.fill_(0.7)
    return model


def build(base=None, **configs):
    """A model (default: a tiny Llama) with an adapter for each keyword, all random; the first is active."""
    names = list(configs)
    model = get_peft_model(base_model() if base is None else base, configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    return randomise(model).eval()


def layers_of(model, name="default"):
    """The adapter layers that have the adapter, by their names from the base model's root."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        layer_name: layer
        for layer_name, layer in base.named_modules()
        if name in getattr(layer, "sibo_adapter_options", {})
    }


class Oracle(nn.Module):
    """The base model of `model`, and one active adapter of each of the given configs by hooks.

    Args:
        model: the `PeftModel` to be compared with.
        configs: by adapter name.
        mixing: endings of the names of the modules that mix.
    """

    def __init__(self, model, configs, mixing=LLAMA_DEFAULT):
        super().__init__()
        state = {name.removeprefix("base_model.model."): value for name, value in model.state_dict().items()}
        self.weights = {
            name: value.clone().requires_grad_(value.is_floating_point())
            for name, value in state.items()
            if ".sibo_adapter_" in name
        }
        self.base = copy.deepcopy(model.get_base_model() if isinstance(model, PeftModel) else model)
        strip(self.base)
        self.h0 = {}
        for adapter_name, config in configs.items():
            for name in layers_of(model, adapter_name):
                self._put_hooks(name, adapter_name, config, name.endswith(tuple(mixing)))

    def _put_hooks(self, name, adapter_name, config, mixes):
        module = self.base.get_submodule(name)
        parts = name.split(".")
        stack = ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit())])
        if stack not in self.h0:
            self.h0[stack] = None
            first = self.base.get_submodule(f"{stack}.0")
            first.register_forward_pre_hook(self._catch(stack), with_kwargs=True)

        def g(v):
            weight = {key: self.weights.get(f"{name}.sibo_adapter_{key}") for key in self._keys(adapter_name)}
            if mixes and config.mixes:
                value = weight[f"lambda.{adapter_name}.weight"]
                if value is None:
                    value = torch.sigmoid(weight[f"lambda.{adapter_name}.logit_bias"])
                v = v * (1 - value) + value * self.h0[stack].reshape(v.shape)
            p = v @ weight[f"down.{adapter_name}.weight"].T
            p = p if weight[f"down.{adapter_name}.bias"] is None else p + weight[f"down.{adapter_name}.bias"]
            y = ACTIVATIONS[config.activation](p) @ weight[f"up.{adapter_name}.weight"].T
            y = y if weight[f"up.{adapter_name}.bias"] is None else y + weight[f"up.{adapter_name}.bias"]
            s = weight[f"scaling.{adapter_name}.weight"]
            return y * (config.scaling if s is None else s)

        def in_front(_, args, kwargs):
            return (args[0] + g(args[0]), *args[1:]), kwargs

        def keep(_, args, kwargs):
            module.unchanged = args[0] if args else kwargs["hidden_states"]

        def behind(_, args, kwargs, output):
            z = output[0] if isinstance(output, tuple) else output
            y = z + g(module.unchanged if config.placement == "parallel" else z)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        module.register_forward_pre_hook(keep, with_kwargs=True)
        if config.placement == "series" and config.side == "input":
            module.register_forward_pre_hook(in_front, with_kwargs=True)
        else:
            module.register_forward_hook(behind, with_kwargs=True)

    @staticmethod
    def _keys(name):
        kinds = ("down", "up")
        keys = [f"{kind}.{name}.{part}" for kind in kinds for part in ("weight", "bias")]
        return [*keys, f"scaling.{name}.weight", f"lambda.{name}.weight", f"lambda.{name}.logit_bias"]

    def _catch(self, stack):
        def hook(_, args, kwargs):
            self.h0[stack] = args[0] if args else kwargs["hidden_states"]

        return hook

    def forward(self, **inputs):
        return self.base(**inputs)


def strip(model):
    """Take adapter layers and hooks off, without PEFT."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            while hasattr(child, "sibo_adapter_options"):
                child = child.base_layer
                setattr(module, name, child)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks"):
            getattr(module, hooks).clear()
        for hooks in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
            getattr(module, hooks).clear()
    model.__dict__.pop("peft_config", None)


def adapter_gradients(model, inputs):
    """The gradients of the adapters, by their names from the base model's root."""
    model.zero_grad()
    model(**inputs).loss.backward()
    return {
        name.removeprefix("base_model.model."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def oracle_gradients(oracle, inputs, wanted):
    names = list(wanted)
    gradients = torch.autograd.grad(oracle(**inputs).loss, [oracle.weights[name] for name in names])
    return dict(zip(names, gradients, strict=True))
