"""Layers that get the same x: one pass over it computes all their down-projections, and one all their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sibo_triton.kernels.siblings import UpProjection
from sibo_triton.ops.arguments import Inputs, Settings, scaling_of
from sibo_triton.ops.autograd import outputs_with_gradients
from sibo_triton.ops.dispatch import implementation
from sibo_triton.ops.products import Request, down, down_inputs, down_projections, forward, output, with_frozen
from sibo_triton.ops.tensors import as_matrix, without_autocast

#: Up to so many tokens, without gradients, all low-rank products are computed in the same launches.
FEW_ROWS = 64
#: Up to so many bytes of y in all, without gradients, they are computed at once, which takes the host less time.
FEW_BYTES = 64 * 2**20


def has_few_rows(settings: Settings, inputs: Inputs) -> bool:
    """Whether a layer's low-rank product takes the launches for few tokens, where no gradient is wanted."""
    few = inputs.x.shape[:-1].numel() <= FEW_ROWS
    return few and settings.activation is None and inputs.weight is not None


def is_at_once(settings: Sequence[Settings], inputs: Sequence[Inputs]) -> bool:
    """Whether all outputs of layers that share x are computed together, where no gradient is wanted."""
    features = sum(layer.lora_b.shape[0] for layer in inputs)
    return inputs[0].x.shape[:-1].numel() * features * settings[0].dtype.itemsize <= FEW_BYTES


class Group:
    """The outputs of layers that share x, each taken once, in any order.

    Args:
        results: of each layer: its output, or what ``finish`` makes it of.
        finish: takes a layer's place and its result, and returns its output; None: the results are the outputs.
    """

    def __init__(self, results: Sequence[Tensor], finish: Callable[[int, Tensor], Tensor] | None = None) -> None:
        self._results: list[Any] = list(results)
        self._finish = finish

    def output(self, i: int) -> Tensor:
        """y of layer i, ``[..., N]``.

        Raises:
            RuntimeError: it was taken before.
        """
        result, self._results[i] = self._results[i], None
        if result is None:
            raise RuntimeError(f"output {i} of the group was taken before, and is kept once: compute the group again")
        return result if self._finish is None else self._finish(i, result)


def group(settings: Sequence[Settings], inputs: Sequence[Inputs]) -> Group:
    """Compute layers that share x.

    With gradients all outputs are computed here, also without where they are small, and for few rows all low-rank
    products. Otherwise only t of each layer is, and its output when it is taken: without gradients the peak of memory
    is what is alive at one time.

    Args:
        settings, inputs: of each layer. They have one backend, x, h0 (None where a layer does not mix), activation (or
            none), dtype of y, and no base output. Either all have a frozen weight or, in series, none.
    """
    outputs = outputs_with_gradients(settings, inputs)
    if outputs is not None:
        return Group(outputs)
    x = as_matrix(inputs[0].x)

    def with_frozen_product(i: int, y: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            return with_frozen(y, inputs[i].x, x, inputs[i].weight, settings[i].dtype)

    def with_up_projection(i: int, t: Tensor) -> Tensor:
        return output(settings[i], inputs[i], x, t)

    if has_few_rows(settings[0], inputs[0]):
        return Group(_low_rank_products(settings, inputs), with_frozen_product)
    if is_at_once(settings, inputs):
        return Group(forward(settings, inputs, [False] * len(inputs))[0])
    downs = down(settings, inputs, [False] * len(inputs))
    return Group([result.activated for result in downs], with_up_projection)


def _low_rank_products(settings: Sequence[Settings], inputs: Sequence[Inputs]) -> list[Any]:
    """The low-rank product of each layer, ``[M, N]``, in as few launches as there are: for few rows."""
    ops, dtype = implementation(settings[0].backend), settings[0].dtype
    with without_autocast(inputs[0].x.device.type):
        x, h0, matrices = down_inputs(settings, inputs)

        def compute() -> list[Tensor]:
            siblings = down_projections(settings, inputs, matrices, [False] * len(inputs))
            ups = [
                UpProjection(b, scaling_of(setting, layer), layer.lora_bias, layer.bias)
                for setting, layer, (_, b) in zip(settings, inputs, matrices, strict=True)
            ]
            return ops.low_rank_siblings(x, siblings, ups, None if h0 is None else as_matrix(h0), dtype)

        key, tensors, _ = _few_rows_request(settings, inputs, x, h0, matrices)
        return list(ops.replayed(key, tensors, compute))


def few_rows_request(settings: Sequence[Settings], inputs: Sequence[Inputs]) -> Request:
    """What identifies the launches of a :func:`group` of few rows. Call it with autocast disabled."""
    return _few_rows_request(settings, inputs, *down_inputs(settings, inputs))


def _few_rows_request(
    settings: Sequence[Settings],
    inputs: Sequence[Inputs],
    x: Tensor,
    h0: Tensor | None,
    matrices: list[tuple[Tensor, Tensor]],
) -> Request:
    tensors = [x, h0]
    for layer, (a, b) in zip(inputs, matrices, strict=True):
        tensors += (a, b, layer.lora_bias, layer.bias, layer.lambda_, layer.scaling, layer.seed)
    return Request(("few rows", tuple(settings)), tensors, matrices)
