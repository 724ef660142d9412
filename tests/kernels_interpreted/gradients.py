"""The down-projection's gradients by the reference, and how close the kernels must come to them."""

import torch
from inputs import BF16, ROUNDING

from sibo_triton import reference

SEED = torch.tensor([0x1234_5678_9ABC_DEF0])


def gradients(dtype, u, x, lora_a, h0, lambda_, p, seed=SEED):
    """Of the reference in a dtype, by autograd: dA, dx, dh0 (None without mixing)."""
    x, lora_a, h0 = (tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (x, lora_a, h0))
    lambda_ = lambda_.to(dtype) if isinstance(lambda_, torch.Tensor) and dtype == torch.float64 else lambda_
    reference.down(x, lora_a, h0, lambda_, p, seed).backward(u.to(dtype))
    return lora_a.grad, x.grad, h0.grad


def absolute_terms(u, x, lora_a, h0, lambda_, p, seed=SEED):
    """What an element's error is measured by: the same sums over absolute values."""
    u, x, lora_a, h0 = (tensor.double().abs() for tensor in (u, x, lora_a, h0))
    return gradients(torch.float64, u, x, lora_a, h0, lambda_, p, seed)


def assert_close(result, exact, terms, by_torch, splits):
    if exact.numel() == 0:
        return
    rounding = ROUNDING[result.dtype]
    error, torch_error = (tensor.double() - exact for tensor in (result, by_torch))
    # The interpreter's dots are float32. It truncates the parts of what is split: 2^-15 of each operand is lost, and
    # 2^-14 of the product with the low parts' own.
    assert (error.abs() <= rounding * exact.abs() + (1.3e-4 if splits else 1e-6) * terms + 2**-25).all()
    margin = 2.1 if result.dtype == BF16 else 1.2  # see ROUNDING
    assert error.norm() <= margin * torch_error.norm() + (4e-5 if splits else 2e-7) * terms.norm()
