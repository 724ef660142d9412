"""Stands in for the driver of an H100: what reaches it is noted, and nothing computed."""

from contextlib import ExitStack
from unittest import mock

import torch

from benchmarks.ahead_of_time.binaries import TARGETS
from benchmarks.ahead_of_time.without_gpu import kernels_chosen, launching_for
from sibo_triton.kernels import replay
from sibo_triton.kernels.launching import Launch

GPU, _ = TARGETS["sm_90"]
SMALLEST_ADDRESS = 2**32  # no number here is as large


class Driver:
    """Notes launches, with a name for each address: a given tensor's, or which new one it is.

    Attributes:
        launches: of the last run: programs, stream, function, metadata and arguments; and frozen products in place.
        hooks: what Triton's hooks would get, of each of them.
        tapes: how often recorded launches ran.
        by_triton: how many launches were Triton's own.
    """

    def __init__(self):
        self.launches, self.hooks, self.tapes, self.by_triton = [], [], 0, 0
        self._names, self._kept = {}, []

    def __enter__(self):
        patches = [
            launching_for(GPU, self._launch),
            kernels_chosen(),
            mock.patch.object(replay.Tape, "__call__", self._counted(replay.Tape.__call__)),
            mock.patch.object(Launch, "_keep", self._of_triton(Launch._keep)),
            mock.patch.object(
                replay, "_empty_strided_of", lambda kind, of=replay._empty_strided_of: self._keeping(of(kind))
            ),
            mock.patch.object(torch.Tensor, "new_empty", self._keeping(torch.Tensor.new_empty)),
            mock.patch.object(
                torch.Tensor, "flatten", self._keeping(torch.Tensor.flatten)
            ),  # copies of what is no matrix
            mock.patch.object(torch.Tensor, "to", self._keeping(torch.Tensor.to)),  # what autocast casts
            mock.patch.object(torch, "empty", self._keeping(torch.empty)),
            mock.patch.object(torch, "empty_like", self._keeping(torch.empty_like)),
            mock.patch.object(torch.Tensor, "addmm_", lambda *operands: self._accumulate(*operands)),
        ]
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._stack.__exit__(*error)

    def _counted(self, call):
        def counted(tape, tensors):
            result = call(tape, tensors)
            self.tapes += result is not None
            return result

        return counted

    def _of_triton(self, keep):
        def counted(*arguments):
            self.by_triton += 1
            keep(*arguments)

        return counted

    def _keeping(self, allocate):
        """So that no two have one address."""

        def keeping(*arguments, **options):
            self._kept.append(allocate(*arguments, **options))
            return self._kept[-1]

        return keeping

    def _launch(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        self.launches.append(((x, y, z), stream, function, metadata, tuple(map(self._named, arguments))))
        self.hooks.append((launch_metadata, enter_hook, exit_hook))

    def _accumulate(self, y, a, b):
        """A frozen product; not computed, as what it accumulates onto nobody wrote."""
        self.launches.append((("addmm_",), (self._named(y), self._named(a), self._named(b))))
        return y

    def _named(self, value):
        if isinstance(value, tuple):
            return tuple(map(self._named, value))
        if isinstance(value, torch.Tensor):
            self._kept.append(value)
            value = value.data_ptr()
        if type(value) is int and value >= SMALLEST_ADDRESS:
            return self._names.setdefault(value, f"new {len(self._names)}"), value % 16
        return type(value), value

    def run(self, step, tensors):
        """What reaches the driver of ``step()``, and the names and shapes of what it returns, by name.

        Args:
            tensors: those that are given, by name.
        """
        self.launches, self.hooks, self.tapes, self.by_triton, self._kept = [], [], 0, 0, []
        self._names = {tensor.data_ptr(): name for name, tensor in tensors.items() if tensor.numel()}
        results = step() or {}
        return self.launches, {name: (self._names.get(of.data_ptr()), of.shape) for name, of in results.items()}


def tensors_of(*all_arguments):
    """Those among arguments, of one call after another, by name."""
    return {
        f"{name} {i}": value
        for i, arguments in enumerate(all_arguments)
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor)
    }
