"""Compiles what a launch would compile, for a GPU that need not be present.

Inside :func:`compiling_for`, calling a launcher with tensors of the device "meta" compiles its kernels as on the
target: with the tiles that the launcher chooses, and with Triton's own specialisation of arguments that are 1,
divisible by 16, or within 2 GiB. So there is no table of arguments to keep in sync with the kernels, and the files in
Triton's cache are those that a launch on such a GPU looks for.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compiler
from triton.runtime import jit

from sibo_triton.kernels import targets
from sibo_triton.kernels.launching import forget_launches
from sibo_triton.ops import dispatch
from sibo_triton.ops.dispatch import Choice


@dataclass
class Compiled:
    """A kernel, and the constants with which it was compiled."""

    name: str
    kernel: CompiledKernel
    constants: dict[str, object]
    warps: int
    stages: int

    @property
    def tiles(self) -> dict[str, int]:
        """BM, BK... of the kernel's arguments."""
        return {name: value for name, value in self.constants.items() if len(name) == 2 and name.startswith("B")}


class _DriverOf:
    """The part of Triton's driver that compiling needs."""

    def __init__(self, target: GPUTarget):
        self.target = target
        self._device = str(target)  # the key under which a kernel keeps what is compiled: one for each target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self._device

    def get_current_stream(self, device: str) -> None:
        return None


@contextmanager
def compiling_for(gpu: GPUTarget, plans_for: object | None = None) -> Iterator[list[Compiled]]:
    """Inside, launches compile and do not run; the compiled kernels are appended to the list.

    Args:
        gpu: as Triton's driver names it.
        plans_for: the target that the launchers find for the device, a ``targets.Target``; if None, the known GPU of
            that kind.
    """
    compiled, functions, run = [], set(), jit.JITFunction.run

    def compile_only(self: jit.JITFunction, *arguments, grid, warmup, **keywords) -> CompiledKernel:
        kernel = run(self, *arguments, grid=grid, warmup=True, **keywords)
        functions.add(self)
        constants = {name: keywords[name] for name in self.arg_names if name in keywords and name.isupper()}
        options = kernel.metadata
        compiled.append(Compiled(self.__name__, kernel, constants, options.num_warps, options.num_stages))
        return kernel

    of_triton = mock.patch.object(jit, "driver", SimpleNamespace(active=_DriverOf(gpu)))
    try:
        with of_triton, mock.patch.object(jit.JITFunction, "run", compile_only), _launchers_find(gpu, plans_for):
            yield compiled
    finally:
        for function in functions:  # or thousands of binaries stay in memory
            function.device_caches.pop(str(gpu), None)


@contextmanager
def launching_for(gpu: GPUTarget, launcher: Callable[..., None] = lambda *arguments: None) -> Iterator[None]:
    """Inside, launches do everything except calling the driver: its arguments go to ``launcher``, and no kernel runs.

    Args:
        gpu: as Triton's driver names it.
        launcher: gets the grid, stream, function, metadata and hooks, and the kernel's arguments.
    """

    functions = set()

    class Driver(_DriverOf):
        utils = SimpleNamespace(
            load_binary=lambda name, binary, *_: ("module", (name, hash(binary)), 0, 0, 1024),
            unload_module=lambda module: None,
        )

        def launcher_cls(self, source: ASTSource, metadata: object) -> Callable[..., None]:
            functions.add(source.fn)
            return launcher

    driver, patch = SimpleNamespace(active=Driver(gpu)), mock.patch.object
    with ExitStack() as stack:
        for module in (jit, compiler):
            stack.enter_context(patch(module, "driver", driver))
        stack.enter_context(patch(compiler, "max_shared_mem", lambda device: 2**18))
        stack.enter_context(_launchers_find(gpu, None))
        try:
            yield
        finally:
            for function in functions:  # whose binaries would call this launcher
                function.device_caches.pop(str(gpu), None)


def kernels_chosen() -> AbstractContextManager[object]:
    """Inside, operations choose the kernels on every device. It may be entered several times."""
    choose = cache(lambda *_: Choice("triton", "chosen without a GPU"))  # cached as what it replaces
    return mock.patch.object(dispatch, "_choose", choose)


@contextmanager
def _launchers_find(gpu: GPUTarget, plans_for: object | None) -> Iterator[None]:
    """What the launchers find out about the device, which is no CUDA device here."""
    target = plans_for or targets.KNOWN[gpu.arch if gpu.backend == "hip" else f"sm_{gpu.arch}"]
    forget_launches()  # as if no kernel had been replaced
    try:
        with mock.patch.object(targets, "target_of", lambda device: target):
            yield
    finally:
        forget_launches()


def target_of_device() -> object:
    """The target of the first CUDA device, for ``plans_for``."""
    return targets.target_of(torch.device("cuda", 0))
