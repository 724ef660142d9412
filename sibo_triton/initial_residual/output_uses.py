"""Find out what the output of each linear is used for: another linear, token by token, or an attention, or a choice.

That tells a feed-forward network's linears from the others that read the residual stream (q, k, v, routers), without
names. The output of a linear carries a tag through every operation, up to a product with a weight: then it went into
a linear. Uses on the way are recorded: a product of two tagged tensors, an attention kernel or a convolution mixes
tokens; a softmax or a top-k weighs or chooses something (a router).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

LINEAR, MIXES_TOKENS, CHOOSES = "linear", "mixes tokens", "chooses"

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "linear", "matmul", "mv", "addmv", "_grouped_mm", "_int_mm"}
_CONVOLUTIONS = {"convolution", "_convolution", "conv1d", "conv2d", "cudnn_convolution", "mkldnn_convolution"}
_CHOICES = {"softmax", "_softmax", "topk", "sort", "argsort", "argmax", "max", "multinomial", "cumsum"}


class OutputUses(TorchDispatchMode):
    """Carries tags from operation to operation, and records the uses of tagged tensors.

    Args:
        is_stream: whether a tensor is a residual stream; a tag ends there, as all that comes later reads it.

    Attributes:
        uses: by a linear's name, the uses of its output.
        readers: by a linear's name, the linears that read its output.
    """

    def __init__(self, is_stream: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self._is_stream = is_stream
        self.uses: dict[str, set[str]] = {}
        self.readers: dict[str, set[str]] = {}
        # by the tensor's memory, as views are other objects; the tensor is kept so that its memory is not reused
        self._tags: dict[tuple, tuple[torch.Tensor, frozenset[str]]] = {}

    def enter_linear(self, name: str, x: Any) -> None:
        """Record that a linear is about to read `x`."""
        for writer in self._tags_of(x) if isinstance(x, torch.Tensor) else ():
            self.readers[writer].add(name)

    def leave_linear(self, name: str, output: Any) -> None:
        """Record that a linear has returned `output`."""
        self.uses.setdefault(name, set())
        self.readers.setdefault(name, set())
        if isinstance(output, torch.Tensor):
            self._tags[memory_of(output)] = (output, frozenset([name]))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tagged = [tags for tags in map(self._tags_of, _tensors((args, kwargs))) if tags]
        result = func(*args, **kwargs)
        if tagged:
            use = _use_in(func.overloadpacket.__name__, len(tagged))
            tags = frozenset().union(*tagged)
            if use is not None:
                for name in tags:
                    self.uses[name].add(use)
            if use != LINEAR:
                results = (tensor for tensor in _tensors(result) if not self._is_stream(tensor))
                self._tags.update((memory_of(tensor), (tensor, tags)) for tensor in results)
        return result

    def feeds_forward(self, name: str) -> bool:
        """Whether only other linears use a linear's output, token by token, and no attention uses theirs.

        Nor do these read what an attention computed: a linear whose output gates that belongs to the attention.
        """
        readers = self.readers.get(name, set())
        if any(MIXES_TOKENS in self.uses[other] and not of.isdisjoint(readers) for other, of in self.readers.items()):
            return False
        return self.uses.get(name) == {LINEAR} and all(MIXES_TOKENS not in self.uses[reader] for reader in readers)

    def _tags_of(self, tensor: torch.Tensor) -> frozenset[str]:
        return self._tags.get(memory_of(tensor), (None, frozenset()))[1]


def is_linear_like(module: nn.Module) -> bool:
    """Whether a module is a linear of any kind, with an adapter or without: its output is then followed."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = getattr(base, "weight", None)
    has_matrix = isinstance(weight, torch.Tensor) and weight.dim() == 2
    return (has_matrix or hasattr(base, "qweight")) and not isinstance(base, nn.Embedding)


def _use_in(operation: str, tagged: int) -> str | None:
    if operation in _PRODUCTS:
        return LINEAR if tagged == 1 else MIXES_TOKENS
    if operation in _CONVOLUTIONS or "attention" in operation or "attn" in operation:
        return MIXES_TOKENS
    return CHOOSES if operation in _CHOICES else None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided:
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def memory_of(tensor: torch.Tensor) -> tuple:
    """A key for the memory that a tensor shows; views that show the same are different objects."""
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
