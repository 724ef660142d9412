"""The Triton backend: what ``ops/torch_backend.py`` does in PyTorch, as launches of the kernels."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from sibo_triton.kernels import replay, targets
from sibo_triton.kernels.down import down_activated_siblings, down_siblings
from sibo_triton.kernels.down_input_gradient import down_input_gradient
from sibo_triton.kernels.down_weight_gradient import down_weight_gradient
from sibo_triton.kernels.few_rows import low_rank_siblings
from sibo_triton.kernels.launching import BoundedCache
from sibo_triton.kernels.precision import float32_is_exact
from sibo_triton.kernels.siblings import DownGradients
from sibo_triton.kernels.up import add_up, up
from sibo_triton.kernels.up_backward import up_backward_siblings

__all__ = [
    "add_up",
    "calls",
    "down_activated_siblings",
    "down_backward_siblings",
    "down_siblings",
    "low_rank_siblings",
    "float32_is_exact",
    "repeats",
    "replayed",
    "tape_of",
    "up",
    "up_backward_siblings",
]


def down_backward_siblings(
    siblings: Sequence[DownGradients],
    x: Tensor | None,  # [M, K]
    initial_residual: Tensor | None,  # [M, K]
    dx_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    base: Tensor | None = None,  # [M, K]
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:  # [r, K] each, [M, K], [M, K]
    """Each sibling's dA, where its ``grad_dtype`` is given, and dx and dh0, summed over siblings, if their dtypes are.

    dx is added to ``base``, if there is one. x and h0 are read for dA only, and may else be None; so may A where
    neither dx nor dh0 is wanted.
    """
    grads_a: list[Tensor | None] = [None] * len(siblings)
    dx = dh0 = None
    if any(sibling.grad_dtype is not None for sibling in siblings):
        if x is None:
            raise ValueError("x is None, but dA is wanted: pass x, or grad_dtype=None")
        grads_a = down_weight_gradient(siblings, x, initial_residual)
    if dx_dtype is not None or residual_dtype is not None:
        with_share = [sibling for sibling in siblings if sibling.lora_a is not None]
        dx, dh0 = down_input_gradient(with_share, dtype=dx_dtype, residual_dtype=residual_dtype, base=base)
    return grads_a, dx, dh0


def replayed(
    key: Hashable, tensors: Sequence[Tensor | None], compute: Callable[[], Sequence[Tensor | None]]
) -> Sequence[Tensor | None]:
    """What ``compute`` returns; from the second call on by its launches alone, without what leads to them.

    Args:
        key: beside the tensors' forms, all that ``compute`` depends on.
        tensors: all that it reads; the first is one.
        compute: calls the launchers, and returns fresh tensors, or None in their places.
    """
    return replay.replayed(_tapes, _with_forms(key, tensors), tensors, compute)


def tape_of(key: Hashable, tensors: Sequence[Tensor | None]) -> replay.Tape | None:
    """What :func:`replayed` has recorded for these."""
    return _tapes.get(_with_forms(key, tensors))


#: Whether what is recorded may run now.
repeats = replay.runs_now


def _with_forms(key: Hashable, tensors: Sequence[Tensor | None]) -> Hashable:
    first = tensors[0]
    assert first is not None
    device = first.device
    # `tensor_key` of each, without the calls
    forms = tuple([None if of is None else (of.dtype, of.shape, of.stride(), of.get_device()) for of in tensors])
    return key, forms, device, targets.target_of(device), float32_is_exact()


_tapes = BoundedCache()
#: `ops/known_calls.py`'s, which are forgotten with the launches that they repeat.
calls = BoundedCache()
