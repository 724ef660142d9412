"""The operations of SIBO-LoRA in plain PyTorch, for the CPU and every device without Triton; gradients written by hand.

For one layer each; ``torch_backend.py`` makes siblings of them. ``sibo_triton.reference``, differentiated by autograd,
is the definition. M tokens, K in_features, N out_features, rank r; matrices of any strides and floating point dtypes.
What makes them fast and small:

* without dropout nothing of size [M, K] is computed but products: the mix happens in the rank,
  ``t = (1 - lambda) (x A^T) + lambda (h0 A^T)``, and so does its gradient;
* dropout, and casts where dtypes differ (PEFT's float32 adapters on a 16-bit model), happen on tiles that stay in the
  cache. The mask is drawn again for every pass (:class:`~.mask.KeepTiles`) and never exists as a whole;
* products with 16-bit operands are taken in float32, tile by tile, unless the device multiplies that dtype faster.

t, u and the gradients of A and B are float32, or float64 where the adapter is; the backend keeps t as
:func:`~sibo_triton.kernels.siblings.kept_dtype` says. Nothing is checked here: the operations check their arguments
once, in ``ops/prepare.py``.
"""

from functools import cache

import torch
from torch import Tensor

from sibo_triton.kernels.siblings import mixes
from sibo_triton.ops.mask import KeepTiles
from sibo_triton.ops.tensors import as_scalar
from sibo_triton.ops.tiles import add_product, read_tiles, write_product


def down(
    x: Tensor,  # [M, K]
    lora_a: Tensor,  # [r, K]
    initial_residual: Tensor | None = None,  # [M, K]
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,  # [1]
    difference: bool = False,
) -> tuple[Tensor, Tensor | None]:  # [M, r], [M, r]
    """``t = drop((1 - lambda) x + lambda h0) A^T`` and, where wanted, ``d = drop(h0 - x) A^T``.

    Args:
        x: ``[M, K]``.
        lora_a: A, ``[r, K]``.
        initial_residual: h0, of the shape of x and any floating dtype. Read where ``lambda_`` is not the number 0 or d
            is wanted, else it may be None.
        lambda_: a number in [0, 1], or a floating point tensor with one element.
        dropout_p: the probability of dropping an element, in [0, 1).
        dropout_seed: int64, one element; needed when ``dropout_p`` is not 0.
        difference: whether to return d, which the gradient of lambda needs.

    Returns:
        t and d (or None), in float32, or float64 if A is.
    """
    rows, cols = x.shape
    h0 = initial_residual if difference or mixes(lambda_) else None
    mask = _mask(rows, cols, dropout_p, dropout_seed, x.device)
    dtype, sum_dtype = _product_dtype(lora_a.dtype, x, h0, mask=mask), _sum_dtype(lora_a.dtype)
    a = lora_a.to(dtype)

    def project(v: Tensor, residual: Tensor | None = None) -> Tensor:
        if mask is None and v.dtype == dtype == sum_dtype:
            return torch.mm(v, a.t())
        out = torch.zeros((rows, a.shape[0]), dtype=sum_dtype, device=x.device)
        for m, k, tile in read_tiles(v, dtype, mask, residual, lambda_):
            add_product(out[m], tile, a[:, k].T)
        return out if mask is None else out.mul_(mask.scale)

    if mask is not None and h0 is not None and not difference:
        return project(x, h0), None
    t = project(x)
    if h0 is None:
        return t, None
    t_h = project(h0)
    d = t_h - t if difference else None
    return torch.lerp(t, t_h, as_scalar(lambda_, t.dtype)) if mixes(lambda_) else t, d


def up(
    t: Tensor,  # [M, r]
    lora_b: Tensor,  # [N, r]
    scaling: float | Tensor,
    dtype: torch.dtype,
    lora_bias: Tensor | None = None,  # [N]
    base_bias: Tensor | None = None,  # [N]
) -> Tensor:  # [M, N]
    """``y = s (t B^T + b_B) + b`` as a fresh, contiguous tensor of the given dtype.

    Args:
        t: ``[M, r]``.
        lora_b: B, ``[N, r]``.
        scaling: s, a number or a tensor with one element.
        dtype: of y.
        lora_bias, base_bias: b_B, scaled with B, and b, the bias of the frozen layer; ``[N]`` or None.
    """
    # In 16 bits s, a tensor, would be rounded.
    if t.dtype == lora_b.dtype == dtype and dtype.itemsize > 2 and lora_bias is None and base_bias is None:
        return torch.mm(t * as_scalar(scaling, dtype), lora_b.t())
    y = torch.empty((t.shape[0], lora_b.shape[0]), dtype=dtype, device=t.device)
    product_dtype = _product_dtype(lora_b.dtype, y)
    write_product(y, *_up_operands(t, lora_b, scaling, product_dtype, lora_bias, base_bias))
    return y


def add_up(
    base: Tensor,  # [M, N]
    t: Tensor,  # [M, r]
    lora_b: Tensor,  # [N, r]
    scaling: float | Tensor,
    lora_bias: Tensor | None = None,  # [N]
) -> Tensor:  # [M, N]
    """``y = base + s (t B^T + b_B)`` as a new tensor: the sum is taken in the wider dtype and rounded once.

    Args:
        base: what the frozen layer returned, ``[M, N]``; not written to.
        t, lora_b, scaling, lora_bias: as for :func:`up`.

    Returns:
        y, contiguous, in base's dtype.
    """
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    write_product(y, *_up_operands(t, lora_b, scaling, _product_dtype(lora_b.dtype, base), lora_bias), add=base)
    return y


def up_backward(
    grad_y: Tensor,  # [M, N]
    t: Tensor | None,  # [M, r]
    lora_b: Tensor,  # [N, r]
    scaling: float | Tensor,
    wants_u: bool = True,
    wants_grad_b: bool = True,
) -> tuple[Tensor | None, Tensor | None]:  # [M, r], [N, r]
    """``u = s dY B`` and ``dB = s dY^T t``, reading dY once where it must be cast.

    Args:
        grad_y: dY, ``[M, N]``.
        t: ``[M, r]``; not looked at, and may be None, when dB is not wanted.
        lora_b: B, ``[N, r]``.
        scaling: s, a number or a tensor with one element.
        wants_u, wants_grad_b: what to compute.

    Returns:
        u and dB, contiguous, in float32, or float64 if B is; None for what is not wanted.
    """
    rows, cols = grad_y.shape
    rank = lora_b.shape[1]
    dtype, sum_dtype = _product_dtype(lora_b.dtype, grad_y), _sum_dtype(lora_b.dtype)
    s = as_scalar(scaling, sum_dtype)
    b = lora_b.to(dtype)
    if grad_y.dtype == dtype == sum_dtype:
        u = torch.mm(grad_y, b).mul_(s) if wants_u else None
        return u, torch.mm(grad_y.t(), t.to(dtype) * s) if wants_grad_b and t is not None else None
    u = torch.zeros((rows, rank), dtype=sum_dtype, device=grad_y.device) if wants_u else None
    grad_b = scaled_t = None
    if wants_grad_b and t is not None:
        grad_b = torch.zeros((rank, cols), dtype=sum_dtype, device=grad_y.device)  # transposed: the faster product
        scaled_t = (t.to(sum_dtype) * s).to(dtype)
    for m, n, tile in read_tiles(grad_y, dtype):
        if u is not None:
            add_product(u[m], tile, b[n])
        if grad_b is not None and scaled_t is not None:
            add_product(grad_b[:, n], scaled_t[m].T, tile)
    return None if u is None else u.mul_(s), None if grad_b is None else grad_b.T.contiguous()


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
    base: Tensor | None = None,  # [M, K]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # [r, K], [M, K], [M, K]
    """``dA = u^T drop((1 - lambda) x + lambda h0)``; ``dx = (1 - lambda) dx~`` and ``dh0 = lambda dx~``.

    ``dx~ = drop'(u A)`` is the gradient of the mix.

    Args:
        u: the gradient of t, ``[M, r]``.
        lora_a: A, ``[r, K]``; may be None if only dA is wanted.
        x: ``[M, K]``; None if dA is not wanted.
        initial_residual, lambda_, dropout_p, dropout_seed: as for :func:`down`.
        adapter_dtype: of A.
        dx_dtype, residual_dtype: of dx and of dh0; None for what is not wanted.
        base: what dx is added to before it is rounded; not written to. Or None.

    Returns:
        dA, in float32, or float64 if ``adapter_dtype`` is; dx; dh0. Contiguous; None for what is not wanted.
    """
    like = lora_a if x is None else x
    assert like is not None
    mask = _mask(u.shape[0], like.shape[1], dropout_p, dropout_seed, u.device)
    grad_a = dx = dh0 = None
    if x is not None:
        grad_a = _weight_gradient(u, x, initial_residual, lambda_, mask, adapter_dtype)
    if lora_a is not None and (dx_dtype is not None or residual_dtype is not None):
        dx, dh0 = _input_gradient(u, lora_a, lambda_, mask, dx_dtype, residual_dtype, base)
    return grad_a, dx, dh0


def _weight_gradient(
    u: Tensor,
    x: Tensor,
    initial_residual: Tensor | None,
    lambda_: float | Tensor,
    mask: KeepTiles | None,
    adapter_dtype: torch.dtype,
) -> Tensor:
    h0 = initial_residual if mixes(lambda_) else None
    sum_dtype = _sum_dtype(adapter_dtype)
    dtype = _product_dtype(adapter_dtype, x, h0, mask=mask)
    u = u.to(sum_dtype)
    if mask is None and x.dtype == dtype == sum_dtype:
        if h0 is None:
            return torch.mm(u.t(), x)
        if h0.dtype == dtype:
            of_x, of_h = _shares(lambda_, sum_dtype)
            return torch.mm((u * of_x).t(), x).addmm_((u * of_h).t(), h0)
    grad_a = torch.zeros((u.shape[1], x.shape[1]), dtype=sum_dtype, device=x.device)

    def add(u: Tensor, v: Tensor, residual: Tensor | None = None) -> None:
        u = u.to(dtype)
        for m, k, tile in read_tiles(v, dtype, mask, residual, lambda_):
            add_product(grad_a[:, k], u[m].T, tile)

    if mask is not None:
        add(u * mask.scale, x, h0)
    elif h0 is None:
        add(u, x)
    else:
        of_x, of_h = _shares(lambda_, sum_dtype)
        add(u * of_x, x)
        add(u * of_h, h0)
    return grad_a


def _input_gradient(
    u: Tensor,
    lora_a: Tensor,
    lambda_: float | Tensor,
    mask: KeepTiles | None,
    dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    base: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    shape = (u.shape[0], lora_a.shape[1])
    u = u.to(_sum_dtype(lora_a.dtype))
    if mask is not None:
        u = u * mask.scale
    elif residual_dtype is None and base is None and dtype == lora_a.dtype == u.dtype:
        return torch.mm(u * _shares(lambda_, dtype)[0] if mixes(lambda_) else u, lora_a), None
    of_x, of_h = _shares(lambda_, u.dtype) if mixes(lambda_) else (1.0, 0.0)

    def product(dtype: torch.dtype | None, share: float | Tensor, base: Tensor | None = None) -> Tensor | None:
        if dtype is None:
            return None
        out = torch.empty(shape, dtype=dtype, device=u.device)
        product_dtype = _product_dtype(lora_a.dtype, out, mask=mask)
        write_product(out, (u * share).to(product_dtype), lora_a.to(product_dtype), base, mask)
        return out

    return product(dtype, of_x, base), product(residual_dtype, of_h)


def _up_operands(
    t: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    dtype: torch.dtype,
    lora_bias: Tensor | None = None,
    base_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Two factors of ``s (t B^T + b_B) + b``: biases are one more row of B^T, so that no pass over y adds them."""
    sum_dtype = _sum_dtype(lora_b.dtype)
    s = as_scalar(scaling, sum_dtype)
    left, right = (t.to(sum_dtype) * s).to(dtype), lora_b.to(dtype).T
    biases = []
    if lora_bias is not None:
        biases.append(lora_bias.to(sum_dtype) * s)
    if base_bias is not None:
        biases.append(base_bias.to(sum_dtype))
    if biases:
        left = torch.cat([left, left.new_ones((left.shape[0], 1))], dim=1)
        right = torch.cat([right, torch.stack(biases).sum(0, keepdim=True).to(dtype)])
    return left, right


def _sum_dtype(adapter_dtype: torch.dtype) -> torch.dtype:
    """In which t, u and the gradients of A and B are summed and returned."""
    return torch.float64 if adapter_dtype == torch.float64 else torch.float32


def _product_dtype(adapter_dtype: torch.dtype, *data: Tensor | None, mask: KeepTiles | None = None) -> torch.dtype:
    """In which to multiply: a 16-bit dtype if there is no other and the device is fast at it, else a wider one."""
    if adapter_dtype.itemsize > 2:
        return _sum_dtype(adapter_dtype)
    tensors = [tensor for tensor in data if tensor is not None]
    if mask is None and all(tensor.dtype == adapter_dtype for tensor in tensors):
        if _multiplies(adapter_dtype, tensors[0].device.type):
            return adapter_dtype
    return _sum_dtype(adapter_dtype)


@cache
def _multiplies(dtype: torch.dtype, device_type: str) -> bool:
    """Whether the device multiplies a 16-bit dtype faster than casts and float32 would.

    Of CPUs those do that oneDNN multiplies bfloat16 on; elsewhere, as in float16, torch's own loops are far slower.
    """
    if device_type != "cpu":
        return True
    bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.bfloat16 and bfloat16


def _shares(lambda_: float | Tensor, dtype: torch.dtype) -> tuple[float | Tensor, float | Tensor]:
    """1 - lambda and lambda."""
    of_h = as_scalar(lambda_, dtype)
    return 1 - of_h, of_h


def _mask(rows: int, cols: int, p: float, seed: Tensor | None, device: torch.device) -> KeepTiles | None:
    """The mask to draw, or None where p is 0."""
    if p == 0 or seed is None:
        return None
    return KeepTiles(rows, cols, p, seed.reshape(()).to(device))
