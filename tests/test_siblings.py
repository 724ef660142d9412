"""Layers that get the same x share their passes over it, and are right also where they cannot."""

import copy
import functools
import gc
import pickle
import re
import threading
import types
import weakref

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from op_cases import BF16, FP32, FP64
from peft import LoraConfig, get_peft_model
from tiny_models import ARCHITECTURES, llama, randomise_adapters, token_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

import sibo_triton.layers.siblings as siblings_file
from sibo_triton import SiboLoraConfig, accelerate, dropout, explain, reference, restore
from sibo_triton.initial_residual import find_block_stacks, trial_run
from sibo_triton.layers.siblings import find_siblings, siblings_below
from sibo_triton.lora.peft_layers import lora_layers
from sibo_triton.ops import torch_backend

ATTENTION = ("q_proj", "k_proj", "v_proj")
EXPECTED = {
    "llama": {"self_attn": {("k_proj", "q_proj", "v_proj")}, "mlp": {("gate_proj", "up_proj")}},
    "bert": {"self": {("key", "query", "value")}},
    "t5": {"SelfAttention": {("k", "q", "v")}, "EncDecAttention": {("k", "v")}},
    "opt": {"self_attn": {("k_proj", "q_proj", "v_proj")}},
}


@pytest.fixture
def passes(monkeypatch):
    """How many layers each pass over x served, forward and backward; of the forward those of several only."""
    seen = {"down": [], "backward": []}
    down, backward = torch_backend.down_siblings, torch_backend.down_backward_siblings

    def counted(name, original):
        def count(*args):
            layers = len(args[name == "down"])
            if layers > 1 or name == "backward":
                seen[name].append(layers)
            return original(*args)

        return count

    monkeypatch.setattr(torch_backend, "down_siblings", counted("down", down))
    monkeypatch.setattr(torch_backend, "down_backward_siblings", counted("backward", backward))
    return seen


def model_with(config=None, dtype=FP32, **options):
    torch.manual_seed(0)
    base = llama().to(dtype)
    config = config or SiboLoraConfig(**{"r": 4, "target_modules": "all-linear", "sibo_lambda": 0.3, **options})
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    randomise_adapters(model)
    return model.train()


def ungrouped(model):
    """The same model, whose layers never meet."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        siblings_file.detach_siblings(module)
    return twin


def results(model, run=None):
    """The loss and every gradient."""
    torch.manual_seed(1)
    model.zero_grad()
    inputs = token_inputs()
    loss = model(**inputs).loss if run is None else run(model, inputs)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=atol * float(value.abs().max()) + 1e-12, rtol=0, msg=name)


@pytest.mark.oldest
@pytest.mark.parametrize("name", EXPECTED)
def test_who_gets_the_same_tensor_is_found(name):
    model = get_peft_model(ARCHITECTURES[name].build(), LoraConfig(r=2, target_modules="all-linear"))
    base = model.base_model.model
    found = {}
    for parent, groups in find_siblings(lora_layers(base), trial_run(base, find_block_stacks(base))).items():
        found.setdefault(parent.rpartition(".")[2], set()).update(tuple(sorted(names)) for names in groups)
    assert {key: value for key, value in found.items() if key in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.oldest
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.2},
        {"sibo_learnable": True},
        {"sibo_learnable": True, "lora_dropout": 0.2},
        {"sibo_target_modules": ["up_proj", "k_proj"]},
        {"sibo_target_modules": ["up_proj", "k_proj"], "sibo_learnable": True},
        {"rank_pattern": {"k_proj": 7, "up_proj": 1}, "alpha_pattern": {"v_proj": 3}},
        {"bias": "lora_only", "lora_bias": True, "target_modules": ["query", "key", "value"]},
    ],
    ids=str,
)
def test_the_same_numbers_as_alone(options, passes):
    """In float64, so that no rounding hides a share of another sibling; dropout draws the same masks on the CPU."""
    if "bias" in options:
        base = ARCHITECTURES["bert"].build().to(FP64)
        model = get_peft_model(base, SiboLoraConfig(r=4, sibo_lambda=0.3, **options), autocast_adapter_dtype=False)
        randomise_adapters(model)
        model.train()
        run = lambda model, inputs: model(input_ids=inputs["input_ids"]).logits.square().mean()  # noqa: E731
        groups = [3]
    else:
        model, run = model_with(dtype=FP64, **options), None
        groups = [3, 2]
    blocks = 1 + max(int(re.search(r"layers?\.(\d+)", row.module)[1]) for row in explain(model))
    found = results(model, run)
    assert passes["down"] == groups * blocks
    assert [count for count in passes["backward"] if count > 1] == list(reversed(passes["down"]))
    assert_same(found, results(ungrouped(model), run), atol=1e-11)
    assert passes["down"] == groups * blocks  # the twin's layers do not meet


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_in_mixed_dtypes_the_numbers_are_those_of_alone_within_rounding(dropout_p):
    model = get_peft_model(
        llama().to(BF16), SiboLoraConfig(r=4, target_modules="all-linear", sibo_lambda=0.3, lora_dropout=dropout_p)
    ).train()
    randomise_adapters(model)
    assert next(p for p in model.parameters() if p.requires_grad).dtype == FP32
    assert_same(results(model), results(ungrouped(model)), atol=0.1)


def attention_of(dtype=FP64, **options):
    """A model's first attention, whose siblings mix nothing, so that it can be called by itself."""
    model = model_with(dtype=dtype, sibo_target_modules=["gate_proj"], **options)
    attention = model.base_model.model.model.layers[0].self_attn
    assert siblings_below(attention) == (ATTENTION,)
    return model, attention


def call(attention, body, *args):
    """The attention with another forward, under its own hooks."""
    attention.forward = types.MethodType(body, attention)
    try:
        return attention(*args)
    finally:
        del attention.forward


def alone(layer, x):
    return nn.Module.__call__(layer, x)  # no scope is open


def gradients_of(ys, attention, x):
    weights = [p for name, p in attention.named_parameters() if p.requires_grad and "o_proj" not in name]
    grads = torch.autograd.grad(sum((y * y).sum() for y in ys), [x, *weights], allow_unused=True)
    return [*ys, *grads]


def other_order(self, x):
    v, q, k = self.v_proj(x), self.q_proj(x), self.k_proj(x)
    return q, k, v


def one_is_not_called(self, x):
    return self.q_proj(x), self.v_proj(x)


def only_one(self, x):
    return (self.k_proj(x),)


def twice(self, x):
    return self.q_proj(x), self.q_proj(x), self.k_proj(x), self.v_proj(x)


def all_twice(self, x):
    return tuple(layer(x) for _ in range(2) for layer in (self.q_proj, self.k_proj, self.v_proj))


def another_x(self, x):
    return self.q_proj(x), self.k_proj(2 * x), self.v_proj(x)


def equal_but_another(self, x):
    return self.q_proj(x), self.k_proj(x.clone()), self.v_proj(x.view_as(x))


def x_is_written_to(self, x):
    x = x + 0.0
    q = self.q_proj(x)
    with torch.no_grad():  # as what has no gradient may be: a mask, say
        x.mul_(1.0)
        x.add_(1.0)
    return self.k_proj(x), self.v_proj(x), q.detach()


def output_is_written_to(self, x):
    q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    return q.mul_(2.0), k.add_(v), v


def switched_off_between(self, x):
    q = self.q_proj(x)
    with torch.no_grad():
        k = self.k_proj(x)
    return q, k, self.v_proj(x)


def an_adapter_is_written_to(self, x):
    q = self.q_proj(x)
    with torch.no_grad():
        self.k_proj.lora_A["default"].weight.mul_(1.5)
    return (q.detach(), self.k_proj(x), self.v_proj(x).detach())


def a_frozen_weight_is_written_to(self, x):
    q = self.q_proj(x)
    with torch.no_grad():
        self.k_proj.base_layer.weight.mul_(1.5)
    return (q.detach(), self.k_proj(x), self.v_proj(x).detach())


def a_weight_is_replaced(self, x):
    q = self.q_proj(x)
    self.k_proj.base_layer.weight = torch.nn.Parameter(1.5 * self.k_proj.base_layer.weight.detach(), False)
    lora_b = self.v_proj.lora_B["default"]
    lora_b.weight = torch.nn.Parameter(1.5 * lora_b.weight.detach())
    return q, self.k_proj(x), self.v_proj(x).detach()


def disabled_between(self, x):
    q = self.q_proj(x)
    self.k_proj.enable_adapters(False)
    k = self.k_proj(x)
    self.k_proj.enable_adapters(True)
    for p in self.k_proj.lora_A.parameters():
        p.requires_grad_(True)
    return q, k, self.v_proj(x)


BODIES = [
    other_order,
    one_is_not_called,
    only_one,
    twice,
    all_twice,
    another_x,
    equal_but_another,
    x_is_written_to,
    output_is_written_to,
    switched_off_between,
    an_adapter_is_written_to,
    a_frozen_weight_is_written_to,
    a_weight_is_replaced,
    disabled_between,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_however_they_are_called_they_are_right(body):
    _, attention = attention_of()
    twin = copy.deepcopy(attention)
    siblings_file.detach_siblings(twin)
    x = torch.randn(2, 5, attention.q_proj.in_features, dtype=FP64, requires_grad=True)
    found = gradients_of(call(attention, body, x), attention, x)
    expected = gradients_of(call(twin, body, x), twin, x)
    assert [f is None for f in found] == [e is None for e in expected]
    for f, e in zip(found, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(f, e, atol=1e-12, rtol=1e-12)


def test_each_of_them_shares_when_it_may(passes):
    """What the test before would not see: that there was anything to share."""
    _, attention = attention_of()
    x = torch.randn(2, 5, attention.q_proj.in_features, dtype=FP64)
    shared = {other_order: [3], one_is_not_called: [3], only_one: [3], twice: [3], all_twice: [3, 3], another_x: [3]}
    for body, expected in shared.items():
        del passes["down"][:]
        call(attention, body, x)
        assert passes["down"] == expected, body.__name__


def test_what_is_not_called_gets_no_gradient():
    """None, and not zeros, to which weight decay would apply."""
    _, attention = attention_of()
    x = torch.randn(2, 5, attention.q_proj.in_features, dtype=FP64)
    sum(y.sum() for y in call(attention, one_is_not_called, x)).backward()
    assert attention.k_proj.lora_A["default"].weight.grad is None
    assert attention.q_proj.lora_A["default"].weight.grad is not None


def test_a_new_tensor_is_not_taken_for_one_that_was_read():
    """What was read is kept as long as it is compared: a tensor made in its place could get its id."""
    _, attention = attention_of()

    def replace_by_one_at_its_place(self, x):
        q = self.q_proj(x)
        base = self.k_proj.base_layer
        old, changed = weakref.ref(base.weight), 1.5 * base.weight.detach()
        del base.weight
        assert old() is not None
        base.weight = torch.nn.Parameter(changed, False)
        return q, self.k_proj(x), self.v_proj(x)

    x = torch.randn(2, 5, attention.q_proj.in_features, dtype=FP64)
    _, k, _ = call(attention, replace_by_one_at_its_place, x)
    torch.testing.assert_close(k, alone(attention.k_proj, x))


def test_with_another_adapter_active_a_layer_runs_alone(passes):
    model, attention = attention_of()
    model.add_adapter("other", SiboLoraConfig(r=2, target_modules="all-linear", sibo_target_modules=["gate_proj"]))
    randomise_adapters(model)
    attention.k_proj.set_adapter("other")
    x = torch.randn(2, 5, attention.q_proj.in_features, dtype=FP64)
    del passes["down"][:]
    q, k, v = call(attention, lambda self, x: (self.q_proj(x), self.k_proj(x), self.v_proj(x)), x)
    assert passes["down"] == [2]
    torch.testing.assert_close(k, alone(attention.k_proj, x))
    torch.testing.assert_close(v, alone(attention.v_proj, x))


def test_nothing_is_kept_past_its_use():
    """Neither when all have run, nor when one is never called, nor after an exception."""
    _, attention = attention_of()

    def failing(self, x):
        self.q_proj(x)
        raise RuntimeError("on purpose")

    for body in (other_order, one_is_not_called, failing):
        x = torch.randn(2, 5, attention.q_proj.in_features, dtype=FP64)
        held = weakref.ref(x)
        try:
            with torch.no_grad():
                call(attention, body, x)
        except RuntimeError:
            pass
        del x
        gc.collect()
        assert held() is None, body.__name__
        assert not siblings_file._scopes.open


def test_a_forward_that_was_left_by_ctrl_c_is_forgotten_by_the_next():
    _, attention = attention_of()

    def interrupted(self, x):
        self.q_proj(x)
        raise KeyboardInterrupt

    x = torch.randn(2, 5, attention.q_proj.in_features, dtype=FP64)
    with pytest.raises(KeyboardInterrupt):
        call(attention, interrupted, x)
    q, k, v = call(attention, other_order, x)
    for y, layer in ((q, attention.q_proj), (k, attention.k_proj), (v, attention.v_proj)):
        torch.testing.assert_close(y, alone(layer, x))
    assert not siblings_file._scopes.open


def test_threads_do_not_meet():
    """Each of two threads is stopped after q while the other runs."""
    _, attention = attention_of()
    attention.forward = types.MethodType(lambda self, x, wait: (self.q_proj(x), wait(), self.k_proj(x)), attention)
    barrier, outputs = threading.Barrier(2, timeout=30), {}
    xs = [torch.randn(2, 5, attention.q_proj.in_features, dtype=FP64) for _ in range(2)]

    def run(i):
        outputs[i] = attention(xs[i], barrier.wait)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(xs):
        torch.testing.assert_close(outputs[i][0], alone(attention.q_proj, x))
        torch.testing.assert_close(outputs[i][2], alone(attention.k_proj, x))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("checkpointed", "dropout_p"), [("mlp", 0.3), ("mlp.gate_proj", 0.3), ("mlp.up_proj", 0.0)])
def test_a_checkpoint_inside_of_the_parents_hooks(checkpointed, dropout_p, use_reentrant, passes, monkeypatch):
    """Its recompute runs no hooks, so that the layers run alone; transformers checkpoints a block's forward like this.

    On a GPU, seeds drawn at once are not those that as many calls draw, so that a recompute alone would find another
    mask than a group: here too.
    """
    monkeypatch.setattr(reference, "draw_seeds", lambda count, device: dropout.draw_seeds(count + 1, device)[1:])
    targets = ["gate_proj", "up_proj", "down_proj"]
    model = model_with(LoraConfig(r=4, target_modules=targets, lora_dropout=dropout_p), dtype=FP64)
    accelerate(model)
    model.enable_input_require_grads()
    twin = ungrouped(model)
    for each in (model, twin):
        for layer in each.base_model.model.model.layers:
            module = layer.get_submodule(checkpointed)
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=use_reentrant)
    found = results(model)
    assert bool(passes["down"]) == (checkpointed == "mlp.up_proj")  # which a group has computed by then, for nothing
    assert_same(found, results(twin), atol=1e-9)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("body", [other_order, one_is_not_called, another_x], ids=lambda body: body.__name__)
def test_a_recompute_groups_as_its_forward_did(body, use_reentrant, passes):
    _, attention = attention_of(lora_dropout=0.3)
    attention.forward = types.MethodType(body, attention)
    x = torch.randn(2, 5, attention.q_proj.in_features, dtype=FP64, requires_grad=True)
    torch.manual_seed(3)
    ys = checkpoint(attention, x, use_reentrant=use_reentrant)
    with torch.no_grad():
        attention(2 * x)  # another forward before the backward
    found = gradients_of(ys, attention, x) if not use_reentrant else None
    if use_reentrant:
        sum((y * y).sum() for y in ys).backward()
        found = [
            *ys,
            x.grad,
            *(p.grad for n, p in attention.named_parameters() if p.requires_grad and "o_proj" not in n),
        ]
    assert passes["down"] == [3, 3, 3]
    torch.manual_seed(3)
    x.grad = None
    for expected, actual in zip(gradients_of(attention(x), attention, x), found, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_graph_can_be_kept_and_gone_through_again():
    _, attention = attention_of(lora_dropout=0.3)
    x = torch.randn(2, 5, attention.q_proj.in_features, dtype=FP64, requires_grad=True)
    ys = call(attention, other_order, x)
    loss = sum((y * y).sum() for y in ys)
    leaves = [x, attention.q_proj.lora_A["default"].weight, attention.v_proj.lora_B["default"].weight]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(one, two)


def test_a_second_derivative_is_refused_by_name():
    _, attention = attention_of()
    x = torch.randn(2, 5, attention.q_proj.in_features, dtype=FP64, requires_grad=True)
    ys = call(attention, other_order, x)
    (dx,) = torch.autograd.grad(sum((y * y).sum() for y in ys), x, create_graph=True)
    with pytest.raises(RuntimeError, match="SIBO_TRITON_BACKEND=reference"):
        dx.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, passes):
    """Tensors of inference mode have no version by which a write to x could be seen: their layers run alone."""
    model = model_with().eval()
    inputs = token_inputs()
    with mode():
        logits = model(**inputs).logits
    assert passes["down"] == ([3, 2] * 3 if mode is torch.no_grad else [])
    torch.testing.assert_close(logits.clone(), ungrouped(model)(**inputs).logits, atol=1e-5, rtol=1e-4)


def test_x_is_kept_once_for_all_of_them():
    """Of q, k and v together: x, what has the size of the rank, and no dY, mask or cast."""
    _, attention = attention_of(dtype=BF16, lora_dropout=0.2)
    for name in ATTENTION:
        getattr(attention, name).lora_A["default"].float()
        getattr(attention, name).lora_B["default"].float()
    x = torch.randn(64, 5, attention.q_proj.in_features, dtype=BF16, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(attention, other_order, x)
    large = [t for t in kept.values() if t.numel() >= x.numel() and not isinstance(t, nn.Parameter)]
    assert len(large) == 1 and large[0] is x
    ranks = [t for t in kept.values() if t.shape == (320, 4)]
    assert len(ranks) == 3


def test_hooks_leave_with_the_last_adapter():
    model = model_with()
    assert any(siblings_below(module) for module in model.modules())
    base = model.unload()
    assert not any(siblings_below(module) for module in base.modules())


def test_a_layer_that_accelerate_wrapped_gives_its_adapter_up_too():
    """Its class stays ours until the wrap is off."""
    model = model_with()
    layers = [module for _, module in lora_layers(model)]
    for layer in layers:
        add_hook_to_module(layer, AlignDevicesHook("cpu"))
    model.delete_adapter("default")
    assert not any(siblings_below(module) for module in model.modules())


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_group_by_themselves(make_copy, passes):
    model = model_with()
    twin = make_copy(model)
    del passes["down"][:]
    assert_same(results(twin), results(model))
    assert passes["down"] == [3, 2] * 6


def test_explain_names_them():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    assert all(row.siblings == () for row in explain(model))
    accelerate(model)
    assert {row.siblings for row in explain(model) if "q_proj" in row.module} == {("v_proj",)}
    assert "6 share passes over their input: q_proj + v_proj." in str(explain(model))
    restore(model)
    assert all(row.siblings == () for row in explain(model))
