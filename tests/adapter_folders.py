"""Adapters in folders, as the tests of saving and loading need them: made up, saved, broken on purpose."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import llama, randomise_adapters, token_inputs
from torch import nn
from transformers import AutoModelForCausalLM

from sibo_triton import SiboLoraConfig

TARGETS = ("q_proj", "up_proj", "o_proj")
MIXING = ("q_proj", "up_proj")
BLOCKS = 3
WEIGHTS = "adapter_model.safetensors"
KINDS = ("fixed", "learnable")


@dataclass(frozen=True)
class Saved:
    """An adapter folder, the folder of its base model, and what the model that was saved computes.

    The lambdas are not the config's 0.3 but `lambdas`, by module name: a loader that took them from the config would
    be seen.
    """

    folder: Path
    base_folder: Path
    input_ids: torch.Tensor
    logits: torch.Tensor
    lambdas: dict[str, float]

    def base(self) -> nn.Module:
        return copy.deepcopy(_bases[self.base_folder])


_bases: dict[Path, nn.Module] = {}


def saved_base(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """A tiny Llama in `folder`, for loaders that take a name; `Saved.base` gives copies of what loads from there."""
    torch.manual_seed(1)
    llama().to(dtype).save_pretrained(folder)
    _bases[folder] = AutoModelForCausalLM.from_pretrained(folder)
    assert _bases[folder].dtype == dtype


def save_adapter(
    folder: Path, base_folder: Path, kind: str, autocast_adapter_dtype: bool = True, seed: int = 0, **options: object
) -> Saved:
    """Save a SIBO adapter (or "plain" LoRA) on the base model of `base_folder`, each mixing module with its lambda."""
    base = copy.deepcopy(_bases[base_folder])
    model = get_peft_model(base, sibo_config(kind, **options), autocast_adapter_dtype=autocast_adapter_dtype)
    make_up_weights(model, seed)
    model.eval().save_pretrained(folder)
    torch.manual_seed(0)
    input_ids = token_inputs()["input_ids"]
    saved = Saved(folder, base_folder, input_ids, logits_of(model, input_ids), lambda_values(model))
    assert len(set(saved.lambdas.values())) == (0 if kind == "plain" else BLOCKS * len(MIXING))
    # what the tests compare depends on the adapter, on lambda, and on its being another than the config's
    for other in (None,) if kind == "plain" else (None, 0.0, 0.3):
        assert not torch.allclose(logits_with_lambda(model, input_ids, other), saved.logits, atol=1e-4)
    return saved


def sibo_config(kind: str, **options: object) -> LoraConfig:
    defaults = {"r": 4, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    if kind == "plain":
        return LoraConfig(**{**defaults, **options})
    return SiboLoraConfig(**{**defaults, "sibo_lambda": 0.3, "sibo_learnable": kind == "learnable", **options})


def make_up_weights(model: nn.Module, seed: int = 0) -> None:
    """As if trained: every LoRA matrix random and exact in bfloat16, every lambda different."""
    torch.manual_seed(seed)
    randomise_adapters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(parameter.bfloat16())
        for position, module in enumerate(lambda_modules(model).values()):
            tensor = getattr(module, "weight", None)
            if tensor is None:
                tensor = module.logit_bias
            tensor.fill_(0.35 + 0.05 * position + 0.01 * seed)


def lambda_modules(model: nn.Module, adapter: str = "default") -> dict[str, nn.Module]:
    """The modules that hold lambda, by the name of their LoRA layer from the base model's root."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    ending = f".lora_sibo_lambda.{adapter}"
    return {name.removesuffix(ending): module for name, module in base.named_modules() if name.endswith(ending)}


def lambda_values(model: nn.Module, adapter: str = "default") -> dict[str, float]:
    """lambda by module, from the tensors and their definition, not from the modules' own forward."""
    values = {}
    for name, module in lambda_modules(model, adapter).items():
        tensors = {key: tensor.detach() for key, tensor in module.state_dict().items()}
        assert all(tensor.dtype == torch.float32 and tensor.shape == (1,) for tensor in tensors.values())
        if "weight" in tensors:
            values[name] = float(tensors["weight"])
        else:
            values[name] = float(tensors["gate"] * tensors["logit_bias"].sigmoid())
    return values


def logits_of(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids).logits.float()


def logits_with_lambda(model: nn.Module, input_ids: torch.Tensor, value: float | None) -> torch.Tensor:
    """What `model` would compute with this lambda everywhere, or (None) without its adapter."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if value is None and "lora_B" in name:
                parameter.zero_()
        for module in lambda_modules(model).values():
            if value is not None and "weight" in module._buffers:
                module.weight.fill_(value)
            elif value is not None:
                module.gate.fill_(value)
                module.logit_bias.fill_(100.0)
    return logits_of(model, input_ids)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def with_weights(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of an adapter folder whose weights went through `change`."""
    shutil.copytree(source, folder)
    tensors = read_weights(folder)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def read_config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def with_config(source: Path, folder: Path, **changes: object) -> Path:
    """A copy of an adapter folder whose adapter_config.json says something else."""
    shutil.copytree(source, folder)
    (folder / "adapter_config.json").write_text(json.dumps({**read_config(folder), **changes}))
    return folder


def everything_about(model, input_ids):
    """What a refusal must not change."""
    tuner = getattr(model, "base_model", None) if isinstance(model, PeftModel) else None
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": {
            (name, kind): len(getattr(module, kind))
            for name, module in model.named_modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks", "_backward_hooks")
        },
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "peft_config": [dict(getattr(m, "peft_config", {})) for m in (model, tuner, base) if m is not None],
        "has peft_config": "peft_config" in vars(base),
        "peft loaded": getattr(base, "_hf_peft_config_loaded", False),
        "active": [
            module.active_adapters for module in model.modules() if hasattr(module, "lora_A") or module is tuner
        ],
        "attributes": {name for name in vars(base) if name != "_hf_peft_config_loaded"},
        "logits": logits_of(model, input_ids),
    }


def assert_unchanged(before, after):
    for what, value in before.items():
        if what == "tensors":
            assert value.keys() == after[what].keys()
            assert all(torch.equal(tensor, after[what][name]) for name, tensor in value.items())
        elif what == "logits":
            assert torch.equal(value, after[what])
        else:
            assert value == after[what], what
