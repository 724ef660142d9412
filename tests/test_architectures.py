"""SIBO-LoRA against an independent oracle, on one tiny model for each way in which h0 or the layers differ."""

from __future__ import annotations

import pytest
import torch
from oracle import oracle_like
from peft import get_peft_model
from tiny_models import ARCHITECTURES, Architecture, randomise_adapters

from sibo_triton import SiboLoraConfig, explain

LAMBDA = 0.3


def _lora_kwargs(architecture: Architecture) -> dict:
    targets = list(architecture.targets) if architecture.targets != ("all-linear",) else "all-linear"
    return {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": architecture.task_type}


def _expected_mixing(architecture: Architecture, model: torch.nn.Module) -> set[str]:
    names = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    in_a_stack = [name for name in names if any(name.startswith(f"{stack}.") for stack in architecture.stacks)]
    return {name for name in in_a_stack if any(name.endswith(f".{ending}") for ending in architecture.mixing)}


def _vit(architecture: Architecture, model: torch.nn.Module) -> set[str]:
    # transformers renamed ViT's modules between the tested pairs; told apart by their place instead
    names = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    old = ("query", "key", "value", "intermediate.dense")
    new = ("q_proj", "k_proj", "v_proj", "fc1")
    return {name for name in names if any(name.endswith(f".{ending}") for ending in (*old, *new))}


def _outputs_and_gradients(model: torch.nn.Module, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


@pytest.mark.oldest
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_gradients_equal_the_oracle(name: str) -> None:
    architecture = ARCHITECTURES[name]
    torch.manual_seed(1)
    base = architecture.build()
    weights = base.state_dict()

    def rebuild() -> torch.nn.Module:
        twin = architecture.build()
        twin.load_state_dict(weights)
        return twin

    kwargs = _lora_kwargs(architecture)
    model = get_peft_model(rebuild(), SiboLoraConfig(**kwargs, sibo_lambda=LAMBDA))
    randomise_adapters(model)
    mixing = _vit(architecture, model) if name == "vit" else _expected_mixing(architecture, model)
    assert {row.module.removeprefix("base_model.model.") for row in explain(model) if row.mixes} == mixing

    inputs = architecture.inputs()
    model.train()
    logits, gradients = _outputs_and_gradients(model, inputs)
    oracle = oracle_like(rebuild, kwargs, model, LAMBDA, mixing)
    expected_logits, expected_gradients = _outputs_and_gradients(oracle, inputs)
    plain = oracle_like(rebuild, kwargs, model, 0.0, mixing)
    plain_logits, plain_gradients = _outputs_and_gradients(plain, inputs)

    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for key, expected in expected_gradients.items():
        torch.testing.assert_close(gradients[key], expected, rtol=1e-3, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert (logits - plain_logits).abs().max() > 1e-3  # lambda = 0 would have been noticed
    assert any((gradients[key] - plain_gradients[key]).abs().max() > 1e-4 for key in gradients)


def test_a_fresh_adapter_equals_the_base_model() -> None:
    for name in ("llama", "t5", "bert"):
        architecture = ARCHITECTURES[name]
        base = architecture.build().eval()
        inputs = architecture.inputs()
        before = base(**inputs).logits
        model = get_peft_model(base, SiboLoraConfig(**_lora_kwargs(architecture), sibo_lambda=LAMBDA)).eval()
        torch.testing.assert_close(model(**inputs).logits, before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
def test_embedding_source_mixes_what_the_token_embedding_returned(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = get_peft_model(
        architecture.build(), SiboLoraConfig(**_lora_kwargs(architecture), sibo_lambda=LAMBDA, sibo_source="embedding")
    ).eval()
    randomise_adapters(model)
    inputs = architecture.inputs()
    base = model.get_base_model()
    embedded = base.get_input_embeddings()(inputs["input_ids"])
    read = {}
    layers = {n: m for n, m in base.named_modules() if hasattr(m, "lora_A")}
    mixing = _expected_mixing(architecture, model)
    for key in mixing:
        layers[key].register_forward_pre_hook(lambda m, args, key=key: read.__setitem__((key, "x"), args[0]))
        layers[key].lora_A["default"].register_forward_pre_hook(
            lambda m, args, key=key: read.__setitem__((key, "mix"), args[0])
        )
    model(**inputs)
    for key in mixing:
        expected = (1 - LAMBDA) * read[key, "x"] + LAMBDA * embedded
        torch.testing.assert_close(read[key, "mix"], expected, rtol=1e-5, atol=1e-6)
    if name in ("gpt2", "bert"):  # positions and a norm come in between
        block_input = get_peft_model(
            architecture.build(), SiboLoraConfig(**_lora_kwargs(architecture), sibo_lambda=LAMBDA)
        )
        block_input.load_state_dict(model.state_dict())
        assert (block_input.eval()(**inputs).logits - model(**inputs).logits).abs().max() > 1e-4


def test_embedding_source_sees_what_hooks_make_of_it_whenever_they_came() -> None:
    """As NEFTune's noise, whose hook `Trainer` registers when training begins."""
    architecture, results = ARCHITECTURES["llama"], []
    inputs = architecture.inputs()
    for runs_before in (False, True):
        torch.manual_seed(0)
        config = SiboLoraConfig(**_lora_kwargs(architecture), sibo_lambda=LAMBDA, sibo_source="embedding")
        model = get_peft_model(architecture.build(), config).eval()
        model.add_adapter("other", SiboLoraConfig(**_lora_kwargs(architecture), sibo_source="embedding"))
        torch.manual_seed(0)
        randomise_adapters(model)
        without = model(**inputs).logits if runs_before else None
        embedding = model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda module, args, output: output * 1.5)
        if runs_before:
            compiled = torch.compile(model, backend="eager")(**inputs).logits
            torch.testing.assert_close(compiled, results[0])
            torch._dynamo.reset()
        results.append(model(**inputs).logits)
        handle.remove()
        if without is not None:
            assert torch.equal(model(**inputs).logits, without)
            assert not torch.allclose(without, results[0], atol=1e-3)
    assert torch.equal(*results)


def test_embedding_source_is_refused_where_the_embedding_does_not_fit() -> None:
    vit = ARCHITECTURES["vit"]
    with pytest.raises(ValueError, match=r"sibo_source='embedding'.*block_input"):
        get_peft_model(vit.build(), SiboLoraConfig(target_modules="all-linear", sibo_source="embedding"))


def test_embedding_source_with_inputs_embeds_says_what_to_do() -> None:
    architecture = ARCHITECTURES["llama"]
    model = get_peft_model(architecture.build(), SiboLoraConfig(**_lora_kwargs(architecture), sibo_source="embedding"))
    with pytest.raises(RuntimeError, match=r"inputs_embeds.*block_input"):
        model(inputs_embeds=torch.randn(1, 4, 32))


def test_the_trial_run_leaves_the_model_and_the_generator_as_they_were() -> None:
    model = ARCHITECTURES["llama"].build()
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    from sibo_triton.initial_residual import find_block_stacks, trial_run

    trial = trial_run(model, find_block_stacks(model))
    assert trial.marks and not trial.problems
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
