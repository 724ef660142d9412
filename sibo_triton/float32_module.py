"""Modules of a few numbers that stay float32 whatever is cast: lambda, and a learnable scaling."""

from __future__ import annotations

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
