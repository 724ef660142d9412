"""Layers that get the same x: their down-projections are one pass over it, and so is their backward."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from sibo_triton.kernels.siblings import UpProjection
from sibo_triton.ops.arguments import Inputs, Settings, scaling_of
from sibo_triton.ops.autograd import outputs_with_gradients
from sibo_triton.ops.dispatch import implementation
from sibo_triton.ops.products import down, down_projections, output, read_by_down, with_frozen
from sibo_triton.ops.tensors import as_matrix, without_autocast

#: Tokens up to which no pass is large, so that without gradients all low-rank products are made at once.
FEW_ROWS = 64


def has_few_rows(settings: Settings, inputs: Inputs) -> bool:
    """Whether a layer's low-rank product is made at once where no gradient is wanted."""
    few = inputs.x.shape[:-1].numel() <= FEW_ROWS
    return few and settings.activation is None and inputs.weight is not None


class Group:
    """The outputs of layers that share x, each to be asked for once, in any order.

    With gradients, and for few rows, all are computed here; else, as memory is then what lasts no longer than it is
    used, each when it is asked for.

    Args:
        settings, inputs: of each layer, as `low_rank` prepares them: with one backend, x, h0 (or None, where a
            layer does not mix), activation or none, and dtype of y, and no base output. Either all have a frozen weight
            or, in series, none.
    """

    def __init__(self, settings: Sequence[Settings], inputs: Sequence[Inputs]) -> None:
        self._settings, self._inputs = settings, inputs
        self._ts: list[Tensor | None] = []
        self._ys: list[Any] = []  # the outputs, or the low-rank products, where they are made at once
        self._are_whole = False
        outputs = outputs_with_gradients(settings, inputs)
        if outputs is not None:
            self._ys, self._are_whole = list(outputs), True
            return
        x = inputs[0].x
        self._x = as_matrix(x)
        if has_few_rows(settings[0], inputs[0]):
            self._low_rank()
        else:
            self._ts = [result.activated for result in down(settings, inputs, [False] * len(inputs))]

    @classmethod
    def of_outputs(cls, outputs: Sequence[Tensor]) -> Group:
        """A group whose outputs are computed."""
        group = cls.__new__(cls)
        group._ys, group._are_whole = list(outputs), True
        return group

    def output(self, i: int) -> Tensor:
        """y of layer i, ``[..., N]``."""
        if self._ys:
            y, self._ys[i] = self._ys[i], None
            assert y is not None
            if self._are_whole:
                return y
        settings, inputs = self._settings[i], self._inputs[i]
        if self._ys:
            with without_autocast(self._x.device.type):
                return with_frozen(y, inputs.x, self._x, inputs.weight, settings.dtype)
        t, self._ts[i] = self._ts[i], None
        assert t is not None
        return output(settings, inputs, self._x, t)

    def _low_rank(self) -> None:
        """The low-rank product of each layer, at once: for few rows, whose launches take longer than what they do."""
        settings, inputs = self._settings, self._inputs
        ops, dtype = implementation(settings[0].backend), settings[0].dtype
        with without_autocast(self._x.device.type):
            x, h0, matrices = read_by_down(settings, inputs)

            def compute() -> list[Tensor]:
                siblings = down_projections(settings, inputs, matrices, [False] * len(inputs))
                ups = [
                    UpProjection(b, scaling_of(own, of), of.lora_bias, of.bias)
                    for own, of, (_, b) in zip(settings, inputs, matrices, strict=True)
                ]
                return ops.low_rank_siblings(x, siblings, ups, None if h0 is None else as_matrix(h0), dtype)

            key, tensors, _ = _asked(settings, inputs, x, h0, matrices)
            self._ys = list(ops.replayed(key, tensors, compute))


def asked_of_few_rows(
    settings: Sequence[Settings], inputs: Sequence[Inputs]
) -> tuple[Hashable, list[Tensor | None], list[tuple[Tensor, Tensor]]]:
    """`products.asked_of_forward` of a group of few rows."""
    return _asked(settings, inputs, *read_by_down(settings, inputs))


def _asked(
    settings: Sequence[Settings],
    inputs: Sequence[Inputs],
    x: Tensor,
    h0: Tensor | None,
    matrices: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Hashable, list[Tensor | None], list[tuple[Tensor, Tensor]]]:
    tensors = [x, h0]
    for of, (a, b) in zip(inputs, matrices, strict=True):
        tensors += (a, b, of.lora_bias, of.bias, of.lambda_, of.scaling, of.seed)
    return ("few rows", tuple(settings)), tensors, list(matrices)
