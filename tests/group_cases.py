"""Cases of layers that share x: on a CPU, in the interpreter and on a GPU alike. The yardstick is `op_cases`'."""

from __future__ import annotations

import torch
from op_cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    WANTABLE,
    OpCase,
    along_numbers,
    assert_as_good,
    in_dtype,
    make,
    to_cpu,
)

from sibo_triton import reference
from sibo_triton.ops import LoraArguments, lora_linear_group

SHARED = ("x", "initial_residual")


def make_group(cases, device="cpu"):
    """The arguments of each layer, which share x and, where they mix, h0."""
    layers = [make(case, device, seed) for seed, case in enumerate(cases)]
    first = next((layer for layer in layers if layer["initial_residual"] is not None), layers[0])
    for layer in layers:
        layer["x"] = layers[0]["x"]
        if layer["initial_residual"] is not None:
            layer["initial_residual"] = first["initial_residual"]
    return layers


def arguments_of(layers):
    return [LoraArguments(**{name: of for name, of in layer.items() if name != "x"}) for layer in layers]


def outputs_of_group(layers, order=None):
    """By the operation; the layers are asked for their outputs in `order`, and None stands for those that are not."""
    group = lora_linear_group(layers[0]["x"], arguments_of(layers))
    assert group is not None
    ys = [None] * len(layers)
    for i in range(len(layers)) if order is None else order:
        ys[i] = group.output(i)
    return ys


def outputs_by_definition(layers, order=None):
    called = range(len(layers)) if order is None else order
    return [reference.lora_linear(**layer) if i in called else None for i, layer in enumerate(layers)]


def results_of(outputs, layers, grads_y, order=None):
    """y of each layer and every gradient that is wanted, by name; those of what is shared once."""
    ys = outputs(layers, order)
    results = {f"y{i}": y.detach() for i, y in enumerate(ys) if y is not None}
    leaves = {}
    for i, layer in enumerate(layers):
        for name, value in layer.items():
            if getattr(value, "requires_grad", False):
                leaves[name if name in SHARED else f"{name}{i}"] = value
    ys = [(y, g) for y, g in zip(ys, grads_y, strict=True) if y is not None and y.requires_grad]
    if ys:
        asked, given = [y for y, _ in ys], [g.to(y.device, y.dtype) for y, g in ys]
        found = torch.autograd.grad(asked, list(leaves.values()), given, allow_unused=True)
        results |= {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}
    return results


def _sharing(layers):
    """Layers whose x and h0 are one tensor each again, after each was copied for each layer."""
    h0 = next((layer["initial_residual"] for layer in layers if layer["initial_residual"] is not None), None)
    return [
        layer | {"x": layers[0]["x"], "initial_residual": None if layer["initial_residual"] is None else h0}
        for layer in layers
    ]


def assert_group_as_good_as_the_definition(cases, device="cpu", order=None, margin=None):
    layers = make_group(cases, device)
    generator = torch.Generator().manual_seed(9)
    grads_y = [torch.randn(*case.tokens, case.out_features, generator=generator).to(case.dtype) for case in cases]
    on_cpu = [to_cpu(layer) for layer in layers]
    grads_y = [along_numbers(reference.lora_linear, layer, g) for layer, g in zip(on_cpu, grads_y, strict=True)]
    found = results_of(outputs_of_group, layers, grads_y, order)
    by_definition = results_of(outputs_by_definition, _sharing(on_cpu), grads_y, order)
    exact_layers = _sharing([in_dtype(layer, FP64) for layer in on_cpu])
    exact = results_of(outputs_by_definition, exact_layers, grads_y, order)
    assert_as_good(found, by_definition, exact, cases[0].dtype, margin)


def group(*changes, **common):
    return [OpCase(**{"in_features": 48, **common, **change}) for change in changes]


RAGGED = ({"rank": 4, "out_features": 40}, {"rank": 1, "out_features": 8}, {"rank": 19, "out_features": 24})
#: Enough numbers that roundings to 16 bits average out.
RAGGED_16 = ({"rank": 16, "out_features": 40}, {"rank": 8, "out_features": 96}, {"rank": 19, "out_features": 24})
ALL = tuple(name for name in WANTABLE if name != "base")

GROUPS = {
    "alike": group({}, {}, {}, tokens=(2, 9), mixes="number"),
    "ragged": group(*RAGGED, tokens=(70,), mixes="number", wants=ALL, bias=True, lora_bias=True),
    "ragged, dropout": group(*RAGGED, tokens=(70,), mixes="number", dropout_p=0.2, wants=ALL),
    "plain": group(*RAGGED, tokens=(70,), mixes="no", wants=("x", "lora_a", "lora_b")),
    "plain and mixing": group({"mixes": "no"}, {"mixes": "learnable"}, {"mixes": "number"}, tokens=(33,), wants=ALL),
    "plain and mixing, dropout": group(
        {"mixes": "no", "dropout_p": 0.1}, {"mixes": "learnable", "dropout_p": 0.3}, {"mixes": "number"}, wants=ALL
    ),
    "learnable": group({}, {"rank": 9}, tokens=(40,), mixes="learnable", wants=ALL),
    "bf16, fp32 adapters": group(*RAGGED, tokens=(70,), dtype=BF16, adapter_dtype=FP32, mixes="number"),
    "bf16, fp32 adapters, dropout": group(
        *RAGGED, tokens=(70,), dtype=BF16, adapter_dtype=FP32, mixes="tensor", dropout_p=0.05
    ),
    "bf16": group(*RAGGED_16, tokens=(70,), dtype=BF16, mixes="number"),
    "bf16, dropout": group(*RAGGED_16, tokens=(70,), dtype=BF16, mixes="no", dropout_p=0.1),
    "fp16": group(*RAGGED, tokens=(70,), dtype=FP16, adapter_dtype=FP32, mixes="number"),
    "only A": group({}, {}, tokens=(20,), mixes="number", wants=("lora_a",)),
    "only B": group({}, {}, tokens=(20,), mixes="number", wants=("lora_b",)),
    "only x": group({}, {}, tokens=(20,), mixes="number", wants=("x",)),
    "only h0": group({"mixes": "no"}, {"mixes": "number"}, tokens=(20,), wants=("initial_residual",)),
    "nothing": group({}, {}, tokens=(70,), mixes="number", wants=()),
    "nothing, few rows": group(*RAGGED, tokens=(3, 5), mixes="number", bias=True, lora_bias=True, wants=()),
    "nothing, one row, bf16": group(*RAGGED_16, tokens=(1, 1), mixes="no", dtype=BF16, bias=True, wants=()),
    "nothing, few rows, dropout": group(*RAGGED, tokens=(9,), mixes="tensor", dropout_p=0.2, wants=()),
    "A of one": group({"wants": ("lora_a",)}, {"wants": ("lora_b",)}, {"wants": ("x",)}, mixes="number"),
    "no tokens": group({}, {}, tokens=(0,), mixes="number"),
}
