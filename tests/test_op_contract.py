"""What users expect of an operation of torch, asked of every operation that an adapter runs as.

On the CPU in plain PyTorch; in the interpreter (`make test-interpreter`) and on a GPU (`make gpu`) by the kernels.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import bottleneck_cases
import op_cases
import pytest
import torch
from bottleneck_cases import BottleneckCase
from op_cases import BF16, FP32, FP64, Allocations, OpCase, saved_storages, trainable
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sibo_triton import reference
from sibo_triton.ops import BACKEND_VARIABLE, add_bottleneck, add_lora, backend_for, lora_linear, registered, small

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_KERNELS = backend_for(torch.device(DEVICE), (FP32,)).name == "triton"
#: The widest dtype, in which an operation and its definition differ by no more than this.
WIDEST, CLOSE = (FP32, 1e-4) if ON_KERNELS else (FP64, 1e-11)


@dataclass(frozen=True)
class Operation:
    """An operation, its definition, and the arguments of a case."""

    run: Callable[..., torch.Tensor]
    definition: Callable[..., torch.Tensor]
    arguments: Callable[..., dict[str, object]]
    down: str = "lora_a"
    up: str = "lora_b"
    autocast_dtype: torch.dtype = FP32  # of y


def of_lora(on_base):
    def arguments(tokens=(2, 9), k=48, n=40, rank=8, wants=op_cases.WANTABLE, biases=True, **options):
        options.pop("scaling", None)  # which does not learn
        rest = {"bias": biases, "lora_bias": biases, "on_base": on_base, "wants": wants}
        return op_cases.make(OpCase(tokens, k, n, rank, **rest, **options), DEVICE)

    return arguments


def of_bottleneck(in_series):
    def arguments(tokens=(2, 9), k=48, n=40, rank=8, wants=bottleneck_cases.WANTABLE, **options):
        case = BottleneckCase(tokens, k, None if in_series else n, rank, wants=wants, **options)
        made = bottleneck_cases.make(case, DEVICE)
        if in_series:
            del made["base"]
        return made

    return arguments


def in_series(operation):
    """x is the base too."""
    return lambda x, **rest: operation(base=x, x=x, **rest)


OF_BOTTLENECK = {"down": "down_weight", "up": "up_weight"}
OPERATIONS = {
    "lora_linear": Operation(lora_linear, reference.lora_linear, of_lora(False), autocast_dtype=BF16),
    "add_lora": Operation(add_lora, reference.add_lora, of_lora(True)),
    "bottleneck in series": Operation(
        in_series(add_bottleneck), in_series(reference.add_bottleneck), of_bottleneck(True), **OF_BOTTLENECK
    ),
    "bottleneck on a base": Operation(add_bottleneck, reference.add_bottleneck, of_bottleneck(False), **OF_BOTTLENECK),
}
ALL_LEARN = {"mixes": "learnable", "scaling": "learnable"}


@pytest.fixture(params=[*OPERATIONS, *([] if ON_KERNELS else ["lora_linear, few elements", "add_lora, few elements"])])
def of(request, monkeypatch):
    """Also of few elements, for which plain PyTorch takes a shorter way."""
    name, _, few = request.param.partition(", ")
    if few:
        monkeypatch.setattr(small, "ELEMENTS", 2**20)
    return OPERATIONS[name]


@pytest.fixture(params=OPERATIONS)
def of_many(request):
    return OPERATIONS[request.param]


def test_strided_and_expanded_inputs_and_gradients(of):
    arguments = of.arguments((4, 6), dtype=WIDEST, mixes="learnable")
    plain = of.run(**arguments)
    strided = dict(arguments)
    for name in {"x", "weight", of.down, of.up} & arguments.keys():
        strided[name] = arguments[name].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        assert not strided[name].is_contiguous()
    torch.testing.assert_close(of.run(**strided), plain, atol=CLOSE, rtol=0)
    strided["initial_residual"] = arguments["initial_residual"].detach()[:1].expand(4, 6, 48).requires_grad_()
    found, expected = (
        torch.autograd.grad(run(**strided).sum(), list(trainable(strided).values()))  # an expanded gradient
        for run in (of.run, of.definition)
    )
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=CLOSE)


def test_y_may_be_written_into_and_what_was_given_is_left_alone(of):
    """Models write into q: y is no view to autograd."""
    arguments = of.arguments(wants=("x",))
    given = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    before = {name: value.detach().clone() for name, value in given.items()}
    y = of.run(**arguments)
    assert y.is_contiguous() and not y._is_view()
    assert y.data_ptr() not in {value.data_ptr() for value in given.values()}
    scaled, expected = y.mul_(2.0), of.definition(**arguments) * 2
    torch.testing.assert_close(scaled, expected, atol=1e-4, rtol=1e-4)
    grad_y = torch.randn_like(y)
    kept = grad_y.clone()
    found, wanted = (torch.autograd.grad(each, arguments["x"], grad_y)[0] for each in (scaled, expected))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(grad_y, kept) and all(torch.equal(value, before[name]) for name, value in given.items())


def test_the_incoming_gradient_is_left_alone(of):
    y = of.run(**of.arguments())
    grad_y = torch.randn_like(y)
    before = grad_y.clone()
    y.backward(grad_y)
    assert torch.equal(grad_y, before)


def test_a_graph_can_be_kept_and_gone_through_again(of):
    arguments = of.arguments(dropout_p=0.3, **ALL_LEARN)
    tensors = list(trainable(arguments).values())
    y = of.run(**arguments)
    first, second = (torch.autograd.grad(y.square().sum(), tensors, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_second_derivative_is_refused_by_name(of_many):
    """Also where the incoming gradient is a constant, and only the adapter's own tensors have a second one."""
    arguments = of_many.arguments(dtype=WIDEST, mixes="learnable")
    for loss in (torch.sum, lambda y: y.square().sum()):
        (dx,) = torch.autograd.grad(loss(of_many.run(**arguments)), arguments["x"], create_graph=True)
        (expected,) = torch.autograd.grad(loss(of_many.definition(**arguments)), arguments["x"])
        torch.testing.assert_close(dx, expected, atol=CLOSE, rtol=CLOSE)
        kind = "LoRA" if of_many.down == "lora_a" else "bottleneck adapter"
        with pytest.raises(RuntimeError, match=f"{kind}.* was differentiated twice.*SIBO_TRITON_BACKEND=reference"):
            dx.square().sum().backward()


def test_a_second_derivative_of_compiled_code_is_refused_by_name(of, monkeypatch):
    arguments = of.arguments(dtype=WIDEST)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        y = of.run(**arguments)
    (dx,) = torch.autograd.grad(y.square().sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="was differentiated twice.*SIBO_TRITON_BACKEND=reference"):
        dx.square().sum().backward()


def test_compiled_autograd_calls_the_backward_of_eager_code(of, monkeypatch):
    monkeypatch.setattr(small, "ELEMENTS", -1)
    arguments = of.arguments(dtype=WIDEST, dropout_p=0.1)
    expected = values_and_gradients(of.run, arguments)
    y = of.run(**arguments)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(partial(torch.compile, backend="eager")):
        y.square().sum().backward()
    found = [tensor.grad for tensor in trainable(arguments).values()]
    torch.testing.assert_close([y.detach(), *found], expected)


def test_the_reference_backend_differentiates_twice(of, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    arguments = of.arguments(dtype=FP64)
    (dx,) = torch.autograd.grad(of.run(**arguments).square().sum(), arguments["x"], create_graph=True)
    dx.square().sum().backward()
    assert arguments[of.down].grad.abs().sum() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_again(of, use_reentrant):
    arguments = of.arguments(dtype=WIDEST, **ALL_LEARN)
    tensors = list(trainable(arguments).values())

    def layer(x):
        return of.run(**arguments | {"x": x, "dropout_p": 0.4, "dropout_seed": reference.draw_seed(DEVICE)})

    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(7)
        y = run(arguments["x"])
        torch.rand(3, device=DEVICE)  # the generator moves on
        y.square().sum().backward()
        results.append([y, *(tensor.grad for tensor in tensors)])
        for tensor in tensors:
            tensor.grad = None
    torch.testing.assert_close(*results, atol=CLOSE, rtol=CLOSE)  # BLAS may round by the memory's alignment


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_autocast_computes_in_its_dtype(of, dropout_p):
    """As PEFT's modules under autocast do: the same output dtype, an error no larger, float32 gradients."""
    arguments = of.arguments((6, 20), dropout_p=dropout_p, mixes="learnable")
    wanted = trainable(arguments)
    grad_y = torch.randn_like(of.definition(**arguments))

    def run(function, enabled):
        with torch.autocast(DEVICE, dtype=BF16, enabled=enabled):
            y = function(**arguments)
        return [y.detach(), *torch.autograd.grad(y, list(wanted.values()), grad_y.to(y.dtype))]

    exact, by_definition, found = run(of.definition, False), run(of.definition, True), run(of.run, True)
    assert found[0].dtype == of.autocast_dtype
    for name, truth, other, own in zip(("y", *wanted), exact, by_definition, found, strict=True):
        assert own.dtype == other.dtype and (name == "y" or own.dtype == FP32), name
        error, allowed = (float((each.float() - truth).norm() / truth.norm()) for each in (own, other))
        # the gradient of lambda is one number, in which roundings may cancel
        assert error <= 1.2 * allowed + (1e-2 if name == "lambda_" else 1e-4), name
    assert (found[0].float() - exact[0]).norm() > 1e-4 * exact[0].norm()  # it did round


def test_functional_call_and_func_transforms(of):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.arguments = of.arguments(dtype=WIDEST, wants=())
            for name in (of.down, of.up):
                setattr(self, name, nn.Parameter(self.arguments.pop(name)))

        def forward(self, run=of.run):
            return run(**self.arguments, **dict(self.named_parameters())).square().sum()

    layer = Layer()
    parameters = {name: (2 * p).detach().requires_grad_() for name, p in layer.named_parameters()}
    found, expected = (
        torch.autograd.grad(torch.func.functional_call(layer, parameters, kwargs={"run": run}), parameters.values())
        for run in (of.run, of.definition)
    )
    torch.testing.assert_close(found, expected, atol=10 * CLOSE, rtol=10 * CLOSE)
    by_transform = torch.func.grad(lambda p: torch.func.functional_call(layer, p))(
        {name: p.detach() for name, p in parameters.items()}
    )
    torch.testing.assert_close(tuple(by_transform.values()), expected)


def test_forward_mode_runs_the_definition(of, monkeypatch):
    monkeypatch.setattr(small, "ELEMENTS", 0)  # where PyTorch's own nodes run
    arguments = of.arguments(dtype=WIDEST, wants=(), mixes="tensor")
    direction = torch.randn_like(arguments["x"])
    tangents = []
    for run in (of.run, of.definition):
        with forward_ad.dual_level():
            y = run(**arguments | {"x": forward_ad.make_dual(arguments["x"], direction)})
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents, atol=CLOSE, rtol=CLOSE)


def test_batched_gradients_are_refused_by_name(of, monkeypatch):
    monkeypatch.setattr(small, "ELEMENTS", 0)
    arguments = of.arguments((4, 6))
    y = of.run(**arguments)
    with pytest.raises(RuntimeError, match=r"batched gradients.*SIBO_TRITON_BACKEND=reference"):
        torch.autograd.grad(y, arguments["x"], torch.randn(3, *y.shape, device=DEVICE), is_grads_batched=True)
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    y = of.run(**arguments)
    (dx,) = torch.autograd.grad(y, arguments["x"], torch.ones(3, *y.shape, device=DEVICE), is_grads_batched=True)
    assert dx.shape == (3, *arguments["x"].shape)


def test_tensors_that_are_negated_when_read(of):
    """As is the imaginary part of a conjugate, which is not negated in memory."""
    arguments = of.arguments(dropout_p=0.3, **ALL_LEARN)
    lazy = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            lazy[name] = torch._neg_view(-value.detach()).requires_grad_(value.requires_grad)
            assert lazy[name].is_neg()
    results = []
    for given in (arguments, lazy):
        y = of.run(**given)
        grad_y = torch.ones_like(y)
        grad_y = torch._neg_view(-grad_y) if given is lazy else grad_y
        results.append((y, *torch.autograd.grad(y, trainable(given).values(), grad_y)))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_a_gradient_of_the_frozen_layer_alone(of):
    """The backward launches no kernel of ours."""
    arguments = of.arguments(wants=())
    name = next(name for name in ("weight", "base", "x") if arguments.get(name) is not None)
    arguments[name] = arguments[name].detach().requires_grad_()
    results = []
    for run in (of.run, of.definition):
        y = run(**arguments)
        results.append(torch.autograd.grad(y, arguments[name], torch.ones_like(y)))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


# --- torch.compile


def values_and_gradients(run, arguments):
    y = run(**arguments)
    return y, *torch.autograd.grad(y.square().sum(), list(trainable(arguments).values()))


COMPILED = [
    ("lora_linear", {"dtype": WIDEST, "mixes": "learnable", "dropout_p": 0.3}),
    ("lora_linear", {"dtype": WIDEST, "mixes": "no", "biases": False, "wants": ("lora_b",)}),
    ("add_lora", {"dtype": WIDEST, "mixes": "number"}),
    ("lora_linear", {"dtype": BF16, "adapter_dtype": FP32, "mixes": "tensor", "biases": False}),
    ("lora_linear", {"dtype": BF16, "mixes": "learnable", "biases": False}),
    ("bottleneck in series", {"dtype": WIDEST, "dropout_p": 0.3, **ALL_LEARN}),
    ("bottleneck on a base", {"dtype": BF16, "activation": "gelu", "mixes": "tensor"}),
    ("bottleneck in series", {"dtype": BF16, "adapter_dtype": FP32, "biases": False, "wants": ("up_weight",)}),
]


#: What the compiler does with an operation does not depend on the backend: the interpreter, slow, shows that it runs.
SOME_COMPILED = COMPILED[3:5] + COMPILED[6:7] if ON_KERNELS and DEVICE == "cpu" else COMPILED


@pytest.mark.parametrize(("name", "options"), SOME_COMPILED)
def test_compiles_into_one_graph(name, options):
    of, arguments = OPERATIONS[name], OPERATIONS[name].arguments(**options)
    compiled = torch.compile(of.run, fullgraph=True, backend="aot_eager")
    found, expected = (values_and_gradients(run, arguments) for run in (compiled, of.run))
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-2 if options["dtype"] == BF16 else 0)


@pytest.mark.parametrize("name", ["lora_linear", "bottleneck in series"][: len(SOME_COMPILED) // 4 + 1])
def test_inductor_computes_the_same(name):
    """With the mask of eager code, which a wrap-around of integers must not change."""
    of, arguments = OPERATIONS[name], OPERATIONS[name].arguments((3, 40), dropout_p=0.3, **ALL_LEARN)
    found, expected = (values_and_gradients(run, arguments) for run in (torch.compile(of.run, fullgraph=True), of.run))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_compiles_where_plain_pytorch_is_asked_for(of, monkeypatch):
    """Small layers take NumPy's help in eager mode, which the compiler must not see."""
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    monkeypatch.setattr(small, "ELEMENTS", 2**13)
    arguments = of.arguments(dropout_p=0.1)
    compiled = torch.compile(of.run, fullgraph=True, backend="aot_eager")
    found, expected = (values_and_gradients(run, arguments) for run in (compiled, of.run))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), SOME_COMPILED)
def test_the_registered_operator_passes_opcheck(name, options, monkeypatch):
    """With the arguments that it gets where the operation is compiled."""
    calls, original = [], registered._forward
    monkeypatch.setattr(registered, "_forward", lambda *arguments: calls.append(arguments) or original(*arguments))
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        OPERATIONS[name].run(**OPERATIONS[name].arguments(**options))
    (arguments,) = calls
    assert set(torch.library.opcheck(original, arguments).values()) == {"SUCCESS"}


# --- What is kept for the backward

LARGE = {"tokens": (40, 8), "k": 256, "n": 128, "rank": 4, "dtype": BF16}


@pytest.mark.parametrize("mixes", ["no", "tensor", "learnable"])
@pytest.mark.parametrize("adapter_dtype", [BF16, FP32])
def test_kept_are_x_and_h0_themselves_and_what_has_the_size_of_the_rank(of_many, adapter_dtype, mixes):
    options = {"adapter_dtype": adapter_dtype, "mixes": mixes, "scaling": "learnable", "dropout_p": 0.05}
    arguments = of_many.arguments(**LARGE, **options, wants=("x", of_many.down, of_many.up))
    given = {value.untyped_storage().data_ptr() for value in arguments.values() if isinstance(value, torch.Tensor)}
    _, storages = saved_storages(lambda: of_many.run(**arguments))
    kept = sum(size for address, size in storages.items() if address not in given)
    rank_sized = 40 * 8 * 4 * adapter_dtype.itemsize  # t (or p), in the dtype that x and the adapter share
    assert kept == rank_sized * (2 if mixes == "learnable" else 1)
    assert arguments["x"].untyped_storage().data_ptr() in storages


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("mixes", ["tensor", "learnable"])
def test_nothing_else_outlives_the_call(of_many, mixes, dropout_p):
    """By the storages that are alive, not by what autograd was told to save."""
    options = {"adapter_dtype": FP32, "mixes": mixes, "scaling": "learnable", "dropout_p": dropout_p}
    arguments = of_many.arguments(**LARGE, **options, wants=("x", of_many.down, of_many.up))
    given = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    with Allocations() as allocations:
        y = of_many.run(**arguments)
    gc.collect()  # of the interpreter's
    assert allocations.alive(beside=[*given, y]) == 40 * 8 * 4 * 4 * (2 if mixes == "learnable" else 1)
    y.sum().backward()
    del y
    gc.collect()
    assert allocations.alive(beside=given) == 0
