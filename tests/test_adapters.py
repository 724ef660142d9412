"""Several adapters in one model, switched, disabled, deleted and unloaded, against stock PEFT with mixing hooks."""

import torch
from adapter_models import (
    base_model,
    build,
    close,
    different,
    gradients,
    hooks_on,
    oracle_of,
    output,
    plain,
    sibo,
    without_mixing,
)
from tiny_models import randomise_adapters, token_inputs

from sibo_triton import explain

# --- Several adapters


def test_each_adapter_has_its_own_lambda():
    configs = {"mild": sibo(0.1), "strong": sibo(0.7), "none": plain(), "only": sibo(1.0)}
    model, inputs = build(**configs), token_inputs()
    oracle, zero = oracle_of(model, **configs), without_mixing(model)
    for name in configs:
        for each in (model, oracle, zero):
            each.set_adapter(name)
        close(output(model, inputs), output(oracle, inputs))
        assert different(output(model, inputs), output(zero, inputs)) == (name != "none")


def test_several_active_adapters_add_up():
    configs = {"one": sibo(0.2), "other": sibo(0.6), "plain": plain()}
    model, inputs = build(**configs), token_inputs()
    oracle, zero = oracle_of(model, **configs), without_mixing(model)
    outputs = []
    for names in (["one", "other"], ["one", "plain"], ["plain", "other", "one"]):
        for each in (model, oracle, zero):
            each.base_model.set_adapter(names)
        outputs.append(output(model, inputs))
        close(outputs[-1], output(oracle, inputs))
        assert different(outputs[-1], output(zero, inputs))
        expected = gradients(oracle, inputs)
        found = gradients(model, inputs)
        assert found.keys() == expected.keys() and len(found) == len(names) * 12 * 2
        for name in found:
            close(found[name], expected[name])
    assert different(outputs[0], outputs[1]) and different(outputs[0], outputs[2])


def test_set_adapter_moves_what_is_trainable():
    model = build(one=sibo(0.3, sibo_learnable=True), other=sibo(0.3, sibo_learnable=True), fixed=sibo(0.3))

    def trainable():
        return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad and "sibo" in name}

    assert trainable() == {"one"}
    model.set_adapter("other")
    assert trainable() == {"other"}
    model.set_adapter("fixed")
    assert trainable() == set()
    assert not any("sibo_lambda.fixed" in name for name, _ in model.named_parameters())  # a buffer: nothing trains it
    status = model.get_model_status()
    assert status.active_adapters == ["fixed"] and status.requires_grad == {"one": False, "other": False, "fixed": True}


def test_learnable_lambdas_of_adapters_and_modules_are_their_own():
    model, inputs = build(one=sibo(0.3, sibo_learnable=True), other=sibo(0.3, sibo_learnable=True)), token_inputs()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "sibo_lambda.one" in n], lr=10.0)
    assert len(optimizer.param_groups[0]["params"]) == 9
    before = output(model, inputs)
    model(**inputs).loss.backward()
    optimizer.step()
    assert different(output(model, inputs), before)
    values = {(row.adapter, round(row.lambda_, 6)) for row in explain(model) if row.mixes}
    assert ("other", 0.3) in values and ("one", 0.3) not in values and len(values) == 10  # each of nine moved by itself


# --- Deleting, unloading


def test_deleting_the_last_sibo_adapter_takes_the_hooks_off():
    configs = {"sibo": sibo(), "plain": plain()}
    model, inputs = build(**configs), token_inputs()
    oracle = oracle_of(model, **configs)
    assert hooks_on(model)
    model.delete_adapter("sibo")
    assert hooks_on(model) == []
    assert not any("sibo" in name for name in model.state_dict())
    model.set_adapter("plain")
    oracle.set_adapter("plain")
    assert torch.equal(output(model, inputs), output(oracle, inputs))


def test_deleting_one_of_two_leaves_the_other_right():
    configs = {"one": sibo(0.2), "other": sibo(0.6), "embedding": sibo(0.5, sibo_source="embedding")}
    model, inputs = build(**configs), token_inputs()
    oracle = oracle_of(model, **configs)
    hooks = len(hooks_on(model))
    model.delete_adapter("one")
    assert len(hooks_on(model)) == hooks  # "other" needs them
    model.delete_adapter("embedding")
    assert len(hooks_on(model)) < hooks  # those for the other source are gone
    for each in (model, oracle):
        each.set_adapter("other")
    close(output(model, inputs), output(oracle, inputs))
    assert {row.adapter for row in explain(model)} == {"other"}


def test_a_plain_adapter_under_a_deleted_ones_name_is_plain():
    model, inputs = build(keep=sibo(0.6), reused=sibo(0.3)), token_inputs()
    model.delete_adapter("reused")
    model.add_adapter("reused", plain())
    randomise_adapters(model)
    configs = {"keep": sibo(0.6), "reused": plain()}
    oracle = oracle_of(model, **configs)
    for name in configs:
        model.set_adapter(name)
        oracle.set_adapter(name)
        close(output(model, inputs), output(oracle, inputs))
    assert not any(row.mixes for row in explain(model) if row.adapter == "reused")
    model.merge_adapter(["reused"])  # it is plain LoRA in every respect


def test_a_sibo_adapter_under_a_deleted_plain_ones_name_mixes():
    model, inputs = build(keep=plain(), reused=plain()), token_inputs()
    model.delete_adapter("reused")
    model.add_adapter("reused", sibo(0.4))
    randomise_adapters(model)
    oracle = oracle_of(model, keep=plain(), reused=sibo(0.4))
    for each in (model, oracle):
        each.set_adapter("reused")
    close(output(model, inputs), output(oracle, inputs))
    assert different(output(model, inputs), output(without_mixing(model), inputs))


def test_transformers_delete_adapter_takes_the_hooks_off():
    model, inputs = base_model(), token_inputs()
    expected = output(model, inputs)
    model.add_adapter(sibo(), adapter_name="one")
    randomise_adapters(model)
    assert different(output(model, inputs), expected) and hooks_on(model)
    model.delete_adapter("one")
    assert hooks_on(model) == []
    assert torch.equal(output(model, inputs), expected)
