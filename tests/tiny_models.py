"""Tiny random models, one for each way in which the initial residual or the layers differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf
from torch import nn

VOCAB, WIDTH, IMAGE_TOKEN = 64, 32, 60
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GQA = {**_LLAMA, "num_key_value_heads": 2}
_BERT = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
_GPT = {
    "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A model family at toy size.

    Attributes:
        build: makes the model, with the generator as it stands.
        targets: linears to put LoRA on, mixing ones and others.
        mixing: the endings of those that mix by default.
        stacks: names of the block lists.
        blocks_per_stack: how many blocks each has.
        task_type: PEFT's.
        inputs: keyword arguments for a forward with a loss.
    """

    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    mixing: tuple[str, ...]
    stacks: tuple[str, ...]
    task_type: str | None
    inputs: Callable[[], dict[str, torch.Tensor]]


def token_inputs(batch: int = 2, length: int = 6) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (batch, length))
    return {"input_ids": ids, "labels": ids.clone()}


def _seq2seq_inputs() -> dict[str, torch.Tensor]:
    # equal lengths: a cross-attention that mixed the wrong stream would not fail by its shape
    return {"input_ids": torch.randint(3, 50, (2, 6)), "labels": torch.randint(3, 50, (2, 6))}


def _image_inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}


def _classification_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 50, (2, 6)), "labels": torch.tensor([0, 2])}


def _llava_inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (2, 8))
    ids[:, 1:5] = IMAGE_TOKEN  # four patches
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16), "labels": ids.clone()}


def llama(blocks: int = 3) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**_LLAMA, "num_hidden_layers": blocks}))


def llama_with(model: nn.Module) -> nn.Module:
    """A bare model with the base weights of an adapted one."""
    twin = llama().eval()
    weights = {name.removeprefix("base_model.model."): value for name, value in model.state_dict().items()}
    weights = {name.replace(".base_layer", ""): value for name, value in weights.items()}
    twin.load_state_dict({name: weights[name] for name in twin.state_dict()})
    return twin


def llava() -> nn.Module:
    text = tf.LlamaConfig(**_GQA)
    vision = tf.CLIPVisionConfig(**_VISION)
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return tf.LlavaForConditionalGeneration(config)


_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LLAMA_MIXING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BERT_TARGETS = ("query", "key", "value", "dense")
_BERT_MIXING = ("query", "key", "value", "intermediate.dense")


def _decoder(build: Callable[[], nn.Module]) -> Architecture:
    return Architecture(build, _LLAMA_TARGETS, _LLAMA_MIXING, ("model.layers",), "CAUSAL_LM", token_inputs)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _decoder(llama),
    "mistral": _decoder(lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GQA))),
    "qwen3": _decoder(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GQA, head_dim=8))),
    "gemma3": _decoder(lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GQA, head_dim=8))),
    "gpt2": Architecture(
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT)),
        ("c_attn", "c_proj", "c_fc"), ("c_attn", "c_fc"), ("transformer.h",), "CAUSAL_LM", token_inputs,
    ),
    "gptj": Architecture(
        lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**_GPT, rotary_dim=4)),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"), ("q_proj", "k_proj", "v_proj", "fc_in"),
        ("transformer.h",), "CAUSAL_LM", token_inputs,
    ),
    "bloom": Architecture(
        lambda: tf.BloomForCausalLM(
            tf.BloomConfig(
                vocab_size=VOCAB, hidden_size=WIDTH, n_layer=3, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
            )
        ),
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), ("query_key_value", "dense_h_to_4h"),
        ("transformer.h",), "CAUSAL_LM", token_inputs,
    ),
    "opt": Architecture(
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
                max_position_embeddings=64, word_embed_proj_dim=WIDTH, dropout=0.0, pad_token_id=0,
            )
        ),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), ("q_proj", "k_proj", "v_proj", "fc1"),
        ("model.decoder.layers",), "CAUSAL_LM", token_inputs,
    ),
    "bert": Architecture(
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**_BERT)),
        _BERT_TARGETS, _BERT_MIXING, ("bert.encoder.layer",), "SEQ_CLS", _classification_inputs,
    ),
    "roberta": Architecture(
        lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_BERT)),
        _BERT_TARGETS, _BERT_MIXING, ("roberta.encoder.layer",), "SEQ_CLS", _classification_inputs,
    ),
    "vit": Architecture(
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(**_VISION, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        ),
        ("all-linear",), (), (), None, _image_inputs,
    ),
    "t5": Architecture(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
                decoder_start_token_id=0, pad_token_id=0,
            )
        ),
        ("q", "k", "v", "o", "wi", "wo"), ("q", "SelfAttention.k", "SelfAttention.v", "wi"),
        ("encoder.block", "decoder.block"), "SEQ_2_SEQ_LM", _seq2seq_inputs,
    ),
    "bart": Architecture(
        lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(
                vocab_size=VOCAB, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
                dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
                forced_eos_token_id=2,
            )
        ),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        ("q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1"),
        ("model.encoder.layers", "model.decoder.layers"), "SEQ_2_SEQ_LM", _seq2seq_inputs,
    ),
    "mixtral": Architecture(
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_GQA, num_local_experts=4)),
        ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj"), ("model.layers",),
        "CAUSAL_LM", token_inputs,
    ),
    "llava": Architecture(
        llava,
        (*_LLAMA_TARGETS, "out_proj", "fc1", "fc2"), (*_LLAMA_MIXING, "fc1"),
        ("model.vision_tower.encoder.layers", "model.language_model.layers"), "CAUSAL_LM", _llava_inputs,
    ),
}  # fmt: skip


def randomise_adapters(model: nn.Module, std: float = 0.2) -> None:
    """Give every LoRA matrix, B too, random values: with B = 0 no test of an adapter's input could fail."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(0.0, std)
