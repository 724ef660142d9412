"""The bottleneck operation on the CPU: values and gradients, and what an operation of torch is expected to stand."""

import dataclasses
import gc

import pytest
import torch
from bottleneck_cases import (
    BOTTLENECK_CASES,
    WANTABLE,
    BottleneckCase,
    assert_as_good_as_the_definition,
    assert_beside_a_linear_as_good_as_the_definition,
    assert_pair_as_good_as_the_definition,
    make,
    name_of,
    wanted_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BF16, FP32, FP64, Allocations
from test_ops import assert_passes_opcheck, saved_storages
from torch.utils.checkpoint import checkpoint

from sibo_triton import reference
from sibo_triton.ops import BACKEND_VARIABLE, add_bottleneck
from sibo_triton.reference import ACTIVATIONS


@pytest.mark.parametrize("case", BOTTLENECK_CASES, ids=name_of)
def test_values_and_gradients_are_as_good_as_the_definitions(case):
    assert_as_good_as_the_definition(case)


@pytest.mark.parametrize("case", BOTTLENECK_CASES, ids=name_of)
def test_float64_gives_the_definition(case):
    """Where no rounding hides anything."""
    assert_as_good_as_the_definition(dataclasses.replace(case, dtype=FP64, adapter_dtype=None))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple),
    sizes=st.tuples(st.integers(1, 40), st.none() | st.integers(1, 40), st.integers(1, 20)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    wants=st.sets(st.sampled_from(WANTABLE)).map(tuple),
    mixes=st.sampled_from(["no", "number", "tensor", "learnable"]),
    scaling=st.sampled_from(["number", "learnable"]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    biases=st.booleans(),
)
def test_any_shape_and_any_gradients_that_are_wanted(tokens, sizes, activation, wants, **options):
    assert_as_good_as_the_definition(BottleneckCase(tokens, *sizes, activation, FP64, wants=wants, **options))


@pytest.mark.parametrize("out_features", [None, 4])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradcheck(activation, out_features):
    case = BottleneckCase(
        (3,), 5, out_features, 2, activation, FP64, None, "learnable", "learnable", 0.3, wants=WANTABLE
    )
    arguments = make(case)
    for name in ("lambda_", "scaling"):
        arguments[name] = arguments[name].detach().double().requires_grad_()
    names = list(wanted_of(arguments))
    assert len(names) == (8 if out_features is None else 9)

    def of_tensors(*tensors):
        changed = arguments | dict(zip(names, tensors, strict=True))
        if out_features is None:
            changed["base"] = changed["x"]
        return add_bottleneck(**changed)

    assert torch.autograd.gradcheck(of_tensors, [arguments[name] for name in names])


def test_a_scaling_of_zero_learns():
    """Its gradient is not taken from what it has multiplied."""
    arguments = make(BottleneckCase(dtype=FP64, scaling="learnable", wants=WANTABLE))
    arguments["scaling"] = torch.zeros(1, requires_grad=True)
    gradients = []
    for operation in (add_bottleneck, reference.add_bottleneck):
        gradients.append(torch.autograd.grad(operation(**arguments).square().sum(), arguments["scaling"])[0])
    assert gradients[0].abs() > 1
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("case", [case for case in BOTTLENECK_CASES if case.out_features], ids=name_of)
@pytest.mark.parametrize("wide", [True, False])
def test_beside_a_linear_it_is_as_good_as_the_definition(case, wide):
    case = dataclasses.replace(case, dtype=FP64, adapter_dtype=None) if wide else case
    assert_beside_a_linear_as_good_as_the_definition(case)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(FP64, FP64), (FP32, FP32), (BF16, FP32), (BF16, BF16)])
@pytest.mark.parametrize("in_series", [True, False])
def test_two_that_share_x_are_as_good_as_the_definition(in_series, dtype, adapter_dtype):
    assert_pair_as_good_as_the_definition(in_series, dtype, adapter_dtype)


# --- What an operation of torch stands


def test_strided_and_expanded_inputs_and_gradients():
    arguments = make(BottleneckCase((4, 6), dtype=FP64, mixes="learnable", wants=WANTABLE))
    plain = add_bottleneck(**arguments)
    x = arguments["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    down_weight = arguments["down_weight"].detach().t().contiguous().t().requires_grad_()
    assert not x.is_contiguous() and not down_weight.is_contiguous()
    strided = arguments | {"base": x, "x": x, "down_weight": down_weight}
    torch.testing.assert_close(add_bottleneck(**strided), plain, atol=1e-12, rtol=0)
    strided["initial_residual"] = arguments["initial_residual"].detach()[:1].expand(4, 6, 48).requires_grad_()
    names = ("x", "down_weight", "up_weight", "initial_residual")
    found, expected = (
        torch.autograd.grad(operation(**strided).sum(), [strided[name] for name in names])  # an expanded gradient
        for operation in (add_bottleneck, reference.add_bottleneck)
    )
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


def test_y_may_be_written_into_and_what_was_given_is_left_alone():
    arguments = make(BottleneckCase(wants=("x",)))
    before = arguments["x"].detach().clone()
    y = add_bottleneck(**arguments)
    assert y.is_contiguous() and not y._is_view() and y.data_ptr() != arguments["x"].data_ptr()
    found, expected = (
        torch.autograd.grad(each.sum(), arguments["x"])[0]
        for each in (y.mul_(2.0), reference.add_bottleneck(**arguments) * 2)
    )
    torch.testing.assert_close(found, expected)
    assert torch.equal(arguments["x"], before)


def test_the_incoming_gradient_is_left_alone():
    arguments = make(BottleneckCase(wants=WANTABLE))
    grad_y = torch.randn(2, 9, 48)
    before = grad_y.clone()
    add_bottleneck(**arguments).backward(grad_y)
    assert torch.equal(grad_y, before)


def test_a_graph_can_be_kept_and_gone_through_again():
    arguments = make(BottleneckCase(mixes="learnable", scaling="learnable", dropout_p=0.3, wants=WANTABLE))
    tensors = list(wanted_of(arguments).values())
    y = add_bottleneck(**arguments)
    first, second = (torch.autograd.grad(y.square().sum(), tensors, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("out_features", [None, 40])
def test_a_second_derivative_is_refused_by_name(out_features):
    """Also where the incoming gradient is a constant, and only the branch's own tensors have a second one."""
    arguments = make(BottleneckCase(out_features=out_features, dtype=FP64, mixes="learnable", wants=WANTABLE))
    for loss in (torch.sum, lambda y: y.square().sum()):
        (dx,) = torch.autograd.grad(loss(add_bottleneck(**arguments)), arguments["x"], create_graph=True)
        (expected,) = torch.autograd.grad(loss(reference.add_bottleneck(**arguments)), arguments["x"])
        torch.testing.assert_close(dx, expected, atol=1e-11, rtol=0)
        with pytest.raises(RuntimeError, match="A bottleneck adapter was differentiated twice.*=reference"):
            dx.square().sum().backward()


def test_the_reference_backend_differentiates_twice(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    arguments = make(BottleneckCase(dtype=FP64, wants=WANTABLE))
    (dx,) = torch.autograd.grad(add_bottleneck(**arguments).square().sum(), arguments["x"], create_graph=True)
    dx.square().sum().backward()
    assert arguments["down_weight"].grad.abs().sum() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_again(use_reentrant):
    arguments = make(BottleneckCase(dtype=FP64, mixes="learnable", scaling="learnable", wants=WANTABLE))
    tensors = list(wanted_of(arguments).values())

    def layer(x):
        changes = {"base": x, "x": x, "dropout_p": 0.4, "dropout_seed": reference.draw_seed()}
        return add_bottleneck(**arguments | changes)

    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(7)
        y = run(arguments["x"])
        torch.rand(3)  # the generator moves on
        y.square().sum().backward()
        results.append([y, *(tensor.grad for tensor in tensors)])
        for tensor in tensors:
            tensor.grad = None
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)  # BLAS may round by the memory's alignment


@pytest.mark.parametrize("out_features", [None, 40])
def test_autocast_computes_in_its_dtype(out_features):
    """As PEFT's modules under autocast do: an error no larger, float32 gradients."""
    case = BottleneckCase((6, 20), 48, out_features, mixes="learnable", dropout_p=0.2, wants=WANTABLE)
    arguments = make(case)
    wanted = wanted_of(arguments)
    grad_y = torch.randn(6, 20, out_features or 48)

    def run(function, enabled):
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            y = function(**arguments)
        return [y.detach(), *torch.autograd.grad(y, list(wanted.values()), grad_y)]

    exact = run(reference.add_bottleneck, False)
    by_definition, found = (run(function, True) for function in (reference.add_bottleneck, add_bottleneck))
    for name, truth, other, own in zip(("y", *wanted), exact, by_definition, found, strict=True):
        assert own.dtype == other.dtype == FP32, name
        error, allowed = (float((each - truth).norm() / truth.norm()) for each in (own, other))
        # the gradient of lambda is one number, in which roundings may cancel
        assert error <= 1.2 * allowed + (1e-2 if name == "lambda_" else 1e-4), name
    assert (found[0] - exact[0]).norm() > 1e-4 * exact[0].norm()  # it did round


@pytest.mark.parametrize(("backend", "dropout_p"), [("aot_eager", 0.0), ("inductor", 0.3)])
def test_compiles_into_one_graph(backend, dropout_p):
    """With the mask of eager code, which a wrap-around of integers must not change."""
    arguments = make(BottleneckCase((3, 40), mixes="learnable", scaling="learnable", dropout_p=dropout_p))
    tensors = list(wanted_of(arguments).values())
    functions = (add_bottleneck, torch.compile(add_bottleneck, fullgraph=True, backend=backend))
    eager, compiled = (
        (y, *torch.autograd.grad(y.square().sum(), tensors)) for y in (f(**arguments) for f in functions)
    )
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        BottleneckCase(dtype=FP64, mixes="learnable", scaling="learnable", dropout_p=0.3, wants=WANTABLE),
        BottleneckCase(dtype=BF16, activation="gelu", out_features=12, mixes="tensor", wants=WANTABLE),
        BottleneckCase(dtype=BF16, adapter_dtype=FP32, biases=False, wants=("up_weight",)),
    ],
    ids=name_of,
)
def test_the_registered_operator_passes_opcheck(case):
    assert_passes_opcheck(lambda: add_bottleneck(**make(case)))


def test_func_transforms_take_the_definition():
    arguments = make(BottleneckCase(dtype=FP64, wants=("up_weight",)))

    def loss(up_weight):
        return add_bottleneck(**arguments | {"up_weight": up_weight}).square().sum()

    found = torch.func.grad(loss)(arguments["up_weight"].detach())
    (expected,) = torch.autograd.grad(loss(arguments["up_weight"]), arguments["up_weight"])
    torch.testing.assert_close(found, expected)


# --- What is kept for the backward


@pytest.mark.parametrize("out_features", [None, 128])
@pytest.mark.parametrize("mixes", ["no", "tensor", "learnable"])
@pytest.mark.parametrize("adapter_dtype", [BF16, FP32])
def test_kept_are_x_and_h0_themselves_and_what_has_the_size_of_the_bottleneck(adapter_dtype, mixes, out_features):
    case = BottleneckCase((40, 8), 256, out_features, 4, "tanh", BF16, adapter_dtype, mixes, "learnable", 0.05)
    arguments = make(case)
    given = {value.untyped_storage().data_ptr() for value in arguments.values() if isinstance(value, torch.Tensor)}
    _, storages = saved_storages(lambda: add_bottleneck(**arguments))
    kept = sum(size for address, size in storages.items() if address not in given)
    assert kept == 40 * 8 * 4 * adapter_dtype.itemsize * (2 if mixes == "learnable" else 1)  # p, and d
    assert arguments["x"].untyped_storage().data_ptr() in storages


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
def test_nothing_else_outlives_the_call(dropout_p):
    """By the storages that are alive, not by what autograd was told to save."""
    case = BottleneckCase((40, 8), 256, None, 4, "gelu", BF16, FP32, "learnable", "learnable", dropout_p)
    arguments = make(case)
    given = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    with Allocations() as allocations:
        y = add_bottleneck(**arguments)
    assert allocations.alive(beside=[*given, y]) == 40 * 8 * 4 * 4 * 2
    y.sum().backward()
    del y
    gc.collect()
    assert allocations.alive(beside=given) == 0


# --- What is refused


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"base has shape \[2, 8, 48\] and x \[2, 9, 48\]", {"base": torch.zeros(2, 8, 48)}),
        (r"down_weight has shape \[8, 47\], but \[bottleneck, 48\] fits x", {"down_weight": torch.zeros(8, 47)}),
        (r"up_weight has shape \[47, 8\], but \[48, 8\] fits", {"up_weight": torch.zeros(47, 8)}),
        ("down_weight is torch.float32 and up_weight torch.bfloat16", {"up_weight": torch.zeros(48, 8, dtype=BF16)}),
        (r"down_bias has shape \[9\], but \[8\] fits", {"down_bias": torch.zeros(9)}),
        (r"up_bias is torch.bfloat16 and down_weight torch.float32", {"up_bias": torch.zeros(48, dtype=BF16)}),
        ("initial_residual is None, but lambda_ is", {"initial_residual": None}),
        (r"initial_residual has shape \[9, 48\]", {"initial_residual": torch.zeros(9, 48)}),
        ("lambda_ is 1.5: it must lie in", {"lambda_": 1.5}),
        ("dropout_p is 1.0: it must lie in", {"dropout_p": 1.0}),
        ("dropout_p is 0.5, but no seed was given", {"dropout_p": 0.5, "dropout_seed": None}),
        (r"scaling has shape \[2\]: pass a number or one", {"scaling": torch.ones(2)}),
        ("activation='mish' is not known: choose one of gelu", {"activation": "mish"}),
    ],
)
def test_wrong_arguments_are_named(message, arguments):
    with pytest.raises(ValueError, match=message):
        add_bottleneck(**make(BottleneckCase()) | arguments)
