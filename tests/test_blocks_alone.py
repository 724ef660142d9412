"""A block or a layer called alone raises, also after a forward that failed: there is no initial residual then."""

import pytest
import torch
from peft import get_peft_model
from refusals import TARGETS
from tiny_models import llama, randomise_adapters, token_inputs
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sibo_triton import SiboLoraConfig


@pytest.fixture
def running():
    """A SIBO model, its inputs, and what its second block was called with."""
    model = get_peft_model(llama(), SiboLoraConfig(r=2, target_modules=list(TARGETS), sibo_lambda=0.3)).eval()
    randomise_adapters(model)
    seen = {}
    block = model.base_model.model.model.layers[1]
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    inputs = token_inputs()
    with torch.no_grad():
        seen["logits"] = model(**inputs).logits
    hook.remove()
    return model, inputs, seen


ALONE = (
    r"model\.layers\.1\.self_attn\.q_proj mixes in the initial residual.*but ran outside of a forward.*the whole model"
)


def q_proj(model, block):
    return model.base_model.model.model.layers[block].self_attn.q_proj


def call_block(running):
    model, _, seen = running
    return model.base_model.model.model.layers[1](*seen["args"], **seen["kwargs"])


@pytest.mark.parametrize("grad", [False, True])
def test_a_block_called_alone_right_after_a_forward_raises(running, grad):
    model, inputs, seen = running
    with torch.set_grad_enabled(grad):
        model(**inputs)
        with pytest.raises(RuntimeError, match=ALONE):
            call_block(running)
        assert torch.equal(model(**inputs).logits, seen["logits"])  # and the model is none the worse for it


def test_a_block_called_alone_computes_with_adapters_disabled(running):
    model, _, seen = running
    with torch.no_grad(), model.disable_adapter():
        call_block(running)


def test_a_layer_called_alone_raises(running):
    model, _, seen = running
    with pytest.raises(RuntimeError, match=ALONE):
        q_proj(model, 1)(seen["args"][0])
    o_proj = model.base_model.model.model.layers[1].self_attn.o_proj
    assert o_proj(seen["args"][0]).isfinite().all()  # plain LoRA needs no h0


def test_the_stack_called_alone_is_a_forward_of_its_own(running):
    model, inputs, seen = running
    base = model.base_model.model
    with torch.no_grad():
        assert torch.equal(base.lm_head(base.model(input_ids=inputs["input_ids"]).last_hidden_state), seen["logits"])


@pytest.mark.parametrize("where", ["layers.0", "layers.2", "layers.1.self_attn.q_proj", "norm"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_no_initial_residual_outlives_an_exception(running, where, when):
    model, inputs, seen = running

    def stop(*_):
        raise ArithmeticError("stop")

    module = model.base_model.model.model.get_submodule(where)
    handle = module.register_forward_pre_hook(stop) if when == "before" else module.register_forward_hook(stop)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(ArithmeticError):
                model(input_ids=torch.randint(3, 50, (2, 6)))
        handle.remove()
        with pytest.raises(RuntimeError, match=ALONE):
            call_block(running)
        assert torch.equal(model(**inputs).logits, seen["logits"])


@pytest.fixture
def interrupted(running):
    """The same after Ctrl-C in another forward: torch's always-called hooks run on an `Exception` only."""

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = running[0].base_model.model.model.layers[2].register_forward_pre_hook(interrupt)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        running[0](input_ids=torch.randint(3, 50, (2, 6)))
    handle.remove()
    return running


def test_the_next_forward_after_an_interrupted_one_is_right(interrupted):
    model, inputs, seen = interrupted
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, seen["logits"])
        with pytest.raises(RuntimeError, match=ALONE):
            call_block(interrupted)


def test_a_block_or_layer_called_alone_after_an_interrupted_forward_raises(interrupted):
    model, _, seen = interrupted
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=ALONE):
            q_proj(model, 1)(seen["args"][0])
        with pytest.raises(RuntimeError, match=ALONE):
            call_block(interrupted)


def test_a_block_called_alone_after_an_interrupted_recompute_raises(running):
    """Under a checkpoint wrapper the block's own hooks hold h0 in the backward."""
    model, inputs, seen = running
    blocks = model.base_model.model.model.layers
    for number, block in enumerate(blocks):
        blocks[number] = checkpoint_wrapper(block)
    expected = model(**inputs).loss
    expected.backward()

    def interrupt(*_):
        if torch._C._current_graph_task_id() != -1:  # in the backward
            raise KeyboardInterrupt

    handle = blocks[2].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs).loss.backward()
    handle.remove()
    with torch.no_grad(), pytest.raises(RuntimeError, match=ALONE):
        call_block(running)
    assert torch.equal(model(**inputs).loss, expected)
