"""Recorded launches hand the driver what the launchers do, address for address, and only where they may."""

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from bottleneck_cases import BOTTLENECK_CASES
from bottleneck_cases import make as make_bottleneck
from bottleneck_cases import name_of as name_of_bottleneck
from bottleneck_cases import run as run_bottleneck
from driver import Driver, tensors_of
from group_cases import GROUPS, make_group, outputs_of_group, results_of
from op_cases import CASES, OpCase, make, name_of, operations, output_and_gradients
from triton import knobs
from triton.runtime import jit

from sibo_triton.kernels import launching, replay
from sibo_triton.kernels.down import down_siblings
from sibo_triton.kernels.launching import forget_launches
from sibo_triton.kernels.siblings import DownProjection
from sibo_triton.kernels.up import up_kernel
from sibo_triton.ops import add_bottleneck, lora, triton_backend

pytestmark = pytest.mark.skipif(
    not isinstance(up_kernel, triton.JITFunction), reason="TRITON_INTERPRET=1: unset it to compile kernels"
)


def check(step, tensors, taped=2):
    """Through the launchers, recorded, and replayed: the same reaches the driver. By so many tapes; None: any."""
    with Driver() as driver:
        with mock.patch.object(launching, "_DIRECT", False):
            expected = driver.run(step, tensors)
            assert driver.tapes == 0
        forget_launches()
        for wanted_tapes in (0, taped, taped):
            assert driver.run(step, tensors) == expected
            assert taped is None or driver.tapes == wanted_tapes


def tapes_of(*cases):
    """Of a forward and, where anything is wanted, of the backward; none for what has no elements."""
    if 0 in (*cases[0].tokens, cases[0].in_features):
        return 0
    return 2 if any(case.wants or case.mixes == "learnable" for case in cases) else 1


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_one_layer(case):
    if case.dtype == torch.float64:
        pytest.skip("the kernels do not take it")
    operation, _ = operations(case)
    arguments = make(case)
    grad_y = torch.randn(*case.tokens, case.out_features)
    check(lambda: output_and_gradients(operation, arguments, grad_y), tensors_of(arguments), tapes_of(case))


@pytest.mark.parametrize("name", GROUPS)
def test_layers_that_share_x(name):
    cases = GROUPS[name]
    layers = make_group(cases)
    grads_y = [torch.randn(*case.tokens, case.out_features).to(case.dtype) for case in cases]
    tensors = tensors_of(*layers, {str(i): grad_y for i, grad_y in enumerate(grads_y)})
    check(lambda: results_of(outputs_of_group, layers, grads_y), tensors, tapes_of(*cases))


@pytest.mark.parametrize("case", BOTTLENECK_CASES, ids=name_of_bottleneck)
def test_bottleneck_adapter(case):
    if case.dtype == torch.float64:
        pytest.skip("the kernels do not take it")
    arguments = make_bottleneck(case)
    width = case.out_features or case.in_features
    grad_y = torch.randn(*arguments["x"].shape[:-1], width).to(arguments["x"].dtype)
    check(lambda: run_bottleneck(add_bottleneck, arguments, grad_y), tensors_of(arguments), None)


def forward_of(arguments):
    def step():
        with torch.no_grad():
            return {"y": lora.lora_linear(**arguments)}

    return step


MIXING = OpCase((70,), 48, 40, 4, mixes="number", wants=())


def test_two_tensors_that_are_one_here_are_not_taken_for_one_elsewhere():
    """h0 is the first layer's x, and of no other layer."""
    arguments = make(MIXING)
    as_one = arguments | {"initial_residual": arguments["x"]}
    with Driver() as driver:
        for _ in range(3):
            driver.run(forward_of(as_one), tensors_of(as_one))
            assert driver.tapes == 0
    check(forward_of(arguments), tensors_of(arguments), 1)
    with Driver() as driver:
        forget_launches()
        names, tapes = [], []
        for of in (arguments, arguments, as_one, arguments):
            launches, _ = driver.run(forward_of(of), tensors_of(of))
            names.append([name for name, _ in launches[0][-1][:2]])
            tapes.append(driver.tapes)
    assert tapes == [0, 1, 1, 1]
    assert names == [["x 0", "initial_residual 0"]] * 2 + [["initial_residual 0"] * 2] + names[:1]


@pytest.mark.parametrize("with_weight_first", [True, False])
def test_a_layer_with_its_frozen_weight_is_not_taken_for_one_without(with_weight_first):
    """Under autocast dx has the dtype of the frozen product where there is one, and else x's."""
    case = OpCase((70,), 48, 48, 16, mixes="no")
    fused, added = make(case), make(replace(case, on_base=True))
    added["base"] = added["base"].bfloat16()  # as a frozen layer returns it there
    grad_y = torch.randn(70, 48)

    def step_of(arguments):
        operation = lora.add_lora if "base" in arguments else lora.lora_linear

        def step():
            with torch.autocast("cpu", torch.bfloat16):
                return output_and_gradients(operation, arguments, grad_y)

        return step

    def launched(driver):
        """Of both, without arguments: casts have any address."""
        order = [fused, added] if with_weight_first else [added, fused]
        return [[of[:-1] for of in driver.run(step_of(each), tensors_of(each))[0]] for each in order]

    with Driver() as driver:
        with mock.patch.object(launching, "_DIRECT", False):
            expected = launched(driver)
        forget_launches()
        for _ in range(3):
            assert launched(driver) == expected


def test_what_lies_on_another_device_is_of_another_form():
    """So that its first launch is Triton's, which refuses it: addresses are not looked at again."""
    if not torch.cuda.is_available():
        assert launching.tensor_key(torch.empty(1))[-1] == -1
    else:
        assert launching.tensor_key(torch.empty(1)) != launching.tensor_key(torch.empty(1, device="cuda"))


def test_tensors_on_another_device_than_the_current_one(monkeypatch):
    """Recorded launches make theirs the current one, as the launchers do."""
    arguments, current = make(MIXING), ["another"]

    @contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    with Driver() as driver:
        for taped in (0, 1):
            driver.run(forward_of(arguments), tensors_of(arguments))
            assert driver.tapes == taped
        expected = driver.launches
        (tape,) = (of for of in triton_backend._tapes._kept.values() if of is not None)
        tape._device = tape._index = 1
        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(jit.driver.active, "get_current_device", lambda: current[0])
        monkeypatch.setattr(jit.driver.active, "get_current_stream", "stream of {}".format)
        driver.run(forward_of(arguments), tensors_of(arguments))
    assert [of[0] for of in driver.launches] == [of[0] for of in expected]
    assert {of[1] for of in driver.launches if len(of) > 2} == {"stream of 1"}


def test_another_alignment_and_hooks_are_left_to_the_launchers(monkeypatch):
    arguments = make(MIXING)
    x = arguments["x"]
    shifted = arguments | {"x": torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)}
    with Driver() as driver:

        def tapes(of=arguments):
            driver.run(forward_of(of), tensors_of(of))
            return driver.tapes

        assert [tapes(of) for of in (arguments, arguments, shifted, shifted, arguments)] == [0, 1, 0, 0, 1]
        up_kernel.add_pre_run_hook(lambda *arguments, **options: None)
        assert tapes() == 0
        up_kernel.pre_run_hooks.clear()
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, "debug", True)
            assert tapes() == 0
        assert tapes() == 1
        forget_launches()
        assert tapes() == 0


def test_what_torch_computes_too_is_not_replayed():
    """As the tape would leave it out; nor is what reads a tensor that nobody named."""
    with Driver():
        x, other = torch.randn(64, 64), torch.randn(64, 64)
        lora_a = torch.randn(16, 64)

        def launched(of):
            return down_siblings(of, [DownProjection(lora_a)])[0][0]

        tapes = launching.BoundedCache()
        for compute in (lambda: [launched(x), x * 2], lambda: [launched(other)]):
            for key in (1, 1):
                replay.replayed(tapes, key, [x, lora_a], compute)
            assert tapes.get(1) is None and 1 in tapes._kept
            tapes._kept.clear()
        replay.replayed(tapes, 1, [x, lora_a], lambda: [launched(x)])
        assert isinstance(tapes.get(1), replay.Tape)
