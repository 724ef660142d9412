"""Hotswapping: lambda of the checkpoint that came last computes, and kinds that do not fit raise."""

import copy

import pytest
import torch
from adapter_folders import (
    KINDS,
    TARGETS,
    lambda_modules,
    lambda_values,
    logits_of,
    make_up_weights,
    save_adapter,
    saved_base,
    sibo_config,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By kind, an adapter and another of other weights, lambdas, rank and scaling; "plain", LoRA on these modules."""
    root = tmp_path_factory.mktemp("hotswap")
    saved_base(root / "base")
    cases = {}
    for kind in KINDS:
        cases[kind] = save_adapter(root / kind, root / "base", kind)
        cases[kind, "other"] = save_adapter(root / f"{kind}-other", root / "base", kind, seed=1, r=8, lora_alpha=5)
        assert not set(cases[kind].lambdas.values()) & set(cases[kind, "other"].lambdas.values())
    cases["plain"] = save_adapter(root / "plain", root / "base", "plain", seed=2)
    return cases


def load(case, **options):
    return PeftModel.from_pretrained(case.base(), case.folder, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_of_the_new_checkpoint_computes(saved, kind):
    first, other = saved[kind], saved[kind, "other"]
    model = load(first)
    objects = [id(module) for module in lambda_modules(model).values()]
    for case in (other, first, other):
        hotswap_adapter(model, case.folder, "default")
        assert lambda_values(model) == case.lambdas
        assert torch.equal(logits_of(model, first.input_ids), case.logits)
    assert objects == [id(module) for module in lambda_modules(model).values()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_lora_checkpoint_gives_lambda_0_and_a_sibo_one_brings_it_back(saved, kind):
    sibo, plain = saved[kind], saved["plain"]
    model = load(sibo)
    hotswap_adapter(model, plain.folder, "default")
    assert set(lambda_values(model).values()) == {0.0}
    assert torch.equal(logits_of(model, sibo.input_ids), plain.logits)
    hotswap_adapter(model, sibo.folder, "default")
    assert lambda_values(model) == sibo.lambdas
    assert torch.equal(logits_of(model, sibo.input_ids), sibo.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_plain_lora_checkpoint_training_does_not_move_lambda_from_0(saved, kind):
    model = load(saved[kind], is_trainable=True)
    hotswap_adapter(model, saved["plain"].folder, "default")
    # PEFT 0.19 swaps in tensors that require no grad
    optimizer = torch.optim.SGD([p.requires_grad_() for n, p in model.named_parameters() if "lora_" in n], lr=1.0)
    model(input_ids=saved[kind].input_ids, labels=saved[kind].input_ids).loss.backward()
    optimizer.step()
    assert set(lambda_values(model).values()) == {0.0}


@pytest.mark.parametrize(
    "model_of, checkpoint",
    [("plain", "fixed"), ("plain", "learnable"), ("fixed", "learnable"), ("learnable", "fixed")],
)
def test_a_checkpoint_with_a_lambda_that_has_no_place_raises_and_changes_nothing(saved, model_of, checkpoint):
    case = saved[model_of]
    model = load(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"unexpected keys[\s\S]*lora_sibo_lambda\.default"):
        hotswap_adapter(model, saved[checkpoint].folder, "default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model, case.input_ids), case.logits)


def test_a_checkpoint_that_mixes_in_fewer_modules_gives_lambda_0_in_the_rest(saved, tmp_path):
    case = saved["fixed"]
    fewer = get_peft_model(case.base(), sibo_config("fixed", sibo_target_modules=["up_proj"]))
    make_up_weights(fewer)
    fewer.eval().save_pretrained(tmp_path)
    model = load(case)
    hotswap_adapter(model, tmp_path, "default")
    assert all(value == 0.0 for name, value in lambda_values(model).items() if "q_proj" in name)
    assert {name: v for name, v in lambda_values(model).items() if "up_proj" in name} == lambda_values(fewer)
    assert torch.equal(logits_of(model, case.input_ids), logits_of(fewer, case.input_ids))

    model = load(case)  # and the other way round, there is no place for them
    hotswap_adapter(model, tmp_path, "default")
    with pytest.raises(RuntimeError, match=r"unexpected keys[\s\S]*q_proj\.lora_sibo_lambda"):
        hotswap_adapter(PeftModel.from_pretrained(case.base(), tmp_path), case.folder, "default")


def test_a_checkpoint_with_another_initial_residual_raises_and_changes_nothing(saved, tmp_path):
    case = saved["fixed"]
    get_peft_model(case.base(), sibo_config("fixed", sibo_source="embedding")).save_pretrained(tmp_path)
    model = load(case)
    for swap in (hotswap_adapter, lambda m, folder, name: m.load_adapter(folder, name)):
        with pytest.raises(ValueError, match="sibo_source, 'block_input' != 'embedding'.*another adapter"):
            swap(model, tmp_path, "default")
    assert lambda_values(model) == case.lambdas
    assert torch.equal(logits_of(model, case.input_ids), case.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_swap_on_a_16_bit_model_keeps_lambda_exact(saved, kind):
    model = load(saved[kind]).to(torch.bfloat16)
    hotswap_adapter(model, saved[kind, "other"].folder, "default")
    assert lambda_values(model) == saved[kind, "other"].lambdas


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_of_several_is_swapped(saved, kind):
    first, other = saved[kind], saved[kind, "other"]
    model = load(first)
    model.load_adapter(first.folder, "second")
    model.set_adapter("second")
    hotswap_adapter(model, other.folder, "second")
    assert torch.equal(logits_of(model, first.input_ids), other.logits)
    model.set_adapter("default")
    assert torch.equal(logits_of(model, first.input_ids), first.logits)


# --- prepared for torch.compile: ranks padded, scalings as tensors


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_for_compiled_hotswap_swaps_ranks_scalings_and_lambdas(saved, kind):
    first, other, plain = saved[kind], saved[kind, "other"], saved["plain"]
    model = load(first)
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape[0] == 16 and isinstance(layer.scaling["default"], torch.Tensor)
    assert lambda_values(model) == first.lambdas
    torch.testing.assert_close(logits_of(model, first.input_ids), first.logits)
    tensors = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for case in (other, first, plain, other):
        hotswap_adapter(model, case.folder, "default")
        torch.testing.assert_close(logits_of(model, first.input_ids), case.logits)
    assert lambda_values(model) == other.lambdas
    # the same tensor objects: a compiled graph reads them
    assert {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]} == tensors


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_for_compiled_hotswap_still_trains_lambda(saved, kind):
    padded, usual = load(saved[kind], is_trainable=True), load(saved[kind], is_trainable=True)
    prepare_model_for_compiled_hotswap(padded, target_rank=16)
    for model in (padded, usual):
        model(input_ids=saved[kind].input_ids, labels=saved[kind].input_ids).loss.backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if "logit_bias" in n} for model in (padded, usual)]
    assert len(gradients[1]) == (len(saved[kind].lambdas) if kind == "learnable" else 0)
    for name, gradient in gradients[1].items():
        assert gradient.abs() > 0
        torch.testing.assert_close(gradients[0][name], gradient)


def test_a_compiled_model_takes_the_new_lambda_without_recompiling(saved):
    first, other = saved["learnable"], saved["learnable", "other"]
    model = load(first)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    model = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits_of(model, first.input_ids), first.logits)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap_adapter(model, other.folder, "default")
        torch.testing.assert_close(logits_of(model, first.input_ids), other.logits)


# --- transformers' own


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_hotswap_computes_with_the_new_lambda(saved, kind, tmp_path):
    first = saved[kind]
    other = save_adapter(tmp_path / "other", first.base_folder, kind, seed=4)  # of the same rank
    model = first.base()
    model.load_adapter(first.folder, adapter_name="default")
    assert torch.equal(logits_of(model, first.input_ids), first.logits)
    model.load_adapter(other.folder, adapter_name="default", hotswap=True)
    assert lambda_values(model) == other.lambdas
    assert torch.equal(logits_of(model, first.input_ids), other.logits)


def test_transformers_enable_peft_hotswap_computes_with_the_new_lambda(saved, tmp_path):
    first = saved["fixed"]
    other = save_adapter(tmp_path / "other", first.base_folder, "fixed", seed=4)
    model = first.base()
    model.enable_peft_hotswap(target_rank=4)
    for case in (first, other):
        model.load_adapter(case.folder, adapter_name="default")
        assert torch.equal(logits_of(model, first.input_ids), case.logits)


@pytest.mark.parametrize(
    "model_of, checkpoint",
    [("plain", "fixed"), ("fixed", "plain"), ("learnable", "plain"), ("fixed", "learnable"), ("learnable", "fixed")],
)
def test_transformers_hotswap_between_kinds_raises(saved, model_of, checkpoint):
    """Unlike PEFT's it leaves what the checkpoint lacks as it was: such a lambda would belong to the other adapter."""
    model = saved[model_of].base()
    model.load_adapter(saved[model_of].folder, adapter_name="default")
    with pytest.raises(ValueError, match="lora_sibo_lambda"):
        model.load_adapter(saved[checkpoint].folder, adapter_name="default", hotswap=True)


def test_plain_lora_hotswap_is_untouched(saved):
    case = saved["plain"]
    model = get_peft_model(case.base(), LoraConfig(r=2, target_modules=list(TARGETS)))
    before = copy.deepcopy(model.state_dict())
    hotswap_adapter(model, case.folder, "default")
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(logits_of(model.eval(), case.input_ids), case.logits)
