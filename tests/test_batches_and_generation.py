"""Batches with an adapter for each row, and generation, against each adapter alone and stock PEFT with mixing hooks."""

import pytest
import torch
from adapter_models import base_model, build, close, different, oracle_of, output, plain, sibo, without_mixing
from peft import get_peft_model
from tiny_models import ARCHITECTURES, randomise_adapters, token_inputs

GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


# --- Batches of several adapters

NAMES = ["mild", "__base__", "strong", "mild", "plain"]  # no palindrome: rows in another order must show


def mixed_batch_model():
    configs = {
        "mild": sibo(0.1),
        "strong": sibo(0.7),
        "plain": plain(),
        "embedding": sibo(0.4, sibo_source="embedding"),
    }
    return build(**configs), token_inputs(batch=len(NAMES))


def alone(model, name, run):
    """What a function of the model gives with one adapter active, or with none."""
    if name == "__base__":
        with model.disable_adapter():
            return run(model)
    model.set_adapter(name)
    return run(model)


def test_each_row_of_a_mixed_batch_equals_its_adapter_alone():
    model, inputs = mixed_batch_model()
    mixed = output(model, inputs, adapter_names=NAMES)
    zero = output(without_mixing(model), inputs, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        close(mixed[row], alone(model, name, lambda model: output(model, inputs))[row])
        assert different(mixed[row], zero[row]) == (name in ("mild", "strong"))


@pytest.mark.parametrize("names", [["embedding", "strong", "embedding", "__base__", "mild"], ["strong"] * 5])
def test_mixed_batches_of_other_kinds(names):
    """Adapters with different sources of h0, and a batch of one adapter only."""
    model, inputs = mixed_batch_model()
    mixed = output(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        close(mixed[row], alone(model, name, lambda model: output(model, inputs))[row])


@pytest.mark.parametrize("beams", [1, 2])
def test_generating_for_several_adapters_at_once_equals_each_alone(beams):
    model, inputs = mixed_batch_model()
    ids = inputs["input_ids"]
    mixed = model.generate(input_ids=ids, adapter_names=NAMES, num_beams=beams, **GENERATE)
    zero = without_mixing(model).generate(input_ids=ids, adapter_names=NAMES, num_beams=beams, **GENERATE)
    assert not torch.equal(mixed, zero)
    for row, name in enumerate(NAMES):
        one = alone(model, name, lambda model: model.generate(input_ids=ids, num_beams=beams, **GENERATE))
        assert mixed[row].tolist() == one[row].tolist()


# --- Generating


def test_greedy_generation_is_the_same_with_and_without_cache():
    config = sibo(0.4)
    model, inputs = build(default=config), token_inputs()
    ids = inputs["input_ids"]
    oracle, zero = oracle_of(model, default=config), without_mixing(model)
    cached = model.generate(input_ids=ids, use_cache=True, **GENERATE)
    assert cached.shape == (2, 12)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **GENERATE))
    assert torch.equal(cached, oracle.generate(input_ids=ids, use_cache=False, **GENERATE))
    assert not torch.equal(cached, zero.generate(input_ids=ids, **GENERATE))
    # step by step, each token's h0 is its own: the logits agree with those of the whole sequence
    scores = model.generate(input_ids=ids, return_dict_in_generate=True, output_logits=True, **GENERATE).logits
    close(torch.stack(scores, dim=1), output(model, {"input_ids": cached})[:, 5:-1])


@pytest.mark.parametrize("cache", [True, False])
def test_beam_search_equals_the_oracles(cache):
    config = sibo(0.4)
    model, ids = build(default=config), token_inputs()["input_ids"]
    options = {**GENERATE, "num_beams": 3, "use_cache": cache}
    found = model.generate(input_ids=ids, **options)
    assert torch.equal(found, oracle_of(model, default=config).generate(input_ids=ids, **options))
    assert not torch.equal(found, without_mixing(model).generate(input_ids=ids, **options))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_generate_the_same_with_and_without_cache(name):
    """The decoder's h0 is one token long in each step, the encoder's is not computed again."""
    architecture = ARCHITECTURES[name]
    model = get_peft_model(base_model(architecture.build), sibo(0.4, target_modules=list(architecture.targets))).eval()
    randomise_adapters(model)
    ids = architecture.inputs()["input_ids"]
    for beams in (1, 2):
        options = {**GENERATE, "num_beams": beams}
        cached = model.generate(input_ids=ids, use_cache=True, **options)
        assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))
        assert not torch.equal(cached, without_mixing(model).generate(input_ids=ids, **options))
