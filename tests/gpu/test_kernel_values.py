"""The values of every kernel on the device against float64 there, where plain torch's error is the yardstick."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernel_launches import BF16, FP16, ROUNDING, Expected, name_of
from launches import FAR, FAR_Y, LARGE, VALUES

from sibo_triton.kernels.precision import INTERPRETED

pytestmark = pytest.mark.gpu

#: In the interpreter they are as small as the others: some show that this file runs.
SOME_LARGE = LARGE[::4] if INTERPRETED else LARGE

#: Of a product of float32 operands in bfloat16 parts: each operand to 2^-17, and 2^-16 for the low parts' own product.
#: The interpreter truncates where a GPU rounds.
IN_PARTS = 2e-4 if INTERPRETED else 2**-15
IN_PARTS_TOGETHER = 4e-5 if INTERPRETED else 1e-5


def assert_as_good_as_torch(result: torch.Tensor, expected: Expected, name: str) -> None:
    assert result.shape == expected.exact.shape, name
    truncates = INTERPRETED and BF16 in (result.dtype, expected.rounded_to)
    error, torch_error = (tensor.double() - expected.exact for tensor in (result, expected.by_torch))
    # Every element: the rounding of operands and of what tensor cores add, 16 products at a time; then of the result.
    product = expected.operands + expected.in_parts * IN_PARTS + 2**-22 * (expected.length / 16 + 8)
    rounding = ROUNDING[result.dtype] * (2 if truncates else 1)
    tiny = 2**-24 if result.dtype == FP16 else 1e-30  # float16's smallest number, and nothing to speak of
    allowed = 1.01 * (product * expected.terms + rounding * expected.exact.abs()) + tiny
    assert (error.abs() <= allowed).all(), f"{name}: {float((error.abs() / allowed).max())} times what is allowed"
    # All together no worse than torch, by more than a product in parts may be; of a few, either may be lucky.
    if result.numel() < 256:
        return
    margin = 2.3 if truncates else 1.2
    together = IN_PARTS_TOGETHER if expected.in_parts else 1e-6
    assert error.norm() <= margin * torch_error.norm() + together * expected.terms.norm(), name


def check(launch, device: str) -> None:
    tensors = launch.inputs(device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    results, expected = launch.launch(tensors), launch.expected(tensors)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert result.device.type == device
        assert_as_good_as_torch(result, expected[name], name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items()), "an input was written to"


@pytest.mark.parametrize("launch", VALUES, ids=name_of)
def test_values(launch, device):
    check(launch, device)


@pytest.mark.parametrize("launch", SOME_LARGE, ids=name_of)
def test_values_of_many_tokens(launch, device):
    check(launch, device)


def need_memory(gib: int, device: str) -> None:
    if device == "cuda" and torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free memory on the device")


@pytest.mark.parametrize("launch", FAR, ids=name_of)
def test_offsets_past_2_31(launch, device):
    """Three rows, 2^30 elements and more apart."""
    need_memory(16, device)
    check(launch, device)


def test_output_offsets_past_2_31(device):
    need_memory(8, device)
    tensors = FAR_Y.inputs(device)
    y = FAR_Y.launch(tensors)["y"]
    assert device == "cpu" or y.numel() > 2**31
    for rows in (slice(0, 64), slice(-70, None)):
        expected = FAR_Y.expected(tensors | {"t": tensors["t"][rows]})["y"]
        assert_as_good_as_torch(y[rows], expected, "y")
