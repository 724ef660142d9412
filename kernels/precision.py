"""Products of float32 matrices at the speed of 16-bit tensor cores, within 1e-5 (norm-wise) of float32's.

A float32 number is the sum of a high and a low bfloat16 number, to 2^-17 of itself, and a float16 number is so exactly;
bfloat16 has float32's exponents, so that neither part over- or underflows where float16 would. A product then takes two
dots where one side is split, and three where both are: that of the two low parts, 2^-18 of the whole, is left out. What
is not finite stays so: the low part of infinity is NaN.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TL_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def split(a, DOT_DTYPE: tl.constexpr):
    """The high and the low part of a float32 or float16 tile: bfloat16 numbers, in DOT_DTYPE."""
    a = a.to(tl.float32)
    a_high = a.to(tl.bfloat16)
    a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
    return a_high.to(DOT_DTYPE), a_low.to(DOT_DTYPE)


@triton.jit
def split_dot(
    a,  # [I, J]
    b,  # [J, L]
    acc,  # [I, L], float32
    SPLIT_A: tl.constexpr,
    SPLIT_B: tl.constexpr,
    DOT_DTYPE: tl.constexpr,  # of the operands of each dot
):
    """``acc + a b``. A side that is not split is rounded to DOT_DTYPE; the flags come from :func:`operands`."""
    # Small terms first.
    if SPLIT_A and SPLIT_B:
        a_high, a_low = split(a, DOT_DTYPE)
        b_high, b_low = split(b, DOT_DTYPE)
        acc = tl.dot(a_low, b_high, acc, input_precision="ieee")
        acc = tl.dot(a_high, b_low, acc, input_precision="ieee")
        acc = tl.dot(a_high, b_high, acc, input_precision="ieee")
    elif SPLIT_A:
        a_high, a_low = split(a, DOT_DTYPE)
        b_whole = b.to(DOT_DTYPE)
        acc = tl.dot(a_low, b_whole, acc, input_precision="ieee")
        acc = tl.dot(a_high, b_whole, acc, input_precision="ieee")
    elif SPLIT_B:
        b_high, b_low = split(b, DOT_DTYPE)
        a_whole = a.to(DOT_DTYPE)
        acc = tl.dot(a_whole, b_low, acc, input_precision="ieee")
        acc = tl.dot(a_whole, b_high, acc, input_precision="ieee")
    else:
        acc = tl.dot(a.to(DOT_DTYPE), b.to(DOT_DTYPE), acc, input_precision="ieee")
    return acc


#: Whether kernels run in Triton's interpreter, which multiplies the raw bits of bfloat16.
INTERPRETED = not isinstance(split_dot, triton.JITFunction)


@dataclass(frozen=True)
class Operands:
    """How :func:`split_dot` multiplies two tiles."""

    split_a: bool
    split_b: bool
    dtype: torch.dtype  # of both sides of each dot, once split or rounded

    @property
    def tl_dtype(self) -> tl.dtype:
        """DOT_DTYPE: float32 in the interpreter, where the parts are still those of a GPU."""
        return tl.float32 if INTERPRETED else TL_DTYPES[self.dtype]


def float32_is_exact() -> bool:
    """Whether torch multiplies float32 matrices as float32: ``torch.set_float32_matmul_precision`` may allow less."""
    return torch.get_float32_matmul_precision() == "highest"


def operands(a: torch.dtype, b: torch.dtype, exact: bool = False) -> Operands:
    """How to multiply tiles that are to count as ``a`` and ``b``.

    Args:
        a, b: float16, bfloat16 or float32. Pass a 16-bit dtype for a float32 tile that may be rounded to it.
        exact: multiply float32 tiles as float32, without tensor cores: where all that the kernel reads and writes is
            float32 and :func:`float32_is_exact`.
    """
    if a == b != torch.float32:
        return Operands(False, False, a)
    if exact:
        return Operands(False, False, torch.float32)
    return Operands(a != torch.bfloat16, b != torch.bfloat16, torch.bfloat16)
