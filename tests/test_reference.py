"""The definition against float64 NumPy, written from the equations with their gradients by hand, and by gradcheck."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sibo_triton.reference import (
    ACTIVATIONS,
    add_lora,
    bottleneck_adapter,
    down,
    dropout_mask,
    lora_linear,
    mix,
    up,
)

SEED = 20240611


# --- NumPy: the equations of docs/definition.md, on [tokens, features] matrices. `d_` is the gradient of what follows.


def numpy_lora(x, weight, bias, a, b, s, h0, lambda_, b_bias, mask, keep, d_y):
    """y, and the gradients by name."""
    x_mixed = (1 - lambda_) * x + lambda_ * h0
    dropped = x_mixed * mask / keep
    t = dropped @ a.T
    y = x @ weight.T + bias + s * (t @ b.T + b_bias)
    u = s * d_y @ b
    d_x_mixed = (u @ a) * mask / keep
    return y, {
        "x": d_y @ weight + (1 - lambda_) * d_x_mixed,
        "weight": d_y.T @ x,
        "bias": d_y.sum(0),
        "lora_a": u.T @ dropped,
        "lora_b": s * d_y.T @ t,
        "lora_bias": s * d_y.sum(0),
        "scaling": (d_y * (t @ b.T + b_bias)).sum(),
        "initial_residual": lambda_ * d_x_mixed,
        "lambda_": (d_x_mixed * (h0 - x)).sum(),
    }


def erf(h):
    return np.vectorize(math.erf, otypes=[float])(h)


def sigmoid(h):
    return 1 / (1 + np.exp(-h))


def gelu_tanh(h):
    return h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def d_gelu_tanh(h):
    tanh = np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))
    return (1 + tanh) / 2 + h / 2 * (1 - tanh**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * h**2)


#: f and its derivative.
NUMPY_ACTIVATIONS = {
    "gelu": (
        lambda h: h * (1 + erf(h / math.sqrt(2))) / 2,
        lambda h: (1 + erf(h / math.sqrt(2))) / 2 + h * np.exp(-(h**2) / 2) / math.sqrt(2 * math.pi),
    ),
    "gelu_pytorch_tanh": (gelu_tanh, d_gelu_tanh),
    "relu": (lambda h: np.maximum(h, 0), lambda h: (h > 0).astype(float)),
    "sigmoid": (sigmoid, lambda h: sigmoid(h) * (1 - sigmoid(h))),
    "silu": (lambda h: h * sigmoid(h), lambda h: sigmoid(h) * (1 + h * (1 - sigmoid(h)))),
    "tanh": (np.tanh, lambda h: 1 - np.tanh(h) ** 2),
}


def numpy_branch(v, w_down, b_down, w_up, b_up, s, activation, h0, lambda_, mask, keep):
    """g(v), and a function from its gradient to the gradients by name, that of v among them."""
    f, d_f = NUMPY_ACTIVATIONS[activation]
    dropped = ((1 - lambda_) * v + lambda_ * h0) * mask / keep
    hidden = dropped @ w_down.T + b_down
    unscaled = f(hidden) @ w_up.T + b_up

    def backward(d_g):
        d_hidden = s * (d_g @ w_up) * d_f(hidden)
        d_v_mixed = (d_hidden @ w_down) * mask / keep
        return {
            "v": (1 - lambda_) * d_v_mixed,
            "down_weight": d_hidden.T @ dropped,
            "down_bias": d_hidden.sum(0),
            "up_weight": s * d_g.T @ f(hidden),
            "up_bias": s * d_g.sum(0),
            "scaling": (d_g * unscaled).sum(),
            "initial_residual": lambda_ * d_v_mixed,
            "lambda_": (d_v_mixed * (h0 - v)).sum(),
        }

    return s * unscaled, backward


def numpy_bottleneck(placement, side, x, weight, bias, d_y, *branch_arguments):
    if (placement, side) == ("series", "input"):
        g, backward = numpy_branch(x, *branch_arguments)
        d_sum = d_y @ weight
        d = backward(d_sum)
        d |= {"x": d_sum + d.pop("v"), "weight": d_y.T @ (x + g), "bias": d_y.sum(0)}
        return (x + g) @ weight.T + bias, d
    z = x @ weight.T + bias
    if placement == "parallel":
        g, backward = numpy_branch(x, *branch_arguments)
        d = backward(d_y)
        return z + g, d | {"x": d_y @ weight + d.pop("v"), "weight": d_y.T @ x, "bias": d_y.sum(0)}
    g, backward = numpy_branch(z, *branch_arguments)
    d = backward(d_y)
    d_z = d_y + d.pop("v")
    return z + g, d | {"x": d_z @ weight, "weight": d_z.T @ x, "bias": d_z.sum(0)}


# --- Inputs


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def lora_arguments(batch=(2, 3), k=7, n=5, r=4, dtype=torch.float64, lambda_=0.3):
    return {
        "x": randn(*batch, k, dtype=dtype),
        "weight": randn(n, k, dtype=dtype),
        "bias": randn(n, dtype=dtype),
        "lora_a": randn(r, k, dtype=dtype),
        "lora_b": randn(n, r, dtype=dtype),
        "scaling": torch.tensor(1.7, dtype=dtype, requires_grad=True),
        "initial_residual": randn(*batch, k, dtype=dtype),
        "lambda_": torch.tensor([lambda_], dtype=dtype, requires_grad=True),
        "lora_bias": randn(n, dtype=dtype),
    }


PLACEMENTS = [("series", "input"), ("series", "output"), ("parallel", "input")]


def bottleneck_arguments(placement, side, batch=(2, 3), k=6, n=5, bottleneck=4, lambda_=0.3):
    read = n if side == "output" else k
    written = k if (placement, side) == ("series", "input") else n
    return {
        "x": randn(*batch, k),
        "weight": randn(n, k),
        "bias": randn(n),
        "down_weight": randn(bottleneck, read),
        "up_weight": randn(written, bottleneck),
        "scaling": torch.tensor(1.7, dtype=torch.float64, requires_grad=True),
        "down_bias": randn(bottleneck),
        "up_bias": randn(written),
        "initial_residual": randn(*batch, read),
        "lambda_": torch.tensor([lambda_], dtype=torch.float64, requires_grad=True),
    }


def matrix(tensor):
    """As NumPy float64, with the leading dimensions of activations flattened to tokens."""
    array = tensor.detach().double().numpy()
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1]) if array.ndim > 2 else array


def kept(tensor, p):
    """The mask that drop() of this activation applies, and the share of elements that it keeps on average."""
    rows, cols = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    return dropout_mask(rows, cols, p, SEED).numpy(), 1 - math.floor(p * 2**16 + 0.5) / 2**16


def assert_like_numpy(y, d_y, arguments, expected_y, expected_gradients, tolerance=1e-12):
    assert y.dtype == arguments["x"].dtype
    wanted = {name: argument for name, argument in arguments.items() if getattr(argument, "requires_grad", False)}
    gradients = torch.autograd.grad(y, list(wanted.values()), d_y, allow_unused=True)
    for name, actual, expected in [
        ("y", y, expected_y),
        *((name, gradient, expected_gradients[name]) for name, gradient in zip(wanted, gradients, strict=True)),
    ]:
        assert actual is not None, f"no gradient for {name}"
        expected = np.asarray(expected).reshape(tuple(actual.shape))
        scale = max(1.0, np.abs(expected).max(initial=0.0))
        error = np.abs(actual.detach().double().numpy() - expected).max(initial=0.0)
        assert error <= tolerance * scale, f"{name}: off by {error / scale:.2e}"


# --- LoRA


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
def test_lora_linear_and_every_gradient_equal_numpy(dtype, tolerance, lambda_, dropout_p):
    arguments = lora_arguments(dtype=dtype, lambda_=lambda_)
    y = lora_linear(**arguments, dropout_p=dropout_p, dropout_seed=SEED)
    d_y = torch.randn_like(y)
    expected = numpy_lora(*map(matrix, arguments.values()), *kept(arguments["x"], dropout_p), matrix(d_y))
    assert_like_numpy(y, d_y, arguments, *expected, tolerance)


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1, np.float64(0.25)])
def test_lora_linear_with_a_number_for_lambda(lambda_):
    arguments = lora_arguments() | {"lambda_": lambda_}
    if lambda_ == 0:
        arguments["initial_residual"] = None
    y = lora_linear(**arguments)
    d_y = torch.randn_like(y)
    tensors = arguments | {"initial_residual": arguments["initial_residual"] if lambda_ else torch.zeros(2, 3, 7)}
    tensors |= {"lambda_": torch.tensor(float(lambda_), dtype=torch.float64)}
    expected = numpy_lora(*map(matrix, tensors.values()), 1.0, 1.0, matrix(d_y))
    assert_like_numpy(y, d_y, arguments, *expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_lora_linear_gradcheck(dropout_p):
    arguments = lora_arguments(batch=(4,), k=5, n=3, r=2)

    def function(*tensors):
        return lora_linear(
            **dict(zip(arguments, tensors, strict=True)), dropout_p=dropout_p, dropout_seed=torch.tensor([SEED])
        )

    assert torch.autograd.gradcheck(function, tuple(arguments.values()))
    assert torch.autograd.gradgradcheck(function, tuple(arguments.values()))


def test_lambda_gradient_lives_in_the_rank():
    """dlambda = <u, A (h0 - x)> without dropout: what lets a kernel compute it from rank-sized tensors."""
    arguments = lora_arguments()
    y = lora_linear(**arguments)
    d_y = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, arguments["lambda_"], d_y)
    u = arguments["scaling"] * d_y @ arguments["lora_b"]
    difference = (arguments["initial_residual"] - arguments["x"]) @ arguments["lora_a"].T
    torch.testing.assert_close(actual, (u * difference).sum().reshape(1))


def test_down_and_up_compose_to_the_layer():
    a = lora_arguments()
    t = down(a["x"], a["lora_a"], a["initial_residual"], a["lambda_"], 0.3, SEED)
    assert t.shape == (2, 3, 4)
    base = torch.nn.functional.linear(a["x"], a["weight"], a["bias"])
    expected = lora_linear(**a, dropout_p=0.3, dropout_seed=SEED)
    torch.testing.assert_close(base + up(t, a["lora_b"], a["scaling"], a["lora_bias"]), expected)


def test_add_lora_takes_the_output_of_any_frozen_layer():
    a = lora_arguments()
    base = randn(2, 3, 5)
    adapter = [a[name] for name in a if name not in ("x", "weight", "bias", "lora_bias")]
    y = add_lora(base, a["x"], *adapter, 0.3, SEED, a["lora_bias"])
    t = down(a["x"], a["lora_a"], a["initial_residual"], a["lambda_"], 0.3, SEED)
    torch.testing.assert_close(y - base, up(t, a["lora_b"], a["scaling"], a["lora_bias"]))
    (d_base,) = torch.autograd.grad(y, base, torch.ones_like(y))
    assert torch.equal(d_base, torch.ones_like(y))


def test_lora_bias_is_optional():
    without = lora_arguments() | {"lora_bias": None}
    torch.testing.assert_close(
        lora_linear(**without), lora_linear(**without | {"lora_bias": torch.zeros(5, dtype=torch.float64)})
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 6)),
    lambda_=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dropout_p=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_lora_linear_of_any_shape(batch, sizes, lambda_, dropout_p):
    k, n, r = sizes
    arguments = lora_arguments(tuple(batch), k, n, r, lambda_=lambda_)
    y = lora_linear(**arguments, dropout_p=dropout_p, dropout_seed=SEED)
    d_y = torch.randn_like(y)
    expected = numpy_lora(*map(matrix, arguments.values()), *kept(arguments["x"], dropout_p), matrix(d_y))
    assert_like_numpy(y, d_y, arguments, *expected)


def test_strided_and_expanded_inputs():
    arguments = lora_arguments()
    expected = lora_linear(**arguments, dropout_p=0.3, dropout_seed=SEED)
    x = arguments["x"].transpose(0, 2).contiguous().transpose(0, 2)
    assert not x.is_contiguous()
    weight = torch.stack([arguments["weight"]] * 2, -1)[..., 0]
    torch.testing.assert_close(
        lora_linear(**arguments | {"x": x, "weight": weight}, dropout_p=0.3, dropout_seed=SEED), expected
    )
    one = arguments["initial_residual"][:1, :1]
    torch.testing.assert_close(
        lora_linear(**arguments | {"initial_residual": one.expand(2, 3, 7)}),
        lora_linear(**arguments | {"initial_residual": one.repeat(2, 3, 1)}),
    )


# --- Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mix_of_16_bit_rounds_once(dtype):
    x, h0 = randn(64, 64, dtype=dtype), randn(64, 64, dtype=dtype)
    for lambda_ in (0.3, torch.tensor(0.3)):
        mixed = mix(x, h0, lambda_)
        assert mixed.dtype == dtype
        assert torch.equal(mixed, (0.7 * x.float() + 0.3 * h0.float()).to(dtype))


@pytest.mark.parametrize("lambda_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("h0_dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mix_of_several_dtypes(x_dtype, h0_dtype, lambda_dtype):
    x, h0 = randn(4, 8, dtype=x_dtype), randn(4, 8, dtype=h0_dtype)
    lambda_ = torch.tensor([0.25], dtype=lambda_dtype, requires_grad=True)
    mixed = mix(x, h0, lambda_)
    assert mixed.dtype == x_dtype
    expected = (0.75 * x.double() + 0.25 * h0.double()).to(x_dtype)
    torch.testing.assert_close(mixed, expected, rtol=torch.finfo(x_dtype).eps, atol=torch.finfo(torch.float32).eps)
    gradients = torch.autograd.grad(mixed.sum(), (x, h0, lambda_))
    assert [gradient.dtype for gradient in gradients] == [x_dtype, h0_dtype, lambda_dtype]


def test_mix_does_not_overflow_where_its_result_does_not():
    """The sum of the two terms, each rounded to float16, would."""
    x = torch.full((2, 2), 65504.0, dtype=torch.float16)
    assert mix(x, x, 0.7).isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("lambda_", [0.3, 1.0, torch.tensor(0.0)])
def test_mix_shows_what_is_not_finite(lambda_, value):
    bad, good = torch.full((2, 2), value), torch.ones(2, 2)
    assert not mix(bad, good, lambda_).isfinite().any()
    assert not mix(good, bad, lambda_).isfinite().any()


def test_lambda_zero_returns_x_itself():
    x = torch.randn(2, 3)
    assert mix(x, None, 0.0) is x
    assert mix(x, torch.full((2, 3), math.nan), 0) is x


def test_a_tensor_that_holds_zero_learns():
    x, h0 = randn(2, 3), randn(2, 3)
    lambda_ = torch.zeros((), dtype=torch.float64, requires_grad=True)
    mixed = mix(x, h0, lambda_)
    assert torch.equal(mixed, x)
    (gradient,) = torch.autograd.grad(mixed.sum(), lambda_)
    torch.testing.assert_close(gradient, (h0 - x).sum())


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_a_16_bit_model_compute_in_float32(base_dtype):
    """PEFT's default. Only the frozen path and the result are rounded."""
    arguments = lora_arguments(batch=(64,), k=48, n=40, r=8, dtype=torch.float32)
    for name in ("x", "weight", "bias", "initial_residual"):
        arguments[name] = arguments[name].detach().to(base_dtype).requires_grad_()
    y = lora_linear(**arguments)
    assert y.dtype == base_dtype
    base = torch.nn.functional.linear(*(arguments[name] for name in ("x", "weight", "bias"))).double()
    frozen = arguments | {"weight": torch.zeros(40, 48), "bias": torch.zeros(40)}
    branch, _ = numpy_lora(*map(matrix, frozen.values()), 1.0, 1.0, np.zeros((64, 40)))
    exact = base + torch.from_numpy(branch)
    half_a_unit = torch.finfo(base_dtype).eps / 2
    torch.testing.assert_close(y.double(), exact, rtol=half_a_unit * 1.001, atol=1e-5)
    gradients = torch.autograd.grad(y.sum(), list(arguments.values()))
    assert [g.dtype for g in gradients] == [argument.dtype for argument in arguments.values()]


# --- Bottleneck adapters


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("placement", "side"), PLACEMENTS)
def test_bottleneck_adapter_and_every_gradient_equal_numpy(placement, side, activation, dropout_p):
    arguments = bottleneck_arguments(placement, side)
    options = {"placement": placement, "side": side, "activation": activation}
    y = bottleneck_adapter(**arguments, **options, dropout_p=dropout_p, dropout_seed=SEED)
    d_y = torch.randn_like(y)
    array = {name: matrix(argument) for name, argument in arguments.items()}
    branch = (array[name] for name in ("down_weight", "down_bias", "up_weight", "up_bias", "scaling"))
    expected = numpy_bottleneck(
        placement,
        side,
        array["x"],
        array["weight"],
        array["bias"],
        matrix(d_y),
        *branch,
        activation,
        array["initial_residual"],
        array["lambda_"],
        *kept(arguments["initial_residual"], dropout_p),
    )
    assert_like_numpy(y, d_y, arguments, *expected)


@pytest.mark.parametrize("activation", ["tanh", "silu"])
@pytest.mark.parametrize(("placement", "side"), PLACEMENTS)
def test_bottleneck_adapter_gradcheck(placement, side, activation):
    arguments = bottleneck_arguments(placement, side, batch=(3,), k=4, n=3, bottleneck=2)
    options = {"placement": placement, "side": side, "activation": activation, "dropout_p": 0.4, "dropout_seed": SEED}

    def function(*tensors):
        return bottleneck_adapter(**dict(zip(arguments, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(function, tuple(arguments.values()))


@pytest.mark.parametrize(("placement", "side"), PLACEMENTS)
def test_bottleneck_biases_are_optional(placement, side):
    arguments = bottleneck_arguments(placement, side)
    biases = ("bias", "down_bias", "up_bias")
    zeros = {name: torch.zeros_like(arguments[name]) for name in biases}
    options = {"placement": placement, "side": side}
    without = bottleneck_adapter(**arguments | dict.fromkeys(biases), **options)
    torch.testing.assert_close(without, bottleneck_adapter(**arguments | zeros, **options))


@pytest.mark.parametrize(("placement", "side"), PLACEMENTS)
def test_a_fresh_bottleneck_adapter_is_the_frozen_layer(placement, side):
    """The up-projection starts at zero; this holds whatever lambda is."""
    arguments = bottleneck_arguments(placement, side)
    for name in ("up_weight", "up_bias"):
        arguments[name] = torch.zeros_like(arguments[name])
    frozen = torch.nn.functional.linear(arguments["x"], arguments["weight"], arguments["bias"])
    assert torch.equal(bottleneck_adapter(**arguments, placement=placement, side=side), frozen)


@pytest.mark.parametrize(("placement", "side"), PLACEMENTS)
def test_float32_bottleneck_on_a_16_bit_model(placement, side):
    arguments = bottleneck_arguments(placement, side)
    exact = bottleneck_adapter(**arguments, placement=placement, side=side)
    for name in arguments:
        to = torch.bfloat16 if name in ("x", "weight", "bias", "initial_residual") else torch.float32
        arguments[name] = arguments[name].detach().to(to).requires_grad_()
    y = bottleneck_adapter(**arguments, placement=placement, side=side)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.1)
    gradients = torch.autograd.grad(y.sum(), list(arguments.values()))
    assert [g.dtype for g in gradients] == [argument.dtype for argument in arguments.values()]


# --- Errors


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, r"lambda_ is 1.5: .*\[0, 1\]", {"lambda_": 1.5}),
        (ValueError, "lambda_ is -0.1", {"lambda_": -0.1}),
        (ValueError, "lambda_ is nan", {"lambda_": math.nan}),
        (TypeError, "lambda_ is '0.1'", {"lambda_": "0.1"}),
        (TypeError, "lambda_ is True", {"lambda_": True}),
        (TypeError, "lambda_ is None", {"lambda_": None}),
        (ValueError, r"lambda_ is a torch.float32 tensor of shape \[2\]", {"lambda_": torch.zeros(2)}),
        (ValueError, "lambda_ is a torch.int64 tensor", {"lambda_": torch.tensor(1)}),
        (ValueError, "initial_residual is None, but lambda_ is 0.3", {"lambda_": 0.3, "initial_residual": None}),
        (ValueError, r"\[2, 7\] and x \[2, 3, 7\]", {"initial_residual": torch.zeros(2, 7)}),
        (ValueError, "lambda_=0.0 where it cannot", {"initial_residual": torch.zeros(2, 3, 1)}),
        (TypeError, "initial_residual torch.int64", {"initial_residual": torch.zeros(2, 3, 7, dtype=torch.int64)}),
        (ValueError, r"lora_a has shape \[4, 6\], but \[r, 7\]", {"lora_a": torch.zeros(4, 6)}),
        (ValueError, r"lora_b has shape \[5, 3\], but \[5, 4\]", {"lora_b": torch.zeros(5, 3)}),
        (ValueError, r"lora_bias has shape \[4\], but \[5\]", {"lora_bias": torch.zeros(4)}),
        (ValueError, r"weight has shape \[5, 6\], but \[N, 7\]", {"weight": torch.zeros(5, 6)}),
        (ValueError, r"weight has shape \[7\]", {"weight": torch.zeros(7)}),
        (ValueError, "dropout_p is 1.0", {"dropout_p": 1.0}),
        (ValueError, "pass draw_seed", {"dropout_p": 0.1}),
    ],
)
def test_lora_linear_names_what_is_wrong(error, message, changes):
    with pytest.raises(error, match=message):
        lora_linear(**lora_arguments() | changes)


def test_add_lora_refuses_a_base_of_other_tokens():
    """It would be broadcast."""
    a = lora_arguments()
    with pytest.raises(ValueError, match=r"base has shape \[1, 3, 5\] and x \[2, 3, 7\]"):
        add_lora(torch.zeros(1, 3, 5), a["x"], a["lora_a"], a["lora_b"], 2.0)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("placement='serial'", {"placement": "serial"}),
        ("side='output' is no adapter", {"placement": "parallel", "side": "output"}),
        ("activation='mish' is not known: choose one of gelu", {"activation": "mish"}),
        (r"down_weight has shape \[4, 6\], but \[bottleneck, 5\]", {"side": "output"}),
        (r"up_weight has shape \[5, 4\], but \[6, 4\]", {"up_weight": torch.zeros(5, 4)}),
        (r"up_weight has shape \[6, 4\], but \[5, 4\]", {"placement": "parallel"}),
        (r"initial_residual has shape \[2, 3, 5\]", {"initial_residual": torch.zeros(2, 3, 5)}),
    ],
)
def test_bottleneck_adapter_names_what_is_wrong(message, changes):
    with pytest.raises(ValueError, match=message):
        bottleneck_adapter(**bottleneck_arguments("series", "input") | changes)
