"""Whole models, all LoRA layers through the kernels: loss and every gradient are those of the definition."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft import get_peft_model
from tiny_models import ARCHITECTURES, randomise_adapters

from sibo_triton import SiboLoraConfig, explain, reference
from sibo_triton.ops import BACKEND_VARIABLE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1, "sibo_learnable": True}], ids=["fixed", "learnable"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_model_trains_on_the_kernels_as_on_the_definition(name, options, device, monkeypatch):
    architecture = ARCHITECTURES[name]
    config = SiboLoraConfig(
        r=4, target_modules=list(architecture.targets), sibo_lambda=0.4, task_type=architecture.task_type, **options
    )
    model, inputs = get_peft_model(architecture.build(), config).train(), architecture.inputs()
    randomise_adapters(model)
    model, inputs = model.to(device), {key: value.to(device) for key, value in inputs.items()}
    assert {row.backend for row in explain(model)} == {"triton"}
    assert {row.runs for row in explain(model)} == {"adapter" if name == "gpt2" else "fused"}

    def loss_and_gradients():
        torch.manual_seed(3)
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    # Layers that share x draw their seeds at once, the definition's one after the other: on CUDA these are others.
    monkeypatch.setattr(reference, "draw_seeds", lambda n, device: [reference.draw_seed(device) for _ in range(n)])
    loss, gradients = loss_and_gradients()
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    expected_loss, expected = loss_and_gradients()
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected.keys() and len(gradients) >= 2 * len(explain(model))
    if options:
        assert sum("logit_bias" in name and gradient.any() for name, gradient in gradients.items()) > 3
    for parameter, gradient in gradients.items():
        error = float((gradient - expected[parameter]).norm())
        assert error <= 1e-4 * float(expected[parameter].norm()) + 1e-7, parameter
