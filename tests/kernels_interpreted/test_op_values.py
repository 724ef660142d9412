"""The operations on interpreted kernels: the cases of tests/op_cases.py, whose other runs are on plain PyTorch."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from op_cases import CASES, assert_as_good_as_the_definition, make, name_of

from sibo_triton.ops import backend_for, lora_linear


def test_they_run_on_the_kernels(monkeypatch):
    """What the other tests here rely on."""
    assert backend_for(torch.device("cpu"), [torch.float32]).name == "triton"
    monkeypatch.setattr("sibo_triton.kernels.down.down_kernel", None)
    with pytest.raises(TypeError):
        lora_linear(**make(CASES[0]))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_values_and_gradients_are_as_good_as_the_definitions(case):
    # twice the rounding in bfloat16: the interpreter cuts off where a GPU rounds to nearest
    margin = {torch.float32: 3e-6, torch.float16: 3e-4, torch.bfloat16: 4e-3}[case.dtype]
    assert_as_good_as_the_definition(case, margin=margin)
