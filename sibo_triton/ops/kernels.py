"""The Triton backend: what ``ops/plain.py`` does in PyTorch, as launches of the kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sibo_triton.kernels.down import down, down_siblings
from sibo_triton.kernels.down_input_gradient import down_input_gradient
from sibo_triton.kernels.down_weight_gradient import down_weight_gradient
from sibo_triton.kernels.low_rank import low_rank_siblings
from sibo_triton.kernels.siblings import DownGradients, UpGradients
from sibo_triton.kernels.up import add_up, up
from sibo_triton.kernels.up_backward import up_backward_siblings

__all__ = [
    "add_up",
    "down",
    "down_backward",
    "down_backward_siblings",
    "down_siblings",
    "low_rank_siblings",
    "up",
    "up_backward",
    "up_backward_siblings",
]


def down_backward_siblings(
    siblings: Sequence[DownGradients],
    x: Tensor | None,  # [M, K]
    initial_residual: Tensor | None,  # [M, K]
    dx_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:  # [r, K] each, [M, K], [M, K]
    """Each sibling's dA, where its ``grad_dtype`` is given, and dx and dh0, summed over siblings, if their dtypes are.

    x and h0 are read for dA only, and may else be None; so may A where neither dx nor dh0 is wanted.
    """
    grads_a: list[Tensor | None] = [None] * len(siblings)
    dx = dh0 = None
    if any(sibling.grad_dtype is not None for sibling in siblings):
        if x is None:
            raise ValueError("x is None, but dA is wanted: pass x, or grad_dtype=None")
        grads_a = down_weight_gradient(siblings, x, initial_residual)
    if dx_dtype is not None or residual_dtype is not None:
        dx, dh0 = down_input_gradient(siblings, dtype=dx_dtype, residual_dtype=residual_dtype)
    return grads_a, dx, dh0


def up_backward(
    grad_y: Tensor,  # [M, N]
    t: Tensor | None,  # [M, r]
    lora_b: Tensor,  # [N, r]
    scaling: float | Tensor,
    wants_u: bool = True,
    wants_grad_b: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # [M, r], [N, r]
    """u and dB of one layer, in float32."""
    own = UpGradients(grad_y, t, lora_b, scaling, wants_u, torch.float32 if wants_grad_b else None)
    return up_backward_siblings([own])[0]


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
    """dA of one layer, if x is given, in float32, and dx and dh0, if their dtypes are."""
    grad_dtype = None if x is None else torch.float32
    own = DownGradients(u, lora_a, adapter_dtype, lambda_, dropout_p, dropout_seed, grad_dtype)
    (grad_a,), dx, dh0 = down_backward_siblings([own], x, initial_residual, dx_dtype, residual_dtype)
    return grad_a, dx, dh0
