"""Made-up rows in the format of LLM-Adapters' files, of several lengths, and tiny models that read them."""

from __future__ import annotations

import json

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sibo_triton.finetune.instructions import TEMPLATES

ARITHMETIC = [
    {
        "instruction": f"A shelf holds {i} cups and {2 * i + 1} plates. {'It is old. ' * (i % 3)}How many in all?",
        "input": "",
        "output": f"There are {i} cups and {2 * i + 1} plates, so {i} + {2 * i + 1} = {3 * i + 1}. "
        f"The answer is {3 * i + 1}.",
        "answer": f"{3 * i + 1}.0",
    }
    for i in range(12)
]
LETTERS = [
    {
        "instruction": f"What is {i} times 2? Answer Choices: (A) {2 * i} (B) {i} (C) 1 (D) 99 (E) 100",
        "input": "",
        "output": f"Twice {i} is {2 * i}. The answer is (A).",
        "answer": "A",
    }
    for i in range(5, 9)
]
_TRUE = [
    f"Please answer the following question with true or false, question: {'say, ' * (i % 3)}is {i} above 5?"
    for i in range(12)
]
COMMONSENSE = [
    {
        "instruction": f"{question}\n\nAnswer format: true/false",
        "input": "",
        "output": f"the correct answer is {str(i > 5).lower()}",
        "answer": str(i > 5).lower(),
    }
    for i, question in enumerate(_TRUE)
]
OPTIONS = [
    {
        "instruction": f"Please choose the correct answer to fill in the blank: the _ was cold.\n\nOption1: ice {i} "
        "Option2: fire Answer format: option1/option2",
        "input": "",
        "output": "the correct answer is option1",
        "answer": "option1",
    }
    for i in range(4)
]
TRAINING = {"arithmetic": ARITHMETIC, "commonsense": COMMONSENSE}
QUESTIONS = {"arithmetic": [ARITHMETIC, LETTERS], "commonsense": [COMMONSENSE, OPTIONS]}


def write_list(path, rows):
    """One JSON list, as LLM-Adapters' files are."""
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return path


def tokenizer():
    """Byte-level BPE, trained on the rows: it splits any text without loss, into few tokens for these."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [
        TEMPLATES["llm-adapters"].for_training(row["instruction"], row["input"]) + row["output"]
        for rows in (ARITHMETIC, LETTERS, COMMONSENSE, OPTIONS)
        for row in rows
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def save_model(kind, folder):
    """A Llama or GPT-J of two layers, 512 positions and random weights, with its tokenizer.

    The weights are large enough that what it generates depends on the prompt.
    """
    reader = tokenizer()
    torch.manual_seed(0)
    ids = {"vocab_size": len(reader), "bos_token_id": reader.bos_token_id, "eos_token_id": reader.eos_token_id}
    ids["initializer_range"] = 0.3
    if kind == "llama":
        config = tf.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=512, **ids,
        )  # fmt: skip
        model = tf.LlamaForCausalLM(config)
    else:
        config = tf.GPTJConfig(
            n_embd=32, n_layer=2, n_head=4, n_positions=512, rotary_dim=4, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, **ids,
        )  # fmt: skip
        model = tf.GPTJForCausalLM(config)
    model.save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder
