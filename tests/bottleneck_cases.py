"""Cases of the bottleneck operation, for plain PyTorch and the kernels alike; the yardstick is that of op_cases.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from op_cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    along_numbers,
    assert_as_good,
    in_dtype,
    output_and_gradients,
    to_cpu,
    trainable,
)

from sibo_triton import reference
from sibo_triton.ops import BottleneckArguments, add_bottleneck, bottleneck_group, bottleneck_linear


@dataclass(frozen=True)
class BottleneckCase:
    """One call: shapes, dtypes, and which tensors require grad."""

    tokens: tuple[int, ...] = (2, 9)
    in_features: int = 48
    out_features: int | None = None  # None: in series, the base is x
    bottleneck: int = 8
    activation: str = "tanh"
    dtype: torch.dtype = FP32  # of base, x and h0
    adapter_dtype: torch.dtype | None = None  # None: the same
    mixes: str = "tensor"  # "no", "number", "tensor", "learnable"
    scaling: str = "number"  # "number", "learnable"
    dropout_p: float = 0.0
    biases: bool = True
    wants: tuple[str, ...] = ("x", "down_weight", "up_weight", "down_bias", "up_bias")


WANTABLE = ("base", "x", "down_weight", "up_weight", "down_bias", "up_bias", "initial_residual")

# Chosen so that each value meets most of the others' once.
BOTTLENECK_CASES = [
    BottleneckCase(),
    BottleneckCase(out_features=40, mixes="no", activation="relu", wants=WANTABLE),
    BottleneckCase(mixes="learnable", scaling="learnable", dropout_p=0.2, activation="gelu", wants=WANTABLE),
    BottleneckCase((7,), 33, 1, 1, "silu", mixes="number", dropout_p=0.05, biases=False, wants=WANTABLE),
    BottleneckCase((1, 1), 1, 5, 3, "sigmoid", mixes="learnable", wants=WANTABLE),
    BottleneckCase(dtype=BF16, adapter_dtype=FP32, mixes="learnable", dropout_p=0.1, wants=WANTABLE),
    BottleneckCase((3, 50), 130, 70, 24, "gelu_pytorch_tanh", BF16, dropout_p=0.05, scaling="learnable"),
    BottleneckCase((70,), 96, None, 16, "silu", FP16, FP32, biases=False, scaling="learnable"),
    BottleneckCase((70,), 64, 65, 48, "tanh", FP16, mixes="learnable", wants=WANTABLE),
    BottleneckCase((4, 2, 9), bottleneck=256, mixes="number", wants=WANTABLE),
    BottleneckCase((66,), 40, None, 16, "relu", wants=("down_bias",)),
    BottleneckCase((66,), 40, 31, 16, mixes="no", dropout_p=0.5, wants=("up_weight",)),
    BottleneckCase((66,), 40, 31, 16, mixes="no", wants=("up_bias", "base")),
    BottleneckCase((66,), 40, None, 16, dtype=BF16, dropout_p=0.1, wants=("x",)),
    BottleneckCase((66,), 40, None, 16, wants=("initial_residual",)),
    BottleneckCase((66,), 40, None, 16, wants=(), mixes="learnable"),
    BottleneckCase((66,), 40, 31, 16, wants=(), scaling="learnable"),
    BottleneckCase((66,), 40, None, 16, wants=()),
]


def name_of(case: BottleneckCase) -> str:
    """A short name for pytest."""
    short = {FP64: "fp64", FP32: "fp32", FP16: "fp16", BF16: "bf16"}
    dtypes = short[case.dtype] + ("" if case.adapter_dtype is None else f"-{short[case.adapter_dtype]}")
    kind = "series" if case.out_features is None else "base"
    options = f"{case.activation}-{case.mixes}-{case.scaling}-p{case.dropout_p}"
    return f"{kind}-{dtypes}-b{case.bottleneck}-{options}-{len(case.wants)}wanted"


def make(case: BottleneckCase, device: str = "cpu", seed: int = 0) -> dict[str, object]:
    """The arguments of a case."""
    generator = torch.Generator().manual_seed(seed)
    adapter_dtype = case.adapter_dtype or case.dtype

    def randn(name, *shape, dtype=adapter_dtype, scale=1.0):
        tensor = (scale * torch.randn(*shape, generator=generator)).to(device, dtype)
        return tensor.requires_grad_(name in case.wants)

    def one(value, learns):
        return torch.tensor([value], device=device, requires_grad=learns)

    k, b = case.in_features, case.bottleneck
    n = case.out_features or k
    x = randn("x", *case.tokens, k, dtype=case.dtype)
    return {
        "base": x if case.out_features is None else randn("base", *case.tokens, n, dtype=case.dtype),
        "x": x,
        "down_weight": randn("down_weight", b, k, scale=k**-0.5),
        "up_weight": randn("up_weight", n, b, scale=b**-0.5),
        "scaling": one(1.5, True) if case.scaling == "learnable" else 1.5,
        "activation": case.activation,
        "down_bias": randn("down_bias", b) if case.biases else None,
        "up_bias": randn("up_bias", n) if case.biases else None,
        "initial_residual": (
            None if case.mixes == "no" else randn("initial_residual", *case.tokens, k, dtype=case.dtype)
        ),
        "lambda_": {"no": 0.0, "number": 0.3}.get(case.mixes, one(0.3, case.mixes == "learnable")),
        "dropout_p": case.dropout_p,
        "dropout_seed": torch.randint(0, 2**62, (1,), generator=generator).to(device),
    }


def wanted_of(arguments: dict[str, object]) -> dict[str, torch.Tensor]:
    """The tensors that require grad; in series x once."""
    wanted = trainable(arguments)
    if arguments["base"] is arguments["x"]:
        wanted.pop("base", None)
    return wanted


def run(operation, arguments: dict[str, object], grad_y: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a call gives: y, and the gradient of each tensor that requires one."""
    if arguments["base"] is not arguments["x"]:
        return output_and_gradients(operation, arguments, grad_y)
    rest = {name: value for name, value in arguments.items() if name != "base"}
    return output_and_gradients(lambda **given: operation(base=given["x"], **given), rest, grad_y)


def converted(arguments: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """The same numbers in another dtype."""
    return _series_again(arguments, in_dtype(arguments, dtype))


def _series_again(arguments: dict[str, object], copy: dict[str, object]) -> dict[str, object]:
    return copy | {"base": copy["x"]} if arguments["base"] is arguments["x"] else copy


def assert_as_good_as_the_definition(case: BottleneckCase, device: str = "cpu", margin: float | None = None) -> None:
    """y and every gradient, norm-wise, against float64."""
    arguments = make(case, device)
    n = case.out_features or case.in_features
    on_cpu = _series_again(arguments, to_cpu(arguments))
    grad_y = torch.randn(*case.tokens, n, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    grad_y = along_numbers(reference.add_bottleneck, on_cpu, grad_y)
    found = run(add_bottleneck, arguments, grad_y.to(device))
    by_definition = run(reference.add_bottleneck, on_cpu, grad_y)
    exact = run(reference.add_bottleneck, converted(on_cpu, FP64), grad_y)
    assert {"y", *wanted_of(arguments)} == set(found)
    assert_as_good(found, by_definition, exact, case.dtype, margin)


def assert_beside_a_linear_as_good_as_the_definition(case: BottleneckCase, device: str = "cpu", margin=None) -> None:
    """`bottleneck_linear`: y and every gradient, W0's and its bias's among them, norm-wise, against float64."""
    arguments = make(case, device)
    base = arguments.pop("base")
    n, k = case.out_features or case.in_features, case.in_features
    generator = torch.Generator().manual_seed(2)
    for name, shape in (("weight", (n, k)), ("bias", (n,))):
        value = (k**-0.5 * torch.randn(*shape, generator=generator)).to(device, case.dtype)
        arguments[name] = value.requires_grad_("base" in case.wants)
    in_parallel = partial(reference.bottleneck_adapter, placement="parallel")
    on_cpu = to_cpu(arguments)
    grad_y = along_numbers(in_parallel, on_cpu, torch.randn(base.shape, generator=generator).to(case.dtype))
    found = output_and_gradients(bottleneck_linear, arguments, grad_y.to(device))
    by_definition = output_and_gradients(in_parallel, on_cpu, grad_y)
    exact = output_and_gradients(in_parallel, in_dtype(on_cpu, FP64), grad_y)
    assert_as_good(found, by_definition, exact, case.dtype, margin)


def assert_pair_as_good_as_the_definition(in_series: bool, dtype, adapter_dtype, device="cpu", margin=None) -> None:
    """Two adapters that read one x, in series or each beside its linear: both outputs and every gradient."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape, dtype=adapter_dtype, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype).requires_grad_()

    m, k = 70, 130
    tensors = {"x": randn(m, k, dtype=dtype), "initial_residual": randn(m, k, dtype=dtype)}
    for i, (size, n) in enumerate(((24, 90), (8, 40))):
        width = k if in_series else n
        if not in_series:
            tensors |= {f"weight{i}": randn(n, k, dtype=dtype, scale=k**-0.5), f"bias{i}": randn(n, dtype=dtype)}
        tensors |= {
            f"down_weight{i}": randn(size, k, scale=k**-0.5),
            f"up_weight{i}": randn(width, size, scale=size**-0.5),
            f"down_bias{i}": randn(size),
            f"up_bias{i}": randn(width),
            f"lambda_{i}": torch.tensor([0.3 / (i + 1)], device=device, requires_grad=True),
            f"scaling{i}": torch.tensor([0.7 + i], device=device, requires_grad=i == 1),
        }
    seeds = reference.draw_seeds(2, device)
    grads_y = [torch.randn(m, k if in_series else n, generator=generator).to(dtype) for n in (90, 40)]

    def layers(given):
        own = [{name[:-1]: of for name, of in given.items() if name[-1] == str(i)} for i in range(2)]
        rest = {"initial_residual": given["initial_residual"], "dropout_p": 0.1, "activation": "silu"}
        return [layer | rest | {"dropout_seed": seeds[i].to(given["x"].device)} for i, layer in enumerate(own)]

    def by_group(given):
        group = bottleneck_group(given["x"], [BottleneckArguments(**layer) for layer in layers(given)])
        assert group is not None
        return [group.output(i) for i in (1, 0)][::-1]

    def definition(x, **layer):
        if in_series:
            return reference.add_bottleneck(x, x, **layer)
        return reference.bottleneck_adapter(x, placement="parallel", **layer)

    def by_definition(given):
        return [definition(given["x"], **layer) for layer in layers(given)]

    def results(outputs, given):
        ys = outputs(given)
        wanted = {name: of for name, of in given.items() if of.requires_grad}
        grads = [g.to(y.device, y.dtype) for g, y in zip(grads_y, ys, strict=True)]
        gradients = torch.autograd.grad(ys, list(wanted.values()), grads)
        return {"y0": ys[0].detach(), "y1": ys[1].detach(), **dict(zip(wanted, gradients, strict=True))}

    on_cpu = to_cpu(tensors)
    of_layers = [{"x": on_cpu["x"], **layer} for layer in layers(on_cpu)]
    grads_y = [along_numbers(definition, layer, g) for layer, g in zip(of_layers, grads_y, strict=True)]
    found = results(by_group, tensors)
    exact = results(by_definition, in_dtype(on_cpu, FP64))
    assert_as_good(found, results(by_definition, on_cpu), exact, dtype, margin)
