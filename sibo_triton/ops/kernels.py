"""The Triton backend: what ``ops/plain.py`` does in PyTorch, as launches of the kernels."""

import torch
from torch import Tensor

from sibo_triton.kernels.down import down, down_siblings
from sibo_triton.kernels.down_input_gradient import down_input_gradient
from sibo_triton.kernels.down_weight_gradient import down_weight_gradient
from sibo_triton.kernels.up import add_up, up
from sibo_triton.kernels.up_backward import up_backward

__all__ = ["add_up", "down", "down_backward", "down_siblings", "up", "up_backward"]


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


def up_backward_siblings(siblings):
    results = []
    for s in siblings:
        u, grad_b = up_backward(s.grad_y, s.t, s.lora_b, s.scaling, s.wants_u, s.grad_dtype is not None)
        results.append((u, None if grad_b is None else grad_b.to(s.grad_dtype)))
    return results


def down_backward_siblings(siblings, x, h0, dx_dtype, residual_dtype):
    grads, dx, dh = [], None, None
    for s in siblings:
        of_residual = residual_dtype if s.mixes else None
        own_x = None if s.grad_dtype is None else x
        args = (s.lambda_, s.dropout_p, s.dropout_seed, s.adapter_dtype, dx_dtype, of_residual)
        a, own_dx, own_dh = down_backward(s.u, s.lora_a, own_x, h0 if s.mixes else None, *args)
        grads.append(None if a is None else a.to(s.grad_dtype))
        dx = own_dx if dx is None else dx + own_dx
        dh = own_dh if dh is None else dh if own_dh is None else dh + own_dh
    return grads, dx, dh
