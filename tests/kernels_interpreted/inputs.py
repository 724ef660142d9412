"""Matrices for the tests of interpreted kernels, and what the interpreter loses that a GPU does not."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from sibo_triton.kernels import up_backward, up_backward_plan
from sibo_triton.kernels.launching import forget_launches

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

LAYOUTS = ("contiguous", "padded", "transposed", "expanded")

#: The relative error of one rounding of an element to a dtype: the interpreter truncates where it casts to bfloat16,
#: twice what rounding to nearest loses. So its parts of a float32 number carry 15 bits and not 17.
ROUNDING = {FP32: 2**-24, FP16: 2**-11, BF16: 2**-7}


def randn(rows: int, cols: int, dtype: torch.dtype, strides: str = "contiguous") -> Tensor:
    """Random values inside a buffer of NaN, so that a read beyond the matrix shows."""
    if strides == "expanded":
        return randn(1, cols, dtype).expand(rows, cols)
    buffer = torch.full((rows + 2, cols + (strides != "contiguous")), math.nan, dtype=dtype)
    if strides == "transposed":
        buffer = buffer.T.contiguous().T
    view = buffer[1 : rows + 1, :cols]
    return view.copy_(torch.randn(rows, cols).to(dtype))


def laid_out(tensor: Tensor, strides: str) -> Tensor:
    """The same values, of which an expanded matrix has the first row's alone, in another layout inside NaN."""
    if strides == "expanded":
        return tensor[:1].expand(tensor.shape)
    return randn(*tensor.shape, tensor.dtype, strides).copy_(tensor)


def force_passes(patch: pytest.MonkeyPatch, passes: str) -> None:
    """Both gradients of up in "one pass", of the ranks that it takes, or in two, whatever the count would choose."""

    def forced(M, N, r, g_dtype, b_dtype, target, *rest):
        chosen = up_backward_plan.plan(M, N, r, g_dtype, b_dtype, target, *rest)
        dots, more = (chosen.dot_u, chosen.dot_grad_b), any(rest[1:])
        both = up_backward_plan.launch_of_both(M, N, r, *dots, g_dtype.itemsize, target, more)
        return dataclasses.replace(chosen, both=both if passes == "one pass" else None)

    patch.setattr(up_backward, "plan", forced)
    forget_launches()
