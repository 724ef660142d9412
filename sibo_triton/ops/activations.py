"""``u f'(p)`` for the activations of bottleneck adapters, in PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

_aten = torch.ops.aten

#: From u, p and f(p).
_GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gelu": lambda u, p, f_p: _aten.gelu_backward(u, p),
    "gelu_pytorch_tanh": lambda u, p, f_p: _aten.gelu_backward(u, p, approximate="tanh"),
    "relu": lambda u, p, f_p: _aten.threshold_backward(u, p, 0),
    "sigmoid": lambda u, p, f_p: _aten.sigmoid_backward(u, f_p),
    "silu": lambda u, p, f_p: _aten.silu_backward(u, p),
    "tanh": lambda u, p, f_p: _aten.tanh_backward(u, f_p),
}


def activation_gradient(activation: str, u: Tensor, p: Tensor, f_p: Tensor) -> Tensor:
    """``u f'(p)``, all of one shape and dtype; f is one of :data:`sibo_triton.reference.ACTIVATIONS`."""
    return _GRADIENTS[activation](u, p, f_p)
