"""The operation on so few elements that host time is all it costs: PyTorch's own nodes, differentiated by autograd.

A Python `autograd.Function` alone takes longer than such a layer. What autograd keeps here has the size of x, which is
nothing. The mask and the equations are the definition's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sibo_triton import reference
from sibo_triton.ops.arguments import Inputs, Settings, lambda_of, scaling_of
from sibo_triton.ops.mask import keep_whole
from sibo_triton.ops.tensors import as_matrix, shaped_like

#: Elements of x up to which plain PyTorch runs this way.
ELEMENTS = 2**13


def low_rank(settings: Settings, inputs: Inputs) -> Tensor:
    """y, ``[..., N]``, of LoRA: `sibo_triton.reference.lora_linear`, or `add_lora` where a base output is given."""
    base, x, weight, bias, lora_a, lora_b, lora_bias, _, initial_residual, _, _, seed = inputs
    scaling, lambda_, dropout_p = scaling_of(settings, inputs), lambda_of(settings, inputs), settings.dropout_p
    given = x
    if x.dim() != 2:  # once, or every product below would
        x = as_matrix(x)
        base = None if base is None else as_matrix(base)
        initial_residual = None if initial_residual is None else as_matrix(initial_residual)
    if base is None:
        base = F.linear(x, weight, bias)
    dtype = lora_a.dtype
    v = x if x.dtype == dtype else x.to(dtype)
    if initial_residual is not None:
        if dtype.itemsize > 2:
            v = torch.lerp(v, initial_residual.to(dtype), lambda_.to(dtype) if isinstance(lambda_, Tensor) else lambda_)
        else:
            v = reference.mix(v, initial_residual, lambda_)  # in float32, as the definition rounds once
    scale = 1.0
    if dropout_p > 0:
        assert seed is not None
        rows, cols = v.shape
        keep, scale = keep_whole(rows, cols, dropout_p, seed, v.device)
        v = v * keep
    t = F.linear(v, lora_a)
    if lora_bias is not None or isinstance(scaling, Tensor) or _overflows(scaling * scale, dtype):
        y = base + F.linear(t if scale == 1 else t * scale, lora_b, lora_bias) * scaling
    else:
        y = torch.add(base, F.linear(t, lora_b), alpha=scaling * scale)
    return shaped_like(given, y if y.dtype == base.dtype else y.to(base.dtype))


def _overflows(alpha: float, dtype: torch.dtype) -> bool:
    """Whether `torch.add` refuses this factor."""
    return dtype == torch.float16 and abs(alpha) > torch.finfo(dtype).max
