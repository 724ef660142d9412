"""lambda, as a tensor that is saved with the weights.

The paper's equation 4:  x~ = (1 - lambda) * x + lambda * h0.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from sibo_triton.float32_module import Float32Module


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
