"""Decide which layers of an adapter mix in which initial residual, and register the hooks that bind it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sibo_triton.initial_residual import BlockStack, InitialResidual, TrialRun, attach, attached, detach, stack_of
from sibo_triton.injection.module_names import matches, shortest_names
from sibo_triton.injection.reversible import is_loading
from sibo_triton.layers.adapters import tuner_layers
from sibo_triton.layers.siblings import detach_unused_siblings
from sibo_triton.layers.sites import MixingSite, Notices
from sibo_triton.options import SiboOptions
from sibo_triton.saving.saved_weights import check_state_dict

_ON_TRUST = "named by sibo_target_modules, not verified"

Decisions = dict[str, tuple[BlockStack | None, str]]  # layer -> the stack whose h0 it mixes in, or None; and why


def _reads(name: str, layer: Any, stack: BlockStack, trial: TrialRun) -> tuple[bool, str]:
    return trial.reads(name, stack)


@dataclass(frozen=True)
class Method:
    """What the decision needs to know about a PEFT method.

    Attributes:
        name: as in "the LoRA targets".
        plain: what a layer that does not mix computes.
        width: the width of what a layer mixes with h0.
        advice: what to target where nothing can mix.
        obstacle: the reason why a layer cannot mix whatever feeds it, or None.
        refuse: raises an error for a layer that would mix, but cannot compute it.
        can_mix: whether a layer can mix in its stack's initial residual, by what the trial run saw, and the reason.
    """

    name: str
    plain: str
    width: Callable[[Any], int]
    advice: str = "linears that read the residual stream (q/k/v, gate/up, the first of an MLP)"
    obstacle: Callable[[Any], str | None] = lambda layer: None
    refuse: Callable[[str, Any], None] = lambda name, layer: None
    can_mix: Callable[[str, Any, BlockStack, TrialRun], tuple[bool, str]] = _reads


def requested_modules(config: SiboOptions) -> tuple[list[str] | str | None, bool]:
    """What `sibo_target_modules` asks for, and whether it is taken whatever a trial run of the model saw.

    The config of a saved adapter names the modules that were found when the adapter was made.
    """
    is_saved = is_loading() and config._sibo_from_file
    requested = config.sibo_target_modules
    if is_saved:
        requested = requested or config.sibo_mixing_modules
    return requested, is_saved and requested is not None


def decide(
    layers: Mapping[str, Any],
    requested: list[str] | str | None,
    stacks: Sequence[BlockStack],
    trial: TrialRun | None,
    method: Method,
) -> Decisions:
    """Decide for each layer whether it mixes, in which stack's initial residual, and why.

    Args:
        layers: the layers, by their names from the base model's root.
        requested: see :func:`requested_modules`.
        stacks: the model's stacks of blocks.
        trial: what the trial run saw; None to take what is requested as it is.
        method: the PEFT method.

    Raises:
        ValueError: what is requested cannot mix, or nothing mixes.
    """
    decisions = {name: _decide(name, layer, requested, stacks, trial, method) for name, layer in layers.items()}
    _check_request(requested, layers, decisions, trial, method)
    if trial is not None:
        _warn_of_problems(stacks, decisions, trial, method)
    return decisions


def bind(
    model: nn.Module,
    config: SiboOptions,
    layers: Mapping[str, Any],
    decisions: Decisions,
    trial: TrialRun,
    method: Method,
) -> dict[str, MixingSite]:
    """Register the hooks of the initial residuals on the model, and return the site of each layer."""
    mixing = {name: stack for name, (stack, _) in decisions.items() if stack is not None}
    used = {stack.name: stack for stack in mixing.values()}
    # all lookups come before the first hook, because they may raise
    widths = {name: (stack, method.width(layers[name])) for name, stack in mixing.items()}
    embeddings = {name: _embedding_name(model, stack, config, widths) for name, stack in used.items()}
    residuals = {name: attach(model, stack, config.sibo_source, embeddings[name]) for name, stack in used.items()}
    for residual in residuals.values():
        residual.check_read = _warn_of_unread
        residual.is_intact = residual.stack_name in trial.intact
    notices = Notices()
    config._sibo_resolved = shortest_names(list(mixing), list(layers))
    if not _check_hooks(model):
        model.register_load_state_dict_pre_hook(check_state_dict)
    sites = {}
    for name, (stack, reason) in decisions.items():
        bound = None if stack is None else residuals[stack.name]
        sites[name] = MixingSite(name, bound, reason, notices, runs_once=len(trial.inputs.get(name, ())) == 1)
    return sites


def _warn_of_unread(scope: nn.Module, residual: InitialResidual, read: set[str]) -> bool:
    """Warn of modules that should have read h0 in a forward and did not; returns whether any should have."""
    names, all_names = [], []
    for _, layer in tuner_layers(scope):
        sites = {} if layer.disable_adapters else layer.__dict__.get("sibo_sites", {})
        of_active = [sites[name] for name in layer.active_adapters if name in sites]
        names += [site.name for site in of_active if site.residual is residual]
        all_names += [site.name for site in of_active]
    endings = {name.rpartition(".")[2] for name in read}
    unread = [name for name in names if name.rpartition(".")[2] not in endings]
    if unread:
        warnings.warn(
            f"{abbreviated(unread, all_names)} mix in the initial residual of {residual.stack_name!r}, but none of "
            "them was called in a forward of it. If another library computes their adapters, as kernels of axolotl and "
            "unsloth do, they are plain LoRA there: turn these kernels off, or train plain LoRA (sibo_lambda=0).",
            stacklevel=2,
        )
    return bool(names)


def remove_unused_hooks(model: nn.Module) -> None:
    """Remove the hooks of initial residuals that no layer of `model` mixes in any more, and of former siblings."""
    detach_unused_siblings(model)
    sites = [site for _, layer in tuner_layers(model) for site in getattr(layer, "sibo_sites", {}).values()]
    used = {id(site.residual) for site in sites}
    for residual in attached(model):
        if id(residual) not in used:
            detach(model, residual)
    if not attached(model):
        for key in _check_hooks(model):
            del model._load_state_dict_pre_hooks[key]


def _check_hooks(model: nn.Module) -> list[int]:
    """The keys of `check_state_dict` among the hooks that a model calls before it loads a state dict."""
    hooks = model._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if getattr(hook, "hook", hook) is check_state_dict]


def _decide(
    name: str,
    layer: Any,
    requested: list[str] | str | None,
    stacks: Sequence[BlockStack],
    trial: TrialRun | None,
    method: Method,
) -> tuple[BlockStack | None, str]:
    asked = requested is not None and matches(requested, name)
    stack = stack_of(name, stacks)
    obstacle = method.obstacle(layer)
    if stack is None:
        mixes, reason = False, "lies outside of the stacks of blocks"
    elif obstacle is not None:
        mixes, reason = False, obstacle
    elif trial is None:
        mixes, reason = True, "named by the saved adapter"
    else:
        mixes, reason = method.can_mix(name, layer, stack, trial)
        width = trial.widths.get(stack.name)
        if mixes and width not in (None, method.width(layer)):  # in stages of a vision model
            mixes, reason = False, f"mixes {method.width(layer)} features, and the initial residual has {width}"
        if asked and trial.is_unknown(name, stack):
            mixes, reason = True, _ON_TRUST
    if asked and not mixes:
        raise ValueError(
            f"sibo_target_modules asks for {name}, which cannot mix: it {reason}. Leave it out of sibo_target_modules; "
            f"it still gets {method.plain}."
        )
    if mixes and requested is not None and not asked:
        return None, "not among sibo_target_modules"
    if mixes:
        method.refuse(name, layer)
    return (stack, reason) if mixes else (None, reason)


def _warn_of_problems(stacks: Sequence[BlockStack], decisions: Decisions, trial: TrialRun, method: Method) -> None:
    for stack in stacks:
        unknown = [name for name in decisions if stack.holds(name) and trial.is_unknown(name, stack)]
        on_trust = [name for name in unknown if decisions[name][1] == _ON_TRUST]
        names = [name for name in unknown if decisions[name] == (None, trial.reads(name, stack)[1])]
        if not on_trust and not names:
            continue
        what = (
            f"sibo_target_modules is taken on trust for {abbreviated(on_trust, decisions)}: make sure that their input "
            "is the residual stream"
            if on_trust
            else f"{abbreviated(names, decisions)} get {method.plain}: name in sibo_target_modules those that read the "
            "residual stream"
        )
        problem = trial.problems.get(stack.name)
        ran = trial.marks.keys() >= {*(on_trust or names)}
        why = "no linear was seen to read it" if ran else "they did not run"
        why = why if problem is None else f"it did not work: {problem}"
        warnings.warn(
            f"What feeds modules of {stack.name!r} could not be found out, so {what}. In a trial run of the model "
            f"{why}.",
            stacklevel=2,
        )


def _check_request(
    requested: list[str] | str | None,
    layers: Mapping[str, Any],
    decisions: Decisions,
    trial: TrialRun | None,
    method: Method,
) -> None:
    targets = f"{method.name} targets"
    if (
        isinstance(requested, list) and trial is not None
    ):  # PEFT's EVA drops targets, of which a saved adapter has names
        idle = [item for item in requested if not any(matches([item], name) for name in layers)]
        if idle:
            raise ValueError(
                f"sibo_target_modules names {', '.join(map(repr, idle))}, which match no module that {targets}. The "
                f"{targets} are {abbreviated(layers, layers)}: add the module to target_modules, or mend the name."
            )
    if any(stack is not None for stack, _ in decisions.values()):
        return
    if isinstance(requested, str):
        raise ValueError(
            f"sibo_target_modules={requested!r} matches none of the {targets}: {abbreviated(layers, layers)}."
        )
    examples: dict[str, str] = {}
    for name, (_, reason) in decisions.items():
        examples.setdefault(reason, name)
    reasons = "; ".join(f"{name} {reason}" for reason, name in examples.items())
    reasons += "".join(f"; {name}: {problem}" for name, problem in (trial.problems if trial else {}).items())
    raise ValueError(
        f"None of the {len(layers)} {targets} can mix in the initial residual ({reasons}), so SIBO would be "
        f"{method.plain}. Target {method.advice}; where they cannot be found, name them in sibo_target_modules and "
        "their block list in sibo_blocks; or use sibo_lambda=0."
    )


def _embedding_name(
    model: nn.Module, stack: BlockStack, config: SiboOptions, widths: Mapping[str, tuple[BlockStack, int]]
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
    for name, (its_stack, width) in widths.items():
        if its_stack is stack and width != table.embedding_dim:
            raise ValueError(
                f"sibo_source='embedding': {name} reads {width} features, but the embedding has "
                f"{table.embedding_dim}. Use sibo_source='block_input'."
            )
    return next(name for name, candidate in model.named_modules() if candidate is embedding)


def abbreviated(names: Collection[str], among: Collection[str]) -> str:
    """The names, shortened to endings that no other of `among` has; at most 12 are listed."""
    short = shortest_names(list(names), list(among))
    return ", ".join(short[:12]) + (", ..." if len(short) > 12 else "")
