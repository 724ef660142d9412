"""By which path a layer runs: each computes the same, the slower ones are named once, and plain LoRA keeps PEFT's."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from accelerate import dispatch_model
from adapter_models import (
    base_model,
    build,
    close,
    different,
    gradients,
    lora_layers,
    oracle_of,
    output,
    plain,
    sibo,
    without_mixing,
)
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from tiny_models import ARCHITECTURES, llama, randomise_adapters, token_inputs
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import sibo_triton.lora.layer as forward_file
from sibo_triton import SiboAdapterConfig, SiboLoraConfig, accelerate, explain
from sibo_triton.lora.layer import FusedLinear
from sibo_triton.saved_activations import saved_activation_bytes


@pytest.fixture
def calls(monkeypatch):
    """The operations that layers call, in order."""
    seen = []
    for name in ("lora_linear", "add_lora"):
        original = getattr(forward_file, name)
        monkeypatch.setattr(
            forward_file, name, lambda *a, _name=name, _original=original, **k: seen.append(_name) or _original(*a, **k)
        )
    shared_output = forward_file.shared_output

    def counted(layer, x):
        y = shared_output(layer, x)
        if y is not None:
            seen.append("lora_linear")
        return y

    monkeypatch.setattr(forward_file, "shared_output", counted)
    return seen


def layer_of(model, name="q_proj", block=1):
    block = model.base_model.model.model.layers[block]
    return getattr(block.mlp if "up" in name else block.self_attn, name)


class LoudLinear(nn.Linear):
    """Not exactly nn.Linear: its forward does more."""

    def forward(self, x):
        return super().forward(x) + 1.0


def subclass_the_base(layer):
    base = layer.base_layer
    layer.base_layer = LoudLinear(base.in_features, base.out_features, bias=False)
    layer.base_layer.weight = base.weight


def patch_the_base(layer):
    original = layer.base_layer.forward
    layer.base_layer.forward = lambda x: 2 * original(x)


class Subclassed(torch.Tensor):
    """A weight that may hold anything (DTensor, a quantised one...)."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __deepcopy__(self, memo):
        return self.detach().clone().as_subclass(Subclassed).requires_grad_()


def subclass_a_weight(layer):
    parameters = layer.lora_A["default"]._parameters
    parameters["weight"] = parameters["weight"].detach().as_subclass(Subclassed).requires_grad_()


HINDRANCES = {
    "a hook on the base layer": (
        lambda layer: layer.base_layer.register_forward_hook(lambda module, args, y: 0.5 * y),
        "adapter",
        "its base layer has hooks",
    ),
    "a subclass of nn.Linear": (subclass_the_base, "adapter", "its base layer is a LoudLinear"),
    "a forward of its own": (patch_the_base, "adapter", "its base layer has a forward of its own"),
    "a hook on lora_A": (
        lambda layer: layer.lora_A["default"].register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        "modules",
        "lora_A has hooks",
    ),
    "a hook on lora_B": (
        lambda layer: layer.lora_B["default"].register_forward_hook(lambda module, args, y: y * 2),
        "modules",
        "lora_B has hooks",
    ),
    "a backward hook on lora_B": (
        lambda layer: layer.lora_B["default"].register_full_backward_hook(lambda module, given, got: None),
        "modules",
        "lora_B has hooks",
    ),
    "a hook on lora_dropout": (
        lambda layer: layer.lora_dropout["default"].register_forward_hook(lambda module, args, y: y * 2),
        "modules",
        "lora_dropout has hooks",
    ),
    "another dropout": (
        lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.5).eval()}),
        "modules",
        "lora_dropout is a AlphaDropout",
    ),
    "a weight of another class": (subclass_a_weight, "modules", "lora_A has a Subclassed as its weight"),
}


@pytest.mark.parametrize("case", HINDRANCES)
def test_what_a_layer_cannot_run_fused_it_runs_slower_and_right(case, calls):
    """And says so once, for the first of the layers."""
    hinder, path, reason = HINDRANCES[case]
    config = sibo(0.4)
    model, inputs = build(default=config), token_inputs()
    oracle = oracle_of(model, default=config)
    for block in (1, 2):
        hinder(layer_of(model, block=block))
        if case != "another dropout":  # the oracle's holds the hook that mixes
            hinder(layer_of(oracle, block=block))
    with pytest.warns(UserWarning, match="modules are called one by one|run apart") as record:
        found = output(model, inputs)
    messages = [str(warning.message) for warning in record if "explain(model)" in str(warning.message)]
    assert len(messages) == 1 and "model.layers.1.self_attn.q_proj" in messages[0] and reason in messages[0]
    assert calls.count("lora_linear") == 10 and calls.count("add_lora") == (2 if path == "adapter" else 0)
    close(found, output(oracle, inputs))
    assert different(found, output(without_mixing(model), inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found, expected = gradients(model, inputs), gradients(oracle, inputs)
    assert found.keys() == expected.keys()
    for name in found:
        close(found[name], expected[name])
    rows = [row for row in explain(model) if row.runs == path]
    assert [row.module for row in rows] == [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in (1, 2)]
    assert all(row.runs_reason.startswith(reason) for row in rows)
    last = {
        "adapter": "2 run the adapter fused, beside their frozen layer, in plain",
        "modules": "2 run module by module",
    }
    assert any(line.startswith(f"{last[path]}") for line in str(explain(model)).splitlines())


def test_hooks_on_all_modules_are_called(calls):
    model, inputs = build(default=sibo(0.4)), token_inputs()
    expected = output(model, inputs)
    del calls[:]
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.add(module) and None)
    try:
        with pytest.warns(UserWarning, match="because hooks are registered on all modules"):
            close(output(model, inputs), expected)
    finally:
        handle.remove()
    assert layer_of(model).lora_A["default"] in seen and layer_of(model).base_layer in seen and not calls


def test_other_base_layers_run_their_own_forward_and_the_adapter_fused(calls):
    """GPT-2's Conv1D: mixing layers and others."""
    architecture = ARCHITECTURES["gpt2"]
    model = get_peft_model(architecture.build(), SiboLoraConfig(r=2, target_modules=list(architecture.targets)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**token_inputs()).loss.backward()
    assert calls == ["add_lora"] * 12
    assert {(row.runs, row.mixes) for row in explain(model)} == {("adapter", True), ("adapter", False)}


class Quantised(nn.Linear):
    """Stands for a layer of a quantisation library, which keeps no x."""


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("mixed_with", [None, "plain", "modules"])
def test_other_base_layers_read_x_as_it_is(adapters, mixed_with):
    """PEFT casts it to the adapter's dtype for each layer, and the copies would be kept for the backward."""
    torch.manual_seed(0)
    base = nn.Sequential(Quantised(64, 48)).bfloat16()
    names = ["default", "other"][:adapters]
    models = [get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["0"])) for _ in range(2)]
    for model in models:
        for name in names[1:]:
            model.add_adapter(name, LoraConfig(r=4, target_modules=["0"]))
        model.base_model.set_adapter(names)
        randomise_adapters(model)
    peft, ours = models
    ours.load_state_dict(peft.state_dict())
    accelerate(ours, names[:1] if mixed_with == "plain" else None)
    if mixed_with == "modules":
        ours.base_model.model[0].lora_A["default"].register_forward_hook(lambda *_: None)
    x = torch.randn(32, 64).bfloat16().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the hook
        y, expected = ours(x), peft(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        of_ours, of_peft = (saved_activation_bytes(model, lambda m=model: m(x)) for model in (ours, peft))
    if mixed_with is None:  # beside x itself: t of each adapter, and nothing of the size of x
        assert of_ours == x.numel() * 2 + adapters * 32 * 4 * 4
        assert of_peft >= of_ours - x.numel() * 2 + x.numel() * 4


def test_every_dense_layer_of_a_sibo_adapter_runs_fused(calls):
    model = build(default=sibo())
    output(model, token_inputs())
    assert calls == ["lora_linear"] * 12
    assert {(row.runs, row.backend) for row in explain(model)} == {("fused", "torch")}
    assert all("on cpu" in row.runs_reason for row in explain(model))


def test_what_peft_handles_goes_to_peft(calls):
    model, inputs = build(one=sibo(0.4), two=sibo(0.2)), token_inputs()
    del calls[:]  # those of the trial run when the second was added
    with model.disable_adapter():
        output(model, inputs)
    assert not calls
    model.base_model.set_adapter(["one", "two"])
    output(model, inputs)
    assert calls == ["add_lora"] * 24
    del calls[:]
    model.set_adapter("one")
    output(model, inputs, adapter_names=["one", "two"])
    assert calls == ["add_lora"] * 24


def test_a_plain_adapter_beside_a_sibo_adapter_runs_pefts_forward_bit_for_bit(calls):
    stock = get_peft_model(base_model(), plain(lora_dropout=0.3))
    randomise_adapters(stock)
    model, inputs = copy.deepcopy(stock), token_inputs()
    model.add_adapter("sibo", sibo())
    assert type(layer_of(model)) is FusedLinear
    for training in (False, True):
        results = []
        for each in (stock, model):
            torch.manual_seed(5)
            results.append(output(each.train(training), inputs))
        assert torch.equal(*results)
    assert not calls


def test_the_class_is_pefts_when_no_sibo_adapter_is_left():
    model = build(default=plain())
    before = repr(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    model.add_adapter("sibo", sibo())
    layer = layer_of(model)
    assert type(layer) is FusedLinear and repr(layer).startswith("lora.Linear(\n  (base_layer): Linear(")
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(layer_of(copied)) is FusedLinear
    inputs = token_inputs()
    close(output(copied, inputs), output(model, inputs))
    model.delete_adapter("sibo")
    assert repr(model) == before and {name: type(module) for name, module in model.named_modules()} == kinds
    # and a refused adapter leaves none behind
    with pytest.raises(ValueError, match="cannot mix"):
        model.add_adapter("bad", sibo(sibo_target_modules=["o_proj"]))
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert type(layer_of(get_peft_model(llama(), sibo(0.0)))) is LoraLinear


@pytest.mark.parametrize("kind", ["plain", "SIBO"])
def test_compiled_blocks_share_their_graphs(kind):
    """Each block by itself: so that there are fewer graphs than blocks, nothing may differ between blocks."""
    targets = {"target_modules": "all-linear"}
    model = build(base_model(partial(llama, 12)), default=sibo(0.4, **targets) if kind == "SIBO" else plain(**targets))
    if kind == "plain":
        accelerate(model)
    inputs, counter = token_inputs(), CompileCounter()
    expected = model(**inputs, use_cache=False).loss
    torch._dynamo.reset()
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=counter)
    torch.testing.assert_close(model(**inputs, use_cache=False).loss, expected)
    assert 1 <= counter.frame_count <= 3


@pytest.mark.parametrize("kind", ["plain", "SIBO", "bottleneck"])
def test_a_compiled_model_takes_any_length(kind):
    """It is compiled for the first length, and once more for all others."""
    configs = {"plain": plain(), "SIBO": sibo(0.4), "bottleneck": SiboAdapterConfig(bottleneck_size=4, sibo_lambda=0.4)}
    model, counter = build(base_model(partial(llama, 1)), default=configs[kind]), CompileCounter()
    if kind == "plain":
        accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in (5, 6, 9, 14):
        ids = torch.arange(2 * length).view(2, length)
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, model(input_ids=ids).logits)
    assert counter.frame_count == 2


@pytest.mark.parametrize("trained", [None, ["embed_tokens"]], ids=["", "with its embedding"])
def test_a_model_compiles_into_one_graph_and_computes_the_same(trained):
    config = sibo(0.4, lora_dropout=0.1, sibo_learnable=True, modules_to_save=trained)
    model, inputs = build(base_model(partial(llama, 2)), default=config).train(), token_inputs()
    results = []
    for each in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        model.zero_grad()
        loss = each(**inputs).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
    with torch.no_grad():  # h0 takes part: another lambda gives another loss
        for name, tensor in model.state_dict().items():
            if "sibo_lambda" in name and "gate" not in name:
                tensor.zero_()
    assert (model(**inputs).loss - results[0][0]).abs() > 1e-3


def test_a_scaling_that_changes_before_the_backward_is_seen():
    """PEFT scales in place, after prepare_model_for_compiled_hotswap a tensor: no gradient may come of the new one."""
    model, inputs = build(default=sibo()), token_inputs()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(layer_of(model).scaling["default"], torch.Tensor)
    expected = gradients(model, inputs)
    loss = model(**inputs).loss
    for _, layer in lora_layers(model, "default"):
        layer.scale_layer(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for _, layer in lora_layers(model, "default"):
        layer.unscale_layer(3.0)
    for name, gradient in gradients(model, inputs).items():
        close(gradient, expected[name])


def test_a_recompute_by_another_path_draws_the_same_mask():
    """Hooks may come and go between a forward and its reentrant recompute."""
    model, inputs = build(default=sibo(0.4, lora_dropout=0.2)).train(), token_inputs()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    torch.manual_seed(0)
    expected = gradients(model, inputs)
    model.zero_grad()
    torch.manual_seed(0)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
    with pytest.warns(UserWarning, match="hooks are registered on all modules"):
        loss = model(**inputs).loss
    handle.remove()
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            close(parameter.grad, expected[name])


def test_layers_with_accelerates_hooks_outlive_their_sibo_adapter():
    model, inputs = build(a=sibo(0.3), b=plain()), token_inputs()
    model.set_adapter("b")
    expected = output(model, inputs)
    model.set_adapter("a")
    mixed = output(model, inputs)
    model = dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    close(output(model, inputs), mixed)
    model.delete_adapter("a")
    model.set_adapter("b")
    close(output(model, inputs), expected)


def test_hooks_of_accelerate_that_came_before_the_adapter_are_told():
    model = dispatch_model(get_peft_model(base_model(), plain()), device_map={"": "cpu"}, force_hooks=True)
    model.add_adapter("sibo", sibo())
    rows = [row for row in explain(model) if row.adapter == "sibo"]
    assert {row.runs for row in rows} == {"adapter"} and all("device hook" in row.runs_reason for row in rows)


def test_selective_checkpointing_that_keeps_products_works():
    model, inputs = build(default=sibo()), token_inputs()
    expected = gradients(model, inputs)
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    for name, gradient in gradients(model, inputs).items():
        close(gradient, expected[name])


def test_a_traced_layer_keeps_no_shape():
    model = build(default=sibo(0.3, sibo_target_modules=["q_proj"]))
    layer = layer_of(model, "o_proj")
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(2, 3, 32), check_trace=False)
        x = torch.randn(3, 2, 32)
        close(traced(x), layer(x))


@pytest.mark.parametrize("learnable", [False, True])
def test_a_model_is_traced_alike_with_and_without_gradients(learnable):
    """torch.jit.trace checks what it traced against a second trace, without them."""
    model, ids = build(default=sibo(0.3, sibo_learnable=learnable)).eval(), torch.arange(10).view(2, 5)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    close(torch.jit.trace(Logits(), ids)(ids + 1), Logits()(ids + 1))


def test_a_bias_on_lora_a_and_nested_inputs_run_by_modules():
    model = build(default=sibo())
    layer = layer_of(model, "o_proj")
    nested = torch.nested.nested_tensor([torch.randn(2, 32), torch.randn(3, 32)])
    with pytest.warns(UserWarning, match="its input is a nested tensor"):
        found = layer(nested)
    for part, x in zip(found.unbind(), nested.unbind(), strict=True):
        close(part, layer(x))
    before = layer(torch.ones(2, 32))
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(4))
    with pytest.warns(UserWarning, match="lora_A has a bias"):
        assert different(layer(torch.ones(2, 32)), before)


def test_explain_tells_what_the_environment_forces(monkeypatch):
    model = build(default=sibo())
    monkeypatch.setenv("SIBO_TRITON_BACKEND", "reference")
    assert "12 run the definition: SIBO_TRITON_BACKEND=reference." in str(explain(model)).splitlines()
    monkeypatch.setenv("SIBO_TRITON_BACKEND", "triton")
    assert "SIBO_TRITON_BACKEND=triton, but the tensors are on cpu" in str(explain(model))


# --- What is kept for the backward


def test_saved_activations_of_a_model():
    """2 Llama layers, hidden 1024, 1024 tokens, r = 16, bf16 base, float32 adapters, dropout 0.05: MiB.

    PEFT's LoRA keeps 210.1 and the frozen model 69.3 there.
    """
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16}
    options = {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.05}

    def mebibytes(config, tokens):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **shape), dtype=torch.bfloat16)
        if config is None:
            model.requires_grad_(False)
            decoder = model.model
        else:
            model = get_peft_model(model, config)
            decoder = model.base_model.model.model
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        model.train()
        embeddings = torch.randn(1, tokens, 1024, dtype=torch.bfloat16, requires_grad=True)
        return saved_activation_bytes(model, lambda: decoder(inputs_embeds=embeddings)[0]) / 2**20

    # so much is kept of each token: fewer tell, in a tenth of the time, and what does not depend on them counts 8 times
    frozen, lora, ours = (8 * mebibytes(of, 128) for of in (None, LoraConfig(**options), SiboLoraConfig(**options)))
    assert frozen == pytest.approx(69.3, abs=1) and lora == pytest.approx(210.1, abs=1)
    assert ours <= 92


def test_layers_that_another_library_computes_are_named_once():
    """By kernels that read A and B and never call the layer: axolotl's and unsloth's."""

    def compute(layer, x):
        return layer.base_layer(x) + layer.lora_B["default"](layer.lora_A["default"](x))

    model = build(base_model(partial(llama, 2)), default=sibo(0.4, target_modules=["q_proj", "gate_proj", "up_proj"]))
    for block in model.base_model.model.model.layers:
        mlp = block.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(compute(mlp.gate_proj, x) * compute(mlp.up_proj, x))
    model.eval()(**token_inputs(), adapter_names=["__base__"] * 2)  # the check is yet to come
    model.train()
    with pytest.warns(UserWarning, match="^gate_proj, up_proj mix in the initial residual of 'model.layers', but none"):
        model(**token_inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**token_inputs())


def test_a_rate_of_dropout_of_1_runs_by_modules_as_peft_does():
    """Which the operations refuse: 1 / (1 - p) is no number."""
    model, inputs = build(default=sibo(0.4, lora_dropout=1.0)).train(), token_inputs()
    with pytest.warns(UserWarning, match="its rate of dropout is 1"):
        found = model(**inputs).logits
    with model.disable_adapter():
        close(found, model(**inputs).logits)
