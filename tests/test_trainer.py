"""transformers' Trainer on a SIBO adapter: checkpoints, resuming, the best model, and what happens to lambda."""

import pytest
import torch
from adapter_folders import (
    KINDS,
    lambda_modules,
    lambda_values,
    logits_of,
    make_up_weights,
    read_weights,
    sibo_config,
    with_weights,
)
from peft import PeftModel, get_peft_model
from trainers import losses, trainer_for

pytestmark = pytest.mark.oldest

STEPS, HALF = 6, 3  # of `trainer_for`


def start(case, kind, **options):
    model = get_peft_model(case.base(), sibo_config(kind, **options))
    make_up_weights(model)
    return model


def adapter_tensors(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(saved, kind, tmp_path):
    case = saved[kind]
    whole = trainer_for(start(case, kind), tmp_path)
    whole.train()
    checkpoint = tmp_path / f"checkpoint-{HALF}"
    tensors = {name for name in read_weights(checkpoint) if "sibo" in name}
    assert len(tensors) == len(case.lambdas) * (2 if kind == "learnable" else 1)
    assert "import sibo_triton" in (checkpoint / "README.md").read_text()

    fresh = get_peft_model(case.base(), sibo_config(kind, sibo_lambda=0.9))  # the checkpoint's lambda is to come
    resumed = trainer_for(fresh, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(losses(whole)) == STEPS
    assert {step: loss for step, loss in losses(whole).items() if step > HALF} == {
        step: loss for step, loss in losses(resumed).items() if step > HALF
    }
    expected, got = adapter_tensors(whole.model), adapter_tensors(resumed.model)
    assert expected.keys() == got.keys() and all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    moved = lambda_values(whole.model) != case.lambdas
    assert moved is (kind == "learnable")

    # the losses depend on lambda: without the checkpoint's, they are others
    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith(("lora_sibo_lambda.weight", "lora_sibo_lambda.logit_bias")):
                tensor.fill_(0.0)

    edited = trainer_for(get_peft_model(case.base(), sibo_config(kind)), tmp_path / "edited")
    edited.train(resume_from_checkpoint=str(with_weights(checkpoint, tmp_path / "0" / checkpoint.name, change)))
    assert losses(edited)[STEPS] != losses(whole)[STEPS]


def test_resuming_from_a_checkpoint_without_lambda_raises(saved, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if "lora_sibo_lambda" in name]:
            del tensors[name]

    case = saved["fixed"]
    trainer_for(start(case, "fixed"), tmp_path, max_steps=1, save_steps=1).train()
    broken = with_weights(tmp_path / "checkpoint-1", tmp_path / "broken" / "checkpoint-1", change)
    with pytest.raises(ValueError, match=r"lora_sibo_lambda\.weight is missing"):
        trainer_for(start(case, "fixed"), tmp_path / "resumed").train(resume_from_checkpoint=str(broken))


@pytest.mark.parametrize("kind", KINDS)
def test_load_best_model_at_end_brings_back_the_lambdas_of_the_best(saved, kind, tmp_path):
    case = saved[kind]
    options = {
        "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 3e-2,
    }  # fmt: skip
    trainer = trainer_for(start(case, kind), tmp_path, **options)
    trainer.train()
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = max(evaluated, key=evaluated.__getitem__)
    assert best != STEPS  # "best" is the largest loss, so that it is not the last
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / f"checkpoint-{best}")
    last = PeftModel.from_pretrained(case.base(), tmp_path / f"checkpoint-{STEPS}")
    logits = logits_of(trainer.model.eval(), case.input_ids)
    assert torch.equal(logits, logits_of(loaded, case.input_ids))
    assert not torch.allclose(logits, logits_of(last, case.input_ids), atol=1e-4)
    assert lambda_values(trainer.model) == lambda_values(loaded)
    assert (lambda_values(loaded) != lambda_values(last)) is (kind == "learnable")


def test_lambda_is_in_the_group_without_weight_decay(saved, tmp_path):
    model = start(saved["learnable"], "learnable")
    trainer = trainer_for(model, tmp_path)
    trainer.create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    lambdas = {name: value for name, value in decay.items() if "lora_sibo_lambda" in name}
    assert len(lambdas) == len(saved["learnable"].lambdas) and set(lambdas.values()) == {0.0}
    assert {value for name, value in decay.items() if "lora_A" in name} == {0.1}


def test_a_fixed_lambda_is_not_given_to_the_optimizer(saved, tmp_path):
    trainer = trainer_for(start(saved["fixed"], "fixed"), tmp_path)
    trainer.create_optimizer()
    given = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    lambdas = [tensor for module in lambda_modules(trainer.model).values() for tensor in module.buffers()]
    assert given and lambdas and not given & {id(tensor) for tensor in lambdas}


def test_lambda_stays_between_0_and_1_under_a_large_learning_rate(saved, tmp_path):
    case = saved["learnable"]
    model = start(case, "learnable", lora_alpha=64)
    before = {name: module.logit_bias.item() for name, module in lambda_modules(model).items()}
    # without B, which would learn the task by itself and leave lambda alone
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "logit_bias" in name
    options = {"max_steps": 30, "save_strategy": "no", "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    trainer_for(model, tmp_path, logging_steps=30, **options).train()
    values = lambda_values(model)
    assert all(0.0 < value < 1.0 for value in values.values())
    moved = [abs(module.logit_bias.item() - before[name]) for name, module in lambda_modules(model).items()]
    assert max(moved) > 1.0  # further than [0, 1] is wide: a raw lambda would have left it
    assert max(values.values()) > 0.9 or min(values.values()) < 0.1
