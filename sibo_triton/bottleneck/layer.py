"""A frozen module with bottleneck adapters: the layer finds h0 and calls one operation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from sibo_triton import reference
from sibo_triton.bottleneck.config import SiboAdapterConfig
from sibo_triton.float32_module import Float32Module
from sibo_triton.initial_residual.binding import first_hidden_state
from sibo_triton.layers.adapters import BOTTLENECK_LAMBDA_NAME
from sibo_triton.layers.obstacles import (
    PathName,
    apply_dropout,
    obstacle_in_adapter,
    obstacle_in_frozen,
    parameter,
)
from sibo_triton.layers.siblings import shared_output
from sibo_triton.layers.sites import MixingSite, initial_residual_for, mixed_batch, mixing_arguments
from sibo_triton.ops import BottleneckArguments, Group, add_bottleneck, bottleneck_group, bottleneck_linear


@dataclass(frozen=True)
class AdapterOptions:
    """The properties of an adapter of a layer, beside its weights.

    Attributes:
        reads_output: whether it is in series, behind the frozen module.
        in_front: whether it is in series, in front of it.
        activation: the name of f.
        scaling: s; unused where s is learnable.
    """

    reads_output: bool
    in_front: bool
    activation: str
    scaling: float


class LearnableScaling(Float32Module):
    """s of one module and one adapter: an fp32 parameter of shape [1], which stays fp32 when the model is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        """Return s: fp32, shape [1]."""
        return self.in_float32("weight")


class SiboAdapterLayer(nn.Module, BaseTunerLayer):
    """A frozen module with bottleneck adapters, each in front of it, behind it or in parallel to it.

    Args:
        base_layer: the frozen module.
        in_features: width of its input.
        out_features: width of its output, or of the first element if it returns a tuple.
    """

    adapter_layer_names: tuple[str, ...] = (
        "sibo_adapter_down",
        "sibo_adapter_up",
        "sibo_adapter_scaling",
        BOTTLENECK_LAMBDA_NAME,
    )
    other_param_names: tuple[str, ...] = ("sibo_adapter_dropout", "sibo_adapter_options", "sibo_sites")

    # attributes of PEFT's class, which has no types
    _active_adapter: Any
    _move_adapter_to_device_of_base_layer: Any
    active_adapters: Any
    delete_adapter: Any
    disable_adapters: Any
    get_base_layer: Any
    set_adapter: Any

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features = in_features
        self.out_features = out_features
        self.sibo_adapter_down = nn.ModuleDict()
        self.sibo_adapter_up = nn.ModuleDict()
        self.sibo_adapter_dropout = nn.ModuleDict()
        self.sibo_adapter_scaling = nn.ModuleDict()  # of those that learn it
        self.sibo_adapter_lambda = nn.ModuleDict()  # of those that mix here
        self.sibo_adapter_options: dict[str, AdapterOptions] = {}
        self.sibo_sites: dict[str, MixingSite] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: SiboAdapterConfig) -> None:
        """Add an adapter, or replace one of the same name by a new one."""
        in_series = config.placement == "series"
        options = AdapterOptions(
            reads_output=in_series and config.side == "output",
            in_front=in_series and config.side == "input",
            activation=config.activation,
            scaling=1.0 if config.scaling == "learnable" else config.scaling,
        )
        read = self.out_features if options.reads_output else self.in_features
        written = self.in_features if options.in_front else self.out_features
        for container in (self.sibo_adapter_scaling, self.sibo_adapter_lambda, self.sibo_sites):
            if adapter_name in container:
                del container[adapter_name]
        self.sibo_adapter_options[adapter_name] = options
        self.sibo_adapter_down[adapter_name] = nn.Linear(read, config.bottleneck_size, bias=config.adapter_bias)
        self.sibo_adapter_up[adapter_name] = nn.Linear(config.bottleneck_size, written, bias=config.adapter_bias)
        rate = config.adapter_dropout
        self.sibo_adapter_dropout[adapter_name] = nn.Dropout(rate) if rate > 0 else nn.Identity()
        if config.scaling == "learnable":
            self.sibo_adapter_scaling[adapter_name] = LearnableScaling()
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: bool | str) -> None:
        """Initialise the weights, as `SiboAdapterConfig.init_weights` says; biases are zero."""
        down: Any = self.sibo_adapter_down[adapter_name]
        up: Any = self.sibo_adapter_up[adapter_name]
        if init_weights == "bert":
            nn.init.normal_(down.weight, std=0.02)
            nn.init.normal_(up.weight, std=0.02)
        else:
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
        for linear in (down, up):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def modules_of(self, adapter_name: str) -> tuple[Any, Any, Any]:
        """The two projections and the dropout of an adapter."""
        return (
            self.sibo_adapter_down[adapter_name],
            self.sibo_adapter_up[adapter_name],
            self.sibo_adapter_dropout[adapter_name],
        )

    def scaling_of(self, adapter_name: str) -> Any:
        """s of an adapter: a number, or an fp32 tensor of shape [1] if it is learnable."""
        if adapter_name in self.sibo_adapter_scaling:
            return self.sibo_adapter_scaling[adapter_name]()
        return self.sibo_adapter_options[adapter_name].scaling

    def width_mixed(self, adapter_name: str) -> int:
        """Width of what an adapter reads, which h0 must have too."""
        return self.out_features if self.sibo_adapter_options[adapter_name].reads_output else self.in_features

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The frozen module's output with the active adapters, or with one for each row of the batch.

        The arguments are the frozen module's, and `adapter_names`, which names the adapter of each row.
        """
        names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            return self.base_layer(*args, **kwargs)
        if names is None:
            if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
                y = self._fused(args[0])
                if y is not None:
                    return y
            active = {name: None for name in self.active_adapters if name in self.sibo_adapter_options}
            return self._with_adapters(active, args, kwargs)
        rows = {name: _rows_of(names, name) for name in dict.fromkeys(names) if name in self.sibo_adapter_options}
        with mixed_batch(names):
            return self._with_adapters(rows, args, kwargs, len(names))

    def _fused(self, x: torch.Tensor) -> torch.Tensor | None:
        """The output if passes over x can be shared, with siblings or with the frozen linear; else None."""
        name = self.only_active()
        if name is None:
            return None
        in_front = self.sibo_adapter_options[name].in_front
        if not torch.compiler.is_compiling():
            y = shared_output(self, x)
            if y is not None:
                return self.base_layer(y) if in_front else y
        if in_front or self.fused_adapter(x) is None:
            return None
        (arguments,) = self._arguments_of([self], name, x)
        return bottleneck_linear(x, **self._with_frozen(arguments)._asdict())

    def only_active(self) -> str | None:
        """The active adapter of this layer, if there is exactly one; else None."""
        if self.disable_adapters:
            return None
        names = [name for name in self.active_adapters if name in self.sibo_adapter_options]
        return names[0] if len(names) == 1 else None

    def path_of(self, adapter_name: str) -> tuple[PathName, str | None]:
        """The path of an adapter that is active alone, for an unknown input, and why it is not a faster one."""
        obstacle = self._obstacle(adapter_name)
        if obstacle is not None:
            return "modules", obstacle
        options = self.sibo_adapter_options[adapter_name]
        if options.in_front or options.reads_output or linear_features(self.base_layer) is None:
            return "adapter", None  # there is no frozen product that its own could be added to
        obstacle = obstacle_in_frozen(self.base_layer)
        return ("fused", None) if obstacle is None else ("adapter", obstacle)

    def _obstacle(self, adapter_name: str, x: torch.Tensor | None = None) -> str | None:
        """Reason why the adapter must run by its modules (for an input x), or None."""
        names = ("sibo_adapter_down", "sibo_adapter_up", "sibo_adapter_dropout")
        return obstacle_in_adapter(self.modules_of(adapter_name), names, x)

    def tensors_read(self, adapter_name: str) -> list[torch.Tensor]:
        """The tensors that the operation reads: weights, biases, those of lambda, and a learnable scaling."""
        down, up, _ = self.modules_of(adapter_name)
        modules = (down, up) if self.sibo_adapter_options[adapter_name].in_front else (down, up, self.base_layer)
        tensors = [parameter(module, name) for module in modules for name in ("weight", "bias")]
        if adapter_name in self.sibo_adapter_lambda:
            lambda_module: Any = self.sibo_adapter_lambda[adapter_name]
            tensors += lambda_module.stored
        if adapter_name in self.sibo_adapter_scaling:
            tensors += self.sibo_adapter_scaling[adapter_name].parameters()
        return [tensor for tensor in tensors if tensor is not None]

    def fused_adapter(self, x: torch.Tensor) -> str | None:
        """The only active adapter, if it is in front of the frozen module or parallel to a plain linear; else None."""
        name = self.only_active()
        if name is None or self.sibo_adapter_options[name].reads_output:
            return None
        if self._obstacle(name, x) is not None:
            return None  # `_add_branch` looks again and warns
        if self.sibo_adapter_options[name].in_front:
            return name
        obstacle = obstacle_in_frozen(self.base_layer, x)
        if obstacle is None:
            return name
        if linear_features(self.base_layer) is not None:  # for a sub-layer nobody expects it
            site = self.sibo_sites[name]
            site.notices.warn_once(site.name, "the frozen layer and its adapter run apart", obstacle)
        return None

    @staticmethod
    def group_of(layers: Sequence[SiboAdapterLayer], adapter_name: str, x: torch.Tensor) -> Group | None:
        """One operation for these layers, which get the same x; None where each must run alone."""
        arguments = SiboAdapterLayer._arguments_of(layers, adapter_name, x)
        for i, layer in enumerate(layers):
            if not layer.sibo_adapter_options[adapter_name].in_front:
                arguments[i] = layer._with_frozen(arguments[i])
        return bottleneck_group(x, arguments)

    def _with_frozen(self, arguments: BottleneckArguments) -> BottleneckArguments:
        """The arguments with those of the frozen linear to which the adapter is parallel."""
        weight, bias = (parameter(self.base_layer, name) for name in ("weight", "bias"))
        return arguments._replace(weight=weight, bias=bias)

    @staticmethod
    def _arguments_of(layers: Sequence[SiboAdapterLayer], name: str, x: torch.Tensor) -> list[BottleneckArguments]:
        """The operations' arguments for one adapter of each layer, beside x and what the branch is added to."""
        dropouts = [layer.sibo_adapter_dropout[name] for layer in layers]
        mixings = mixing_arguments(layers, name, x, dropouts, BOTTLENECK_LAMBDA_NAME)
        all_arguments = []
        for layer, mixing in zip(layers, mixings, strict=True):
            down, up, _ = layer.modules_of(name)
            arguments = BottleneckArguments(
                down_weight=parameter(down, "weight"),
                up_weight=parameter(up, "weight"),
                scaling=layer.scaling_of(name),
                activation=layer.sibo_adapter_options[name].activation,
                down_bias=parameter(down, "bias"),
                up_bias=parameter(up, "bias"),
                **mixing._asdict(),
            )
            all_arguments.append(arguments)
        return all_arguments

    def _with_adapters(
        self, rows: Mapping[str, list[int] | None], args: tuple, kwargs: dict[str, Any], batch: int | None = None
    ) -> Any:
        """The output, to which each adapter is applied in its rows of the batch (None: all)."""
        if not rows:
            return self.base_layer(*args, **kwargs)
        x = self._input_among(args, kwargs)
        if batch is not None and batch != len(x):  # len() makes a number of a dynamic size
            raise ValueError(
                f"adapter_names has {batch} entries, but a layer got an input of {len(x)} rows: give one name for each "
                "sample of the batch."
            )
        options = self.sibo_adapter_options
        x_changed = x
        for name in (name for name in rows if options[name].in_front):
            x_changed = self._add_rows(name, rows[name], x_changed, x)
        args, kwargs = _replaced(args, kwargs, x, x_changed)
        returned = self.base_layer(*args, **kwargs)
        z = returned[0] if isinstance(returned, tuple) else returned
        y = z
        for name in (name for name in rows if not options[name].in_front):
            y = self._add_rows(name, rows[name], y, z if options[name].reads_output else x)
        return (y, *returned[1:]) if isinstance(returned, tuple) else y

    def _input_among(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        x = first_hidden_state(args, kwargs)
        if x is None:
            x = next(iter((*args, *kwargs.values())), None)
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            first = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(
                f"An adapter on a {type(self.get_base_layer()).__name__} got no hidden states among its arguments, but "
                f"{first}: take the module out of target_modules."
            )
        return x

    def _add_rows(self, name: str, rows: list[int] | None, base: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``base + g(v)`` in these rows of the batch (None: all)."""
        if rows is None:
            return self._add_branch(name, base, v)
        changed = self._add_branch(name, base[rows], v[rows])
        return base.index_copy(0, torch.tensor(rows, device=base.device), changed)

    def _add_branch(self, name: str, base: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``base + g(v)``."""
        down, up, dropout = self.modules_of(name)
        obstacle = self._obstacle(name, v)
        if obstacle is None:
            (arguments,) = self._arguments_of([self], name, v)
            of_adapter = {key: of for key, of in arguments._asdict().items() if key not in ("weight", "bias")}
            return add_bottleneck(base, v, **of_adapter)
        site = self.sibo_sites[name]
        site.notices.warn_once(site.name, "the adapter's modules are called one by one", obstacle)
        h0, lambda_ = None, 0.0
        if name in self.sibo_adapter_lambda:
            h0, lambda_ = initial_residual_for(self, name, v), self.sibo_adapter_lambda[name]()
        v_mixed = reference.mix(v.to(down.weight.dtype), h0, lambda_)
        activation = reference.ACTIVATIONS[self.sibo_adapter_options[name].activation]
        hidden = activation(down(apply_dropout(dropout, v_mixed)))
        return (base + up(hidden) * self.scaling_of(name)).to(base.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        refuse_merging(", ".join(adapter_names or self.active_adapters))

    def unmerge(self) -> None:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)  # as PEFT's layers say it


class SubLayer(SiboAdapterLayer):
    """A frozen sub-layer ("mlp", "self_attn") with adapters, on which the sub-layer's attributes are found too."""

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """Of its first weight that is not quantised: a sub-layer has none of its own, where PEFT looks."""
        weights = [weight for weight in base_layer.parameters() if weight.is_floating_point() and weight.itemsize > 1]
        return (weights[0].device, weights[0].dtype) if weights else (None, None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """The input and output width of a linear of any kind; None for another module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        read, written = (getattr(module, name, None) for name in names)
        if isinstance(read, int) and isinstance(written, int):
            return read, written
    return None


def refuse_merging(adapters: str) -> NoReturn:
    """Raise the ValueError that says why a bottleneck adapter cannot be merged."""
    raise ValueError(
        f"Cannot merge adapter {adapters!r}: a bottleneck adapter is not linear (and with SIBO reads the initial "
        "residual), so no weight of the layer gives the same output. Keep the adapter as it is: it can be saved, "
        "loaded and generated with. unload() gives the base model back."
    )


def _rows_of(names: Sequence[str], name: str) -> list[int]:
    return [row for row, other in enumerate(names) if other == name]


def _replaced(args: tuple, kwargs: dict[str, Any], x: torch.Tensor, by: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments with another tensor in the place of x."""
    if by is x:
        return args, kwargs
    return (
        tuple(by if value is x else value for value in args),
        {name: by if value is x else value for name, value in kwargs.items()},
    )
