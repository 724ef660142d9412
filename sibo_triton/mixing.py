"""How a module mixes: lambda as a tensor that is saved with the weights.

The paper's equation 4:  x~ = (1 - lambda) * x + lambda * h0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Float32Module(nn.Module):
    """A module of a few numbers that stay float32 when the model is cast (in bfloat16 0.3 would become 0.30078).

    Also where their `data` is cast, which no module sees: TRL's trainers do so on a quantised base, to every trainable
    parameter, and FSDP's `MixedPrecision(buffer_dtype=...)` to buffers. In bfloat16 a step of an optimizer is less than
    the spacing of the numbers, and a parameter would never move. It is float32 again before anything takes hold of it:
    from `train()` on, which trainers call, or when a wrapper such as DDP collects the parameters; else from the next
    forward on. Buffers are from the next forward on.
    """

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None:  # what FSDP puts in its place, in a dtype of its own, is not registered
            self.__dict__.setdefault("_registered", {})[name] = param, param.detach().clone()

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent)
        self.note_buffers()

    def note_buffers(self) -> None:
        """Remember the buffers and their values, which a cast of their `data` is undone to."""
        noted: dict[str, Any] = self.__dict__.setdefault("_noted_buffers", {})
        for name, buffer in self._buffers.items():
            if buffer is not None:
                noted[name] = buffer, None if buffer.is_meta else buffer.detach().clone()

    def train(self, mode: bool = True) -> Float32Module:
        self._restore_float32()
        return super().train(mode)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self._restore_float32()
        return super().named_parameters(*args, **kwargs)

    def in_float32(self, name: str) -> torch.Tensor:
        """A parameter, for a forward."""
        parameter = self._parameters.get(name)
        if parameter is None:  # FSDP has an attribute in its place
            return getattr(self, name)
        if parameter.dtype != torch.float32:
            if torch.compiler.is_compiling() or (dist.is_available() and dist.is_initialized()):
                return parameter.float()  # DDP would lose track of one that is changed now
            self._restore_float32()
        return parameter

    @torch.no_grad()
    def _restore_float32(self) -> None:
        all_registered: dict[str, tuple[nn.Parameter, torch.Tensor]] = self.__dict__.get("_registered", {})
        for name, (parameter, registered) in all_registered.items():
            is_cast = parameter.dtype != torch.float32 and not parameter.is_meta
            if not is_cast or self._parameters.get(name) is not parameter or hasattr(parameter, "_fsdp_flattened"):
                continue
            parameter.data = _in_float32(parameter, registered)

    def buffer_in_float32(self, name: str) -> torch.Tensor:
        """A buffer, for a forward."""
        buffer: Any = self._buffers[name]  # attributes of modules are slow to look up
        if buffer.dtype is torch.float32:
            return buffer
        noted, value = self.__dict__["_noted_buffers"][name]
        if buffer is not noted or value is None:
            return buffer.float()  # torch.func.functional_call puts tensors of its caller in the place of buffers
        if torch.compiler.is_compiling():
            return torch.where(value.to(buffer.device, buffer.dtype) == buffer, value.to(buffer.device), buffer.float())
        with torch.inference_mode(False), torch.no_grad():
            buffer.data = _in_float32(buffer, value)
        return buffer

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that saved weights must hold, by their names in this module."""
        parameters = {name: parameter for name, parameter in self._parameters.items() if parameter is not None}
        return {**parameters, **dict(self.named_buffers(recurse=False))}

    def _apply(self, fn: Any, recurse: bool = True) -> Float32Module:
        before = {name: tensor.detach() for name, tensor in self.tensors().items()}
        super()._apply(fn, recurse)
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                if tensor.dtype != torch.float32:  # it was cast: keep the new device, restore the value
                    tensor.data = before[name].to(tensor.device, torch.float32)
        self.note_buffers()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in self.tensors():
            key = prefix + name
            if key in state_dict:  # load_state_dict(assign=True) would take the checkpoint's dtype
                state_dict[key] = state_dict[key].to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.note_buffers()


def _in_float32(cast: torch.Tensor, registered: torch.Tensor) -> torch.Tensor:
    """What was cast, in float32: as it was registered or loaded, unless it has changed since."""
    registered = registered.to(cast.device, copy=True)
    return registered if torch.equal(registered.to(cast.dtype), cast) else cast.detach().to(torch.float32)


class SiboLambda(Float32Module):
    """The mixing ratio lambda of one module and one adapter: an fp32 tensor of shape [1], part of the state dict.

    Layers compute with this tensor, not with the config, so that whatever loads the adapter's weights loads its lambda
    too. It stays fp32 when the model is cast.

    * fixed: a buffer `weight` holds lambda; a buffer, because PEFT makes every adapter parameter trainable.
    * learnable: lambda = gate * sigmoid(logit_bias), as lambda would leave [0, 1] if it were trained itself. The
      parameter's name holds "bias" because `transformers.Trainer` and PEFT's optimizers exempt such names from weight
      decay. `gate` is a buffer of ones: PEFT's hotswap zeroes what a checkpoint does not hold, and a plain LoRA
      checkpoint must then give lambda = 0, not sigmoid(0) = 0.5. The names differ from the fixed ones so that swapping
      one kind for the other is an error.
    """

    weight: torch.Tensor
    gate: torch.Tensor
    logit_bias: nn.Parameter

    def __init__(self, value: float, learnable: bool = False, device: torch.device | None = None) -> None:
        super().__init__()
        if device is not None and device.type == "meta":
            device = None  # lambda has its value before weights are loaded
        self.learnable = learnable
        if learnable:
            logit = math.log(value) - math.log1p(-value)
            self.logit_bias = nn.Parameter(torch.full((1,), logit, dtype=torch.float32, device=device))
            self.register_buffer("gate", torch.ones(1, dtype=torch.float32, device=device))
        else:
            self.register_buffer("weight", torch.full((1,), value, dtype=torch.float32, device=device))

    def forward(self) -> torch.Tensor:
        """Return lambda: fp32, shape [1]."""
        if self.learnable:
            return self.gate * torch.sigmoid(self.in_float32("logit_bias"))
        return self.buffer_in_float32("weight")

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """The tensors that lambda is computed from."""
        return (self.logit_bias, self.gate) if self.learnable else (self.buffer_in_float32("weight"),)

    def problem_with(self, name: str, tensor: torch.Tensor) -> str | None:
        """Say what is wrong with a checkpoint's `tensor` for the entry `name`, or None."""
        if tuple(tensor.shape) != (1,):
            return f"has shape {list(tensor.shape)}, expected [1]"
        if tensor.is_meta or hasattr(tensor, "device_mesh"):  # a shard may be empty
            return None
        value = float(tensor.detach().float())
        if math.isnan(value) or math.isinf(value):
            return f"is {value}"
        if name != "logit_bias" and not 0.0 <= value <= 1.0:
            return f"is {value}, outside of [0, 1]"
        return None

    def value(self) -> float | None:
        """lambda as a number, or None where it cannot be read: on the meta device, or sharded among processes."""
        tensor = self.logit_bias if self.learnable else self.weight
        if tensor.is_meta or hasattr(tensor, "device_mesh") or tensor.numel() != 1:
            return None
        if tensor.untyped_storage().nbytes() == 0:  # FSDP has freed it until it is gathered again
            return None
        return float(self().detach())

    def extra_repr(self) -> str:
        value = self.value()
        return f"{'' if value is None else f'{value:.4g}, '}learnable={self.learnable}"
