"""Recorded launches: repeats the launches of a forward or backward without the launchers, to save host time.

A forward or a backward is a few launches on tensors that it gets, that it returns, and scratch between them. When it
first runs with tensors of certain shapes, strides and dtypes, its launches are recorded as a `Tape`, which knows of
each argument whether it is a given tensor, a part of a returned one, or scratch. From then on the tape allocates the
returned tensors, and all scratch at once, and passes addresses to the driver. Plans, checks and the keys of single
launches follow from the shapes, strides and dtypes, and are not looked at again.

This holds only where every launch is direct (`launching.py`), and where nothing but launches computes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from itertools import starmap
from operator import add, or_
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import jit

from . import autotune, launching
from .launching import BoundedCache, Launch
from .targets import cdiv
from .tuple_getter import tuple_getter

aten = torch.ops.aten

#: torch's operations that compute nothing: allocations, and views.
_ALLOCATE = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
}
_VIEW = {
    aten.alias.default,
    aten.as_strided.default,
    aten.detach.default,
    aten.permute.default,
    aten.select.int,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}

_SCRATCH_ALIGNED = 256  # as torch's allocator aligns what has a buffer of its own, and more than any kernel asks for
_SCRATCH = -1  # its buffer is the last
_UNKNOWN: Any = object()


def replayed(
    tapes: BoundedCache, key: Hashable, tensors: Sequence[Tensor | None], compute: Callable[[], Sequence[Tensor | None]]
) -> Sequence[Tensor | None]:
    """What ``compute`` returns: by its recorded launches, from the second call on.

    Args:
        tapes: the tapes recorded so far.
        key: all that the launches depend on, with the `launching.tensor_key` of each tensor.
        tensors: all tensors that ``compute`` reads.
        compute: calls launchers, and returns new tensors, or None in their places; which, depends on the key only.
    """
    if not runs_now():
        return compute()
    tape = tapes.get(key, _UNKNOWN)
    if tape is _UNKNOWN:
        return _recorded(tapes, key, tensors, compute)
    found = None if tape is None else tape(tensors)
    return compute() if found is None else found


def runs_now() -> bool:
    """Whether tapes may be recorded and run."""
    return launching.direct() and not autotune.ENABLED and torch._C._len_torch_dispatch_stack() == 0


def _recorded(
    tapes: BoundedCache, key: Hashable, tensors: Sequence[Tensor | None], compute: Callable[[], Sequence[Tensor | None]]
) -> Sequence[Tensor | None]:
    """What ``compute`` returns. Keeps its tape, or None if it can have none; nothing if a later call may record one."""
    given = [tensor for tensor in tensors if tensor is not None]
    index = given[0].device.index
    if index is not None and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return _recorded(tapes, key, tensors, compute)
    addresses = {tensor.data_ptr() for tensor in given}
    if len(addresses) < len(given) or 0 in addresses:
        return compute()  # two tensors at one address (h0 and the first layer's x) may be distinct in the next call
    with _Watch() as watch, launching.recorded() as launches:
        outputs = compute()
    tapes.keep(key, None if watch.computed else _Taping(tensors, watch.allocated).tape(launches, outputs))
    return outputs


class _Watch(TorchDispatchMode):
    """Notes the addresses of allocated storages, and whether anything but launches computes."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: set[int] = set()
        self.computed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATE:
            self.allocated.add(result.untyped_storage().data_ptr())
        elif func not in _VIEW:
            self.computed = True
        return result


class Tape:
    """Launches, and where their arguments come from.

    Addresses are numbered: first those of the given tensors, then those in the buffers that the tape allocates.

    Args:
        launches: each launch, what `Launch.direct` returned for it, and its arguments, with numbers for addresses.
        alignment: of each given tensor, as :func:`_alignment` has it; None where none is given.
        device: of the tensors.
        buffers: shape and dtype of each buffer to allocate; the last is scratch.
        addresses: of each number after those of given tensors: its buffer, and the offset in bytes.
        outputs: of each returned tensor its buffer and, unless it is all of it, shape, strides and offset.
    """

    __slots__ = (
        *("_aligned", "_alignment", "_alive", "_allocate", "_buffers", "_constants", "_device", "_hooks", "_index"),
        *("_launches", "_offsets", "_pick_given", "_pick_outputs", "_pick_starts", "_pick_tuples", "_views"),
    )

    def __init__(
        self,
        launches: list[tuple[Launch, tuple, list[Any]]],
        alignment: list[bool | None],
        device: torch.device,
        buffers: list[tuple[tuple[int, ...], torch.dtype]],
        addresses: list[tuple[int, int]],
        outputs: list[tuple[int, tuple | None] | None],
    ) -> None:
        self._device, self._index = jit.driver.active.get_current_device(), device.index
        given = [i for i, aligned in enumerate(alignment) if aligned is not None]
        self._pick_given = tuple_getter(given)
        self._alignment = [aligned for aligned in alignment if aligned is not None]
        self._aligned = all(self._alignment)
        self._allocate = _empty_strided_of(device.type)
        self._buffers = [(shape, torch.empty(shape, device="meta").stride(), dtype) for shape, dtype in buffers]
        self._pick_starts = tuple_getter([buffer for buffer, _ in addresses])
        self._offsets = tuple(offset for _, offset in addresses)
        # One tuple holds all values, so that one call picks all that a launch passes to the driver: given addresses,
        # those in allocated buffers, the stream, constants, and tuples of these.
        place_of = {number: place for place, number in enumerate(given)}
        place_of |= {len(alignment) + i: len(given) + i for i in range(len(addresses))}
        stream = len(place_of)
        constants: dict[int, Any] = {}  # by identity: None, True and small numbers occur often
        place_of_constant: dict[int, int] = {}

        def constant(value: Any) -> int:
            constants[id(value)] = value
            return place_of_constant.setdefault(id(value), stream + len(constants))

        def place(value: Any) -> int:
            return place_of[value] if type(value) is int else constant(value)

        tuples: list[list[int]] = []  # those with an address; they come last, the first at the very end

        def place_or_tuple(value: Any) -> int:
            if type(value) is tuple and any(type(one) is int for one in value):
                tuples.append([place(one) for one in value])
                return -len(tuples)
            return place(value)

        passed = []
        for (run, programs, function, metadata, rest), arguments in ((direct, of) for _, direct, of in launches):
            head = [*map(constant, programs), stream, *map(constant, (function, metadata, None, None, None))]
            passed.append((run, [*head, *map(place_or_tuple, arguments), *map(constant, rest)]))
        self._constants = tuple(constants.values())
        self._pick_tuples = [tuple_getter(of) for of in reversed(tuples)]
        self._launches = [(run, tuple_getter(places)) for run, places in passed]
        self._hooks = [launch.hooks for launch, *_ in launches]
        self._alive = [launch for launch, *_ in launches]  # they keep the binaries, which Triton may unload otherwise
        self._pick_outputs = tuple_getter([len(buffers) if of is None else of[0] for of in outputs])
        self._views = [(i, of[1]) for i, of in enumerate(outputs) if of is not None and of[1] is not None]

    def __call__(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """The returned tensors, for given ones with the recorded key; None where the launches do not fit these."""
        driver = jit.driver.active
        device = driver.get_current_device()
        if device != self._device:  # of a model on several, with the first as the current one
            if self._index is None:
                return None
            with torch.cuda.device(self._index):
                return self(tensors)
        given = tuple(map(_data_ptr, self._pick_given(tensors)))
        if self._aligned:
            matches = reduce(or_, given) & 15 == 0
        else:
            matches = _alignment(given) == self._alignment
        if not matches or any(self._hooks):
            return None
        buffers = list(starmap(self._allocate, self._buffers))
        starts = tuple(map(_data_ptr, buffers))
        stream = driver.get_current_stream(device)
        placed = (*given, *map(add, self._pick_starts(starts), self._offsets), stream, *self._constants)
        if self._pick_tuples:
            placed += tuple([pick(placed) for pick in self._pick_tuples])
        for run, pick in self._launches:
            run(*pick(placed))
        outputs = list(self._pick_outputs((*buffers, None)))
        for i, view in self._views:
            outputs[i] = outputs[i].as_strided(*view)
        return outputs


_data_ptr = torch.Tensor.data_ptr


def _empty_strided_of(device_type: str) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """Allocates on the current device of a type: by the function that Inductor's code calls, in half of the time."""
    fast = getattr(getattr(torch._C._dynamo, "guards", None), f"_empty_strided_{device_type}", None)
    if fast is not None:
        return fast
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device_type)


def _alignment(addresses: Sequence[int]) -> list[bool]:
    """Of each: whether it is a multiple of 16, which is what binaries depend on."""
    return [address & 15 == 0 for address in addresses]


class _Taping:
    """Makes a tape: tells which tensor each address of a launch belongs to.

    Args:
        tensors: the given tensors.
        allocated: the addresses of the storages that were allocated.
    """

    def __init__(self, tensors: Sequence[Tensor | None], allocated: set[int]) -> None:
        self._allocated = allocated
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        self._alignment = [None if address == 0 else address & 15 == 0 for address in addresses]
        self._device = next(tensor.device for tensor in tensors if tensor is not None)
        self._numbers = {address: i for i, address in enumerate(addresses) if address != 0}
        self._given = len(addresses)
        self._buffers: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._returned: dict[int, int] = {}  # which buffer a storage is
        self._scratch: dict[int, int] = {}  # where a storage starts in the buffer of scratch
        self._room = 0
        self._places: list[tuple[int, int]] = []

    def tape(self, launches: list[tuple[Launch, dict[str, Any]]], outputs: Sequence[Tensor | None]) -> Tape | None:
        """None where the origin of an argument is unknown, or where a launch cannot be direct."""
        try:
            made = [None if output is None else self._output(output) for output in outputs]
            taped = [(launch, self._direct(launch, of), self._arguments(of)) for launch, of in launches]
        except _CannotTell:
            return None
        if self._room:
            self._buffers.append(((self._room,), torch.uint8))
        return Tape(taped, self._alignment, self._device, self._buffers, self._places, made)

    def _output(self, output: Tensor) -> tuple[int, tuple | None]:
        storage, size = output.untyped_storage(), output.element_size()
        start = storage.data_ptr()
        if start not in self._allocated or storage.nbytes() == 0:
            raise _CannotTell
        whole = output.is_contiguous() and storage.nbytes() == output.numel() * size
        if start not in self._returned:
            self._returned[start] = len(self._buffers)
            self._buffers.append((tuple(output.shape) if whole else (storage.nbytes() // size,), output.dtype))
        elif self._buffers[self._returned[start]][1] != output.dtype or whole:
            raise _CannotTell
        view = None if whole else (tuple(output.shape), output.stride(), output.storage_offset())
        return self._returned[start], view

    @staticmethod
    def _direct(launch: Launch, arguments: dict[str, Any]) -> tuple:
        found = launch.direct(arguments)
        if found is None:
            raise _CannotTell
        return found

    def _arguments(self, arguments: dict[str, Any]) -> list[Any]:
        return [
            tuple([self._numbered(one) for one in value]) if type(value) is tuple else self._numbered(value)
            for value in arguments.values()
        ]

    def _numbered(self, value: Any) -> Any:
        """A number for a tensor; what is none stays."""
        if value is None or type(value) is float:
            return value
        address = value.data_ptr()
        if address not in self._numbers:
            storage = value.untyped_storage()
            start = storage.data_ptr()
            if start not in self._allocated:
                raise _CannotTell
            if start in self._returned:
                place = self._returned[start], address - start
            else:
                if start not in self._scratch:
                    self._scratch[start] = self._room
                    self._room += cdiv(storage.nbytes(), _SCRATCH_ALIGNED) * _SCRATCH_ALIGNED
                place = _SCRATCH, self._scratch[start] + address - start
            self._numbers[address] = self._given + len(self._places)
            self._places.append(place)
        return self._numbers[address]


class _CannotTell(Exception):
    """There is no tape."""
