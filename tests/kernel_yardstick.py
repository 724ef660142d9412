"""How far from float64 the result of a launch may be: plain torch's error in the same dtypes, and a margin."""

import torch
from kernel_launches import BF16, FP16, ROUNDING, Expected, Inputs, Launch

from sibo_triton.kernels.precision import INTERPRETED

#: Of a product of float32 operands in bfloat16 parts: each operand to 2^-17, and 2^-16 for the low parts' own product.
#: The interpreter truncates where a GPU rounds.
IN_PARTS = 2e-4 if INTERPRETED else 2**-15
IN_PARTS_TOGETHER = 4e-5 if INTERPRETED else 1e-5
MANY = 256  # values of a result of which roundings average out


def assert_as_good_as_torch(result: torch.Tensor, expected: Expected, name: str) -> None:
    assert (result.shape, result.dtype) == (expected.exact.shape, expected.by_torch.dtype), name
    assert result.is_contiguous(), name
    excess = excess_over_torch(result.double(), expected)
    assert excess is None, f"{name}: {excess}"


def assert_one_percent_is_seen(result: torch.Tensor, expected: Expected, name: str) -> None:
    """Whether a scale wrong by 1 % would not be as good as torch.

    Not asked of a few values; of f(p), which may saturate; nor where the interpreter truncates an operand on the way.
    """
    truncated = INTERPRETED and expected.rounded_to == BF16
    if result.numel() >= MANY and expected.exact.any() and not (truncated or name.startswith("activated")):
        assert excess_over_torch(1.01 * result.double(), expected) is not None, f"{name}: a scale of 1.01 is not seen"


def excess_over_torch(result: torch.Tensor, expected: Expected) -> str | None:
    """By how much a result, in float64, is further from the truth than is allowed; None: it is not."""
    dtype = expected.by_torch.dtype
    truncates = INTERPRETED and BF16 in (dtype, expected.rounded_to)
    error, torch_error = (tensor.double() - expected.exact for tensor in (result, expected.by_torch))
    # Every element: the rounding of operands and of what tensor cores add, 16 products at a time; then of the result.
    # The interpreter's dots are float32 whatever is in memory.
    operands = 0.0 if INTERPRETED and expected.rounded_to is None else expected.operands
    product = operands + expected.in_parts * IN_PARTS + 2**-22 * (expected.length / 16 + 8)
    rounding = ROUNDING[dtype] * (2 if truncates else 1)
    tiny = 2**-24 if dtype == FP16 else 1e-30  # float16's smallest number, and nothing to speak of
    allowed = 1.01 * (product * expected.terms + rounding * expected.exact.abs()) + tiny
    if not (error.abs() <= allowed).all():
        return f"{float((error.abs() / allowed).max())} times what is allowed of an element"
    # All together no worse than torch, by more than a product in parts may be; of a few values, either may be lucky.
    if result.numel() < MANY or expected.exact.bfloat16().unique().numel() < 200:
        return None
    margin = 2.3 if truncates else 1.2
    allowed_together = margin * torch_error.norm() + (IN_PARTS_TOGETHER if expected.in_parts else 1e-6) * (
        expected.terms.norm()
    )
    return None if error.norm() <= allowed_together else f"{float(error.norm() / allowed_together)} times together"


def check(launch: Launch, device: str, tensors: Inputs | None = None, sees_one_percent: bool = False) -> None:
    """A launch against float64.

    Args:
        tensors: what its inputs are, if not its own.
        sees_one_percent: whether to show that the check is as narrow as that.
    """
    tensors = launch.inputs(device) if tensors is None else tensors
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    results, expected = launch.launch(tensors), launch.expected(tensors)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert result.device.type == device
        assert_as_good_as_torch(result, expected[name], name)
        if sees_one_percent:
            assert_one_percent_is_seen(result, expected[name], name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items()), "an input was written to"
