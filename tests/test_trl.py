"""TRL's trainers take a SiboLoraConfig as they take a LoraConfig."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import mix_by_hooks
from peft import LoraConfig, PeftModel
from tiny_models import llama, randomise_adapters

from sibo_triton import SiboLoraConfig, accelerate, accelerate_all, explain

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(40))]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _sentence(index: int, length: int = 6) -> str:
    return " ".join(f"w{(index * 7 + step * 3) % 40}" for step in range(length))


def _arguments(kind: type, folder: Path, **more: object):
    return kind(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=True, seed=0,
        disable_tqdm=True, **more,
    )  # fmt: skip


def _config(kind: type = SiboLoraConfig, **more: object) -> LoraConfig:
    return kind(r=4, lora_dropout=0.0, target_modules=["q_proj", "o_proj", "up_proj"], task_type="CAUSAL_LM", **more)


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return llama()


@pytest.mark.parametrize("learnable", [False, True])
def test_sft(tokenizer, tmp_path: Path, learnable: bool) -> None:
    data = datasets.Dataset.from_list([{"text": _sentence(index)} for index in range(8)])
    model = _model()
    trainer = trl.SFTTrainer(
        model=model,
        args=_arguments(trl.SFTConfig, tmp_path, max_length=16),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=_config(sibo_lambda=0.4, sibo_learnable=learnable),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    up = dict(trainer.model.named_parameters())["base_model.model.model.layers.2.mlp.up_proj.lora_B.default.weight"]
    assert up.abs().max() > 1e-3  # it was zero
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(_model(), tmp_path / "adapter")
    ids = torch.arange(4, 14)[None]
    expected = trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
    lambdas = [value for name, value in loaded.state_dict().items() if "sibo_lambda" in name and "gate" not in name]
    assert len(lambdas) == 6
    if learnable:
        assert any(abs(torch.sigmoid(value).item() - 0.4) > 1e-4 for value in lambdas)


def test_sft_computes_what_the_oracle_computes(tokenizer, tmp_path: Path) -> None:
    """The same losses as plain LoRA with hooks that mix, and not those of plain LoRA."""
    data = datasets.Dataset.from_list([{"text": _sentence(index)} for index in range(8)])
    mixing = [f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")]

    def losses(config: LoraConfig, lambda_: float | None) -> list[float]:
        arguments = _arguments(trl.SFTConfig, tmp_path, max_length=16)
        trainer = trl.SFTTrainer(
            model=_model(), args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=config
        )
        torch.manual_seed(1)
        randomise_adapters(trainer.model)
        if lambda_ is not None:
            # hooks of this kind are wrong under checkpointing
            trainer.model.gradient_checkpointing_disable()
            trainer.args.gradient_checkpointing = False
            mix_by_hooks(trainer.model.get_base_model(), lambda_, mixing)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    sibo = losses(_config(sibo_lambda=0.4), None)
    assert sibo == pytest.approx(losses(_config(LoraConfig), 0.4), rel=1e-5)
    assert sibo != pytest.approx(losses(_config(LoraConfig), 0.0), rel=2e-4)


@pytest.mark.parametrize("how", ["by accelerate", "by accelerate_all"])
def test_accelerated_plain_lora_trains_as_stock_lora(tokenizer, tmp_path: Path, how: str) -> None:
    data = datasets.Dataset.from_list([{"text": _sentence(index)} for index in range(8)])

    def losses(accelerated: bool) -> list[float]:
        accelerate_all(accelerated and how == "by accelerate_all")
        try:
            trainer = trl.SFTTrainer(
                model=_model(),
                args=_arguments(trl.SFTConfig, tmp_path, max_length=16),
                train_dataset=data,
                processing_class=tokenizer,
                peft_config=_config(LoraConfig),
            )
        finally:
            accelerate_all(False)
        if accelerated and how == "by accelerate":
            accelerate(trainer.model)
        assert {row.runs for row in explain(trainer.model)} == {"fused" if accelerated else "PEFT"}
        torch.manual_seed(1)
        randomise_adapters(trainer.model)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


@pytest.mark.parametrize("learnable", [False, True])
def test_dpo_and_its_reference(tokenizer, tmp_path: Path, learnable: bool) -> None:
    data = datasets.Dataset.from_list(
        [
            {"prompt": _sentence(i, 3), "chosen": " " + _sentence(i + 1, 3), "rejected": " " + _sentence(i + 2, 3)}
            for i in range(8)
        ]
    )
    model = _model()
    trainer = trl.DPOTrainer(
        model=model,
        args=_arguments(trl.DPOConfig, tmp_path, max_length=24),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=_config(sibo_lambda=0.4, sibo_learnable=learnable),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # a fresh adapter is the reference: the first loss is log 2 only if both ran with the right adapter state
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]


def test_dpo_from_a_trained_adapter_copies_it_as_the_reference(tokenizer, tmp_path: Path) -> None:
    from peft import get_peft_model

    policy = get_peft_model(_model(), _config(sibo_lambda=0.4, sibo_learnable=True))
    randomise_adapters(policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "logit_bias" in name:
                parameter.add_(0.7)  # no longer what the config says
    data = datasets.Dataset.from_list(
        [
            {"prompt": _sentence(i, 3), "chosen": " " + _sentence(i + 1, 3), "rejected": " " + _sentence(i + 2, 3)}
            for i in range(8)
        ]
    )
    trainer = trl.DPOTrainer(
        model=policy,
        args=_arguments(trl.DPOConfig, tmp_path, max_length=24),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
