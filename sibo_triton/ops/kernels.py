"""The Triton backend: what ``ops/plain.py`` does in PyTorch, as launches of the kernels."""

import torch
from torch import Tensor

from sibo_triton.kernels.down import down
from sibo_triton.kernels.down_input_gradient import down_input_gradient
from sibo_triton.kernels.down_weight_gradient import down_weight_gradient
from sibo_triton.kernels.up import add_up, up
from sibo_triton.kernels.up_backward import up_backward

__all__ = ["add_up", "down", "down_backward", "up", "up_backward"]


def down_backward(
    u: Tensor,  # [M, r]
    lora_a: Tensor | None,  # [r, K]
    x: Tensor | None,  # [M, K]
    initial_residual: Tensor | None,  # [M, K]
    lambda_: float | Tensor,
    dropout_p: float,
    dropout_seed: Tensor | None,  # [1]
    adapter_dtype: torch.dtype,
    dx_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # [r, K], [M, K], [M, K]
    """dA, if x is given, and dx and dh0, if their dtypes are."""
    options = (lambda_, dropout_p, dropout_seed)
    grad_a = dx = dh0 = None
    if x is not None:
        grad_a = down_weight_gradient(u, x, initial_residual, *options, adapter_dtype=adapter_dtype)
    if lora_a is not None:
        dx, dh0 = down_input_gradient(u, lora_a, *options, dtype=dx_dtype, residual_dtype=residual_dtype)
    return grad_a, dx, dh0
