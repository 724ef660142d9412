"""An adapter's weights and its lambda belong together: refuse the ones without the other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from peft import PeftConfig
from torch import nn

from sibo_triton.lora.config import SiboLoraConfig
from sibo_triton.lora.layer import LAMBDA_NAME, lora_layers, sibo_adapters


def check_checkpoint(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Refuse weights of a SIBO adapter that come without their lambda, before anything is loaded.

    Raises:
        ValueError: a lambda tensor is missing, not finite, outside of [0, 1], or of another shape.
    """
    for name, layer in lora_layers(model):
        for adapter_name in sibo_adapters(layer):
            stem = f"{prefix}{name}."
            if f"{stem}lora_A.{adapter_name}.weight" not in state_dict:
                continue
            lambda_ = getattr(layer, LAMBDA_NAME)[adapter_name]
            for entry in lambda_.tensors():
                key = f"{stem}{LAMBDA_NAME}.{adapter_name}.{entry}"
                problem = lambda_.problem_with(entry, state_dict[key]) if key in state_dict else "is missing"
                if problem is not None:
                    _refuse_checkpoint(f"{name}.{LAMBDA_NAME}.{entry}", problem)


def check_loaded_lambdas(model: nn.Module, adapter_name: str, missing: Sequence[str]) -> None:
    """The same check for a loader that sets tensors itself (transformers' load_adapter), after it is done."""
    for name, layer in lora_layers(model):
        if adapter_name not in sibo_adapters(layer):
            continue
        for entry, tensor in getattr(layer, LAMBDA_NAME)[adapter_name].tensors().items():
            key = f"{name}.{LAMBDA_NAME}.{adapter_name}.{entry}"
            problem = getattr(layer, LAMBDA_NAME)[adapter_name].problem_with(entry, tensor)
            if any(key.endswith(other) or other.endswith(key) for other in missing):
                problem = "is missing"
            if problem is not None:
                _refuse_checkpoint(f"{name}.{LAMBDA_NAME}.{entry}", problem)


def check_all_lambdas_taken(adapter_name: str, unexpected: Iterable[str]) -> None:
    """Raise a ValueError if the weights that were loaded held a lambda for which the adapter had no place."""
    # PEFT 0.19 writes the parameters of all adapters whose name holds "bias" into the file of each: not this one's
    left_out = sorted(
        key for key in unexpected if re.search(rf"\.{LAMBDA_NAME}\.({re.escape(adapter_name)}\.)?[^.]+$", key)
    )
    if left_out:
        raise ValueError(
            f"The weights hold {left_out[0]}{' and others' if len(left_out) > 1 else ''}, but adapter {adapter_name!r} "
            "computes plain LoRA there, which is not what was trained. Load the folder as an adapter of another name, "
            "or make this one with the SiboLoraConfig that was saved with the weights."
        )


def check_same_source(adapter: PeftConfig, saved: PeftConfig) -> None:
    """Raise a ValueError if weights for another kind of h0 would be loaded onto an adapter.

    What h0 is, alone of the options of SIBO, is in no tensor.
    """
    both = all(isinstance(config, SiboLoraConfig) and config.mixes for config in (adapter, saved))
    if both and adapter.sibo_source != saved.sibo_source:
        raise ValueError(
            f"Configs are incompatible: for sibo_source, {adapter.sibo_source!r} != {saved.sibo_source!r}. Loading "
            "onto an adapter exchanges its weights only: load the checkpoint as another adapter."
        )


def _refuse_checkpoint(key: str, problem: str) -> None:
    raise ValueError(
        f"{key} {problem} in the adapter's weights. A SIBO adapter without its lambda would compute something else "
        "than what was trained. Load the complete adapter folder as save_pretrained wrote it; a plain LoRA adapter "
        "loads with peft.LoraConfig."
    )
