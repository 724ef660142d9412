"""Models in parts: blocks on other devices or offloaded compute what the whole model computes, h0 follows once."""

import peft
import pytest
import torch
from accelerate import dispatch_model
from adapter_models import build, close, different, gradients, output, sibo, without_mixing
from peft import PeftModel
from tiny_models import token_inputs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from sibo_triton.initial_residual.binding import Frame, InitialResidual

PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm",
         "lm_head")  # fmt: skip


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """The folder of a model and of its adapter, and what the two compute together."""
    monkeypatch.chdir(tmp_path)  # PEFT writes the weights of offloaded layers below the working directory
    model, inputs = build(default=sibo(0.3)), token_inputs()
    expected, expected_gradients = output(model, inputs), gradients(model, inputs)
    assert different(expected, output(without_mixing(model), inputs))
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    return tmp_path, inputs, expected, expected_gradients


def on(*devices, prefix=""):
    return {prefix + part: device for part, device in zip(PARTS, devices, strict=True)}


# blocks 1 and 2 wait on the disk, block 0 runs from memory
OFFLOADED = ("cpu", "cpu", "cpu", "disk", "disk", "cpu", "cpu")
PREFIX = "base_model.model."  # of PEFT's names


def dispatched(folder):
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapter", is_trainable=True
    )
    parts = on(*OFFLOADED, prefix=PREFIX)
    return dispatch_model(model, parts, main_device="cpu", offload_dir=folder / "offloaded", force_hooks=True)


def loaded_in_parts(folder):
    if peft.__version__.startswith("0.19."):
        pytest.skip("PEFT 0.19 fails, for plain LoRA too, where blocks of a model with a head are on the disk")
    base = LlamaForCausalLM.from_pretrained(
        folder / "base", device_map=on(*OFFLOADED), offload_folder=folder / "offloaded"
    )
    assert base.model.layers[1].self_attn.q_proj.weight.is_meta and not base.lm_head.weight.is_meta
    parts = on(*OFFLOADED, prefix=PREFIX)
    options = {"device_map": parts, "offload_folder": folder / "offloaded again", "is_trainable": True}
    return PeftModel.from_pretrained(base, folder / "adapter", **options)


@pytest.mark.oldest
@pytest.mark.parametrize("load", [dispatched, loaded_in_parts])
def test_blocks_that_are_offloaded_to_disk_compute_what_the_whole_model_computes(saved, load):
    folder, inputs, expected, expected_gradients = saved
    model = load(folder).eval()
    offloaded = {name for name, tensor in model.named_parameters() if tensor.is_meta}
    assert offloaded == {name for name, _ in model.named_parameters() if "layers.1" in name or "layers.2" in name}
    close(output(model, inputs), expected)  # accelerate's hooks are on the layers: their modules are called
    # what waits on the disk gets no gradient (accelerate's); what does not, gets it through the blocks that do
    got = gradients(model, inputs)
    assert got.keys() == expected_gradients.keys() - offloaded and got
    for name, gradient in got.items():
        close(gradient, expected_gradients[name])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_on_two_gpus_compute_what_one_computes(saved, checkpointing):
    folder, inputs, expected, _ = saved
    inputs = {name: tensor.to("cuda:0") for name, tensor in inputs.items()}
    results = []
    for devices in ((0,) * len(PARTS), (0, 0, 0, 0, 1, 1, 1), (0, 0, 0, 1, 0, 1, 0)):
        base = LlamaForCausalLM.from_pretrained(folder / "base", device_map=on(*devices))
        model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()
        assert {tensor.device.index for name, tensor in model.named_buffers() if "lambda" in name} == set(devices[2:5])
        if checkpointing:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        found = gradients(model, inputs)
        results.append((output(model, inputs).cpu(), {name: gradient.cpu() for name, gradient in found.items()}))
    one = results[0]
    torch.testing.assert_close(one[0], expected, atol=1e-3, rtol=1e-3)
    for logits, found in results[1:]:
        close(logits, one[0])
        assert found.keys() == one[1].keys()
        for name, gradient in found.items():
            close(gradient, one[1][name])


class Copies(TorchDispatchMode):
    """Counts the tensors that are copied to the meta device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += function is torch.ops.aten._to_copy.default and result.is_meta
        return result


def test_the_initial_residual_is_copied_once_in_a_forward_for_all_modules_of_another_device():
    """The other device is meta, the only one that a CPU has: modules run on the CPU, and there again."""
    model, inputs = build(default=sibo(0.3)), token_inputs()
    expected = output(model, inputs)

    class AlsoElsewhere(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.here, self.there = layer, build(default=sibo(0.3)).get_submodule(name).to("meta")
            self.there.sibo_sites = layer.sibo_sites  # this one's h0, not that of the model that it comes from

        def forward(self, hidden_states):
            assert self.there(torch.empty_like(hidden_states, device="meta")).is_meta
            return self.here(hidden_states)

    for block in (1, 2):
        for part in ("self_attn.q_proj", "mlp.up_proj"):
            name = f"base_model.model.model.layers.{block}.{part}"
            model.set_submodule(name, AlsoElsewhere(model.get_submodule(name)))
    for forwards in (1, 2):
        with Copies() as copies:
            close(output(model, inputs), expected)
        assert copies.count == 1, forwards


def test_a_copy_on_another_device_gives_its_gradient_to_the_initial_residual():
    residual, elsewhere = InitialResidual("blocks", "block_input"), torch.device("cpu", 1)  # torch copies to it
    value = torch.randn(2, 3, 4, requires_grad=True)
    residual.open(Frame(value))
    with torch.no_grad():
        first = residual.get("module", elsewhere)
    copies = [residual.get("module", elsewhere) for _ in range(2)]
    assert residual.get("module", value.device) is value
    assert copies[0] is copies[1] and copies[0] is not value and torch.equal(copies[0], value)
    assert not first.requires_grad and copies[0].requires_grad  # made without a graph, it is not for those who need one
    (copies[0] * 2 + copies[1] * 3).sum().backward()
    assert torch.equal(value.grad, torch.full_like(value, 5.0))
    residual.close()
    residual.open(Frame(value + 1))
    assert torch.equal(residual.get("module", elsewhere), value + 1)


def test_a_block_that_gets_some_of_the_tokens_finds_these_on_another_device_too():
    residual, elsewhere = InitialResidual("blocks", "block_input"), torch.device("cpu", 1)
    value = torch.randn(2, 5, 4)
    residual.open(Frame())
    residual.enter_block("first", value)
    assert torch.equal(residual.get("module", elsewhere), value)
    residual.leave_block((output := value + 1,))
    residual.enter_block("second", output[:, 2:4])
    for device in (value.device, elsewhere):
        assert torch.equal(residual.get("module", device), value[:, 2:4])
