"""Every kernel on inputs of any shapes, strides and dtypes, with any gradients wanted, against float64.

The launches and the yardstick are those of tests/gpu, which `make test-interpreter` runs on chosen values.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from gradient_launches import InputGradient, UpBackward, WeightGradient
from inputs import BF16, FP16, FP32, LAYOUTS, force_passes, laid_out
from kernel_launches import Activated, Down, LowRank, Up, name_of
from kernel_yardstick import check

from sibo_triton.kernels import targets
from sibo_triton.kernels.activations import NAMES
from sibo_triton.kernels.targets import KNOWN

DTYPE = st.sampled_from([FP32, FP16, BF16])
LAYOUT = st.sampled_from(LAYOUTS)
RANK = st.integers(0, 70) | st.sampled_from([1, 3, 4, 8, 16, 24, 48, 64, 128, 200, 257])
RANKS = st.lists(RANK, min_size=1, max_size=2).map(tuple)
ROWS, COLUMNS = st.integers(0, 70), st.integers(0, 140)
# Numbers that bfloat16 holds, halves too, which are the second sibling's.
LAMBDA, SCALING = st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([-0.5, 1.5])
DROPOUT = st.sampled_from([0.0, 0.05, 0.6])
#: Of a lambda or a scaling in a tensor, which may have one dimension or none.
SCALAR = st.tuples(st.sampled_from([FP32, torch.float64, BF16]), st.sampled_from([(), (1,)]))
BOOL = st.booleans()
#: On a GPU of many multiprocessors sums are cut into parts.
SPLITS = BOOL


def check_laid_out(launch, layouts, scalar=(FP32, (1,)), splits=False, passes=None, **converted):
    """With the inputs in other layouts (by the beginnings of their names), scalars in another dtype and shape."""
    tensors = launch.inputs("cpu")
    for name, tensor in tensors.items():
        stem = name.rstrip("0123456789")
        if name in ("h0", *converted):
            stem = name
        tensor = tensor.to(converted.get(stem, tensor.dtype))
        if stem in ("lambda", "scaling"):
            tensor = tensor.to(scalar[0]).view(scalar[1])
        elif stem in ("bias", "base_bias"):
            tensor = laid_out(tensor[:, None], "padded")[:, 0]  # a stride of 2
        elif stem in layouts:
            tensor = laid_out(tensor, layouts[stem])
        tensors[name] = tensor
    with pytest.MonkeyPatch.context() as patch:
        if splits:
            patch.setattr(targets, "target_of", lambda device: KNOWN["sm_90"])
        if passes is not None:
            force_passes(patch, passes)
        check(launch, "cpu", tensors)


def any_launch(examples, **strategies):
    """A property of any launch, of as many examples."""
    return lambda test: settings(max_examples=examples, deadline=None, derandomize=True)(given(**strategies)(test))


DOWN = {
    "m": ROWS, "k": COLUMNS, "ranks": RANKS, "dtypes": st.tuples(DTYPE, DTYPE, DTYPE), "lambda_": LAMBDA, "p": DROPOUT,
    "lambda_is_tensor": BOOL, "layouts": st.fixed_dictionaries({"x": LAYOUT, "h0": LAYOUT, "a": LAYOUT}),
    "scalar": SCALAR, "splits": SPLITS,
}  # fmt: skip


@any_launch(40, difference=BOOL, **DOWN)
def test_down(m, k, ranks, dtypes, lambda_, p, lambda_is_tensor, layouts, scalar, splits, difference):
    x, h0, a = dtypes
    launch = Down(m, k, ranks, x, a, lambda_, p, difference, lambda_is_tensor, h0)
    check_laid_out(launch, layouts, scalar, splits)


@any_launch(30, difference=BOOL, activation=st.sampled_from(NAMES), has_bias=BOOL, bias=DTYPE, **DOWN)
def test_down_activated(
    m, k, ranks, dtypes, lambda_, p, lambda_is_tensor, layouts, scalar, splits, difference, activation, has_bias, bias
):
    x, h0, a = dtypes
    rest = {"difference": difference, "lambda_is_tensor": lambda_is_tensor, "h0_dtype": h0}
    launch = Activated(m, k, ranks, x, a, activation, lambda_, p, has_bias, **rest)
    check_laid_out(launch, layouts, scalar, splits, bias=bias)


@any_launch(
    60, m=ROWS, n=COLUMNS, rank=RANK, y=DTYPE, b=DTYPE, adds=BOOL, has_biases=st.tuples(BOOL, BOOL), scaling=SCALING,
    scaling_is_tensor=BOOL, layouts=st.fixed_dictionaries({"b": LAYOUT, "base": LAYOUT}), scalar=SCALAR,
    biases=st.tuples(DTYPE, DTYPE),
)  # fmt: skip
def test_up(m, n, rank, y, b, adds, has_biases, scaling, scaling_is_tensor, layouts, scalar, biases):
    """Nothing is written to the base, of which an expanded one has one row."""
    has_bias, has_base_bias = has_biases
    launch = Up(m, n, rank, y, b, adds, has_bias, scaling, scaling_is_tensor, has_base_bias=has_base_bias)
    check_laid_out(launch, layouts, scalar, bias=biases[0], base_bias=biases[1])


@any_launch(30, n=COLUMNS, has_bias=BOOL, scaling_is_tensor=BOOL, **DOWN)
def test_low_rank(
    m, k, n, ranks, dtypes, lambda_, p, lambda_is_tensor, layouts, scalar, splits, has_bias, scaling_is_tensor
):
    x, h0, a = dtypes
    launch = LowRank(m, k, n, ranks, x, a, lambda_, p, has_bias, lambda_is_tensor, 1.5, scaling_is_tensor)
    check_laid_out(launch, layouts | {"b": layouts["a"]}, scalar, splits, h0=h0)


@any_launch(
    60, m=st.integers(0, 150), n=st.integers(0, 270), ranks=RANKS, g=DTYPE, b=DTYPE, wants=st.tuples(BOOL, BOOL),
    scaling=SCALING, scaling_is_tensor=BOOL, scalar=SCALAR, wants_sum=BOOL, grad=DTYPE, splits=SPLITS,
    layouts=st.fixed_dictionaries({"grad_y": LAYOUT, "b": LAYOUT}), passes=st.sampled_from(["one pass", "two passes"]),
    activation=st.none() | st.sampled_from(NAMES),
)  # fmt: skip
def test_up_backward(
    m, n, ranks, g, b, wants, scaling, scaling_is_tensor, scalar, wants_sum, grad, splits, layouts, passes, activation
):
    """In one pass, of the ranks that it takes, and in two, whatever the count would choose."""
    rest = {"grad_dtype": grad, "wants_sum": wants_sum, "activation": activation}
    launch = UpBackward(m, n, ranks, g, b, wants, scaling, scaling_is_tensor, **rest)
    check_laid_out(launch, layouts, scalar, splits, passes)


@any_launch(40, last_is_plain=BOOL, grad=DTYPE, **DOWN)
def test_weight_gradient(
    m, k, ranks, dtypes, lambda_, p, lambda_is_tensor, layouts, scalar, splits, last_is_plain, grad
):
    x, h0, a = dtypes
    rest = {"last_is_plain": last_is_plain and len(ranks) > 1, "grad_dtype": grad}
    launch = WeightGradient(m, k, ranks, x, a, lambda_, p, lambda_is_tensor, h0, **rest)
    check_laid_out(launch, layouts, scalar, splits)


@any_launch(
    40, last_is_plain=BOOL, wanted=st.sampled_from([(True, False), (False, True), (True, True)]),
    base=st.none() | LAYOUT, **DOWN
)  # fmt: skip
def test_input_gradient(
    m, k, ranks, dtypes, lambda_, p, lambda_is_tensor, layouts, scalar, splits, last_is_plain, wanted, base
):
    dx, dh, a = dtypes
    wants_dx, wants_dh = wanted[0] or (lambda_ == 0 and not lambda_is_tensor), wanted[1]
    launch = InputGradient(
        m, k, ranks, dx, a, lambda_, p,
        adds=wants_dx and base is not None,
        wants_dh=wants_dh and (lambda_ != 0 or lambda_is_tensor),
        lambda_is_tensor=lambda_is_tensor,
        last_is_plain=last_is_plain and len(ranks) > 1,
        wants_dx=wants_dx,
        dh_dtype=dh,
    )  # fmt: skip
    converted = {"base": FP32} if wants_dh else {}  # as the gradient of another path may have it
    check_laid_out(launch, layouts | {"base": base}, scalar, splits, **converted)


# --- The yardstick itself

WRONG = [
    Down(65, 130, (24,), BF16, BF16, 0.3, 0.1),
    Down(65, 130, (24,), BF16, FP32, 0.3, 0.1),
    Activated(65, 130, (24,), BF16, BF16, "relu", 0.3),
    Up(65, 130, 24, BF16, BF16),
    Up(65, 130, 24, FP16, FP32),
    LowRank(16, 130, 130, (24,), FP16, FP16),
    UpBackward(130, 130, (24,), BF16, BF16),
    UpBackward(130, 130, (24,), BF16, FP32),
    WeightGradient(130, 130, (24,), FP16, FP32, 0.3, 0.1),
    WeightGradient(130, 130, (24,), BF16, BF16, 0.3, 0.1, grad_dtype=BF16),
    InputGradient(65, 130, (24,), BF16, FP32, 0.3, 0.1, wants_dh=True),
    InputGradient(65, 130, (24,), FP32, FP32, 0.3, 0.1, wants_dh=True),
]


@pytest.mark.parametrize("launch", WRONG, ids=name_of)
def test_a_scale_that_is_wrong_by_1_percent_is_seen(launch, monkeypatch):
    """In each result."""
    right = type(launch).launch
    for name in right(launch, launch.inputs("cpu")):

        def scaled(own, tensors, name=name):
            results = right(own, tensors)
            return results | {name: (1.01 * results[name].double()).to(results[name].dtype)}

        monkeypatch.setattr(type(launch), "launch", scaled)
        with pytest.raises(AssertionError, match=name):
            check(launch, "cpu")


def test_a_result_that_is_not_written_is_seen(monkeypatch):
    launch = Up(65, 130, 24, BF16, BF16)
    monkeypatch.setattr(Up, "launch", lambda own, tensors: {"y": torch.empty(65, 130, dtype=BF16)})
    with pytest.raises(AssertionError, match="y"):
        check(launch, "cpu")
