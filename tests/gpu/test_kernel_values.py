"""The values of every kernel on the device against float64 there, where plain torch's error is the yardstick."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernel_launches import name_of
from kernel_yardstick import assert_as_good_as_torch, check
from launches import FAR, FAR_Y, LARGE, VALUES

from sibo_triton.kernels.precision import INTERPRETED

pytestmark = pytest.mark.gpu

#: In the interpreter they are as small as the others: some show that this file runs.
SOME_LARGE = LARGE[::4] if INTERPRETED else LARGE


@pytest.mark.parametrize("launch", VALUES, ids=name_of)
def test_values(launch, device):
    check(launch, device, sees_one_percent=True)


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
