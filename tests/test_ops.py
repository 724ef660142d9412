"""The operations on the CPU: values and gradients, and all that an operation of torch is expected to stand."""

import dataclasses
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    BF16,
    CASES,
    FP32,
    FP64,
    WANTABLE,
    Allocations,
    OpCase,
    assert_as_good_as_the_definition,
    in_dtype,
    make,
    name_of,
    operations,
    saved_storages,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from sibo_triton import reference
from sibo_triton.ops import BACKEND_VARIABLE, Choice, add_lora, backend_for, dispatch, lora_linear, small


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_values_and_gradients_are_as_good_as_the_definitions(case):
    assert_as_good_as_the_definition(case)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_float64_gives_the_definition(case):
    """Where no rounding hides anything."""
    assert_as_good_as_the_definition(dataclasses.replace(case, dtype=FP64, adapter_dtype=None))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20)),
    wants=st.sets(st.sampled_from(WANTABLE)).map(tuple),
    mixes=st.sampled_from(["no", "number", "tensor", "learnable"]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    biases=st.tuples(st.booleans(), st.booleans()),
    on_base=st.booleans(),
)
def test_any_shape_and_any_gradients_that_are_wanted(tokens, sizes, wants, mixes, dropout_p, biases, on_base):
    k, n, r = sizes
    rest = {"mixes": mixes, "dropout_p": dropout_p, "bias": biases[0], "lora_bias": biases[1], "on_base": on_base}
    assert_as_good_as_the_definition(OpCase(tokens, k, n, r, FP64, wants=wants, **rest))


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p, on_base):
    case = OpCase((3,), 5, 4, 2, FP64, mixes="learnable", dropout_p=dropout_p, bias=True, lora_bias=True)
    case = dataclasses.replace(case, on_base=on_base, wants=WANTABLE)
    operation, _ = operations(case)
    arguments = make(case)
    arguments["lambda_"] = torch.tensor([0.3], dtype=FP64, requires_grad=True)
    names = [name for name, value in arguments.items() if getattr(value, "requires_grad", False)]
    assert len(names) == (7 if on_base else 8)

    def of_tensors(*tensors):
        return operation(**arguments | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(of_tensors, [arguments[name] for name in names])


# --- Few elements, on a CPU


@pytest.fixture
def small_layers(monkeypatch):
    """What a user's small layers run."""
    calls = []
    original = small.low_rank
    monkeypatch.setattr(small, "low_rank", lambda *arguments: calls.append(1) or original(*arguments))
    monkeypatch.setattr(small, "ELEMENTS", 2**20)
    return calls


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_small_layers_are_as_good_as_the_definition(case, small_layers):
    assert_as_good_as_the_definition(case)
    assert_as_good_as_the_definition(dataclasses.replace(case, dtype=FP64, adapter_dtype=None))
    assert len(small_layers) == 2


@pytest.mark.parametrize("on_base", [False, True])
def test_small_layers_under_autocast_round_as_the_definition_does(on_base, small_layers):
    arguments = make(OpCase(mixes="learnable", dropout_p=0.3, bias=True, on_base=on_base))
    operation, definition = operations(OpCase(on_base=on_base))
    with torch.autocast("cpu", dtype=BF16):
        found, expected = operation(**arguments), definition(**arguments)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    assert small_layers


# --- What an operation of torch stands


def test_strided_and_expanded_inputs_and_gradients():
    case = OpCase((4, 6), dtype=FP64, mixes="learnable", bias=True, wants=WANTABLE)
    arguments = make(case)
    plain = lora_linear(**arguments)
    x = arguments["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weight = arguments["weight"].detach().t().contiguous().t().requires_grad_()
    h0 = arguments["initial_residual"].detach()[:1].expand(4, 6, 48).requires_grad_()
    assert not x.is_contiguous() and not weight.is_contiguous() and not h0.is_contiguous()
    strided = arguments | {"x": x, "weight": weight}
    torch.testing.assert_close(lora_linear(**strided), plain, atol=1e-12, rtol=0)
    strided["initial_residual"] = h0
    names = ("x", "weight", "initial_residual", "lora_a")
    found, expected = (
        torch.autograd.grad(operation(**strided).sum(), [strided[name] for name in names])  # an expanded gradient
        for operation in (lora_linear, reference.lora_linear)
    )
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("elements", [-1, 2**20])
def test_what_is_made_without_gradients_may_be_written_into_with_them(elements, monkeypatch):
    monkeypatch.setattr(small, "ELEMENTS", elements)
    x, weight, lora_a, lora_b = (torch.randn(shape) for shape in ((2, 3, 8), (4, 8), (2, 8), (4, 2)))
    with torch.no_grad():
        y = lora_linear(x, weight, None, lora_a, lora_b, 1.0)
    y.mul_(torch.ones(4, requires_grad=True)).sum().backward()


def test_y_may_be_written_into():
    """As models do to q: y is no view to autograd."""
    arguments = make(OpCase(wants=("x",)))
    y = lora_linear(**arguments)
    assert y.is_contiguous() and not y._is_view()
    scaled = y.mul_(2.0)
    expected = reference.lora_linear(**arguments) * 2
    found, wanted = (torch.autograd.grad(each.sum(), arguments["x"])[0] for each in (scaled, expected))
    torch.testing.assert_close(found, wanted)


def test_the_base_output_is_left_alone():
    arguments = make(OpCase(on_base=True, wants=("lora_b",)))
    before = arguments["base"].clone()
    y = add_lora(**arguments)
    assert torch.equal(arguments["base"], before) and y.data_ptr() != arguments["base"].data_ptr()


def test_a_graph_can_be_kept_and_gone_through_again():
    arguments = make(OpCase(mixes="learnable", dropout_p=0.3, bias=True, wants=WANTABLE))
    tensors = [value for value in arguments.values() if getattr(value, "requires_grad", False)]
    y = lora_linear(**arguments)
    first, second = (torch.autograd.grad(y.square().sum(), tensors, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("on_base", [False, True])
def test_a_second_derivative_is_refused_by_name(on_base):
    """Also where the incoming gradient is a constant, and only the layer's own tensors have a second one."""
    case = OpCase(dtype=FP64, mixes="learnable", on_base=on_base, wants=WANTABLE)
    operation, definition = operations(case)
    arguments = make(case)
    for loss in (torch.sum, lambda y: y.square().sum()):
        (dx,) = torch.autograd.grad(loss(operation(**arguments)), arguments["x"], create_graph=True)
        (expected,) = torch.autograd.grad(loss(definition(**arguments)), arguments["x"])
        torch.testing.assert_close(dx, expected, atol=1e-11, rtol=0)
        with pytest.raises(RuntimeError, match="differentiated twice.*SIBO_TRITON_BACKEND=reference"):
            dx.square().sum().backward()


def test_the_reference_backend_differentiates_twice(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    arguments = make(OpCase(dtype=FP64, wants=WANTABLE))
    (dx,) = torch.autograd.grad(lora_linear(**arguments).square().sum(), arguments["x"], create_graph=True)
    dx.square().sum().backward()
    assert arguments["lora_a"].grad.abs().sum() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_again(use_reentrant):
    arguments = make(OpCase(dtype=FP64, mixes="learnable", wants=WANTABLE))
    tensors = [value for value in arguments.values() if getattr(value, "requires_grad", False)]

    def layer(x):
        return lora_linear(**arguments | {"x": x, "dropout_p": 0.4, "dropout_seed": reference.draw_seed()})

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


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("on_base", [False, True])
def test_autocast_computes_in_its_dtype(on_base, dropout_p):
    """As PEFT's modules under autocast do: the same output dtype, an error no larger, float32 gradients."""
    case = OpCase((6, 20), dropout_p=dropout_p, mixes="learnable", bias=True, on_base=on_base, wants=WANTABLE)
    operation, definition = operations(case)
    arguments = make(case)
    names = [name for name, value in arguments.items() if getattr(value, "requires_grad", False)]
    grad_y = torch.randn(6, 20, 40)

    def run(function, enabled):
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            y = function(**arguments)
        return [y.detach(), *torch.autograd.grad(y, [arguments[name] for name in names], grad_y.to(y.dtype))]

    exact, by_definition, found = run(definition, False), run(definition, True), run(operation, True)
    assert found[0].dtype == by_definition[0].dtype == (FP32 if on_base else BF16)
    for name, truth, other, own in zip(("y", *names), exact, by_definition, found, strict=True):
        assert own.dtype == other.dtype, name
        error, allowed = (float((each.float() - truth).norm() / truth.norm()) for each in (own, other))
        # the gradient of lambda is one number, in which roundings may cancel
        assert error <= 1.2 * allowed + (1e-2 if name == "lambda_" else 1e-4), name
    assert (found[0].float() - exact[0]).norm() > 1e-4 * exact[0].norm()  # it did round


def test_functional_call_and_func_transforms():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.arguments = make(OpCase(dtype=FP64, wants=()))
            self.lora_a, self.lora_b = (nn.Parameter(self.arguments.pop(name)) for name in ("lora_a", "lora_b"))

        def forward(self, operation=lora_linear):
            return operation(**self.arguments, lora_a=self.lora_a, lora_b=self.lora_b).square().sum()

    layer = Layer()
    parameters = {name: (2 * p).detach().requires_grad_() for name, p in layer.named_parameters()}
    loss = torch.func.functional_call(layer, parameters)
    found = torch.autograd.grad(loss, list(parameters.values()))
    expected = torch.autograd.grad(
        torch.func.functional_call(layer, parameters, kwargs={"operation": reference.lora_linear}),
        list(parameters.values()),
    )
    torch.testing.assert_close(found, expected)
    by_transform = torch.func.grad(lambda p: torch.func.functional_call(layer, p))(
        {name: p.detach() for name, p in parameters.items()}
    )
    torch.testing.assert_close(tuple(by_transform.values()), expected)


def test_a_scaling_in_a_tensor_is_not_rounded_with_t():
    """0.3 in bfloat16 is 0.3008: an error of one sign in every element."""
    arguments = make(OpCase((70,), 256, 128, 4, BF16, mixes="no"))
    arguments |= {"scaling": torch.tensor([0.3]), "weight": torch.zeros(128, 256, dtype=BF16), "bias": None}
    found, exact = (lora_linear(**given).double() for given in (arguments, in_dtype(arguments, FP64)))
    assert abs(float((found * exact).sum() / exact.square().sum()) - 1) < 5e-4


# --- torch.compile


COMPILED = [
    OpCase(dtype=FP64, mixes="learnable", dropout_p=0.3, bias=True, lora_bias=True, wants=WANTABLE),
    OpCase(dtype=FP64, mixes="no", wants=("lora_b",)),
    OpCase(dtype=FP64, mixes="number", on_base=True, lora_bias=True, wants=WANTABLE),
    OpCase(dtype=BF16, adapter_dtype=FP32, mixes="tensor", wants=WANTABLE),
    OpCase(dtype=BF16, mixes="learnable", wants=WANTABLE),
]


@pytest.mark.parametrize("case", COMPILED, ids=name_of)
def test_compiles_into_one_graph(case):
    operation, _ = operations(case)
    arguments = make(case)
    tensors = [value for value in arguments.values() if getattr(value, "requires_grad", False)]
    eager, compiled = (
        (y, *torch.autograd.grad(y.square().sum(), tensors))
        for y in (f(**arguments) for f in (operation, torch.compile(operation, fullgraph=True, backend="aot_eager")))
    )
    torch.testing.assert_close(compiled, eager, atol=0, rtol=0 if case.dtype != BF16 else 1e-2)


@pytest.mark.parametrize("case", COMPILED, ids=name_of)
def test_registered_operators_pass_opcheck(case):
    assert_passes_opcheck(lambda: operations(case)[0](**make(case)))


def assert_passes_opcheck(run):
    """The registered operator, with the arguments that it gets where `run` is compiled."""
    from sibo_triton.ops import registered

    calls = []
    record = lambda *arguments: calls.append(arguments) or original(*arguments)  # noqa: E731
    original, registered._forward = registered._forward, record
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            run()
    finally:
        registered._forward = original
    (arguments,) = calls
    assert set(torch.library.opcheck(original, arguments).values()) == {"SUCCESS"}


# --- What is kept for the backward


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("mixes", ["no", "tensor", "learnable"])
@pytest.mark.parametrize("adapter_dtype", [BF16, FP32])
def test_kept_are_x_and_h0_themselves_and_what_has_the_size_of_the_rank(adapter_dtype, mixes, on_base):
    case = OpCase((40, 8), 256, 128, 4, BF16, adapter_dtype, mixes, 0.05, on_base=on_base)
    arguments = make(case)
    given = {value.untyped_storage().data_ptr() for value in arguments.values() if isinstance(value, torch.Tensor)}
    operation, _ = operations(case)
    _, storages = saved_storages(lambda: operation(**arguments))
    kept = sum(size for address, size in storages.items() if address not in given)
    rank_sized = 40 * 8 * 4 * adapter_dtype.itemsize  # t, in the dtype that x and A share
    assert kept == rank_sized * (2 if mixes == "learnable" else 1)
    assert arguments["x"].untyped_storage().data_ptr() in storages


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("mixes", ["tensor", "learnable"])
def test_nothing_else_outlives_the_call(mixes, dropout_p):
    """By the storages that are alive, not by what autograd was told to save."""
    arguments = make(OpCase((40, 8), 256, 128, 4, BF16, FP32, mixes, dropout_p))
    given = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    with Allocations() as allocations:
        y = lora_linear(**arguments)
    rank_sized = 40 * 8 * 4 * 4
    assert allocations.alive(beside=[*given, y]) == rank_sized * (2 if mixes == "learnable" else 1)
    y.sum().backward()
    del y
    gc.collect()
    assert allocations.alive(beside=given) == 0


# --- The choice of what computes


def test_the_backend_is_chosen_in_one_place_and_said(monkeypatch):
    cpu = torch.device("cpu")
    choice = backend_for(cpu, [FP32])
    assert choice.name == "torch" and "cpu" in choice.reason and not choice.fell_off
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert backend_for(cpu, [FP32]).name == "reference"
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="SIBO_TRITON_BACKEND=triton, but the tensors are on cpu"):
        lora_linear(**make(OpCase()))
    monkeypatch.setenv(BACKEND_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="'cuda' is no backend: set it to one of auto, triton, torch, reference"):
        lora_linear(**make(OpCase()))


def test_on_a_gpu_without_the_kernels_the_reason_is_said_once(monkeypatch):
    monkeypatch.setattr("sibo_triton.ops.low_rank.backend_for", lambda *_: Choice("torch", "triton is not there", True))
    with pytest.warns(UserWarning, match="plain PyTorch on this GPU .* because triton is not there") as record:
        for _ in range(3):
            lora_linear(**make(OpCase()))
    assert len(record) == 1


def test_what_stands_between_a_gpu_and_the_kernels(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    dispatch._choose.cache_clear()
    old = backend_for(gpu, [FP32])
    assert (old.name, old.fell_off) == ("torch", True) and "T4 has compute capability 7.5" in old.reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    dispatch._choose.cache_clear()
    assert backend_for(gpu, [BF16, FP32]).name == "triton"
    wide = backend_for(gpu, [FP32, FP64])
    assert (wide.name, wide.fell_off) == ("torch", True) and "do not take torch.float64" in wide.reason
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: None)
    dispatch._choose.cache_clear()
    assert "triton is not installed" in backend_for(gpu, [FP32]).reason
    dispatch._choose.cache_clear()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"weight has shape \[40, 47\], but \[40, 48\] fits", {"weight": torch.zeros(40, 47)}),
        (ValueError, r"x is torch.float32 and weight torch.bfloat16", {"weight": torch.zeros(40, 48, dtype=BF16)}),
        (ValueError, r"lora_a has shape \[4, 3\], but \[r, 48\] fits x", {"lora_a": torch.zeros(4, 3)}),
        (ValueError, r"lora_b has shape \[40, 3\], but \[N, 4\] fits lora_a", {"lora_b": torch.zeros(40, 3)}),
        (ValueError, "lora_a is torch.float32 and lora_b torch.bfloat16", {"lora_b": torch.zeros(40, 4, dtype=BF16)}),
        (ValueError, "initial_residual is None, but lambda_ is", {"initial_residual": None}),
        (ValueError, r"initial_residual has shape \[9, 48\]", {"initial_residual": torch.zeros(9, 48)}),
        (ValueError, "lambda_ is 1.5: it must lie in", {"lambda_": 1.5}),
        (ValueError, "dropout_p is 1.0: it must lie in", {"dropout_p": 1.0}),
        (ValueError, "dropout_p is 0.5, but no seed was given", {"dropout_p": 0.5, "dropout_seed": None}),
        (ValueError, r"lora_bias has shape \[4\], but \[40\] fits lora_b", {"lora_bias": torch.zeros(4)}),
        (ValueError, "scaling requires grad", {"scaling": torch.ones(1, requires_grad=True)}),
    ],
)
def test_wrong_arguments_are_named(error, message, arguments):
    with pytest.raises(error, match=message):
        lora_linear(**make(OpCase()) | arguments)
