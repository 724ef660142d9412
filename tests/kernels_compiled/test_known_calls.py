"""A call that is known goes to its recorded launches in one step; one that is not like it takes the long path."""

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

pytest.importorskip("triton", reason="triton is not installed")

import triton
from driver import Driver, tensors_of
from group_cases import arguments_of, make_group, outputs_of_group, results_of
from op_cases import OpCase, make, operations, output_and_gradients

from sibo_triton import reference
from sibo_triton.kernels import launching
from sibo_triton.kernels.launching import forget_launches
from sibo_triton.kernels.up import up_kernel
from sibo_triton.ops import LoraArguments, autograd, group, known_calls, lora, lora_linear_group, recorded_call

pytestmark = pytest.mark.skipif(
    not isinstance(up_kernel, triton.JITFunction), reason="TRITON_INTERPRET=1: unset it to compile kernels"
)

MIXING = OpCase((2, 70), 48, 40, 4, mixes="number", wants=("x", "lora_a", "lora_b"))


@contextmanager
def driver_with_nothing_known():
    forget_launches()
    with Driver() as driver:
        yield driver
    forget_launches()


def expected_of(driver, step, tensors):
    """What reaches the driver by the launchers themselves."""
    with mock.patch.object(launching, "_DIRECT", False):
        found = driver.run(step, tensors)
        assert driver.tapes == 0
    return found


@contextmanager
def the_long_path_is_closed(backward=True):
    """Neither arguments are prepared nor gradients put together."""
    closed = mock.Mock(side_effect=AssertionError("the call is not known"))
    with mock.patch.object(lora, "_checked", closed):
        with mock.patch.object(recorded_call, "gradients", closed if backward else autograd.gradients):
            yield


def step_of(arguments, of=MIXING, operation=None):
    operation = operation or operations(of)[0]
    grad_y = torch.ones(*of.tokens, of.out_features, dtype=arguments["x"].dtype)
    return lambda: output_and_gradients(operation, arguments, grad_y)


CALLS = {
    "plain": OpCase((70,), 48, 40, 4, mixes="no", wants=("x", "lora_a", "lora_b")),
    "mixing": MIXING,
    "h0's gradient": OpCase((2, 7), 48, 40, 4, mixes="number", wants=("x", "initial_residual", "lora_a", "lora_b")),
    "frozen input": OpCase((70,), 48, 40, 4, mixes="number", wants=("lora_a", "lora_b")),
    "only A": OpCase((70,), 48, 40, 4, mixes="number", wants=("lora_a",)),
    "dropout": OpCase((70,), 48, 40, 4, mixes="number", dropout_p=0.1, wants=("x", "lora_a", "lora_b")),
    "nothing wanted, few rows": OpCase((3,), 48, 40, 4, mixes="number", wants=()),
    "nothing wanted": OpCase((70,), 48, 40, 4, mixes="number", wants=()),
    "lambda learns": OpCase((2, 70), 48, 40, 4, mixes="learnable"),
    "lambda alone learns": OpCase((2, 70), 48, 40, 4, mixes="learnable", wants=()),
    "the bias learns": OpCase((70,), 48, 40, 4, mixes="number", bias=True, wants=("x", "bias", "lora_b")),
    "on a base, lambda learns": OpCase((70,), 48, 40, 4, mixes="learnable", on_base=True, wants=("base", "lora_a")),
    "on a base": OpCase((2, 70), 48, 40, 4, mixes="number", on_base=True, wants=("x", "base", "lora_a", "lora_b")),
    "on a base, which gets no gradient": OpCase((70,), 48, 40, 4, dropout_p=0.1, on_base=True),
    "on a base, nothing wanted": OpCase((2, 3), 48, 40, 4, mixes="number", on_base=True, wants=()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_known_call_takes_one_step(name):
    of = CALLS[name]
    arguments = make(of)
    step, tensors = step_of(arguments, of), tensors_of(arguments)
    with driver_with_nothing_known() as driver:
        expected = expected_of(driver, step, tensors)
        assert driver.run(step, tensors) == expected  # records
        assert driver.run(step, tensors) == expected
        with the_long_path_is_closed():
            assert driver.run(step, tensors) == expected


@pytest.mark.parametrize("tokens", [(2, 70), (3,)])
def test_under_autocast_the_adapter_is_cast_in_each_call(tokens):
    """To its dtype, in which it computes; without it the same arguments are another call."""
    of = replace(MIXING, tokens=tokens, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    arguments = make(of)
    step, tensors = step_of(arguments, of), tensors_of(arguments)
    under_autocast = step_of(arguments, of, torch.autocast("cpu", torch.bfloat16)(lora.lora_linear))
    with driver_with_nothing_known() as driver:
        expected = [expected_of(driver, each, tensors) for each in (step, under_autocast)]
        assert expected[0] != expected[1]
        for _ in range(2):
            assert [driver.run(each, tensors) for each in (step, under_autocast)] == expected
        with the_long_path_is_closed():
            assert [driver.run(each, tensors) for each in (under_autocast, step)] == expected[::-1]
        if len(tokens) == 1:  # nothing wanted, few rows
            alone = torch.no_grad()(torch.autocast("cpu", torch.bfloat16)(lambda: {"y": lora.lora_linear(**arguments)}))
            expected = expected_of(driver, alone, tensors)
            for _ in range(2):
                assert driver.run(alone, tensors) == expected
            with the_long_path_is_closed():
                assert driver.run(alone, tensors) == expected


def test_layers_that_share_x_take_one_step_without_gradients(monkeypatch):
    """But where their outputs are so large that each is to be made when it is needed."""
    cases = [OpCase((2, 70), 48, n, 4, mixes="number", wants=()) for n in (40, 24)]
    layers = make_group(cases)
    tensors = tensors_of(*layers)

    def step():
        return results_of(outputs_of_group, layers, [None, None])

    with driver_with_nothing_known() as driver:
        expected = expected_of(driver, step, tensors)
        for _ in range(2):
            assert driver.run(step, tensors) == expected
        with the_long_path_is_closed():
            assert driver.run(step, tensors) == expected
        forget_launches()
        monkeypatch.setattr(group, "FEW_BYTES", 140 * (40 + 24) * 4 - 1)
        for _ in range(3):
            names, results = driver.run(step, tensors)
            assert results.keys() == expected[1].keys() and len(names) == len(expected[0])
            assert driver.tapes == 0 and names != expected[0]  # a frozen product comes before the other layer's `up`


@pytest.mark.parametrize(
    "mixes", [("no", "no", "no"), ("no", "number", "tensor"), ("learnable", "number", "learnable")]
)
def test_layers_that_share_x_take_one_step(mixes):
    cases = [OpCase((2, 70), 48, n, r, mixes=of) for n, r, of in zip((40, 24, 24), (4, 16, 3), mixes, strict=True)]
    layers = make_group(cases)
    grads_y = [torch.ones(*case.tokens, case.out_features) for case in cases]
    tensors = tensors_of(*layers, {str(i): grad_y for i, grad_y in enumerate(grads_y)})

    def step(order=None):
        return results_of(outputs_of_group, layers, grads_y, order)

    with driver_with_nothing_known() as driver:
        expected = expected_of(driver, step, tensors)
        of_two = expected_of(driver, lambda: step((0, 2)), tensors)
        for _ in range(2):
            assert driver.run(step, tensors) == expected
        with the_long_path_is_closed():
            assert driver.run(step, tensors) == expected
        with the_long_path_is_closed(backward=False):  # a sibling whose output is not used
            assert driver.run(lambda: step((0, 2)), tensors) == of_two
            assert driver.run(step, tensors) == expected


def test_what_is_asked_for_may_change_from_call_to_call():
    """Which tensors want a gradient, and whether any is wanted: of few rows launches are others then."""
    few = replace(MIXING, tokens=(2, 7))
    arguments = make(few)
    step, tensors = step_of(arguments, few), tensors_of(arguments)

    def without_gradients():
        with torch.no_grad():
            return {"y": lora.lora_linear(**arguments)}

    with driver_with_nothing_known() as driver:
        expected, of_none = expected_of(driver, step, tensors), expected_of(driver, without_gradients, tensors)
        arguments["x"].requires_grad_(False)
        of_frozen = expected_of(driver, step, tensors)
        for _ in range(3):
            assert driver.run(step, tensors) == of_frozen
            arguments["x"].requires_grad_(True)
            assert driver.run(step, tensors) == expected
            assert driver.run(without_gradients, tensors) == of_none
            arguments["x"].requires_grad_(False)


def transposed(matrix):
    return matrix.detach().t().contiguous().t().requires_grad_(matrix.requires_grad)


VARIANTS = {
    "dtype of h0": lambda of: {"initial_residual": of["initial_residual"].bfloat16()},
    "dtype of all": lambda of: {name: of[name].bfloat16() for name in ("x", "weight", "bias", "lora_a", "lora_b")},
    "strides of x": lambda of: {"x": torch.randn(2, 70, 96)[..., :48].requires_grad_()},
    "strides of W0": lambda of: {"weight": transposed(of["weight"])},
    "strides of A": lambda of: {"lora_a": transposed(of["lora_a"])},
    "rank": lambda of: {name: torch.randn(shape) for name, shape in (("lora_a", (5, 48)), ("lora_b", (40, 5)))},
    "no bias": lambda of: {"bias": None},
    "another bias": lambda of: {"bias": None, "lora_bias": of["bias"].detach()},
    "A frozen": lambda of: {"lora_a": of["lora_a"].detach()},
    "B negated when read": lambda of: {"lora_b": torch._neg_view(-of["lora_b"].detach())},
}
ON_BASE = {
    "dtype of the base": lambda of: {"base": of["base"].detach().bfloat16().requires_grad_()},
    "strides of the base": lambda of: {"base": torch.randn(2, 70, 96)[..., :40].requires_grad_()},
    "a base that is no matrix": lambda of: {"base": of["base"].detach()[:1].expand(2, 70, 40).requires_grad_()},
    "a base negated when read": lambda of: {"base": torch._neg_view(-of["base"].detach()).requires_grad_()},
    "a base without gradient": lambda of: {"base": of["base"].detach()},
}


@pytest.mark.parametrize("case", [MIXING, CALLS["nothing wanted"], CALLS["on a base"]])
def test_nothing_is_launched_on_fake_tensors(case):
    """Which have no memory. Their address is 0, and Triton takes it."""
    with driver_with_nothing_known() as driver, FakeTensorMode() as fake:
        arguments = {
            name: fake.from_tensor(of) if isinstance(of, torch.Tensor) else of for name, of in make(case).items()
        }
        found = output_and_gradients(operations(case)[0], arguments, torch.ones(*case.tokens, case.out_features))
        assert not driver.launches and not driver.tapes
        expected = output_and_gradients(operations(case)[1], arguments, torch.ones(*case.tokens, case.out_features))
        assert {name: (of.shape, of.dtype) for name, of in found.items()} == {
            name: (of.shape, of.dtype) for name, of in expected.items()
        }
        if not case.on_base:
            layer = LoraArguments(**{name: of for name, of in arguments.items() if name != "x"})
            assert lora_linear_group(arguments["x"], [layer, layer]) is None


@pytest.mark.parametrize("name", VARIANTS | ON_BASE)
def test_what_differs_in_one_property_is_another_call(name):
    of = replace(MIXING, bias=True)
    if name in ON_BASE:
        of = replace(MIXING, on_base=True, wants=(*MIXING.wants, "base"))
    arguments = make(of)
    other = arguments | (VARIANTS | ON_BASE)[name](arguments)
    tensors = tensors_of(arguments, other)
    steps = [step_of(arguments, of), step_of(other, of)]
    with driver_with_nothing_known() as driver:
        expected = [expected_of(driver, step, tensors) for step in steps]
        assert expected[0] != expected[1]
        for i in (0, 0, 1, 0, 1, 1, 0):
            assert driver.run(steps[i], tensors) == expected[i]


def by_vmap(call):
    return torch.func.vmap(lambda _: call())(torch.zeros(1))[0]


def by_tracing(call):
    return torch.jit.trace(lambda _: call(), (torch.zeros(1),), check_trace=False)(torch.zeros(1))


def in_forward_mode(call):
    with forward_ad.dual_level():
        return call()


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("context", [by_vmap, by_tracing, in_forward_mode])
def test_where_only_the_definition_is_right_it_runs(context):
    arguments = make(replace(MIXING, wants=()))
    step, tensors = step_of(arguments), tensors_of(arguments)
    with driver_with_nothing_known() as driver:
        for _ in range(3):
            driver.run(step, tensors)
            assert driver.launches
        count = len(driver.launches)
        with mock.patch.object(torch.Tensor, "addmm_", side_effect=AssertionError("the operation runs")):
            y = context(lambda: lora.lora_linear(**arguments))
        assert len(driver.launches) == count
    torch.testing.assert_close(y, reference.lora_linear(**arguments))


def test_an_input_that_is_no_matrix_is_copied_each_time():
    """Its rows have no one stride: the launches read a copy, whose address is another in each call."""
    arguments = make(MIXING)
    arguments["x"] = torch.randn(70, 2, 48).transpose(0, 1)[:, :, :48].requires_grad_()
    arguments["initial_residual"] = torch.randn(2, 70, 48)
    with driver_with_nothing_known() as driver:
        step, tensors = step_of(arguments), tensors_of(arguments)
        expected = expected_of(driver, step, tensors)
        (first, _), *_ = expected[0][0][-1]
        assert first.startswith("new")
        for _ in range(3):
            assert driver.run(step, tensors) == expected


def test_one_tensor_in_two_places_here_is_not_taken_for_one_elsewhere():
    arguments = make(MIXING)
    as_one = arguments | {"initial_residual": arguments["x"].detach()}
    as_one["x"] = as_one["initial_residual"]
    of_two = arguments | {"x": arguments["x"].detach()}
    with driver_with_nothing_known() as driver:
        expected = [expected_of(driver, step_of(of), tensors_of(of)) for of in (as_one, of_two)]
        for of, wanted in ((as_one, 0), (of_two, 1), (as_one, 0), (of_two, 1), (of_two, 1), (as_one, 0)):
            assert driver.run(step_of(of), tensors_of(of)) == expected[wanted]
        forget_launches()
        driver.run(step_of(arguments), tensors_of(arguments))  # records the launches, for another call
        for of, wanted in ((as_one, 0), (of_two, 1), (as_one, 0), (of_two, 1)):
            assert driver.run(step_of(of), tensors_of(of)) == expected[wanted]


def test_a_known_call_is_differentiated_once_and_watches_what_it_keeps():
    arguments = make(MIXING)
    with driver_with_nothing_known() as driver:
        for _ in range(3):
            driver.run(step_of(arguments), tensors_of(arguments))
        y = lora.lora_linear(**arguments)
        (dx,) = torch.autograd.grad(y, arguments["x"], torch.ones_like(y), create_graph=True)
        with pytest.raises(RuntimeError, match="A SIBO-LoRA layer was differentiated twice"):
            dx.sum().backward()
        y = lora.lora_linear(**arguments)
        arguments["lora_b"].data, version = arguments["lora_b"].data, arguments["lora_b"]._version
        with torch.no_grad():
            arguments["lora_b"].mul_(2)
        assert arguments["lora_b"]._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("name", ["x", "initial_residual"])
def test_a_tensor_that_is_negated_when_read_is_written_negated_first(name):
    arguments = make(MIXING)
    with driver_with_nothing_known() as driver:
        for _ in range(3):
            driver.run(step_of(arguments), tensors_of(arguments))
        assert f"{name} 0" in str(driver.launches)
        lazy = arguments | {name: torch._neg_view(-arguments[name].detach()).requires_grad_()}
        assert lazy[name].stride() == arguments[name].stride()
        for _ in range(3):
            driver.run(step_of(lazy), tensors_of(lazy))
            assert driver.launches and f"{name} 0" not in str(driver.launches)


def test_errors_backends_and_autocast_are_those_of_the_long_path(monkeypatch):
    arguments = make(MIXING)
    with driver_with_nothing_known() as driver:
        for _ in range(3):
            driver.run(step_of(arguments), tensors_of(arguments))
        with pytest.raises(ValueError, match="lambda_ is 1.3"):
            lora.lora_linear(**arguments | {"lambda_": 1.3})
        with pytest.raises(ValueError, match="weight has shape"):
            lora.lora_linear(**arguments | {"weight": arguments["weight"][1:]})
        with torch.autocast("cpu", torch.bfloat16):  # of a known one y would be float32
            assert lora.lora_linear(**arguments).dtype == torch.bfloat16
        with monkeypatch.context() as patch:
            patch.setattr(launching, "_DIRECT", False)
            driver.run(step_of(arguments), tensors_of(arguments))
            assert driver.tapes == 0
        kept = dict(known_calls.implementation("triton").calls._kept)
        assert kept
    known_calls.implementation("triton").calls._kept.update(kept)
    try:  # no driver stands in any more: the backend is chosen anew
        torch.testing.assert_close(lora.lora_linear(**arguments), reference.lora_linear(**arguments))
    finally:
        forget_launches()


def test_the_precision_of_float32_products_is_looked_at_in_each_call():
    arguments = make(MIXING)
    step, tensors = step_of(arguments), tensors_of(arguments)
    before = torch.get_float32_matmul_precision()
    try:
        with driver_with_nothing_known() as driver:
            expected = {}
            for precision in ("highest", "high"):
                torch.set_float32_matmul_precision(precision)
                expected[precision] = expected_of(driver, step, tensors)
            assert expected["highest"] != expected["high"]
            for precision in ("highest", "highest", "high", "highest", "high", "high"):
                torch.set_float32_matmul_precision(precision)
                assert driver.run(step, tensors) == expected[precision]
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("packed_first", [False, True])
def test_what_is_kept_may_come_back_in_another_form(packed_first):
    """Hooks on saved tensors (offloading to the CPU) pack a strided x without its gaps."""
    arguments = make(MIXING)
    arguments["x"] = torch.randn(2, 70, 96)[..., :48].requires_grad_()
    step, tensors = step_of(arguments), tensors_of(arguments)

    def packed():
        def pack(tensor):
            return tensor.clone(memory_format=torch.contiguous_format)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return step()

    def forms(found):
        """Of launches, what is no address: copies have any."""
        return [[of for of in launch[-1] if of[0] is int] for launch in found[0] if launch[0] != ("addmm_",)]

    with driver_with_nothing_known() as driver:
        order = [packed, step] if packed_first else [step, packed]
        expected = {each: forms(expected_of(driver, each, tensors)) for each in order}
        assert expected[step] != expected[packed]
        for each in (order[0], order[0], *order, *order, *order[::-1]):
            assert forms(driver.run(each, tensors)) == expected[each]


def test_a_call_that_goes_the_long_path_leaves_what_is_known():
    """Pointers that are not aligned have other binaries; and what never repeats is not looked at each time."""
    arguments = make(MIXING)
    x = arguments["x"].detach()
    shifted = arguments | {"x": torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x).requires_grad_()}
    with driver_with_nothing_known() as driver:
        for of in (arguments, arguments, shifted, arguments, shifted):
            driver.run(step_of(of), tensors_of(of))
        with the_long_path_is_closed():
            driver.run(step_of(arguments), tensors_of(arguments))
        never = make(replace(MIXING, lora_bias=True, wants=("lora_bias",)))
        driver.run(step_of(never), tensors_of(never))
        with mock.patch.object(known_calls, "remember", side_effect=AssertionError("it is known never to repeat")):
            driver.run(step_of(never), tensors_of(never))


def test_numbers_are_those_of_the_long_path():
    arguments = make(MIXING)
    with driver_with_nothing_known():
        for _ in range(2):
            lora.lora_linear(**arguments)
        count = len(known_calls.implementation("triton").calls._kept)
        lora.lora_linear(**arguments | {"scaling": np.array(1.5)})
        lora.lora_linear(**arguments | {"scaling": float("nan")})
        assert len(known_calls.implementation("triton").calls._kept) == count
        layers = arguments_of(make_group([MIXING] * 2))
        for _ in range(2):
            lora.lora_linear_group(arguments["x"], layers)
        with the_long_path_is_closed():
            lora.lora_linear_group(arguments["x"], layers)
