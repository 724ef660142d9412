"""`SiboAdapterModel`: PEFT's tuner for bottleneck adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from peft.tuners.lora.model import _adapter_names_pre_forward_hook, _get_encoder
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sibo_triton.bottleneck.config import SiboAdapterConfig
from sibo_triton.bottleneck.layer import SiboAdapterLayer, SubLayer, linear_features, refuse_merging
from sibo_triton.initial_residual import BlockStack, TrialRun, find_block_stacks, stack_of, trial_run
from sibo_triton.initial_residual.output_uses import is_linear_like
from sibo_triton.injection.mixing_modules import (
    Decisions,
    Method,
    abbreviated,
    bind,
    decide,
    remove_unused_hooks,
    requested_modules,
)
from sibo_triton.injection.module_names import matches, shortest_names
from sibo_triton.injection.reversible import inject_reversibly, note_config
from sibo_triton.layers.adapters import BOTTLENECK_PREFIX
from sibo_triton.layers.siblings import connect_siblings
from sibo_triton.layers.sites import MixingSite, Notices
from sibo_triton.sibo_lambda import SiboLambda


class SiboAdapterModel(BaseTuner):
    """A model with bottleneck adapters, as `peft.get_peft_model` makes it for a `SiboAdapterConfig`."""

    prefix = BOTTLENECK_PREFIX
    tuner_layer_cls = SiboAdapterLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter on the modules that its config targets, and bind the initial residual where it mixes.

        Raises:
            TypeError: the config is not a `SiboAdapterConfig`.
            ValueError: the adapter cannot compute what its config says; the model is then as it was.
        """
        config = self.peft_config[adapter_name]
        inject_reversibly(
            partial(self._inject, model, adapter_name, *args, **kwargs), self, model, adapter_name, remove_unused_hooks
        )
        note_config(model, adapter_name, config)

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: SiboAdapterConfig = self.peft_config[adapter_name]
        if not isinstance(config, SiboAdapterConfig):
            raise TypeError(f"Adapter {adapter_name!r} needs a SiboAdapterConfig, got {type(config).__name__}.")
        config.check_options()
        for _, layer in adapter_layers(model):
            if adapter_name in layer.sibo_adapter_options:
                layer.delete_adapter(adapter_name)  # an earlier adapter of this name
        requested, known = requested_modules(config)
        known = known and config.target_modules is not None and not _targets_sub_layers(model, config)
        stacks, trial = _look_at(model, config)
        if config.target_modules is None:
            config.target_modules = _feed_forward_linears(model, stacks, trial)  # a set, as PEFT has it
        self._widths, self._output_shapes = trial.widths, trial.output_shapes
        super().inject_adapter(model, adapter_name, *args, **kwargs)

        layers = {name: layer for name, layer in adapter_layers(model) if adapter_name in layer.sibo_adapter_options}
        if not layers:  # PEFT 0.19 checks this for the first adapter only
            raise ValueError(f"Target modules {config.target_modules} not found in the base model.")
        if config.mixes:
            method = _method(adapter_name, config)
            decisions = decide(layers, requested, stacks, None if known else trial, method)
            if config.side == "output" and requested is None:
                _refuse_other_outputs(layers, decisions, stacks, trial)
            sites = bind(model, config, layers, decisions, trial, method)
        else:
            notices = Notices()
            sites = {name: MixingSite(name, None, "plain adapter", notices) for name in layers}
        train = adapter_name in self.active_adapters and not config.inference_mode
        for name, layer in layers.items():
            _install(layer, adapter_name, sites[name], config, train)
        reading_x = ((name, layer) for name, layer in adapter_layers(model) if not _reads_output(layer))
        connect_siblings(model, reading_x, trial, warn=known or not config.mixes)  # else `decide` has warned

    def _prepare_adapter_config(self, peft_config: SiboAdapterConfig, model_config: dict) -> SiboAdapterConfig:
        return peft_config  # `_inject` has found the default of target_modules

    def _create_and_replace(
        self,
        config: SiboAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        names = current_key.split(".")
        for end in range(1, len(names)):
            around = ".".join(names[:end])
            if isinstance(self.model.get_submodule(around), SubLayer):
                raise ValueError(
                    f"{current_key} lies inside of {around}, which has an adapter as a whole: the frozen module would "
                    "never call one on its part. Target one of the two."
                )
        if isinstance(target, SiboAdapterLayer):
            target.update_layer(adapter_name, config)
            return
        if isinstance(target, BaseTunerLayer):
            raise ValueError(
                f"{current_key} has an adapter of another method already ({type(target).__name__}): put the two on "
                "different modules."
            )
        layer = self._new_layer(config, target, current_key)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an inactive adapter is not trainable
        self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, config: SiboAdapterConfig, target: nn.Module, name: str) -> SiboAdapterLayer:
        features = linear_features(target)
        if isinstance(target, NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"{name} is read by torch's MultiheadAttention, which never calls it: target another module."
            )
        if features is not None:
            return SiboAdapterLayer(target, *features)
        width = _stream_width(name, self._widths)
        in_front = config.placement == "series" and config.side == "input"
        if in_front or width is None or not any(True for _ in target.children()):
            raise ValueError(
                f"{name} is a {type(target).__name__}, not a linear layer, and gets no adapter in front of it. Take it "
                "out of target_modules; whole sub-layers of a block can have adapters with placement='parallel' or "
                "side='output'."
            )
        inner = [child for child, module in target.named_modules() if isinstance(module, BaseTunerLayer)]
        if inner:
            raise ValueError(
                f"{name} holds {abbreviated(inner, inner)}, which have adapters already: one around them would "
                "rename their weights, and they could not be saved and loaded any more. Target other modules, or give "
                "all of them adapters in another model."
            )
        returned = {shape[-1] for shape in self._output_shapes.get(name, ())}
        if returned - {width}:
            widths = ", ".join(map(str, sorted(returned)))
            raise ValueError(
                f"{name} is a {type(target).__name__} that returns {widths} features, and the residual stream has "
                f"{width}: an adapter around it would not fit. Target linears instead."
            )
        return SubLayer(target, width, width)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, SubLayer):  # to be unloaded: PEFT would copy a weight, which a sub-layer does not have
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        remove_unused_hooks(self.model)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        remove_unused_hooks(model)
        return model

    def _check_merge_allowed(self) -> None:
        refuse_merging(", ".join(self.active_adapters))

    def add_weighted_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: adapters are not linear, so a sum of their weights does not compute the sum of their outputs."""
        raise ValueError(
            "Bottleneck adapters cannot be combined into one: they are not linear. Activate several with "
            "base_model.set_adapter([...]) instead; what they compute then adds up."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """For PeftModel: pass `adapter_names`, one name for each sample, to the layers."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = {name for name in names if name != "__base__"} - set(self.peft_config)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams") or 1
        encoder = _get_encoder(self.model)
        in_encoder = set() if encoder is None else set(encoder.modules())
        handles = []
        for module in self.modules():
            if isinstance(module, (SiboAdapterLayer, AuxiliaryTrainingWrapper)):
                repeated = list(names) if module in in_encoder else [name for name in names for _ in range(beams)]
                hook = partial(_adapter_names_pre_forward_hook, adapter_names=repeated)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, SiboAdapterLayer]]:
    """The layers of a base model that have bottleneck adapters, with their names from its root."""
    for name, module in model.named_modules():
        if isinstance(module, SiboAdapterLayer):
            yield name, module


def _reads_output(layer: SiboAdapterLayer) -> bool:
    return all(options.reads_output for options in layer.sibo_adapter_options.values())


def _install(
    layer: SiboAdapterLayer, adapter_name: str, site: MixingSite, config: SiboAdapterConfig, train: bool
) -> None:
    layer.sibo_sites[adapter_name] = site
    if site.residual is None:
        return
    device: Any = layer.sibo_adapter_down[adapter_name].weight.device
    lambda_ = SiboLambda(config.sibo_lambda, config.sibo_learnable, device)
    layer.sibo_adapter_lambda[adapter_name] = lambda_.requires_grad_(train)


def _look_at(model: nn.Module, config: SiboAdapterConfig) -> tuple[list[BlockStack], TrialRun]:
    """The stacks of blocks of a model, and what a trial run saw."""
    needs_stacks = config.target_modules is None or config.mixes or _targets_sub_layers(model, config)
    try:
        stacks = find_block_stacks(model, config.sibo_blocks)
    except ValueError:
        if needs_stacks:
            raise
        return [], TrialRun()  # not a transformer: every module runs alone
    trial = trial_run(model, stacks)  # also for a saved adapter: its file does not say which layers share x
    return trial.owned(model, stacks), trial


def _targets_sub_layers(model: nn.Module, config: SiboAdapterConfig) -> bool:
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        return False
    modules = ((name, module) for name, module in model.named_modules() if matches(targets, name))
    return any(linear_features(module) is None and not isinstance(module, BaseTunerLayer) for _, module in modules)


def _feed_forward_linears(model: nn.Module, stacks: list[BlockStack], trial: TrialRun) -> set[str]:
    """The default of target_modules."""
    names = [
        name
        for stack in stacks
        for name in trial.marks
        if stack.holds(name) and trial.reads_into_feed_forward(name, stack)
    ]
    empty = [stack.name for stack in stacks if not any(map(stack.holds, names)) and _has_linears(stack)]
    problems = "; ".join(f"{name}: {problem}" for name, problem in trial.problems.items())
    if names and empty:
        warnings.warn(
            f"No linear of a feed-forward network that reads the residual stream was found in {', '.join(empty)}, so "
            f"there are no adapters{f' ({problems})' if problems else ''}. Name modules in target_modules if there "
            "should be.",
            stacklevel=2,
        )
    if not names:
        around = [name for name, module in model.named_modules() if isinstance(module, SubLayer)]
        problems = f"; {problems}" if problems else ""
        if around:
            problems += f", outside of {abbreviated(around, around)}, which have adapters as a whole"
        raise ValueError(
            f"No linear of a feed-forward network that reads the residual stream was found in {type(model).__name__}"
            f"{problems}. Name the modules in target_modules."
        )
    return set(shortest_names(names, [name for name, _ in model.named_modules() if name]))


def _has_linears(stack: BlockStack) -> bool:
    """Not so of the convolutions in front of a speech model."""
    return any(is_linear_like(module) for block in stack.blocks for module in block.modules())


def _stream_width(name: str, widths: dict[str, int]) -> int | None:
    """Width of the residual stream of the stack that holds a module, where it is known."""
    return next((width for stack, width in widths.items() if name.startswith(stack + ".")), None)


def _method(adapter_name: str, config: SiboAdapterConfig) -> Method:
    method = Method(name="adapter", plain="a plain adapter", width=lambda layer: layer.width_mixed(adapter_name))
    if config.side == "output":
        advice = "modules whose output is as wide as the residual stream (down projections)"
        return replace(method, advice=advice, can_mix=_as_wide)
    return method


def _as_wide(name: str, layer: SiboAdapterLayer, stack: BlockStack, trial: TrialRun) -> tuple[bool, str]:
    """Whether a module's output can be mixed with h0, being of the same tokens and as wide; and the reason."""
    _, reason = trial.reads(name, stack)
    unknown = name not in trial.marks or stack.name in trial.problems or stack.name in trial.repeated
    if unknown or trial.marks[name] - {None, stack.name}:  # it reads another stack's stream: other tokens
        return False, reason
    other = _other_output(name, layer, stack, trial)
    return (True, "returns what is as wide as the residual stream") if other is None else (False, other)


def _other_output(name: str, layer: SiboAdapterLayer, stack: BlockStack, trial: TrialRun) -> str | None:
    """What a module returns, if that does not fit h0."""
    width = trial.widths.get(stack.name)
    if width not in (None, layer.out_features):
        return f"returns {layer.out_features} features, and the initial residual of {stack.name} has {width}"
    if width is not None and not trial.returns_tokens(name, stack):
        return f"returns other tokens than those that enter {stack.name}, or in another order"
    return None


def _refuse_other_outputs(
    layers: dict[str, SiboAdapterLayer], decisions: Decisions, stacks: list[BlockStack], trial: TrialRun
) -> None:
    """Raise a ValueError if an adapter on the output side would not mix because of what its module returns."""
    others = {}
    for name, layer in layers.items():
        stack = stack_of(name, stacks)
        if decisions[name][0] is None and stack is not None:
            other = _other_output(name, layer, stack, trial)
            if other is not None:
                others[name] = other
    if others:
        name, reason = next(iter(others.items()))
        raise ValueError(
            f"side='output': {name} {reason}, so its output cannot be mixed (as of {abbreviated(others, layers)}). Use "
            "side='input', target modules whose output is as wide (down projections), or name those that mix in "
            "sibo_target_modules: the others then get a plain adapter."
        )
