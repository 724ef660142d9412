"""Copies of a model and threads in one model: each forward has an initial residual of its own."""

import copy
import io
import threading

import pytest
import torch
from adapter_models import base_model, build, different, gradients, hooks_on, output, sibo
from peft import inject_adapter_in_model
from tiny_models import randomise_adapters, token_inputs

# --- Copies


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def injected():
    model = inject_adapter_in_model(sibo(), base_model()).eval()
    randomise_adapters(model)
    return model


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled])
@pytest.mark.parametrize("make", [lambda: build(default=sibo(), other=sibo(0.5)), injected])
def test_copies_compute_the_same_and_are_independent(make_copy, make):
    model, inputs = make(), token_inputs()
    before = output(model, inputs)
    twin = make_copy(model)
    assert torch.equal(output(twin, inputs), before)
    assert len(hooks_on(twin)) == len(hooks_on(model))

    randomise_adapters(twin)
    assert different(output(twin, inputs), before)
    assert torch.equal(output(model, inputs), before)
    for module in model.modules():  # and the copy mixes in its own h0, with its own lambda
        if hasattr(module, "lora_sibo_lambda"):
            module.lora_sibo_lambda["default"].weight.zero_()
    after = output(twin, inputs)
    assert different(output(model, inputs), before) and torch.equal(output(twin, inputs), after)
    del model
    expected = gradients(twin, inputs)
    assert len(expected) >= 18 and all(gradient.isfinite().all() for gradient in expected.values())


def test_a_copy_may_run_inside_of_a_forward_of_the_original():
    """Each has its own h0: neither takes what the other left."""
    model = build(default=sibo())
    twin = copy.deepcopy(model)
    inputs, others = token_inputs(), token_inputs()
    expected, other_expected = output(model, inputs), output(twin, others)
    seen = []
    block = model.base_model.model.model.layers[1]
    block.register_forward_pre_hook(lambda *_: seen.append(output(twin, others)))
    assert torch.equal(output(model, inputs), expected)
    assert torch.equal(seen[0], other_expected)


def test_a_copy_can_be_taken_after_training_steps_and_unloaded():
    model, inputs = build(default=sibo()), token_inputs()
    gradients(model, inputs)
    twin = copy.deepcopy(model)
    base = twin.unload()
    assert hooks_on(base) == [] and hooks_on(model)
    with model.disable_adapter():
        assert torch.equal(output(base, inputs), output(model, inputs))


# --- Threads


def in_threads(model, work, count=4):
    """Do the work in threads at once: each waits in the second block until all have passed the first."""
    results, errors = [None] * count, []
    meeting = threading.Barrier(count, timeout=60)

    def run(number):
        try:
            results[number] = work(number)
        except Exception as error:
            errors.append(error)

    def meet(*_):
        meeting.wait()

    hook = model.base_model.model.model.layers[1].register_forward_pre_hook(meet)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert not errors
    return results


def test_threads_do_not_see_each_others_initial_residual():
    model = build(default=sibo())
    # of equal shape, so that another thread's h0 would fit
    batches = [token_inputs() for _ in range(4)]
    adapters = [p for name, p in model.named_parameters() if p.requires_grad]

    def forward(number):
        return output(model, batches[number])

    def backward(number):
        return torch.autograd.grad(model(**batches[number]).loss, adapters)

    expected = [forward(number) for number in range(4)]
    expected_gradients = [backward(number) for number in range(4)]
    assert different(expected[0], expected[1])
    for found, wanted in zip(in_threads(model, forward), expected, strict=True):
        assert torch.equal(found, wanted)
    for found, wanted in zip(in_threads(model, backward), expected_gradients, strict=True):
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
