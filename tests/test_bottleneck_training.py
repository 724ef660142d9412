"""Training bottleneck adapters: checkpointing of every kind, Trainer, torch.compile, what is kept for the backward."""

import gc
from functools import partial

import pytest
import torch
from adapter_models import base_model, close, different, output
from bottleneck_models import Oracle, adapter, adapter_gradients, build, layers_of, randomise
from checkpoint_kinds import KINDS, assert_same, checkpoint, gradients_of
from op_cases import Allocations, saved_storages
from peft import PeftModel, get_peft_model
from tiny_models import ARCHITECTURES, VOCAB, llama, llama_with, token_inputs
from trainers import losses, trainer_for
from transformers import LlamaConfig, LlamaForCausalLM

from sibo_triton import SiboAdapterConfig

oldest = pytest.mark.oldest

EQUATIONS = {
    "series": {},
    "output": {"side": "output", "target_modules": ["down_proj"]},
    "parallel": {"placement": "parallel"},
    "sub-layer": {"placement": "parallel", "target_modules": ["mlp"]},
}


def model_for(seed=3, blocks=3, **options):
    torch.manual_seed(seed)
    defaults = {"sibo_learnable": True, "scaling": "learnable", "task_type": "CAUSAL_LM"}
    return randomise(
        get_peft_model(base_model(partial(llama, blocks)), adapter(0.4, **{**defaults, **options}))
    ).train()


def batches():
    torch.manual_seed(4)
    return [{**token_inputs(), "use_cache": False} for _ in range(2)]


# --- Checkpointing


@oldest
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_gradients_of_none_with_two_forwards_before_a_backward(kind, equation):
    """An h0 that was remembered would be the second forward's in the first one's recompute."""
    gradients = []
    for checkpointed in (False, True):
        model = model_for(**EQUATIONS[equation])
        if checkpointed:
            checkpoint(model, KINDS[kind])
        first, second = batches()
        losses = [model(**first).loss, model(**second).loss]
        (losses[0] + 2 * losses[1]).backward()
        gradients.append(gradients_of(model))
    assert gradients[0] and all(".sibo_adapter_" in name for name in gradients[0])
    assert_same(gradients[1], gradients[0])
    other = model_for(**EQUATIONS[equation])
    other(**batches()[1]).loss.backward()
    assert any(different(gradients[0][name], gradient) for name, gradient in gradients_of(other).items())


@oldest
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_checkpointing_draws_the_dropout_mask_again(kind):
    gradients = []
    for checkpointed in (False, True):
        model = model_for(adapter_dropout=0.4)
        if checkpointed:
            checkpoint(model, KINDS[kind])
        torch.manual_seed(9)
        model(**batches()[0]).loss.backward()
        gradients.append(gradients_of(model))
    assert_same(gradients[1], gradients[0])


@oldest
@pytest.mark.parametrize("equation", EQUATIONS)
def test_h0_gets_a_gradient_where_what_is_below_it_trains(equation):
    """Embeddings that are given, or trained; against the oracle, through whose mix autograd goes."""
    config = adapter(0.4, **EQUATIONS[equation])
    model, inputs = build(default=config), batches()[0]
    ids, rest = inputs["input_ids"], {"use_cache": False}
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    mixing = config.target_modules
    loss = Oracle(model, {"default": config}, mixing)(inputs_embeds=embeddings, **rest).logits.square().mean()
    (expected,) = torch.autograd.grad(loss, embeddings)
    model(inputs_embeds=embeddings, **rest).logits.square().mean().backward()
    close(embeddings.grad, expected)
    without = Oracle(model, {"default": adapter(0.0, **EQUATIONS[equation])}, mixing)
    (other,) = torch.autograd.grad(without(inputs_embeds=embeddings, **rest).logits.square().mean(), embeddings)
    assert (other - expected).abs().max() > 0.01 * expected.abs().max()

    weight = model.get_input_embeddings().weight.requires_grad_()
    model(input_ids=ids, **rest).logits.square().mean().backward()
    close(weight.grad, torch.zeros_like(weight).index_add_(0, ids.flatten(), expected.flatten(0, 1)))


@oldest
def test_a_block_alone_has_no_initial_residual():
    model = build(default=adapter())
    with pytest.raises(RuntimeError, match="mixes in the initial residual of 'model.layers', but ran outside"):
        model.base_model.model.model.layers[0].mlp(torch.randn(1, 2, 32))
    build(default=adapter(0)).base_model.model.model.layers[0].mlp(torch.randn(1, 2, 32))


@oldest
def test_retain_graph_and_graph_twice():
    model, inputs = model_for(adapter_dropout=0.3), batches()[0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(**inputs).loss
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@oldest
def test_generate_and_its_cache():
    model = build(default=adapter())
    inputs = {"input_ids": torch.randint(3, 50, (2, 5))}
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, use_cache=False, **options))


def test_autocast_trains_in_its_dtype():
    model = model_for()
    exact = adapter_gradients(model, batches()[0])
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batches()[0]).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and "down" in name and "weight" in name:
            gradient = exact[name.removeprefix("base_model.model.")]
            assert parameter.grad.dtype == torch.float32
            assert 0 < (parameter.grad - gradient).norm() < 0.1 * gradient.norm()


def test_torch_compile_computes_the_same():
    torch._dynamo.reset()
    model, inputs = model_for(blocks=2), batches()[0]
    expected = output(model, inputs)
    gradients = adapter_gradients(model, inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(output(compiled, inputs), expected)
    model.zero_grad()
    compiled(**inputs).loss.backward()
    for name, gradient in gradients.items():
        close(dict(model.named_parameters())[f"base_model.model.{name}"].grad, gradient)


# --- What is kept for the backward


def deep(**options):
    """A model of 512 tokens, wide enough that a tensor of [tokens, hidden] stands out."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4
        )
    )
    if options:
        base = get_peft_model(base, adapter(bottleneck_size=4, adapter_bias=False, **options))
    else:
        base.requires_grad_(False)
    base.enable_input_require_grads()
    ids = torch.randint(0, VOCAB, (2, 256))
    return base, {"input_ids": ids, "labels": ids}


def kept(model, inputs):
    loss, storages = saved_storages(lambda: model(**inputs, use_cache=False).loss)
    loss.backward()
    gc.collect()
    return sum(storages.values())


@pytest.mark.parametrize(("placement", "dropout"), [("series", 0.0), ("parallel", 0.05)])
def test_nothing_of_the_size_of_x_is_kept_for_a_module(placement, dropout):
    """x once for gate and up, h0 by reference, [tokens, bottleneck] for each; the frozen layers keep no x."""
    frozen = kept(*deep())
    model, inputs = deep(placement=placement, adapter_dropout=dropout, sibo_learnable=True)
    modules, tokens, row = len(layers_of(model)), 512, 256 * 4
    x = tokens * row
    added = kept(model, inputs) - frozen
    weights = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    in_the_bottleneck = modules * tokens * 4 * 4 * 2  # p, and d as lambda learns
    assert modules == 6
    # the x that gate and up share in each of three blocks, which a frozen layer does not keep, and h0
    assert added <= 3 * x + x + weights + in_the_bottleneck + 64 * 1024, added / x
    assert added < modules * x  # one for each module would be this much


def test_nothing_more_than_the_frozen_model_holds_outlives_the_backward():
    alive = []
    for options in ({}, {"placement": "series"}):
        model, inputs = deep(**options)
        model(**inputs, use_cache=False).loss.backward()
        model.zero_grad()
        with Allocations() as allocations:
            model(**inputs, use_cache=False).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        gc.collect()
        alive.append(allocations.alive(beside=gradients))
    assert alive[1] - alive[0] < 512 * 256 * 4 / 2


# --- Trainer


@oldest
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", [{}, {"placement": "parallel", "sibo_lambda": 0.0}], ids=["sibo", "plain"])
def test_training_reduces_the_loss_and_resumes_where_it_stopped(options, checkpointing, tmp_path):
    def start():
        torch.manual_seed(5)
        defaults = {"sibo_learnable": True, "scaling": "learnable", "adapter_dropout": 0.1, "task_type": "CAUSAL_LM"}
        chosen = {**defaults, **options}
        value = chosen.pop("sibo_lambda", 0.3)
        chosen["sibo_learnable"] = chosen["sibo_learnable"] and value > 0
        return get_peft_model(base_model(), SiboAdapterConfig(bottleneck_size=8, sibo_lambda=value, **chosen))

    run = {"max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 10, "learning_rate": 2e-2}
    run["gradient_checkpointing"] = checkpointing
    whole = trainer_for(start(), tmp_path, **run)
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    found = losses(whole)
    assert found[8] < 0.9 * found[1]
    after = dict(whole.model.named_parameters())
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items()), "everything trains"
    resumed = trainer_for(start(), tmp_path / "resumed", **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert {step: loss for step, loss in found.items() if step > 4} == {
        step: loss for step, loss in losses(resumed).items() if step > 4
    }
    loaded = PeftModel.from_pretrained(llama_with(whole.model), tmp_path / "checkpoint-8").eval()
    inputs = token_inputs()
    close(output(loaded, inputs), output(whole.model.eval(), inputs))


@oldest
def test_weight_decay_leaves_lambda_alone(tmp_path):
    model = model_for()
    trainer = trainer_for(model, tmp_path)
    decayed = set(trainer.get_decay_parameter_names(model))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in names if "lambda" in name}.isdisjoint(decayed)
    assert any("sibo_adapter_down" in name for name in decayed)


@oldest
def test_a_sequence_classifier_trains_with_its_head():
    base = ARCHITECTURES["bert"]
    model = get_peft_model(base.build(), adapter(task_type="SEQ_CLS"))
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad and "classifier" in name}
    inputs = base.inputs()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(6):
        loss = model(**inputs).loss
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found[-1] < found[0] - 0.05
