"""Everything that sibo_triton changes in other libraries; methods of LoRA layers are in `lora/wrapping.py`.

Plain LoRA is not changed: each wrapper calls the original with the same arguments, and beside that acts on adapters of
this package only, or refuses what concerns one (its weights for a plain adapter, for example). Plain adapters are
accelerated where `accelerate_all` asked for it. PEFT's own mapping of LORA is not touched, so configs print, warn, save
and pickle as before.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from accelerate.utils import fsdp_utils
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.optimizers import lorafa
from peft.tuners.lora import LoraModel, intruders
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.mixed import MixedModel
from peft.tuners.xlora import XLoraModel
from peft.utils import PeftType, hotswap, other, register_peft_method, save_and_load
from torch import nn
from transformers import modeling_utils
from transformers.integrations.peft import PeftAdapterMixin

from sibo_triton.bottleneck.config import SiboAdapterConfig
from sibo_triton.bottleneck.model import SiboAdapterModel
from sibo_triton.float32_module import Float32Module
from sibo_triton.injection.reversible import loading
from sibo_triton.injection.snapshot import Snapshot
from sibo_triton.layers.adapters import BOTTLENECK_TYPE, LORA_LAMBDA_NAME
from sibo_triton.lora import acceleration, refusals
from sibo_triton.lora import model as sibo_lora
from sibo_triton.lora.config import SIBO_LORA_TYPE, SiboLoraConfig
from sibo_triton.lora.wrapping import wrap_layer_class, wrap_layer_classes
from sibo_triton.options import SiboOptions
from sibo_triton.patching import wrap
from sibo_triton.saving import saved_weights


def register() -> None:
    """Register SIBO adapters with PEFT. `import sibo_triton` calls it; calling it again does nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[SIBO_LORA_TYPE] = SiboLoraConfig  # what adapter_config.json of a SIBO adapter says
    _register_method(BOTTLENECK_TYPE, SiboAdapterConfig, SiboAdapterModel)
    wrap(LoraModel, "inject_adapter", _inject_adapter)
    wrap(LoraModel, "merge_adapter", _merge_adapter)
    wrap(LoraModel, "_unload_and_optionally_merge", _unload)
    wrap(LoraModel, "_check_add_weighted_adapter", _check_weighted)
    wrap(intruders, "reduce_intruder_dimension", _reduce_intruders)
    wrap(LoraModel, "delete_adapter", _delete_adapter)
    wrap(LoraModel, "_enable_peft_forward_hooks", _check_mixed_batch)
    wrap_layer_class(LoraLinear)
    wrap(MixedModel, "inject_adapter", _refuse_mixed_model)
    wrap(XLoraModel, "__init__", _x_lora)
    wrap(lorafa.LoraFAOptimizer, "__init__", _lorafa)
    _wrap_everywhere_in_peft(other, "fsdp_auto_wrap_policy", _fsdp_policy)
    if hasattr(fsdp_utils, "fsdp2_load_full_state_dict"):
        wrap(fsdp_utils, "fsdp2_load_full_state_dict", _fsdp2_load)
    wrap(hotswap, "check_hotswap_configs_compatible", _check_hotswap)
    wrap(hotswap, "hotswap_adapter_from_state_dict", _hotswap)
    _wrap_everywhere_in_peft(save_and_load, "get_peft_model_state_dict", _get_state_dict)
    _wrap_everywhere_in_peft(save_and_load, "set_peft_model_state_dict", _set_state_dict)
    wrap(modeling_utils, "convert_and_load_state_dict_in_model", _transformers_load)
    wrap(PeftModel, "from_pretrained", _from_pretrained)
    wrap(PeftModel, "load_adapter", _load_adapter)
    wrap(PeftAdapterMixin, "load_adapter", _transformers_load_adapter)
    wrap(PeftAdapterMixin, "delete_adapter", _transformers_delete_adapter)


def _register_method(name: str, config_class: type, tuner_class: type) -> None:
    """Register a new PEFT method. PEFT needs a member of its enum of methods, which has no public way to add one."""
    if name in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_, member.__objclass__ = name, name, PeftType
        member._sort_order_ = len(PeftType.__members__)
        setattr(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    register_peft_method(name=name.lower(), config_cls=config_class, model_cls=tuner_class)


def _wrap_everywhere_in_peft(owner: ModuleType, name: str, wrapper: Callable) -> None:
    """Wrap a function, also in those modules of PEFT that have imported it by name."""
    original = getattr(owner, name)
    wrap(owner, name, wrapper)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").partition(".")[0] == "peft" and vars(module).get(name) is original:
            setattr(module, name, getattr(owner, name))


def _inject_adapter(
    original: Callable, tuner: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    sibo_lora.inject_adapter(original, tuner, model, adapter_name, *args, **kwargs)
    acceleration.accelerate_if_all(tuner, model, adapter_name)
    wrap_layer_classes(model)


def _reduce_intruders(
    original: Callable, peft_model: PeftModel, old_adapter_name: str = "default", *args: Any, **kwargs: Any
) -> None:
    refusals.check_reducing_intruders_allowed(peft_model, old_adapter_name)
    original(peft_model, old_adapter_name, *args, **kwargs)


def _lorafa(original: Callable, optimizer: Any, params: Any, *args: Any, **kwargs: Any) -> None:
    """LoRA-FA takes every two parameters with "lora" in their names for A and B: lambda goes by another name."""
    groups = list(params)
    for i, group in enumerate(groups):
        if isinstance(group, dict) and "names" in group:
            names = [name.replace("lora", "") if LORA_LAMBDA_NAME in name else name for name in group["names"]]
            groups[i] = group | {"names": names}
    original(optimizer, groups, *args, **kwargs)


def _fsdp_policy(original: Callable, model: nn.Module) -> Callable[..., bool]:
    """PEFT's policy, which wraps modules without children whose `weight` is trained, and a learnable lambda."""
    policy = original(model)

    def with_numbers(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        if not recurse and isinstance(module, Float32Module):
            return any(parameter.requires_grad for parameter in module.parameters())
        return policy(module=module, recurse=recurse, nonwrapped_numel=nonwrapped_numel)

    return with_numbers


def _fsdp2_load(original: Callable, accelerator: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """accelerate takes every entry of a state dict for a sharded one, which lambda's buffers are meanwhile."""
    from torch.distributed.tensor import DTensor, Replicate  # importing it takes time

    mesh = next((of.device_mesh for of in model.parameters() if isinstance(of, DTensor)), None)
    if mesh is None:
        return original(accelerator, model, *args, **kwargs)
    modules = [module for module in model.modules() if isinstance(module, Float32Module)]
    numbers: list[tuple[dict[str, Any], str]] = [(of._buffers, name) for of in modules for name in of._buffers]
    for buffers, name in numbers:
        buffers[name] = DTensor.from_local(buffers[name], mesh, [Replicate()] * mesh.ndim, run_check=False)
    try:
        return original(accelerator, model, *args, **kwargs)
    finally:
        device = getattr(accelerator, "device", None)  # where FSDP computes, also with weights that it keeps on the CPU
        for buffers, name in numbers:
            local = buffers[name].to_local()
            buffers[name] = local if local.is_meta else local.to(device)
        for module in modules:
            module.note_buffers()


def _merge_adapter(original: Callable, tuner: LoraModel, adapter_names: Any = None, *args: Any, **kwargs: Any) -> Any:
    refusals.check_merge_allowed(tuner.model, adapter_names)
    return original(tuner, adapter_names, *args, **kwargs)


def _unload(original: Callable, tuner: LoraModel, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
    if merge:
        names = kwargs.get("adapter_names", args[2] if len(args) > 2 else None)
        refusals.check_merge_allowed(tuner.model, names)
    model = original(tuner, merge, *args, **kwargs)
    sibo_lora.remove_unused_hooks(tuner.model)
    return model


def _check_weighted(original: Callable, tuner: LoraModel, adapters: Any, *args: Any, **kwargs: Any) -> Any:
    refusals.check_weighted_adapter_allowed(tuner.model, adapters)
    return original(tuner, adapters, *args, **kwargs)


def _delete_adapter(original: Callable, tuner: LoraModel, *args: Any, **kwargs: Any) -> Any:
    result = original(tuner, *args, **kwargs)
    sibo_lora.remove_unused_hooks(tuner.model)
    return result


def _check_mixed_batch(original: Callable, tuner: LoraModel, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("adapter_names") is not None:  # here, for PEFT leaves its hooks behind when a forward raises
        refusals.check_mixed_batch_allowed(tuner.model, kwargs["adapter_names"])
    return original(tuner, *args, **kwargs)


def _x_lora(original: Callable, tuner: XLoraModel, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    snapshot = Snapshot(model)
    try:
        original(tuner, model, *args, **kwargs)
    except sibo_lora.XLoraRefusal:
        snapshot.restore()  # X-LoRA freezes the model, and may have injected plain adapters
        raise


def _refuse_mixed_model(
    original: Callable, tuner: MixedModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    config: PeftConfig = tuner.peft_config[adapter_name]
    if isinstance(config, SiboLoraConfig) and config.mixes:
        raise ValueError(
            f"Adapter {adapter_name!r} is a SIBO adapter, which PeftMixedModel would run as plain LoRA. Use "
            "get_peft_model(..., mixed=False), or a plain peft.LoraConfig."
        )
    return original(tuner, model, adapter_name, *args, **kwargs)


def _check_hotswap(original: Callable, old: PeftConfig, new: PeftConfig) -> None:
    original(old, new)
    saved_weights.check_same_options(old, new)


def _hotswap(original: Callable, model: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
    return original(model, saved_weights.without_guard(state_dict), *args, **kwargs)


def _get_state_dict(original: Callable, model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    tensors = original(model, *args, **kwargs)
    arguments = _arguments(original, model, *args, **kwargs)
    model = getattr(model, "_orig_mod", model) if arguments.get("unwrap_compiled") else model
    adapter_name = arguments.get("adapter_name", "default")
    tensors = saved_weights.with_lambdas(model, tensors, adapter_name)
    tensors = saved_weights.without_others(model, tensors, adapter_name)
    return saved_weights.with_guard(model, tensors, arguments.get("state_dict"))


def _set_state_dict(original: Callable, model: nn.Module, peft_model_state_dict: Any, *args: Any, **kwargs: Any) -> Any:
    adapter_name = _arguments(original, model, peft_model_state_dict, *args, **kwargs).get("adapter_name", "default")
    saved_weights.check_same_method(model, adapter_name, peft_model_state_dict)
    saved_weights.check_adapter_mixes(model, adapter_name, peft_model_state_dict)
    result = original(model, saved_weights.without_guard(peft_model_state_dict), *args, **kwargs)
    saved_weights.check_all_lambdas_taken(adapter_name, result.unexpected_keys)
    return result


def _arguments(function: Callable, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return inspect.signature(function).bind(*args, **kwargs).arguments


_loaded_by_transformers: ContextVar[str | None] = ContextVar("adapter that transformers loads", default=None)


@contextmanager
def _loading_by_transformers(adapter_name: str) -> Iterator[None]:
    token = _loaded_by_transformers.set(adapter_name)
    try:
        yield
    finally:
        _loaded_by_transformers.reset(token)


def _transformers_load(original: Callable, model: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
    adapter_name = _loaded_by_transformers.get()
    if adapter_name is None:  # a base model's weights
        return original(model, state_dict, *args, **kwargs)
    saved_weights.check_adapter_mixes(model, adapter_name, state_dict)
    return original(model, saved_weights.without_guard(state_dict), *args, **kwargs)


def _from_pretrained(original: Callable, cls: type[PeftModel], *args: Any, **kwargs: Any) -> Any:
    with loading():  # injects before it calls load_adapter
        return original(cls, *args, **kwargs)


def _load_adapter(
    original: Callable, peft_model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    hub_kwargs, _, _ = PeftConfig._split_kwargs(kwargs)
    saved = _config_of_weights(peft_model, adapter_name, model_id, hub_kwargs)
    with loading():
        result = original(peft_model, model_id, adapter_name, *args, **kwargs)
    if isinstance(saved, SiboOptions) and saved.mixes:
        peft_model.peft_config[adapter_name].sibo_lambda = saved.sibo_lambda  # as the tensors have it now
    return result


def _transformers_load_adapter(original: Callable, model: Any, *args: Any, **kwargs: Any) -> Any:
    adapter_name = kwargs.get("adapter_name", args[1] if len(args) > 1 else None) or "default"
    hub_kwargs: dict[str, Any] = {name: kwargs[name] for name in ("token", "revision", "subfolder") if name in kwargs}
    hub_kwargs |= kwargs.get("adapter_kwargs") or {}
    _config_of_weights(model, adapter_name, kwargs.get("peft_model_id", args[0] if args else None), hub_kwargs)
    with loading(), _loading_by_transformers(adapter_name):
        result = original(model, *args, **kwargs)
        if isinstance(getattr(model, "peft_config", {}).get(adapter_name), SiboOptions):
            without_value = [*result.missing_keys, *(key for key, *_ in result.mismatched_keys)]
            saved_weights.check_loaded_lambdas(model, adapter_name, without_value)
        saved_weights.check_all_lambdas_taken(adapter_name, getattr(result, "unexpected_keys", ()))
        return result


def _config_of_weights(model: Any, adapter_name: str, model_id: Any, hub_kwargs: dict[str, Any]) -> PeftConfig | None:
    """The config saved beside weights that are loaded onto an existing adapter: neither library compares the two."""
    existing = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(existing, SiboOptions) or not existing.options_outside_weights() or model_id is None:
        return None
    try:
        saved = PeftConfig.from_pretrained(model_id, **hub_kwargs)
    except (ValueError, OSError):  # weights alone are enough for PEFT
        return None
    saved_weights.check_same_options(existing, saved)
    return saved


def _transformers_delete_adapter(original: Callable, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    result = original(model, *args, **kwargs)
    sibo_lora.remove_unused_hooks(model)
    return result
