"""Launches that repeat: host time is what small models and short batches wait for.

Step after step a layer launches the same but for the tensors. So a launcher keeps, by the shapes, strides, dtypes and
flags of its arguments, what follows from them: the checks that passed, the plan, the grid and every argument that is no
tensor. And of what Triton found for such a launch the binary is kept: to bind and look at some 35 arguments again takes
Triton a multiple of what all the rest of a launch takes.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
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
                if len(self._kept) >= KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = prepared
        return prepared


def forget_launches() -> None:
    """Of every launcher: for tests that replace a plan or a kernel, which no key knows of."""
    with _lock:
        for launches in _all:
            launches._kept.clear()


def form(tensor: Tensor | None) -> Hashable:
    """What a launch depends on of a tensor, beside its device and the alignment of its pointer."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())


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
        if self._device is None or self._device == torch.cuda.current_device():
            self._launch(tensors)
        else:
            with torch.cuda.device(self._device):
                self._launch(tensors)

    def _launch(self, tensors: dict[str, Any]) -> None:
        if self._found and _binary_is_all(self._kernel):
            driver = jit.driver.active
            device = driver.get_current_device()
            found = self._found.get((device, _alignment(tensors.values())))
            if found is not None:
                _, run, function, metadata = found
                stream = driver.get_current_stream(device)
                # None: what hooks, of which there are none, would get
                run(*self._programs, stream, function, metadata, None, None, None, *tensors.values(), *self._rest)
                return
        kernel = self._kernel[self._grid](**tensors, **self._arguments)
        if _DIRECT and type(kernel) is CompiledKernel:
            self._keep(kernel, tensors)

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
        key = jit.driver.active.get_current_device(), _alignment(tensors.values())
        # with the kernel itself, whose binary Triton may unload with it
        self._found[key] = kernel, kernel.run, kernel.function, kernel.packed_metadata


def no_launch(**tensors: Any) -> None:
    """The launch where there is nothing to compute."""


def _alignment(values: Any) -> int:
    """A bit for each pointer: whether it is a multiple of 16, which is all that Triton compiles for."""
    bits = 1
    for value in values:
        if type(value) is tuple:
            for one in value:
                if one is not None and type(one) is not float:
                    bits = bits << 1 | (one.data_ptr() & 15 == 0)
        elif value is not None and type(value) is not float:
            bits = bits << 1 | (value.data_ptr() & 15 == 0)
    return bits


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
    runtime, compilation = knobs.runtime, knobs.compilation
    return not (
        getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
        or runtime.debug
        or compilation.instrumentation_mode
        or getattr(runtime, "add_stages_inspection_hook", None) is not None  # of 3.7
        or getattr(compilation, "fpsan_homomorphic_casts", False)  # of 3.9
        or kernel.pre_run_hooks
        or type(kernel).run is not _RUN
    )
