"""The same bits from run to run, in CUDA graphs, and on each device of several."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from captured import Captured
from kernel_launches import name_of
from launches import MASK, SMALL

from sibo_triton import reference
from sibo_triton.kernels.precision import INTERPRETED

pytestmark = pytest.mark.gpu

#: The interpreter has no graphs, no second device, and one order: there some show that this file runs.
SOME = SMALL[:2] if INTERPRETED else SMALL


def same_bits(results: dict, others: dict) -> bool:
    return results.keys() == others.keys() and all(torch.equal(results[name], others[name]) for name in results)


@pytest.mark.parametrize("launch", SOME, ids=name_of)
def test_repeats_bitwise(launch, device):
    tensors = launch.inputs(device)
    first = {name: result.clone() for name, result in launch.launch(tensors).items()}
    for _ in range(2 if INTERPRETED else 20):
        assert same_bits(launch.launch(tensors), first)


@pytest.mark.parametrize("launch", SOME, ids=name_of)
def test_replays_of_a_graph_follow_their_inputs(launch, device):
    tensors = launch.inputs(device)
    captured = Captured(lambda: launch.launch(tensors), device)
    before = {name: result.clone() for name, result in captured.replay().items()}
    assert same_bits(before, launch.launch(tensors))
    for name, tensor in tensors.items():
        if name.startswith("seed"):
            tensor += 1
        elif tensor.numel() > 1:
            tensor *= 2
    results = captured.replay()
    assert same_bits(results, launch.launch(tensors))
    assert all(not torch.equal(results[name], before[name]) for name in results)


def test_every_replay_draws_another_mask(device):
    """The seed is drawn inside of the graph, and read back the mask is the reference's."""
    tensors = MASK.inputs(device)
    tensors["x"].fill_(1.0)
    tensors["a0"].copy_(torch.eye(MASK.k))

    def step():
        seed = reference.draw_seed(device)
        return MASK.launch(tensors | {"seed0": seed}) | {"seed": seed}

    captured = Captured(step, device)
    seeds = set()
    for _ in range(5):
        results = captured.replay()
        mask = reference.dropout_mask(MASK.m, MASK.k, MASK.p, results["seed"])
        assert torch.equal(results["t0"] != 0, mask)
        seeds.add(int(results["seed"]))
    assert len(seeds) == 5


@pytest.mark.parametrize("launch", SOME, ids=name_of)
def test_second_device_computes_what_the_first_does(launch, device):
    """Also while the first is the current one."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices, there is one")
    tensors = launch.inputs(device)
    other = {name: tensor.to("cuda:1" if device == "cuda" else device) for name, tensor in tensors.items()}
    on_first, on_second = launch.launch(tensors), launch.launch(other)
    for name, result in on_second.items():
        assert result.device == other[next(iter(other))].device
        torch.testing.assert_close(result.to(on_first[name].device), on_first[name], rtol=1e-2, atol=1e-2)
