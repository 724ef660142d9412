"""Launches that repeat: host time is what small models and short batches wait for.

Step after step a layer launches the same but for the tensors. So a launcher keeps, by the shapes, strides, dtypes and
flags of its arguments, what follows from them: the checks that passed, the plan, the grid and every argument that is no
tensor. And of what Triton found for such a launch the binary is kept: to bind and look at some 35 arguments again takes
Triton a multiple of what all the rest of a launch takes.
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

#: Of one launcher: enough for a model's layers and some dozens of lengths of batches.
KEPT = 1024

_lock = threading.Lock()
_all: list[Launches] = []


class Launches:
    """What a launcher prepared, by all that it depends on; the oldest makes room."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}
        self.get = self._kept.get
        _all.append(self)

    def keep(self, key: Hashable, prepared: Any) -> Any:
        """Returns what it keeps. Nothing is kept where tiles are tuned, as a launch in a captured graph is not."""
        if not autotune.ENABLED:
            with _lock:
                if len(self._kept) >= KEPT and key not in self._kept:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = prepared
        return prepared


def forget_launches() -> None:
    """Of every launcher: for tests that replace a plan or a kernel, which no key knows of."""
    with _lock:
        for launches in _all:
            launches._kept.clear()


def form(tensor: Tensor | None) -> Hashable:
    """What a launch depends on of a tensor, beside the alignment of its pointer.

    Of the device its number, -1 of a CPU: the first launch of a form is Triton's, which refuses what is elsewhere.
    """
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device())


def form_of_value(value: float | Tensor) -> Hashable:
    """Likewise, of what may be a number."""
    return form(value) if isinstance(value, Tensor) else value


class Launch:
    """A launch but for its tensors, on one device.

    Args:
        kernel: the kernel.
        grid: its programs.
        device: of the tensors: Triton launches on the current device, which may be another.
        arguments: those that are no tensors, and Triton's options.
    """

    __slots__ = ("_arguments", "_device", "_found", "_grid", "_kernel", "_programs", "_rest")

    def __init__(self, kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any]) -> None:
        self._kernel, self._grid, self._arguments = kernel, grid, arguments
        self._device = device.index if device.type == "cuda" else None  # only the interpreter launches on a CPU
        self._programs = (*grid, 1, 1)[:3]
        self._found: dict[Hashable, tuple] = {}
        self._rest: tuple = ()

    def __call__(self, **tensors: Any) -> None:
        """Launch. The tensors, tuples of them, numbers that might be one, and None: the kernel's first parameters."""
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
                # None: what hooks, of which there are none, would get
                run(*self._programs, stream, function, metadata, None, None, None, *values, *self._rest)
                return
        kernel = self._kernel[self._grid](**tensors, **self._arguments)
        if _DIRECT and type(kernel) is CompiledKernel:
            self._keep(kernel, tensors)

    def direct(self, tensors: dict[str, Any]) -> tuple | None:
        """How it is launched directly, on the current device, with tensors that it was launched with; None: not at all.

        Triton's function, the programs, the binary's function and metadata, and the arguments that are no tensors.
        """
        found = self._found.get((jit.driver.active.get_current_device(), _addresses(tensors.values())[1]))
        return None if found is None else (found[1], self._programs, *found[2:], self._rest)

    @property
    def hooks(self) -> list[Any]:
        """The kernel's own hooks, which come and go."""
        return self._kernel.pre_run_hooks

    def _keep(self, kernel: CompiledKernel, tensors: dict[str, Any]) -> None:
        """Keep the binary for launches that differ in nothing that Triton would look at.

        Which is dtypes, what numbers are 1 or divisible by 16, constants and options, all of them fixed here; the
        device and whether each pointer is aligned, in the key; and what `_binary_is_all` asks for. AMD's backend looks
        also at the size of each storage, so that there every launch is Triton's own.
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
    """The launches of this thread inside, with their tensors, which it keeps, so that no two have one address."""
    launches: list[tuple[Launch, dict[str, Any]]] = []
    _recording.launches = launches
    try:
        yield launches
    finally:
        _recording.launches = None


def no_launch(**tensors: Any) -> None:
    """The launch where there is nothing to compute."""


def _addresses(values: Iterable[Any]) -> tuple[list[Any], int]:
    """The values with addresses in place of tensors, and a bit for each: whether it is a multiple of 16.

    Which is all that Triton compiles for. It takes an address as it takes a tensor, but asks the driver no questions
    about it.
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


#: The versions whose `JITFunction.run` was read: it ends in the very call that `Launch` makes. With others, and where
#: somebody has replaced it before this import, every launch is Triton's own.
_RUN = getattr(jit.JITFunction, "run", None)
_DIRECT = (
    (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
    and getattr(_RUN, "__module__", None) == jit.__name__
    and all(hasattr(knobs.runtime, name) for name in ("launch_enter_hook", "launch_exit_hook", "debug"))
    and hasattr(knobs.compilation, "instrumentation_mode")
    and hasattr(CompiledKernel, "run")
)


def _binary_is_all(kernel: Any) -> bool:
    """Whether nobody watches launches, or asks for other binaries than usual: profilers, sanitizers, debuggers."""
    return not kernel.pre_run_hooks and type(kernel).run is _RUN and _nobody_watches()


def _nobody_watches() -> bool:
    """Likewise, of all kernels."""
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
    """Whether launches are handed to the driver directly, but for kernels that have hooks of their own."""
    return _DIRECT and jit.JITFunction.run is _RUN and _nobody_watches()
