"""Matrices for the tests of interpreted kernels, and what the interpreter loses that a GPU does not."""

import math

import torch
from torch import Tensor

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
