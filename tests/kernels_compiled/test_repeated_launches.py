"""A launch that repeats hands the driver what Triton's own would, without asking Triton."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from driver import Driver
from kernel_launches import Up, name_of
from triton import knobs

from benchmarks.ahead_of_time.cases import BF16, FP32, OF_EACH_KERNEL
from sibo_triton.kernels import launching
from sibo_triton.kernels.launching import KEPT, BoundedCache, forget_launches
from sibo_triton.kernels.up import up_kernel

pytestmark = pytest.mark.skipif(
    not isinstance(up_kernel, triton.JITFunction), reason="TRITON_INTERPRET=1: unset it to compile kernels"
)

UP = Up(130, 200, 16, BF16, FP32, scaling_is_tensor=True)


def inputs(launch, shift=0):
    """On the CPU; shifted by so many elements from an aligned pointer."""
    tensors = {}
    for name, given in launch.inputs("cpu").items():
        strides = given.stride()
        room = torch.empty(given.untyped_storage().nbytes() // given.element_size() + shift + 16, dtype=given.dtype)
        tensors[name] = room.as_strided(given.shape, strides, shift)
    return tensors


def of_triton(driver, launch, tensors):
    """The same by Triton alone."""
    with mock.patch.object(launching, "_DIRECT", False):
        forget_launches()
        handed = handed_over(driver, launch, tensors)
        forget_launches()
    assert driver.by_triton == 0, "the binaries are not kept"
    return handed


def handed_over(driver, launch, tensors):
    return driver.run(lambda: launch.launch(tensors) and None, tensors)[0]


@pytest.mark.parametrize("launch", OF_EACH_KERNEL, ids=name_of)
def test_what_reaches_the_driver_is_what_triton_hands_over(launch):
    with Driver() as driver:
        of_m = {m: replace(launch, m=m) for m in (launch.m, launch.m + 14, 16)}
        wanted = {(m, shift): of_triton(driver, of, inputs(of, shift)) for m, of in of_m.items() for shift in (0, 1)}
        for again in range(3):
            for (m, shift), by_triton in wanted.items():
                assert handed_over(driver, of_m[m], inputs(of_m[m], shift)) == by_triton
                assert (driver.by_triton > 0) == (again == 0)


def test_pointers_that_are_not_aligned_have_a_kernel_of_their_own():
    with Driver() as driver:
        functions = [handed_over(driver, UP, inputs(UP, shift))[0][2] for shift in (0, 1, 0, 1)]
        assert functions[:2] == functions[2:] and functions[0] != functions[1]
        assert driver.by_triton == 0


def test_hooks_and_knobs_get_tritons_own_launch(monkeypatch):
    tensors = inputs(UP)
    with Driver() as driver:
        handed_over(driver, UP, tensors)
        (usual,) = handed_over(driver, UP, tensors)
        assert driver.by_triton == 0 and driver.hooks == [(None, None, None)]

        def seen():
            """The function that is launched by Triton."""
            (handed,) = handed_over(driver, UP, tensors)
            assert driver.by_triton == 1
            return handed[2]

        for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
            monkeypatch.setattr(hooks, "calls", [print])
            assert seen() == usual[2] and driver.hooks[-1][1] is knobs.runtime.launch_enter_hook
            monkeypatch.setattr(hooks, "calls", [])
        monkeypatch.setattr(knobs.runtime, "debug", True)
        seen()
        monkeypatch.setattr(knobs.runtime, "debug", False)
        up_kernel.add_pre_run_hook(lambda *_, **__: None)
        assert seen() == usual[2]
        up_kernel.pre_run_hooks.clear()
        run = triton.JITFunction.run
        monkeypatch.setattr(triton.JITFunction, "run", lambda *arguments, **keywords: run(*arguments, **keywords))
        assert seen() == usual[2]
        monkeypatch.undo()
        handed_over(driver, UP, tensors)
        assert driver.by_triton == 0


def test_a_kernel_that_does_not_fit_raises_on_every_launch():
    with Driver() as driver, mock.patch.object(triton.compiler.compiler, "max_shared_mem", lambda device: 16):
        for _ in range(2):
            with pytest.raises(triton.runtime.errors.OutOfResources):
                handed_over(driver, UP, inputs(UP))


def test_the_oldest_makes_room():
    launches = BoundedCache()
    for i in range(KEPT + 1):
        assert launches.keep(i, f"launch {i}") == f"launch {i}"
    assert launches.get(0) is None and launches.get(1) == "launch 1" and launches.get(KEPT) == f"launch {KEPT}"
    forget_launches()
    assert launches.get(KEPT) is None
