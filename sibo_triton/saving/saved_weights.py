"""An adapter's weights and its lambda belong together: either one without the other is refused.

Where this package is imported, the checks are here. Where it is not, a guard in the saved weights makes loading fail.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from sibo_triton.layers.adapters import (
    BOTTLENECK_LAMBDA_NAME,
    BOTTLENECK_PREFIX,
    BOTTLENECK_TYPE,
    FIRST_WEIGHTS,
    lambda_name_of,
    sibo_adapters,
    sibo_lambdas,
    tuner_layers,
)
from sibo_triton.options import SiboOptions

# A shape that no parameter has: load_state_dict refuses it even with strict=False. It has two dimensions, because a
# shard of a one-dimensional parameter may be empty.
_GUARD_SHAPE = (0, 0)

_LAMBDA_PATTERN = "|".join(map(re.escape, FIRST_WEIGHTS))


def with_guard(
    model: nn.Module, tensors: dict[str, torch.Tensor], state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Add the guard to the weights of a SIBO adapter before they are saved; return those of others as they are.

    Stock PEFT reads no config when it loads weights onto an existing adapter. It would copy A and B to a plain LoRA
    adapter and drop the lambdas, which that does not have. The guard, an empty tensor under the name of a base
    parameter, makes it stop with "size mismatch for ...".

    Args:
        model: the model that has the adapter.
        tensors: the adapter's weights by their names in a file, without the adapter's name.
        state_dict: the whole model's, if the weights were taken from one.
    """
    mixing = next((re.split(rf"\.(?:{_LAMBDA_PATTERN})\.", key)[0] for key in tensors if _is_lambda(key)), None)
    if mixing is None:
        return tensors
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    tensors_of_model = {**{_as_in_state_dict(name): tensor for name, tensor in named}, **(state_dict or {})}
    name = _guarded_name(mixing, tensors_of_model, {*tensors}, {*getattr(model, "peft_config", {})})
    return {**tensors, name: torch.zeros(_GUARD_SHAPE)}


def with_lambdas(model: nn.Module, tensors: dict[str, torch.Tensor], adapter_name: str) -> dict[str, torch.Tensor]:
    """Add missing buffers of lambdas: scripts pass a state dict that they make of `named_parameters()`."""
    first = "|".join(map(re.escape, FIRST_WEIGHTS.values()))
    missing = {}
    for name in (match[1] for match in (re.match(rf"(.+)\.(?:{first})\.", key) for key in tensors) if match):
        try:
            layer = model.get_submodule(name)
        except AttributeError:  # a wrapper's names
            continue
        if adapter_name in sibo_adapters(layer):
            for entry, value in sibo_lambdas(layer)[adapter_name].named_buffers():
                missing[f"{name}.{lambda_name_of(layer)}.{entry}"] = value.detach().clone()
    return {**missing, **tensors}


def without_others(model: nn.Module, tensors: dict[str, torch.Tensor], adapter_name: str) -> dict[str, torch.Tensor]:
    """Drop other bottleneck adapters' weights from those of one that is saved: PEFT 0.19 does not."""
    others = [re.escape(name) for name in getattr(model, "peft_config", {}) if name != adapter_name]
    if not others:
        return tensors
    of_others = re.compile(rf"\.{BOTTLENECK_PREFIX}[a-z]+\.({'|'.join(others)})\.[^.]+$")
    return {key: tensor for key, tensor in tensors.items() if of_others.search(key) is None}


def without_guard(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights of a SIBO adapter without the guard; values may be slices of a safetensors file."""
    guards = _guards(tensors)
    return {key: value for key, value in tensors.items() if key not in guards} if guards else tensors


def _guarded_name(
    mixing: str, tensors_of_model: Mapping[str, torch.Tensor], saved: set[str], adapters: set[str]
) -> str:
    """A base parameter near the layer `mixing` that has the same name in every LoRA model of this base.

    It is a norm's weight: LoRA does not wrap norms (which would rename their parameters), nor are they quantised.
    """
    layer = mixing.split(".")

    def shared_parts(name: str) -> int:
        parts = name.split(".")
        return next(
            (i for i, (a, b) in enumerate(zip(layer, parts, strict=False)) if a != b), min(len(layer), len(parts))
        )

    norms = [
        name
        for name, tensor in tensors_of_model.items()
        if name.endswith(".weight")
        and getattr(tensor, "ndim", None) == 1
        and name not in saved
        and not any(mark in name for mark in (".base_layer.", ".original_module."))
        and adapters.isdisjoint(name.split("."))
    ]
    if norms:
        return max(norms, key=shared_parts)
    base = [name for name in tensors_of_model if name.startswith(f"{mixing}.base_layer.") and name not in saved]
    return max(base, key=lambda name: name.endswith(".weight"), default=f"{mixing}.base_layer.weight")


def _as_in_state_dict(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def _guards(tensors: Mapping[str, Any]) -> list[str]:
    shapes = {
        key: value.get_shape() if hasattr(value, "get_shape") else getattr(value, "shape", ())
        for key, value in tensors.items()
    }
    return [key for key, shape in shapes.items() if tuple(shape) == _GUARD_SHAPE]


def _is_lambda(key: str, adapter_name: str | None = None) -> bool:
    # PEFT 0.19 writes parameters whose name holds "bias" into the files of all adapters, not only of their own
    optional = "" if adapter_name is None else rf"({re.escape(adapter_name)}\.)?"
    return re.search(rf"\.({_LAMBDA_PATTERN})\.{optional}[^.]+$", key) is not None


def check_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Refuse weights of a SIBO adapter that come without their lambda, before anything is loaded; drop their guard.

    Raises:
        ValueError: a lambda tensor is missing, not finite, outside of [0, 1], or of another shape.
    """
    for key in _guards(state_dict):
        del state_dict[key]
    for name, layer in tuner_layers(model):
        for adapter_name, lambda_ in sibo_lambdas(layer).items():
            stem, lambda_name = f"{prefix}{name}.", lambda_name_of(layer)
            if f"{stem}{FIRST_WEIGHTS[lambda_name]}.{adapter_name}.weight" not in state_dict:
                continue
            for entry in lambda_.tensors():
                key = f"{stem}{lambda_name}.{adapter_name}.{entry}"
                problem = lambda_.problem_with(entry, state_dict[key]) if key in state_dict else "is missing"
                if problem is not None:
                    _refuse_weights(f"{name}.{lambda_name}.{entry}", problem)


def check_loaded_lambdas(model: nn.Module, adapter_name: str, missing: Sequence[str]) -> None:
    """The same check after a loader that sets tensors itself (transformers' load_adapter)."""
    for name, layer in tuner_layers(model):
        if adapter_name not in sibo_adapters(layer):
            continue
        lambda_, lambda_name = sibo_lambdas(layer)[adapter_name], lambda_name_of(layer)
        for entry, tensor in lambda_.tensors().items():
            key = f"{name}.{lambda_name}.{adapter_name}.{entry}"
            problem = lambda_.problem_with(entry, tensor)
            if any(key.endswith(other) or other.endswith(key) for other in missing):
                problem = "is missing"
            if problem is not None:
                _refuse_weights(f"{name}.{lambda_name}.{entry}", problem)


def check_adapter_mixes(model: nn.Module, adapter_name: str, tensors: Mapping[str, Any]) -> None:
    """Raise a ValueError if weights of a SIBO adapter are about to be loaded onto an adapter that mixes nowhere."""
    exists = adapter_name in getattr(model, "peft_config", {})
    if exists and not any(adapter_name in sibo_adapters(layer) for _, layer in tuner_layers(model)):
        lambdas = sorted(key for key in tensors if _is_lambda(key, adapter_name))
        _refuse_without_place(adapter_name, lambdas or _guards(tensors))


def check_all_lambdas_taken(adapter_name: str, unexpected: Iterable[str]) -> None:
    """Raise a ValueError if the loaded weights held a lambda that the adapter does not have."""
    _refuse_without_place(adapter_name, sorted(key for key in unexpected if _is_lambda(key, adapter_name)))


def _refuse_without_place(adapter_name: str, keys: Sequence[str]) -> None:
    if keys:
        raise ValueError(
            f"The weights hold {keys[0]}{' and others' if len(keys) > 1 else ''}, but adapter {adapter_name!r} "
            "computes the plain method there (or what else its config says), which is not what was trained. Load the "
            "folder as an adapter of another name, or make this one with the SiboLoraConfig or SiboAdapterConfig that "
            "was saved with the weights."
        )


def check_same_options(adapter: PeftConfig, saved: PeftConfig) -> None:
    """Raise a ValueError if weights would be loaded onto an adapter that computes something else with them.

    For example with another source of h0, which is stored in no tensor.
    """
    if not isinstance(adapter, SiboOptions) or not isinstance(saved, SiboOptions):
        return
    for name in adapter.options_outside_weights():
        if name in saved.options_outside_weights() and getattr(adapter, name) != getattr(saved, name):
            raise ValueError(
                f"Configs are incompatible: for {name}, {getattr(adapter, name)!r} != {getattr(saved, name)!r}. "
                "Loading onto an adapter exchanges its weights only: load the checkpoint as another adapter."
            )


def check_same_method(model: nn.Module, adapter_name: str, tensors: Mapping[str, Any]) -> None:
    """Raise a ValueError if the weights are a bottleneck adapter's and the adapter is LoRA, or the reverse.

    No name would match, and PEFT would silently load nothing. Under FSDP one rank has the weights and the others none.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None or not tensors:
        return
    expected = config.peft_type == BOTTLENECK_TYPE
    are_of_bottleneck = any(f".{FIRST_WEIGHTS[BOTTLENECK_LAMBDA_NAME]}." in key for key in tensors)
    if expected != are_of_bottleneck:
        weights = "those of" if are_of_bottleneck else "not those of"
        raise ValueError(
            f"The weights are {weights} a bottleneck adapter (SiboAdapterConfig), and adapter {adapter_name!r} is "
            f"{'' if expected else 'not '}one: nothing would be loaded. Load the folder as an adapter of another name."
        )


def _refuse_weights(key: str, problem: str) -> None:
    raise ValueError(
        f"{key} {problem} in the adapter's weights. A SIBO adapter without its lambda would compute something else "
        "than what was trained. Load the complete adapter folder as save_pretrained wrote it; a plain LoRA adapter "
        "loads with peft.LoraConfig."
    )
