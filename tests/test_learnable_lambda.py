"""A learnable lambda, a parameter of one number, with what treats all parameters of LoRA alike."""

import copy

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.utils import other
from tiny_models import llama, randomise_adapters, token_inputs
from torch.distributed.fsdp import FullyShardedDataParallel

from sibo_triton import SiboAdapterConfig, SiboLoraConfig
from sibo_triton.sibo_lambda import SiboLambda

pytestmark = pytest.mark.oldest

LORA = SiboLoraConfig(r=4, target_modules=["q_proj", "up_proj"], sibo_learnable=True, task_type="CAUSAL_LM")
ADAPTER = SiboAdapterConfig(
    target_modules=["gate_proj"], bottleneck_size=4, sibo_learnable=True, scaling="learnable", task_type="CAUSAL_LM"
)


def model_of(config):
    torch.manual_seed(0)
    model = get_peft_model(llama(), copy.deepcopy(config))
    randomise_adapters(model)
    return model.train()


def numbers_of(model):
    """The parameters of one number: lambda's logit, and s."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.shape == (1,)}


def step(model, optimizer):
    optimizer.zero_grad()
    ids = token_inputs()["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def cast_data(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


@pytest.mark.parametrize("config", [LORA, ADAPTER])
def test_one_whose_data_was_cast_trains_on_in_float32(config):
    """As TRL's trainers cast every trainable parameter on a quantised base."""
    model = model_of(config)
    before = {name: parameter.detach().clone() for name, parameter in numbers_of(model).items()}
    cast_data(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        step(model, optimizer)
    for name, parameter in numbers_of(model).items():
        assert parameter.dtype == torch.float32
        assert 0 < (parameter - before[name]).abs() < 1.1e-4, name  # a step, and no rounding to bfloat16


@pytest.mark.parametrize("config", [LORA, ADAPTER])
def test_what_took_hold_of_a_cast_one_keeps_it(config):
    """As DDP, which hooks the accumulators of gradients: it collects the parameters of each module."""
    model, reduced = model_of(config), []
    cast_data(model)
    accumulators = []  # kept alive, as DDP does
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                accumulators.append(parameter.expand_as(parameter).grad_fn.next_functions[0][0])
                accumulators[-1].register_hook(lambda *_, name=f"{name}.{key}": reduced.append(name))
    with torch.autocast("cpu", torch.bfloat16):
        step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert numbers_of(model).keys() <= set(reduced)
    assert {parameter.dtype for parameter in numbers_of(model).values()} == {torch.float32}


def test_one_that_was_cast_later_than_another_took_hold_of_it_is_left(process_group):
    model = model_of(LORA)
    cast_data(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(**token_inputs())
    assert {parameter.dtype for parameter in numbers_of(model).values()} == {torch.bfloat16}
    model.train()
    assert {parameter.dtype for parameter in numbers_of(model).values()} == {torch.float32}


def test_copies_and_compiled_models_compute_with_a_cast_one():
    model, inputs = model_of(LORA).eval(), token_inputs()
    expected = model(**inputs).logits
    copied = copy.deepcopy(model)
    for each in (model, copied):
        for parameter in numbers_of(each).values():
            parameter.data = parameter.data.to(torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(copied(**inputs).logits, expected)
    assert {parameter.dtype for parameter in numbers_of(copied).values()} == {torch.float32}


def test_what_was_trained_before_keeps_what_16_bits_hold():
    model = model_of(LORA)
    name, parameter = next(iter(numbers_of(model).items()))
    with torch.no_grad():
        parameter.fill_(1.2345)
    parameter.data = parameter.data.to(torch.bfloat16)
    model(**token_inputs())
    assert parameter.dtype == torch.float32 and parameter.item() == torch.tensor(1.2345).bfloat16().item(), name


@pytest.mark.parametrize("adapter_name", ["default", "my_lora"])
def test_lora_fa_pairs_each_a_with_its_b(adapter_name):
    model = get_peft_model(llama(), copy.deepcopy(LORA), adapter_name=adapter_name)
    randomise_adapters(model)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        step(model, optimizer)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_B" in name or "logit_bias" in name}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("config", [LORA, ADAPTER])
def test_peft_s_policy_for_fsdp_wraps_it_as_it_wraps_a_and_b(config, use_orig_params, process_group, monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    model, ids = model_of(config), token_inputs()["input_ids"]
    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    gradients = {name: of.grad.clone() for name, of in model.named_parameters() if of.grad is not None}
    model.zero_grad()
    sharded = FullyShardedDataParallel(
        model,
        auto_wrap_policy=other.fsdp_auto_wrap_policy(model),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    loss = sharded(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    found = {name.replace("_fsdp_wrapped_module.", ""): of.grad for name, of in sharded.named_parameters()}
    for name, gradient in gradients.items():
        if gradient.shape == (1,):
            flat = name if use_orig_params else f"{name.rpartition('.')[0]}._flat_param"
            torch.testing.assert_close(found[flat], gradient)


@pytest.mark.parametrize("shard", ["freed", "empty"])
def test_lambda_of_which_this_rank_has_no_value_is_printed_without_one(shard):
    """What FSDP leaves of a learnable lambda between forwards: a view of freed memory, or an empty shard."""
    lambda_ = SiboLambda(0.3, learnable=True)
    assert repr(lambda_) == "SiboLambda(0.3, learnable=True)"
    if shard == "freed":
        lambda_.logit_bias.untyped_storage().resize_(0)
    else:
        lambda_.logit_bias.data = torch.empty(0)
    assert lambda_.value() is None
    assert repr(lambda_) == "SiboLambda(learnable=True)"
