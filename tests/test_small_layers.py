"""Small layers on a CPU, as users have them: a whole model takes `sibo_triton.ops.small`, and gives the same."""

import pytest
import torch
from adapter_models import base_model, close, plain, sibo
from peft import get_peft_model
from tiny_models import randomise_adapters, token_inputs

from sibo_triton import SiboLoraConfig, accelerate
from sibo_triton.ops import lora_linear, small

CONFIGS = {
    "SIBO": sibo(0.3),
    "learnable": sibo(0.3, sibo_learnable=True, lora_bias=True),
    "dropout": sibo(0.3, lora_dropout=0.2),
    "plain": plain(lora_dropout=0.2),
}


@pytest.fixture
def calls(monkeypatch):
    calls, original = [], small.low_rank
    monkeypatch.setattr(small, "low_rank", lambda *arguments: calls.append(1) or original(*arguments))
    return calls


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "checkpointed", "checkpointed, reentrant"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_gives_the_same_loss_and_gradients(name, checkpointing, calls, monkeypatch):
    model = get_peft_model(base_model(), CONFIGS[name])
    randomise_adapters(model)
    if name == "plain":
        accelerate(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    inputs = token_inputs()
    results = []
    for elements in (-1, 2**20):
        monkeypatch.setattr(small, "ELEMENTS", elements)
        torch.manual_seed(1)  # of the masks, which are the same
        model.train().zero_grad()
        model(**inputs).loss.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert bool(calls) == (elements > 0)
    assert results[0].keys() == results[1].keys() and len(results[0]) >= 2 * 4 * 3
    for parameter, expected in results[0].items():
        close(results[1][parameter], expected)


def test_it_generates_the_same(calls, monkeypatch):
    model = get_peft_model(base_model(), SiboLoraConfig(r=4, target_modules="all-linear", sibo_lambda=0.3))
    randomise_adapters(model)
    ids, tokens = token_inputs()["input_ids"], []
    for elements in (-1, 2**20):
        monkeypatch.setattr(small, "ELEMENTS", elements)
        tokens.append(model.eval().generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert calls and torch.equal(*tokens)


@pytest.mark.parametrize(("scaling", "dropout_p"), [(1e5, 0.0), (-7e4, 0.0), (70.0, 0.999)])
def test_a_factor_that_float16_does_not_hold(scaling, dropout_p, monkeypatch):
    """Of s and dropout's scale, where what it multiplies is small."""
    x, weight, lora_a, lora_b = (torch.randn(size).half() for size in ((8, 16), (4, 16), (2, 16), (4, 2)))
    arguments = (x, weight, None, lora_a * 1e-2, lora_b * 1e-2, scaling)
    results = []
    for elements in (-1, 2**20):
        monkeypatch.setattr(small, "ELEMENTS", elements)
        results.append(lora_linear(*arguments, dropout_p=dropout_p, dropout_seed=torch.tensor([3])))
    assert results[0].isfinite().all()
    torch.testing.assert_close(*results, atol=1e-2, rtol=1e-2)
