"""SIBO on a `LoraModel`: which of its layers mix, what injection adds to them, and when that is taken off again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from peft import PeftConfig, PeftType
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from sibo_triton.initial_residual import BlockStack, Feeds, attach, attached, detach, find_block_stacks, trace_feeds
from sibo_triton.lora.checkpoints import check_checkpoint
from sibo_triton.lora.config import SiboLoraConfig
from sibo_triton.lora.forward import FusedLinear
from sibo_triton.lora.install import forget, install, is_linear, match_class
from sibo_triton.lora.layer import MixingSite, dispatches_variants, lora_layers
from sibo_triton.lora.paths import Notices
from sibo_triton.lora.siblings import attach_siblings, detach_unused_siblings, find_siblings
from sibo_triton.lora.snapshot import Snapshot, is_loading, undo_if_loading_fails
from sibo_triton.lora.targets import matches, shortest_names

_ON_TRUST = "named by sibo_target_modules, not verified"


# What each adapter's config was when it was injected. Injecting another under its name replaces it in PEFT's dictionary
# before anything of ours runs; a refusal puts it back.
_configs: WeakKeyDictionary[nn.Module, dict[str, PeftConfig]] = WeakKeyDictionary()


class XLoraRefusal(ValueError):
    """X-LoRA was given a SIBO adapter."""


def inject_adapter(
    original: Callable[..., None], tuner: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """`LoraModel.inject_adapter`, and SIBO on top where the adapter's config asks for it.

    Raises:
        ValueError: the adapter cannot be made to mix right; the model is then as it was.
    """
    config = tuner.peft_config[adapter_name]
    mixes = isinstance(config, SiboLoraConfig) and config.mixes
    if mixes or any(adapter_name in getattr(layer, "sibo_sites", {}) for _, layer in lora_layers(model)):
        _inject_reversibly(original, tuner, model, adapter_name, *args, **kwargs)
    else:
        original(tuner, model, adapter_name, *args, **kwargs)
    _configs.setdefault(model, {})[adapter_name] = config


def _inject_reversibly(
    original: Callable[..., None], tuner: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    config = tuner.peft_config[adapter_name]
    snapshot = Snapshot(model)
    targeted = (tuner.targeted_module_names, tuner.targeted_parameter_names)
    targeted_before = [list(names) for names in targeted]

    def take_back() -> None:
        snapshot.restore()
        remove_unused_hooks(model)
        previous = _configs.get(model, {}).get(adapter_name)  # PEFT has put the new one in its place
        if previous is not None and any(_has_adapter(layer, adapter_name) for _, layer in lora_layers(model)):
            tuner.peft_config[adapter_name] = previous
        else:
            tuner.peft_config.pop(adapter_name, None)
        for names, before in zip(targeted, targeted_before, strict=True):
            names[:] = before

    try:
        for _, layer in lora_layers(model):
            forget(layer, adapter_name)  # an earlier adapter of this name
        if isinstance(config, SiboLoraConfig) and config.mixes:
            _inject_sibo(original, tuner, model, adapter_name, *args, **kwargs)
        else:
            original(tuner, model, adapter_name, *args, **kwargs)
        remove_unused_hooks(model)
    except BaseException:
        take_back()
        raise
    undo_if_loading_fails(take_back)


def _inject_sibo(
    original: Callable[..., None], tuner: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    config = tuner.peft_config[adapter_name]
    config.check_options()
    if any(other.peft_type == PeftType.XLORA for other in tuner.peft_config.values()):
        raise XLoraRefusal(
            f"Adapter {adapter_name!r} is a SIBO adapter, which X-LoRA cannot use: its layers compute plain LoRA. "
            "Give X-LoRA plain LoRA adapters (sibo_lambda=0, or peft.LoraConfig)."
        )
    stacks = find_block_stacks(model, config.sibo_blocks)
    requested, feeds = config.sibo_target_modules, None
    is_saved = is_loading() and config._sibo_from_file
    if is_saved:  # it names its modules, as they were found when it was made
        requested = requested or config.sibo_mixing_modules
    if requested is None or not is_saved:
        feeds = trace_feeds(model, stacks)
    shared = trace_feeds(model, stacks) if feeds is None else feeds
    original(tuner, model, adapter_name, *args, **kwargs)
    _make_sibo(model, adapter_name, config, requested, stacks, feeds, active=adapter_name in tuner.active_adapters)
    attach_siblings(model, find_siblings(model, shared))


def _make_sibo(
    model: nn.Module,
    adapter_name: str,
    config: SiboLoraConfig,
    requested: list[str] | str | None,
    stacks: Sequence[BlockStack],
    feeds: Feeds | None,
    active: bool,
) -> None:
    layers = {name: layer for name, layer in lora_layers(model) if _has_adapter(layer, adapter_name)}
    decisions: dict[str, tuple[BlockStack | None, str]] = {}
    for name, layer in layers.items():
        decisions[name] = _decide(name, layer, requested, stacks, feeds)
    mixing = {name: stack for name, (stack, _) in decisions.items() if stack is not None}
    _check_request(requested, layers, mixing, decisions, feeds)
    if feeds is not None:
        _warn_of_problems(stacks, decisions, feeds)

    used = {stack.name: stack for stack in mixing.values()}
    # all are looked up before the first hook is put on, for what may be refused
    embeddings = {name: _embedding_name(model, stack, config, layers, mixing) for name, stack in used.items()}
    residuals = {name: attach(model, stack, config.sibo_source, embeddings[name]) for name, stack in used.items()}
    notices = Notices()
    for name, layer in layers.items():
        stack, reason = decisions[name]
        site = MixingSite(name, residuals[stack.name] if stack is not None else None, reason, notices)
        train = active and not config.inference_mode
        install(layer, adapter_name, site, config.sibo_lambda, config.sibo_learnable, train)
    config._sibo_resolved = shortest_names(list(mixing), list(layers))
    if not any(getattr(hook, "hook", hook) is check_checkpoint for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(check_checkpoint)


def _decide(
    name: str,
    layer: LoraLayer,
    requested: list[str] | str | None,
    stacks: Sequence[BlockStack],
    feeds: Feeds | None,
) -> tuple[BlockStack | None, str]:
    """The stack whose initial residual a LoRA layer mixes in, or None; and why."""
    asked = requested is not None and matches(requested, name)
    stack = next((stack for stack in stacks if stack.holds(name)), None)
    if stack is None:
        mixes, reason = False, "lies outside of the stacks of blocks"
    elif not is_linear(layer):
        mixes, reason = False, f"is a {type(layer.get_base_layer()).__name__}, not a linear layer"
    elif feeds is None:
        mixes, reason = True, "named by the saved adapter"
    else:
        mixes, reason = feeds.reads(name, stack)
        if asked and stack.name in feeds.problems:
            mixes, reason = True, _ON_TRUST
    if asked and not mixes:
        raise ValueError(
            f"sibo_target_modules asks for {name}, which cannot mix: it {reason}. Leave it out of sibo_target_modules; "
            "it still gets plain LoRA."
        )
    if mixes and requested is not None and not asked:
        return None, "not among sibo_target_modules"
    if mixes and not dispatches_variants(layer):
        raise ValueError(
            f"{name} is a {type(layer).__name__}, a PEFT layer that computes plain LoRA whatever the adapter is, so "
            "SIBO would be left out silently. Use another quantisation (bitsandbytes, GPTQ, HQQ, torchao) or none, or "
            "peft.LoraConfig."
        )
    return (stack, reason) if mixes else (None, reason)


def _warn_of_problems(
    stacks: Sequence[BlockStack], decisions: dict[str, tuple[BlockStack | None, str]], feeds: Feeds
) -> None:
    for stack in stacks:
        names = {name: None for name in decisions if stack.holds(name)}
        if stack.name not in feeds.problems or not names:
            continue
        on_trust = {name: None for name in names if decisions[name][1] == _ON_TRUST}
        what = (
            f"sibo_target_modules is taken on trust for {_some(on_trust)}: make sure that their input is the residual "
            "stream"
            if on_trust
            else f"{_some(names)} get plain LoRA: name in sibo_target_modules those that read the residual stream"
        )
        warnings.warn(
            f"What feeds the modules of {stack.name!r} could not be found out, so {what}. A trial run of the model did "
            f"not work: {feeds.problems[stack.name]}.",
            stacklevel=2,
        )


def _check_request(
    requested: list[str] | str | None,
    layers: dict[str, LoraLayer],
    mixing: dict[str, BlockStack],
    decisions: dict[str, tuple[BlockStack | None, str]],
    feeds: Feeds | None,
) -> None:
    if isinstance(requested, list):
        idle = [item for item in requested if not any(matches([item], name) for name in layers)]
        if idle:
            raise ValueError(
                f"sibo_target_modules names {', '.join(map(repr, idle))}, which match no module that LoRA targets. The "
                f"LoRA targets are {_some(layers)}: add the module to target_modules, or mend the name."
            )
    if mixing:
        return
    if isinstance(requested, str):
        raise ValueError(f"sibo_target_modules={requested!r} matches none of the LoRA targets: {_some(layers)}.")
    examples: dict[str, str] = {}
    for name, (_, reason) in decisions.items():
        examples.setdefault(reason, name)
    reasons = "; ".join(f"{name} {reason}" for reason, name in examples.items())
    reasons += "".join(f"; {name}: {problem}" for name, problem in (feeds.problems if feeds else {}).items())
    raise ValueError(
        f"None of the {len(layers)} LoRA targets can mix in the initial residual ({reasons}), so SIBO would be plain "
        "LoRA. Target linears that read the residual stream (q/k/v, gate/up, the first of an MLP); where they cannot "
        "be found, name them in sibo_target_modules and their block list in sibo_blocks; or use sibo_lambda=0."
    )


def _embedding_name(
    model: nn.Module,
    stack: BlockStack,
    config: SiboLoraConfig,
    layers: dict[str, LoraLayer],
    mixing: dict[str, BlockStack],
) -> str | None:
    """For sibo_source="embedding": the name of the token embedding that feeds `stack`."""
    if config.sibo_source != "embedding":
        return None
    names = stack.owner_name.split(".") if stack.owner_name else []
    for end in range(len(names), -1, -1):
        module: Any = model.get_submodule(".".join(names[:end]))
        try:
            embedding = module.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if embedding is not None:
            break
    else:
        raise ValueError(
            f"sibo_source='embedding': no token embedding was found for {stack.name!r} (get_input_embeddings). Use "
            "sibo_source='block_input'."
        )
    table = embedding
    while not isinstance(table, nn.Embedding):
        inner = getattr(table, "base_layer", None) or getattr(table, "original_module", None)
        if inner is None:
            raise ValueError(
                f"sibo_source='embedding': the input embedding of {stack.name!r} is a {type(table).__name__}, which "
                "has no token table. Use sibo_source='block_input'."
            )
        table = inner
    for name, its_stack in mixing.items():
        if its_stack is stack and layers[name].in_features != table.embedding_dim:
            raise ValueError(
                f"sibo_source='embedding': {name} reads {layers[name].in_features} features, but the embedding has "
                f"{table.embedding_dim}. Use sibo_source='block_input'."
            )
    return next(name for name, candidate in model.named_modules() if candidate is embedding)


def remove_unused_hooks(model: nn.Module) -> None:
    """Take off the hooks of initial residuals that no layer of `model` mixes in any more, and its layers' class."""
    for _, layer in lora_layers(model):
        match_class(layer)
    detach_unused_siblings(model, FusedLinear)
    used = {id(site.residual) for _, layer in lora_layers(model) for site in getattr(layer, "sibo_sites", {}).values()}
    for residual in attached(model):
        if id(residual) not in used:
            detach(model, residual)
    if not attached(model):
        for key, hook in list(model._load_state_dict_pre_hooks.items()):
            if getattr(hook, "hook", hook) is check_checkpoint:
                del model._load_state_dict_pre_hooks[key]


def _has_adapter(layer: LoraLayer, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A


def _some(layers: dict[str, Any]) -> str:
    names = shortest_names(list(layers), list(layers))
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
