"""Known calls give the values of the long path: with launches that are stood in for by plain PyTorch.

What reaches a GPU's driver is compared in kernels_compiled/test_known_calls.py, where nothing is computed, and the bits
that a GPU computes in gpu/test_replay.py.
"""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from group_cases import GROUPS, group, make_group, outputs_of_group, results_of
from op_cases import CASES, FP64, OpCase, make, name_of, operations, output_and_gradients

from benchmarks.ahead_of_time.without_gpu import kernels_chosen
from sibo_triton.kernels.launching import BoundedCache
from sibo_triton.ops import known_calls, torch_backend, triton_backend

COMPUTES = (
    *("add_up", "down_activated_siblings", "down_backward_siblings", "down_siblings", "low_rank_siblings", "up"),
    "up_backward_siblings",
)


class Recorded:
    """Stands for recorded launches: computes anew, for tensors of the values that it was recorded with."""

    def __init__(self, tensors, compute):
        self.tensors, self.compute, self.runs = list(tensors), compute, 0

    def __call__(self, tensors):
        self.runs += 1
        for of, was in zip(tensors, self.tensors, strict=True):
            assert (of is None) == (was is None)
            assert of is None or (of.dtype == was.dtype and torch.equal(of.reshape(was.shape), was))
        with torch.no_grad():
            return list(self.compute())


@pytest.fixture
def recorded(monkeypatch):
    """The launches that are recorded, while the kernels are chosen and plain PyTorch computes in their place."""
    records = {}

    def key_of(key, tensors):
        return key, tuple(None if of is None else (of.dtype, of.shape, of.stride()) for of in tensors)

    def replayed(key, tensors, compute):
        records[key_of(key, tensors)] = Recorded(tensors, compute)
        return compute()

    for name in COMPUTES:
        monkeypatch.setattr(triton_backend, name, getattr(torch_backend, name))
    monkeypatch.setattr(triton_backend, "replayed", replayed)
    monkeypatch.setattr(triton_backend, "tape_of", lambda key, tensors: records.get(key_of(key, tensors)))
    monkeypatch.setattr(triton_backend, "repeats", lambda: True)
    monkeypatch.setattr(triton_backend, "calls", BoundedCache())
    with kernels_chosen():
        yield records


def check(step, records, cases):
    first = step()
    with mock.patch.object(known_calls, "remember", side_effect=AssertionError("the call is not known")):
        for _ in range(2):  # the backward is known the second time
            found = step()
            assert first.keys() == found.keys()
            for name, of in first.items():
                assert of.dtype == found[name].dtype and of.stride() == found[name].stride()
                assert torch.equal(of, found[name]), name
    if all({"weight", "lora_bias"}.isdisjoint(case.wants) for case in cases):  # whose gradients are the long path's
        runs = [of.runs for of in records.values()]
        assert runs and 0 not in runs or 0 in (*cases[0].tokens, cases[0].in_features)


MORE = [
    OpCase(bias=True, wants=("x", "bias", "lora_b")),
    OpCase(mixes="learnable", on_base=True, wants=("base", "lora_a")),
    OpCase(mixes="number", on_base=True, wants=("x", "base", "initial_residual")),
]
MORE_GROUPS = {
    "two lambdas, biases": group(
        {}, {"rank": 9}, {"mixes": "no"}, tokens=(40,), mixes="learnable", bias=True, wants=("x", "lora_a", "bias")
    ),
    "lambdas alone": group({"mixes": "number"}, {}, {"rank": 2}, tokens=(40,), mixes="learnable", wants=()),
}


@pytest.mark.parametrize("case", [*(case for case in CASES if case.dtype != FP64), *MORE], ids=name_of)
def test_a_layer(case, recorded):
    arguments = make(case)
    grad_y = torch.randn(*case.tokens, case.out_features)
    check(lambda: output_and_gradients(operations(case)[0], arguments, grad_y), recorded, [case])


@pytest.mark.parametrize("name", GROUPS | MORE_GROUPS)
def test_layers_that_share_x(name, recorded):
    cases = (GROUPS | MORE_GROUPS)[name]
    layers = make_group(cases)
    grads_y = [torch.randn(*case.tokens, case.out_features).to(case.dtype) for case in cases]
    check(lambda: results_of(outputs_of_group, layers, grads_y), recorded, cases)
