"""Cases of the operations, and what is asked of them: on a CPU, in the interpreter and on a GPU alike.

The yardstick is autograd through the definition in the same dtypes: the operation's error against float64 may not be
larger than its error, plus a small margin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sibo_triton import reference
from sibo_triton.ops import add_lora, lora_linear

FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class OpCase:
    """One call: shapes, dtypes, and which tensors require grad."""

    tokens: tuple[int, ...] = (2, 9)
    in_features: int = 48
    out_features: int = 40
    rank: int = 4
    dtype: torch.dtype = FP32  # of x, h0, the frozen layer
    adapter_dtype: torch.dtype | None = None  # None: the same
    mixes: str = "tensor"  # "no", "number", "tensor", "learnable"
    dropout_p: float = 0.0
    bias: bool = False
    lora_bias: bool = False
    on_base: bool = False  # add_lora
    wants: tuple[str, ...] = ("x", "lora_a", "lora_b")


WANTABLE = ("x", "weight", "bias", "base", "lora_a", "lora_b", "lora_bias", "initial_residual")


def make(case: OpCase, device: str = "cpu", seed: int = 0) -> dict[str, object]:
    """The arguments of a case, in the order of the operation."""
    generator = torch.Generator().manual_seed(seed)

    def randn(name, *shape, dtype=case.dtype, scale=1.0):
        tensor = (scale * torch.randn(*shape, generator=generator)).to(device, dtype)
        return tensor.requires_grad_(name in case.wants)

    adapter_dtype = case.adapter_dtype or case.dtype
    k, n, r = case.in_features, case.out_features, case.rank
    arguments: dict[str, object] = {}
    if case.on_base:
        arguments["base"] = randn("base", *case.tokens, n)
    arguments["x"] = randn("x", *case.tokens, k)
    if not case.on_base:
        arguments["weight"] = randn("weight", n, k, scale=k**-0.5)
        arguments["bias"] = randn("bias", n) if case.bias else None
    arguments["lora_a"] = randn("lora_a", r, k, dtype=adapter_dtype, scale=k**-0.5)
    arguments["lora_b"] = randn("lora_b", n, r, dtype=adapter_dtype, scale=r**-0.5)
    arguments["scaling"] = 1.5
    arguments["initial_residual"] = None if case.mixes == "no" else randn("initial_residual", *case.tokens, k)
    arguments["lambda_"] = {"no": 0.0, "number": 0.3}.get(case.mixes, torch.tensor([0.3], device=device))
    if case.mixes == "learnable":
        arguments["lambda_"].requires_grad_()
    arguments["dropout_p"] = case.dropout_p
    arguments["dropout_seed"] = torch.randint(0, 2**62, (1,), generator=generator).to(device)
    arguments["lora_bias"] = randn("lora_bias", n, dtype=adapter_dtype) if case.lora_bias else None
    return arguments


def output_and_gradients(operation, arguments: dict[str, object], grad_y: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a call gives: y, and the gradient of each tensor that requires one."""
    y = operation(**arguments)
    results = {"y": y.detach()}
    wanted = trainable(arguments)
    if wanted:
        gradients = torch.autograd.grad(y, list(wanted.values()), grad_y.to(y.dtype))
        results |= dict(zip(wanted, gradients, strict=True))
    return results


def in_dtype(arguments: dict[str, object], dtype: torch.dtype, device: str | None = None) -> dict[str, object]:
    """The same numbers in another floating dtype."""

    def convert(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value.to(device) if isinstance(value, torch.Tensor) else value
        return value.detach().to(device, dtype).requires_grad_(value.requires_grad)

    return {name: convert(value) for name, value in arguments.items()}


def operations(case: OpCase):
    """The operation of a case, and its definition."""
    return (add_lora, reference.add_lora) if case.on_base else (lora_linear, reference.lora_linear)


def assert_as_good_as_the_definition(case: OpCase, device: str = "cpu", margin: float | None = None) -> None:
    """y and every gradient, norm-wise, against float64."""
    operation, definition = operations(case)
    arguments = make(case, device)
    on_cpu = to_cpu(arguments)
    grad_y = torch.randn(*case.tokens, case.out_features, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    grad_y = along_numbers(definition, on_cpu, grad_y)
    found = output_and_gradients(operation, arguments, grad_y.to(device))
    by_definition = output_and_gradients(definition, on_cpu, grad_y)
    exact = output_and_gradients(definition, in_dtype(on_cpu, FP64), grad_y)
    assert {"y", *trainable(arguments)} == set(found)
    assert_as_good(found, by_definition, exact, case.dtype, margin)


def along_numbers(definition, arguments: dict[str, object], grad_y: torch.Tensor) -> torch.Tensor:
    """dY, and as much along dy/dlambda and dy/ds where these learn: their gradients are sums that else would cancel."""
    wide, added = in_dtype(arguments, FP64), torch.zeros_like(grad_y, dtype=FP64)
    for name in ("lambda_", "scaling"):
        if getattr(arguments[name], "requires_grad", False):
            with torch.no_grad():
                more, less = (definition(**wide | {name: wide[name] + step}) for step in (0.01, -0.01))
            moved = more - less
            if moved.any():
                added += moved * (grad_y.double().norm() / moved.norm())
    return (grad_y.double() + added).to(grad_y.dtype)


def assert_as_good(
    found: dict[str, torch.Tensor],
    by_definition: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    dtype: torch.dtype,
    margin: float | None = None,
) -> None:
    """Each result, norm-wise: no further from float64's than the definition's in the same dtypes, and a margin.

    Also that a scale wrong by 1 % would not be as good: up or down, as the interpreter, which truncates, is off by some
    tenths of it in one direction.

    Args:
        dtype: of the activations.
        margin: of a result's size. Default: of the CPU.
    """
    margin = {FP64: 1e-12, FP32: 3e-6}.get(dtype, 1e-4) if margin is None else margin
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        assert found[name].dtype == by_definition[name].dtype, name
        assert found[name].shape == truth.shape, name
        result, size = found[name].cpu().double(), float(truth.norm())
        error, allowed = (float((each - truth).norm()) for each in (result, by_definition[name].cpu().double()))
        # One number has no errors that average out: that of one rounding to 16 bits of its terms.
        own_margin = max(margin, 1e-3) if truth.numel() == 1 and dtype.itemsize == 2 else margin
        bound = 1.2 * allowed + own_margin * size + 1e-30
        assert math.isfinite(error) and error <= bound, (name, error, allowed, size)
        wrong = max(float((scale * result - truth).norm()) for scale in (0.99, 1.01))
        assert size == 0 or wrong > bound, (name, "a scale wrong by 1 % is not seen", bound / size)


def to_cpu(arguments: dict[str, object]) -> dict[str, object]:
    """The same arguments on the CPU."""
    return {
        name: value.detach().cpu().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def trainable(arguments: dict[str, object]) -> dict[str, torch.Tensor]:
    """The tensors that require grad, by name."""
    return {name: value for name, value in arguments.items() if getattr(value, "requires_grad", False)}


def saved_storages(run):
    """The storages that autograd holds after `run`, by saved-tensor hooks: {address: bytes}."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    return y, storages


class Allocations(TorchDispatchMode):
    """Sees every storage that operations make, and knows which of them are still alive, whoever holds them."""

    def __init__(self):
        super().__init__()
        self._made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made.setdefault(StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self, beside=()) -> int:
        """Bytes that are still held, without the storages of the tensors `beside`."""
        known = {tensor.untyped_storage()._cdata for tensor in beside}
        return sum(size for ref, size in self._made.items() if not ref.expired() and ref.cdata not in known)


# Chosen so that each value meets most of the others' once.
CASES = [
    OpCase(),
    OpCase(mixes="no", bias=True, wants=WANTABLE),
    OpCase(mixes="learnable", dropout_p=0.2, lora_bias=True, wants=WANTABLE),
    OpCase(tokens=(7,), in_features=33, out_features=1, rank=1, mixes="number", dropout_p=0.05, bias=True),
    OpCase(tokens=(1, 1), in_features=1, out_features=5, rank=3, mixes="learnable", wants=WANTABLE),
    OpCase(dtype=BF16, adapter_dtype=FP32, mixes="learnable", dropout_p=0.1, bias=True, wants=WANTABLE),
    OpCase(tokens=(3, 50), in_features=130, out_features=70, rank=24, dtype=BF16, dropout_p=0.05, lora_bias=True),
    OpCase(tokens=(70,), in_features=96, out_features=130, rank=16, dtype=FP16, adapter_dtype=FP32, bias=True),
    OpCase(tokens=(70,), in_features=64, out_features=65, rank=48, dtype=FP16, mixes="learnable", wants=WANTABLE),
    OpCase(tokens=(4, 2, 9), rank=8, mixes="number", on_base=True, lora_bias=True, wants=WANTABLE),
    OpCase(tokens=(66,), rank=64, dtype=BF16, adapter_dtype=FP32, dropout_p=0.3, on_base=True, wants=WANTABLE),
    OpCase(tokens=(66,), in_features=31, rank=128, dtype=BF16, mixes="learnable", on_base=True),
    OpCase(tokens=(5,), in_features=40, rank=200, mixes="no", dropout_p=0.5, wants=("lora_b",)),
    OpCase(tokens=(66,), in_features=40, rank=16, dtype=BF16, wants=("lora_a",)),
    OpCase(tokens=(66,), in_features=40, rank=16, dtype=BF16, dropout_p=0.1, wants=("x",)),
    OpCase(tokens=(66,), in_features=40, rank=16, wants=("initial_residual",), mixes="tensor"),
    OpCase(tokens=(66,), in_features=40, rank=16, wants=(), mixes="learnable"),
    OpCase(tokens=(66,), in_features=40, rank=16, wants=()),
]


def name_of(case: OpCase) -> str:
    """A short name for pytest."""
    short = {FP64: "fp64", FP32: "fp32", FP16: "fp16", BF16: "bf16"}
    dtypes = short[case.dtype] + ("" if case.adapter_dtype is None else f"-{short[case.adapter_dtype]}")
    kind = "base" if case.on_base else "linear"
    return f"{kind}-{dtypes}-r{case.rank}-{case.mixes}-p{case.dropout_p}-{len(case.wants)}wanted"
