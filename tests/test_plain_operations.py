"""The plain operations against float64 autograd of the definition, whose error in the same dtypes is the yardstick.

No margin admits a scale that is wrong by 1 %, or a forgotten term of that size.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sibo_triton import reference
from sibo_triton.ops import mask as mask_module
from sibo_triton.ops import plain, tiles

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SEED = torch.tensor([-(2**62) - 12345])


@pytest.fixture
def small_tiles(monkeypatch):
    """So that small matrices take many."""
    monkeypatch.setattr(tiles, "CPU_TILE", 96)
    monkeypatch.setattr(tiles, "TILE_COLS", 8)


def arguments(m=70, k=62, n=37, r=5, x=FP32, h0=None, adapter=None, base=None, lambda_=0.3, dropout_p=0.0, scaling=1.7):
    """What a layer gets; a dtype that is not named is that of x."""

    def randn(*shape, dtype):
        return torch.randn(shape, dtype=FP64).to(x if dtype is None else dtype)

    return SimpleNamespace(
        base=randn(m, n, dtype=base),
        x=randn(m, k, dtype=x),
        h0=randn(m, k, dtype=h0),
        lora_a=randn(r, k, dtype=adapter),
        lora_b=randn(n, r, dtype=adapter),
        lora_bias=randn(n, dtype=adapter),
        grad_y=randn(m, n, dtype=base),
        lambda_=lambda_,
        scaling=scaling,
        dropout_p=dropout_p,
    )


def mixes(a):
    return isinstance(a.lambda_, torch.Tensor) or a.lambda_ != 0


def by_autograd(a, dtype=None):
    """Every result by name, from the definition; all of it in the dtype, if one is given."""

    def leaf(tensor):
        return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()

    x, h0, lora_a, lora_b = map(leaf, (a.x, a.h0, a.lora_a, a.lora_b))
    base, lora_bias = (tensor.to(dtype or tensor.dtype) for tensor in (a.base, a.lora_bias))
    lambda_, scaling = (
        value.to(dtype) if dtype and isinstance(value, torch.Tensor) else value for value in (a.lambda_, a.scaling)
    )
    t = reference.down(x, lora_a, h0, lambda_, a.dropout_p, SEED)
    t.retain_grad()
    low_rank = reference.up(t, lora_b, scaling, lora_bias)
    y = (base + low_rank).to(base.dtype)
    y.backward(a.grad_y.to(y.dtype))
    results = {"t": t, "low_rank": low_rank, "y": y, "u": t.grad, "grad_a": lora_a.grad, "grad_b": lora_b.grad}
    results |= {"dx": x.grad}
    if mixes(a):
        d = reference.down((h0.to(lora_a.dtype) - x.to(lora_a.dtype)), lora_a, None, 0.0, a.dropout_p, SEED)
        results |= {"d": d, "t_beside_d": t, "dh0": h0.grad}
    return {name: result.detach() for name, result in results.items()}


def by_plain(a):
    mixing = (a.lambda_, a.dropout_p, SEED)
    t, d = plain.down(a.x, a.lora_a, a.h0, *mixing, difference=mixes(a))
    u, grad_b = plain.up_backward(a.grad_y, t, a.lora_b, a.scaling)
    dtypes = (a.lora_a.dtype, a.x.dtype, a.h0.dtype if mixes(a) else None)
    grad_a, dx, dh0 = plain.down_backward(u, a.lora_a, a.x, a.h0, *mixing, *dtypes)
    results = {
        "t": plain.down(a.x, a.lora_a, a.h0, *mixing)[0],
        "low_rank": plain.up(t, a.lora_b, a.scaling, a.base.dtype, a.lora_bias),
        "y": plain.add_up(a.base, t, a.lora_b, a.scaling, a.lora_bias),
        "u": u,
        "grad_a": grad_a,
        "grad_b": grad_b,
        "dx": dx,
    }
    if mixes(a):
        results |= {"d": d, "t_beside_d": t, "dh0": dh0}
    return results


def norm(tensor):
    return float(tensor.double().norm())


def assert_as_good_as_autograd(a):
    exact, yardstick, actual = by_autograd(a, FP64), by_autograd(a), by_plain(a)
    assert actual.keys() == exact.keys()
    sum_dtype = FP64 if a.lora_a.dtype == FP64 else FP32
    for name, result in actual.items():
        dtype = {"dx": a.x, "dh0": a.h0, "low_rank": a.base, "y": a.base}.get(name)
        assert result.dtype == (sum_dtype if dtype is None else dtype.dtype), name
        assert result.shape == exact[name].shape and result.is_contiguous(), name
        error, yardstick_error = (norm(r.to(result.dtype) - exact[name]) for r in (result, yardstick[name]))
        # Where both are as good as exact, chance decides: some units in the last place of float32, or of float64.
        unit = torch.finfo(torch.promote_types(FP32, min(sum_dtype, result.dtype, key=lambda d: d.itemsize))).eps
        assert error <= 1.1 * yardstick_error + 10 * unit * norm(exact[name]), f"{name}: {error} > {yardstick_error}"


LAMBDAS = [0.0, 0.3, 1.0, torch.tensor([0.3]), torch.tensor(0.25, dtype=BF16)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lambda_", LAMBDAS, ids=str)
@pytest.mark.parametrize(("x", "adapter"), list(itertools.product((FP32, BF16, FP16, FP64), repeat=2)), ids=str)
def test_every_result_is_as_good_as_autograd_of_the_definition(x, adapter, lambda_, dropout_p):
    assert_as_good_as_autograd(arguments(x=x, adapter=adapter, lambda_=lambda_, dropout_p=dropout_p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lambda_", [0.0, 0.3, torch.tensor([0.3])], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [{}, {"x": BF16}, {"x": BF16, "adapter": FP32}, {"x": FP16, "h0": FP32, "base": BF16}, {"x": BF16, "h0": FP32}],
    ids=str,
)
def test_in_tiles(small_tiles, dtypes, lambda_, dropout_p):
    scaling = torch.tensor([1.7], dtype=FP32)
    assert_as_good_as_autograd(arguments(**dtypes, lambda_=lambda_, dropout_p=dropout_p, scaling=scaling))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_whether_or_not_the_device_multiplies_16_bits(dtype, native, monkeypatch):
    monkeypatch.setattr(plain, "_multiplies", lambda dtype, device_type: native)
    for lambda_ in (0.0, 0.3):
        assert_as_good_as_autograd(arguments(m=200, x=dtype, lambda_=lambda_))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lambda_", [0.0, 0.3])
@pytest.mark.parametrize(
    ("m", "k", "n", "r"),
    [(0, 6, 5, 4), (6, 0, 5, 4), (6, 7, 0, 4), (6, 7, 5, 0), (1, 1, 1, 1), (1, 7, 5, 16), (0, 0, 0, 0), (40, 33, 1, 1)],
)
def test_sizes_of_0_and_1_and_odd_ones(small_tiles, m, k, n, r, lambda_, dropout_p):
    for dtype in (FP64, FP32, BF16):
        a = arguments(m, k, n, r, x=dtype, lambda_=lambda_, dropout_p=dropout_p)
        if dtype == BF16:  # chance decides whose few numbers are rounded better
            assert [result.shape for result in by_plain(a).values()] == [y.shape for y in by_autograd(a).values()]
        else:
            assert_as_good_as_autograd(a)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 9), st.integers(0, 6)),
    tile=st.tuples(st.sampled_from([1, 7, 30, 10**6]), st.sampled_from([2, 6, 4096])),
    lambda_=st.sampled_from([0.0, 0.1, 1.0, torch.tensor(0.5, dtype=FP64)]),
    dropout_p=st.sampled_from([0.0, 0.05, 0.5, 0.99]),
    dtypes=st.sampled_from([{"x": FP64}, {"x": FP32, "adapter": FP64}, {"x": FP64, "base": FP32, "adapter": FP64}]),
)
def test_any_shape_in_any_tiles(sizes, tile, lambda_, dropout_p, dtypes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CPU_TILE", tile[0])
        patch.setattr(tiles, "TILE_COLS", tile[1])
        assert_as_good_as_autograd(arguments(*sizes, **dtypes, lambda_=lambda_, dropout_p=dropout_p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("x", [FP32, BF16])
@pytest.mark.parametrize("strides", ["transposed", "padded", "expanded"])
def test_strides_and_no_input_is_written(strides, x, dropout_p):
    a = arguments(x=x, adapter=FP32, dropout_p=dropout_p)

    def strided(v):
        if strides == "transposed":
            return v.T.contiguous().T
        if strides == "expanded":
            return v[:1].expand(v.shape)
        return torch.full((len(v) + 2, v.shape[1] + 3), math.nan, dtype=v.dtype)[1:-1, 2:-1].copy_(v)

    for name in ("base", "x", "h0", "lora_a", "lora_b", "grad_y"):
        setattr(a, name, strided(getattr(a, name)))
    inputs = [value for value in vars(a).values() if isinstance(value, torch.Tensor)]
    before = [value.clone() for value in inputs]
    assert_as_good_as_autograd(a)
    assert all(torch.equal(value, was) for value, was in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_sums_with_float32_adapters_are_rounded_once(dtype):
    """PEFT's default. Half a unit in the last place of the sum, for each element."""
    a = arguments(m=200, x=dtype, adapter=FP32, scaling=2.0)
    t = torch.randn(200, 5)
    y = plain.add_up(a.base, t, a.lora_b, 2.0, a.lora_bias)
    half_a_unit = {"rtol": torch.finfo(dtype).eps / 2 * 1.001, "atol": 1e-6}
    low_rank = 2 * (t.double() @ a.lora_b.double().T + a.lora_bias.double())
    torch.testing.assert_close(y.double(), a.base.double() + low_rank, **half_a_unit)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
def test_up_adds_both_biases_and_only_one_is_scaled(dtype):
    a = arguments(x=dtype)
    t, base_bias = torch.randn(70, 5, dtype=dtype), torch.randn(37, dtype=dtype)
    for lora_bias, b in itertools.product((None, a.lora_bias), (None, base_bias)):
        expected = 1.7 * t.double() @ a.lora_b.double().T
        expected += 0 if lora_bias is None else 1.7 * lora_bias.double()
        expected += 0 if b is None else b.double()
        y = plain.up(t, a.lora_b, 1.7, dtype, lora_bias, b)
        assert norm(y - expected) <= (0.7 if dtype == BF16 else 3) * torch.finfo(dtype).eps * norm(expected)


def test_only_what_is_wanted():
    a = arguments(lambda_=0.3)
    t, u = torch.randn(70, 5), torch.randn(70, 5)
    both = plain.up_backward(a.grad_y, t, a.lora_b, 1.7)
    assert torch.equal(plain.up_backward(a.grad_y, None, a.lora_b, 1.7, wants_grad_b=False)[0], both[0])
    assert plain.up_backward(a.grad_y, None, a.lora_b, 1.7, wants_grad_b=False)[1] is None
    assert plain.up_backward(a.grad_y, t, a.lora_b, 1.7, wants_u=False)[0] is None
    assert torch.equal(plain.up_backward(a.grad_y, t, a.lora_b, 1.7, wants_u=False)[1], both[1])
    mixing = (0.3, 0.0, None)
    grad_a, *nothing = plain.down_backward(u, None, a.x, a.h0, *mixing, FP32, None, None)
    assert grad_a is not None and nothing == [None, None]
    grad_a, dx, dh0 = plain.down_backward(u, a.lora_a, None, None, *mixing, FP32, None, BF16)
    assert grad_a is None and dx is None and dh0.dtype == BF16


# --- The mask


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 987654321987654321])
@pytest.mark.parametrize(("rows", "cols", "p"), [(37, 65, 0.3), (3, 4099, 0.05), (1, 1, 0.5), (64, 64, 0.99999)])
def test_the_mask_is_the_definitions(rows, cols, p, seed, readable):
    """Also with a seed whose value the host does not look at, as on a GPU."""
    expected = reference.dropout_mask(rows, cols, p, seed)
    tensor = torch.tensor(seed)
    mask = mask_module.KeepTiles(rows, cols, p, tensor if readable else torch.nn.Parameter(tensor, requires_grad=False))
    assert torch.equal(mask.tile(slice(0, rows), slice(0, cols)), expected.to(torch.int16))
    m, k = slice(rows // 3, rows), slice(cols // 4 * 2, cols)
    assert torch.equal(mask.tile(m, k), expected[m, k].to(torch.int16))


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["base", "x", "h0", "lora_a", "lora_b", "grad_y"])
def test_what_is_not_finite_stays_so_and_spreads_no_further(name, value, dropout_p, lambda_):
    a = arguments(lambda_=lambda_, dropout_p=dropout_p)
    mask = reference.dropout_mask(70, 62, 0.5, SEED)
    column = int((~mask[3]).nonzero()[0])  # dropped, in row 3
    getattr(a, name)[3 if name != "lora_a" else 2, column if name in ("x", "h0", "lora_a") else 1] = value
    expected, actual = by_autograd(a), by_plain(a)
    if (lambda_, name) != (0.0, "h0"):  # which is not read
        assert any(not result.isfinite().all() for result in expected.values())
    for result in actual:
        assert torch.equal(actual[result].isfinite(), expected[result].isfinite()), result


# --- Memory and devices


class Allocations(TorchDispatchMode):
    """The size in bytes of every storage that an operation returned and none of the inputs has."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                storage = tensor.untyped_storage()
                self.sizes[storage.data_ptr()] = max(storage.nbytes(), self.sizes.get(storage.data_ptr(), 0))
        return result


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("x", "adapter"), [(FP32, FP32), (BF16, FP32), (FP16, FP16)])
def test_nothing_as_large_as_an_activation_is_made(x, adapter, dropout_p, monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE", 2**12)
    a = arguments(512, 256, 512, 8, x=x, adapter=adapter, dropout_p=dropout_p)
    t = u = torch.randn(512, 8)
    mixing = (0.3, dropout_p, SEED)
    inputs = [value for value in vars(a).values() if isinstance(value, torch.Tensor)]
    with Allocations(*inputs, t, SEED) as made:
        plain.down(a.x, a.lora_a, a.h0, *mixing, difference=True)
        plain.up_backward(a.grad_y, t, a.lora_b, 1.7)
        plain.down_backward(u, None, a.x, a.h0, *mixing, adapter, None, None)
    assert 512 * 8 * 4 <= max(made.sizes.values()) <= 2**12 * 4
    with Allocations(*inputs, t, SEED) as made:
        plain.down_backward(u, a.lora_a, None, None, *mixing, adapter, x, None)
    assert sum(size >= a.x.nbytes for size in made.sizes.values()) == 1
    with Allocations(*inputs, t, SEED) as made:
        y = plain.add_up(a.base, t, a.lora_b, 1.7, a.lora_bias)
    assert sum(size >= a.base.nbytes for size in made.sizes.values()) == 1 and not y.isnan().any()


@pytest.mark.parametrize("mode", ["meta", "fake"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_tensors_without_data(mode, dropout_p):
    a = arguments(x=BF16, adapter=FP32, lambda_=torch.tensor([0.3]), scaling=torch.tensor(2.0), dropout_p=dropout_p)
    fake = FakeTensorMode()

    def without_data(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to("meta") if mode == "meta" else fake.from_tensor(value)

    b = SimpleNamespace(**{name: without_data(value) for name, value in vars(a).items()})
    seed = without_data(SEED)
    with fake if mode == "fake" else torch.device("meta"):
        t, d = plain.down(b.x, b.lora_a, b.h0, b.lambda_, dropout_p, seed, True)
        u, grad_b = plain.up_backward(b.grad_y, t, b.lora_b, b.scaling)
        results = [t, d, u, grad_b, plain.add_up(b.base, t, b.lora_b, b.scaling, b.lora_bias)]
        results += plain.down_backward(u, b.lora_a, b.x, b.h0, b.lambda_, dropout_p, seed, FP32, BF16, FP32)
    shapes = [(70, 5), (70, 5), (70, 5), (37, 5), (70, 37), (5, 62), (70, 62), (70, 62)]
    assert [tuple(result.shape) for result in results] == shapes
    assert [result.dtype for result in results] == [FP32, FP32, FP32, FP32, BF16, FP32, BF16, FP32]
