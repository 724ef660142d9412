"""What torch.export makes of a model: a program that needs neither sibo_triton nor Triton to run."""

import pytest
import torch
from adapter_models import base_model, build, plain, sibo
from tiny_models import llama
from torch import nn
from torch.export import Dim, export

from sibo_triton import SiboAdapterConfig, accelerate

CONFIGS = {"plain": plain(), "SIBO": sibo(0.4), "bottleneck": SiboAdapterConfig(bottleneck_size=4, sibo_lambda=0.4)}


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_exported_model_takes_any_batch_and_runs_without_us(kind):
    model = build(base_model(lambda: llama(1)), default=CONFIGS[kind]).eval()
    if kind == "plain":
        accelerate(model)
    ids = torch.arange(14).view(2, 7)
    sizes = {0: Dim("batch", max=64), 1: Dim("length", max=64)}
    exported = export(Logits(model), (ids,), dynamic_shapes={"ids": sizes})
    assert not any("sibo" in str(node.target) for node in exported.graph.nodes if node.op == "call_function")
    for shape in ((2, 7), (3, 11), (1, 20)):
        ids = torch.arange(shape[0] * shape[1]).view(shape)
        torch.testing.assert_close(exported.module()(ids), Logits(model)(ids))
