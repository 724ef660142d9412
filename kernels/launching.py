"""Launches with cached preparation, to save host time, which is what small models and short batches wait for.

In each step a layer makes the same launches on other tensors. A launcher caches what follows from the shapes, strides,
dtypes and flags of its arguments: the checks that passed, the plan, the grid, and every argument that is not a tensor.
The binary that Triton compiled for such a launch is cached too: for Triton, binding and inspecting some 35 arguments
again takes several times as long as the rest of a launch.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import jit

from . import autotune

#: Entries of one cache: enough for a model's layers at some dozens of batch lengths.
KEPT = 1024

_lock = threading.Lock()
_all: list[BoundedCache] = []


class BoundedCache:
    """A dictionary of at most ``KEPT`` entries: launches, tapes or calls, by all that they depend on."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}
        self.get = self._kept.get
        _all.append(self)

    def keep(self, key: Hashable, prepared: Any) -> Any:
        """Returns what it keeps. Keeps nothing under autotuning, as launches that a CUDA graph captures are untuned."""
        if not autotune.ENABLED:
            with _lock:
                if len(self._kept) >= KEPT and key not in self._kept:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = prepared
        return prepared


def forget_launches() -> None:
    """Clear every cache: for tests that replace a plan or a kernel, which are not part of the keys."""
    with _lock:
        for launches in _all:
            launches._kept.clear()


def tensor_key(tensor: Tensor | None) -> Hashable:
    """dtype, shape, strides and device index (-1: CPU): a launch depends on these and on the pointer's alignment.

    The device's type is not needed: Triton makes the first launch for a key, and refuses tensors of other types.
    """
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device())


def value_key(value: float | Tensor) -> Hashable:
    """:func:`tensor_key` of a tensor; a number is its own key."""
    return tensor_key(value) if isinstance(value, Tensor) else value


def value_argument(value: float | Tensor) -> float | Tensor:
    """A tensor, or a number as a float, as kernels take lambda and the scaling."""
    return value if isinstance(value, Tensor) else float(value)


class Launch:
    """A launch without its tensors, on one device.

    Args:
        kernel: the kernel.
        grid: its programs.
        device: of the tensors: Triton launches on the current device, which may be another.
        arguments: those that are not tensors, and Triton's options.
    """

    __slots__ = ("_arguments", "_device", "_found", "_grid", "_kernel", "_programs", "_rest")

    def __init__(self, kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any]) -> None:
        self._kernel, self._grid, self._arguments = kernel, grid, arguments
        self._device = device.index if device.type == "cuda" else None  # only the interpreter launches on a CPU
        self._programs = (*grid, 1, 1)[:3]
        self._found: dict[Hashable, tuple] = {}
        self._rest: tuple = ()

    def __call__(self, **tensors: Any) -> None:
        """Launch, given the kernel's first parameters: tensors, tuples of them, None, or numbers in their place."""
        if _recording.launches is not None:
            _recording.launches.append((self, tensors))
        if self._device is None or self._device == torch.cuda.current_device():
            self._launch(tensors)
        else:
            with torch.cuda.device(self._device):
                self._launch(tensors)

    def _launch(self, tensors: dict[str, Any]) -> None:
        if self._found and _binary_is_all(self._kernel):
            driver = jit.driver.active
            device = driver.get_current_device()
            values, alignment = _addresses(tensors.values())
            found = self._found.get((device, alignment))
            if found is not None:
                _, run, function, metadata = found
                stream = driver.get_current_stream(device)
                # None, three times: what launch hooks would get
                run(*self._programs, stream, function, metadata, None, None, None, *values, *self._rest)
                return
        kernel = self._kernel[self._grid](**tensors, **self._arguments)
        if _DIRECT and type(kernel) is CompiledKernel:
            self._keep(kernel, tensors)

    def direct(self, tensors: dict[str, Any]) -> tuple | None:
        """How to launch directly, on the current device, with tensors that it was launched with before.

        Triton's function, the programs, the binary's function and metadata, and the arguments that are not tensors;
        None: it cannot.
        """
        found = self._found.get((jit.driver.active.get_current_device(), _addresses(tensors.values())[1]))
        return None if found is None else (found[1], self._programs, *found[2:], self._rest)

    @property
    def hooks(self) -> list[Any]:
        """The kernel's own hooks, which users add and remove."""
        return self._kernel.pre_run_hooks

    def _keep(self, kernel: CompiledKernel, tensors: dict[str, Any]) -> None:
        """Keep the binary for launches that Triton would compile alike.

        Triton looks at dtypes, at which numbers are 1 or divisible by 16, at constants and options, all fixed here; at
        the device and at whether each pointer is aligned, which are in the key; and at what `_binary_is_all` asks for.
        AMD's backend also looks at the size of each storage: there every launch is Triton's own.
        """
        function = self._kernel
        if not isinstance(function, jit.JITFunction) or kernel.metadata.target.backend != "cuda":
            return
        first = function.arg_names[: len(tensors)]
        if first != list(tensors) or function.used_global_vals or not _binary_is_all(function):
            return
        self._rest = tuple(self._arguments[name] for name in function.arg_names[len(tensors) :])
        key = jit.driver.active.get_current_device(), _addresses(tensors.values())[1]
        # with the kernel itself, whose binary Triton may unload with it
        self._found[key] = kernel, kernel.run, kernel.function, kernel.packed_metadata


class _Recording(threading.local):
    launches: list[tuple[Launch, dict[str, Any]]] | None = None


_recording = _Recording()


@contextmanager
def recorded() -> Iterator[list[tuple[Launch, dict[str, Any]]]]:
    """The launches of this thread inside, with their tensors, which it keeps alive, so that no address is reused."""
    launches: list[tuple[Launch, dict[str, Any]]] = []
    _recording.launches = launches
    try:
        yield launches
    finally:
        _recording.launches = None


def no_launch(**tensors: Any) -> None:
    """The launch where there is nothing to compute."""


def _addresses(values: Iterable[Any]) -> tuple[list[Any], int]:
    """The values with addresses in place of tensors, and a bit for each address: whether it is a multiple of 16.

    Triton compiles for these bits only. It takes an address like a tensor, without asking the driver about it.
    """
    found: list[Any] = []
    bits = 1
    for value in values:
        if value is None or type(value) is float:
            found.append(value)
        elif type(value) is tuple:
            own: list[Any] = []
            for one in value:
                if one is None or type(one) is float:
                    own.append(one)
                else:
                    address = one.data_ptr()
                    own.append(address)
                    bits = bits << 1 | (address & 15 == 0)
            found.append(tuple(own))
        else:
            address = value.data_ptr()
            found.append(address)
            bits = bits << 1 | (address & 15 == 0)
    return found, bits


#: Known versions, whose `JITFunction.run` ends in the very call that `Launch` makes. With others, and where it was
#: replaced before this import, every launch is Triton's own.
_RUN = getattr(jit.JITFunction, "run", None)
_DIRECT = (
    (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
    and getattr(_RUN, "__module__", None) == jit.__name__
    and all(hasattr(knobs.runtime, name) for name in ("launch_enter_hook", "launch_exit_hook", "debug"))
    and hasattr(knobs.compilation, "instrumentation_mode")
    and hasattr(CompiledKernel, "run")
    and not knobs.runtime.interpret  # whose launches are all its own
)


def _binary_is_all(kernel: Any) -> bool:
    """Whether no profiler, sanitizer or debugger watches launches, or asks for other binaries than usual."""
    return not kernel.pre_run_hooks and type(kernel).run is _RUN and _nobody_watches()


def _nobody_watches() -> bool:
    """:func:`_binary_is_all`, as far as it concerns all kernels."""
    runtime, compilation = knobs.runtime, knobs.compilation
    return not (
        getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
        or runtime.debug
        or compilation.instrumentation_mode
        or getattr(runtime, "add_stages_inspection_hook", None) is not None  # of 3.7
        or getattr(compilation, "fpsan_homomorphic_casts", False)  # of 3.9
    )


def direct() -> bool:
    """Whether launches go to the driver directly, except for kernels that have hooks of their own."""
    return _DIRECT and jit.JITFunction.run is _RUN and _nobody_watches()
