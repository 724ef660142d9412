"""The short path of LoRA's operations on the kernels, for calls whose form has been seen before.

Training and generation call a layer with tensors of the same few shapes, strides and dtypes again and again. Everything
between the arguments and the recorded launches (`kernels/replay.py`) follows from those: checks, the backend, what is
saved for the backward, which gradient belongs to which tensor. It is worked out once, in the first such call, and kept
as a `Call`, in which each tensor is an index. On a small layer that work takes the host as long as all the rest.

Nothing is computed here that `products.py` does not compute: the first call of a form, and every call that differs from
it, goes there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sibo_triton.ops.arguments import Inputs, Settings
from sibo_triton.ops.autograd import kept_of, node_of
from sibo_triton.ops.dispatch import implementation
from sibo_triton.ops.group import few_rows_request, has_few_rows, is_at_once
from sibo_triton.ops.guarded import CAN_GUARD, first_that_fits, with_guards
from sibo_triton.ops.products import PER_LAYER, Down, forward_request
from sibo_triton.ops.recorded_call import Call, CallWithGradients, Read, casts_of, differ, places_among
from sibo_triton.ops.tensors import autocast_dtype, without_autocast

_PLAIN = {Tensor, nn.Parameter, type(None)}
#: The tensors of a call, in this order: these, and then those of each layer.
_SHARED = ("x", "initial_residual", "base")
_OF_LAYER = tuple(name for name in Inputs._fields if name not in (*_SHARED, "down_bias"))
_BASE = _SHARED.index("base")
#: The gradients that recorded launches return, dY itself, and that of lambda; others are left to `products.py`.
_GRADIENTS = {"x", "initial_residual", "lora_a", "lora_b", "bias", "base", "lambda_"}


def flattened(
    x: Tensor, initial_residual: Tensor | None, layers: Sequence[tuple], base: Tensor | None = None
) -> tuple[tuple, tuple]:
    """The tensors of a call, None where there is none, and the rest of what identifies it.

    Args:
        initial_residual: h0 of those layers that have one.
        layers: the fields of `LoraArguments` of each.
        base: what a single layer without a frozen weight is added to.
    """
    tensors: list[Any] = [x, initial_residual, base]
    numbers: list[Any] = []
    for weight, bias, lora_a, lora_b, scaling, h0, lambda_, dropout_p, seed, lora_bias in layers:
        lambda_number = lambda_tensor = scaling_number = scaling_tensor = None
        if isinstance(lambda_, Tensor):
            lambda_tensor = lambda_
        else:
            lambda_number = lambda_
        if isinstance(scaling, Tensor):
            scaling_tensor = scaling
        else:
            scaling_number = scaling
        numbers += (lambda_number, scaling_number, dropout_p, h0 is None)
        tensors += (weight, bias, lora_a, lora_b, lora_bias, lambda_tensor, scaling_tensor, seed)
    return tuple(tensors), tuple(numbers)


def form_of(tensors: tuple, numbers: tuple) -> Hashable:
    """What a call depends on beside the forms of its tensors: numbers, and modes of torch. None: it has no form.

    The types of the tensors and the shape of x are in it, so that few calls have the same.
    """
    try:
        hash(numbers)
    except TypeError:  # an array with one element, which the long path converts
        return None
    x = tensors[0]
    autocast = autocast_dtype(x.device.type) if torch._C._is_any_autocast_enabled() else None
    modes = torch.is_grad_enabled(), autocast, implementation("triton").float32_is_exact()
    return numbers, modes, tuple(map(type, tensors)), x.shape


def known(form: Hashable, tensors: tuple) -> Any:
    """What is remembered for such a call, to be passed to :func:`outputs`; None: nothing yet."""
    remembered = implementation("triton").calls.get(form, ())
    return first_that_fits(remembered, [tensor for tensor in tensors if tensor is not None])


def outputs(call: Any, tensors: tuple) -> Sequence[Tensor] | None:
    """y of each layer by a known call; None where the call must take the long path."""
    if call is _LONG_PATH:
        return None
    if not torch._C._is_any_autocast_enabled():
        return call(tensors)
    with without_autocast(tensors[0].device.type):
        return call(tensors)


#: Remembered for calls that always take the long path.
_LONG_PATH = object()


def remember(form: Hashable, tensors: tuple, settings: Sequence[Settings], inputs: Sequence[Inputs]) -> None:
    """Remember a call that was not known and has taken the long path, which has recorded its launches."""
    if not all(number == number for number in form[0]):  # type: ignore[index]  # NaN: a form that is never found
        return
    present = [tensor for tensor in tensors if tensor is not None]
    plain = settings[0].backend == "triton" and _PLAIN.issuperset(map(type, tensors)) and CAN_GUARD
    if not plain or any(tensor.is_neg() for tensor in present):  # recorded launches read what the long path resolved
        return
    call = _call_for(tensors, settings, inputs)
    if call is not None:
        calls = implementation("triton").calls
        calls.keep(form, with_guards(calls.get(form, ()), present, call))


def _call_for(tensors: tuple, settings: Sequence[Settings], inputs: Sequence[Inputs]) -> Any:
    """What to remember for such a call; None: nothing."""
    node = node_of(settings, inputs) if torch.is_grad_enabled() else None
    if node is not None and not node.places:
        node = None
    few_rows = node is None and has_few_rows(settings[0], inputs[0])
    simple = all(map(_is_simple, settings, inputs))
    if node is None:
        simple &= few_rows or len(inputs) == 1 or is_at_once(settings, inputs)
    else:
        simple &= {Inputs._fields[field] for _, field in node.places} <= _GRADIENTS
    if not simple:
        return _LONG_PATH
    learns = [node is not None and node.wants[i].lambda_ for i in range(len(inputs))]
    call = _call_of(tensors, settings, inputs, None if few_rows else learns) if differ(tensors) else None
    if call is None or node is None:
        return call
    # Which of the tensors and of the launches' results are saved for the backward: objects stand for the results.
    results = [object() for _ in range(PER_LAYER * len(inputs))]
    starts = range(0, len(results), PER_LAYER)
    downs = [Down(results[i], results[i + 1] if own else None, None) for i, own in zip(starts, learns, strict=True)]
    kept = kept_of(node, inputs, downs)
    keeps = places_among([one for one in kept if one is not None], (*tensors, *results))
    wants = places_among([inputs[i][field] for i, field in node.places], tensors)
    return CallWithGradients(call, node, keeps, [one is not None for one in kept], wants)


def _is_simple(settings: Settings, inputs: Inputs) -> bool:
    """Whether a layer is one that a `Call` can compute: kernels, LoRA, and a frozen linear of one dtype if any."""
    one_dtype = inputs.weight is None or settings.dtype == settings.x_dtype == inputs.weight.dtype
    return settings.backend == "triton" and settings.activation is None and one_dtype


def _call_of(
    tensors: tuple, settings: Sequence[Settings], inputs: Sequence[Inputs], learns: list[bool] | None
) -> Call | None:
    """The call without gradients; None where its launches are not recorded.

    Args:
        learns: of each layer, whether its lambda gets a gradient; None: the launches are those for few rows.
    """
    count = len(inputs)
    with without_autocast(tensors[0].device.type):
        if learns is None:
            key, read, matrices = few_rows_request(settings, inputs)
        else:
            key, read, matrices = forward_request(settings, inputs, learns)
    tape = implementation("triton").tape_of(key, read)
    if tape is None:
        return None
    # of x and of the base these are matrices: views of them, or copies where there can be none
    read, base = list(read), tensors[_BASE]
    for i, given in ((0, tensors[0]), (2, base)):
        if given is not None:
            matrix = read[i]
            if matrix is None or matrix.data_ptr() != given.data_ptr():
                return None
            read[i] = given
    # the index of each layer's low-rank y among the launches' results, and of its weight among the tensors
    ys = [i if learns is None else PER_LAYER * (i + 1) - 1 for i in range(count)]
    weights = [] if base is not None else [len(_SHARED) + len(_OF_LAYER) * i for i in range(count)]
    return Call(Read(tape, read, tensors, casts_of(inputs, matrices)), ys, weights)
