"""What FSDP, FSDP2 and accelerate do to lambda, and it must survive. Their sharding is tested on one process."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import fsdp_utils
from peft import get_peft_model
from tiny_models import llama, randomise_adapters, token_inputs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.tensor import DTensor, Shard

from sibo_triton import SiboAdapterConfig, SiboLoraConfig
from sibo_triton.sibo_lambda import SiboLambda

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed"),
]

KINDS = {
    "LoRA": SiboLoraConfig(r=4, target_modules=["q_proj"], sibo_lambda=0.3),
    "LoRA, learnable": SiboLoraConfig(r=4, target_modules=["q_proj"], sibo_lambda=0.3, sibo_learnable=True),
    "bottleneck": SiboAdapterConfig(target_modules=["up_proj"], bottleneck_size=4, sibo_lambda=0.3),
    "bottleneck, learnable": SiboAdapterConfig(
        target_modules=["up_proj"], bottleneck_size=4, sibo_lambda=0.3, sibo_learnable=True, scaling="learnable"
    ),
}


def model_of(kind):
    torch.manual_seed(0)
    model = get_peft_model(llama(), copy.deepcopy(KINDS[kind]))
    randomise_adapters(model)
    return model


def lambdas_of(model):
    """The buffers of lambda: of a learnable one, the gate."""
    buffers = {name.replace("_fsdp_wrapped_module.", ""): of for name, of in model.named_buffers()}
    return {name: of for name, of in buffers.items() if "sibo" in name}


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_loads_a_sharded_model_from_the_weights_of_one_rank(kind, process_group):
    """`cpu_ram_efficient_loading`, its default, by its function; lambda as that rank has it."""
    model, ids = model_of(kind), token_inputs()["input_ids"]
    for value in lambdas_of(model).values():
        value.mul_(0.7)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    weights = copy.deepcopy(model.state_dict())
    other, mesh = model_of(kind).to("meta"), init_device_mesh("cpu", (1,))
    for layer in other.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(other, mesh=mesh)
    accelerator = SimpleNamespace(is_main_process=True)
    fsdp_utils.fsdp2_load_full_state_dict(accelerator, other, weights)
    rotary, of_llama = other.get_base_model().model.rotary_emb, llama().model.rotary_emb  # accelerate puts these back
    for name, buffer in of_llama.named_buffers():
        setattr(rotary, name, buffer)
    torch.testing.assert_close(other(input_ids=ids).logits, expected)
    assert lambdas_of(other) and not any(isinstance(of, DTensor) for of in lambdas_of(other).values())


@pytest.mark.parametrize("kind", ["LoRA", "bottleneck"])
def test_a_dtype_for_buffers_leaves_lambda_as_it_is(kind, process_group):
    """Also one that was loaded, and not registered."""
    model, ids = model_of(kind), token_inputs()["input_ids"]
    model.load_state_dict({name: of * 0.7 if "lambda" in name else of for name, of in model.state_dict().items()})
    before = {name: value.clone() for name, value in lambdas_of(model).items()}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    precision = MixedPrecision(buffer_dtype=torch.bfloat16)
    sharded = FullyShardedDataParallel(
        model, mixed_precision=precision, use_orig_params=True, device_id=torch.device("cpu")
    )
    with torch.no_grad():
        found = sharded(input_ids=ids).logits
    after = lambdas_of(sharded)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.bfloat16() != value and after[name].dtype == torch.float32
        assert torch.equal(after[name], value), name
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)  # rotary buffers are rounded


def test_the_value_of_a_shard_is_not_looked_at(process_group):
    """It may hold nothing: there are more ranks than elements."""
    mesh = init_device_mesh("cpu", (1,))
    shard = DTensor.from_local(torch.empty(0), mesh, [Shard(0)], run_check=False, shape=torch.Size((1,)), stride=(1,))
    modules = [
        module for name, module in model_of("LoRA, learnable").named_modules() if hasattr(module, "problem_with")
    ]
    assert modules and all(module.problem_with("logit_bias", shard) is None for module in modules)


def test_tensors_of_a_caller_in_the_place_of_lambda_are_left_as_they_are():
    """In 16 bits, by torch.func: also in its transforms."""
    model, ids = model_of("LoRA").eval(), token_inputs()["input_ids"]
    state = {name: of.bfloat16() if "lambda" in name else of.detach() for name, of in model.state_dict().items()}
    before = {name: of.clone() for name, of in state.items()}

    def loss(lambdas):
        return torch.func.functional_call(model, state | lambdas, (ids,), tie_weights=False).logits.square().mean()

    lambdas = {name: of for name, of in state.items() if "lambda" in name}
    value, gradients = loss(lambdas), torch.func.grad(loss)(lambdas)
    assert value.isfinite() and all(of.isfinite().all() for of in gradients.values())
    assert all(torch.equal(of, before[name]) and of.dtype == before[name].dtype for name, of in state.items())


def test_a_cast_lambda_is_restored_in_inference_mode_and_trains_on():
    model, ids = model_of("LoRA").train(), token_inputs()["input_ids"]
    for value in lambdas_of(model).values():
        value.fill_(0.2)  # not what was registered
        value.data = value.data.bfloat16()
    with torch.inference_mode():
        model(input_ids=ids)
    model(input_ids=ids).logits.mean().backward()
    assert {value.dtype for value in lambdas_of(model).values()} == {torch.float32}


def test_a_cast_lambda_has_its_value_in_compiled_code_too():
    """Which changes no module: the first eager forward restores it."""
    lambda_ = SiboLambda(0.3)
    cast = torch.full((1,), 0.3).bfloat16()
    for changed, expected in ((cast, torch.full((1,), 0.3)), (cast / 2, (cast / 2).float())):
        lambda_.weight.data = changed
        torch._dynamo.reset()
        found = torch.compile(lambda_, backend="eager", fullgraph=True)()
        assert lambda_.weight.dtype == torch.bfloat16 and torch.equal(found, expected)
