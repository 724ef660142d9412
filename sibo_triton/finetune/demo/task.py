"""The demonstration's problems and its base model: a small decoder that is trained to add.

Numbers are written units first ("32+54=680" is 23 + 45 = 068), the order in which one adds by hand: every digit of the
answer then depends on digits at fixed distances and on one carry, and a small model learns it within a minute.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_SPECIAL = ("<pad>", "<eos>", "<unk>")
_CHARACTERS = "0123456789+-="
_OPERAND_DIGITS, _ANSWER_DIGITS = 2, 3
_NUMBERS = 10**_OPERAND_DIGITS
TEST_PROBLEMS = 500


@dataclass(frozen=True)
class Scale:
    """How large the demonstration is. The defaults are those of `sibo-triton demo`; tests use less."""

    layers: int = 12
    hidden: int = 64
    intermediate: int = 128
    heads: int = 4
    batch: int = 64
    base_steps: int = 500
    base_rate: float = 2e-3
    adapter_steps: int = 200
    adapter_rate: float = 5e-3
    rank: int = 8  # on every linear
    bottleneck: int = 32  # on gate and up projection: about as many parameters
    timed_steps: int = 20


@dataclass(frozen=True)
class Problem:
    """One problem, a + b or a - b with a >= b, and its text for the model."""

    a: int
    operator: str
    b: int

    @property
    def answer(self) -> int:
        return self.a + self.b if self.operator == "+" else self.a - self.b

    @property
    def prompt(self) -> str:
        return f"{_units_first(self.a, _OPERAND_DIGITS)}{self.operator}{_units_first(self.b, _OPERAND_DIGITS)}="

    @property
    def completion(self) -> str:
        return _units_first(self.answer, _ANSWER_DIGITS)


def _units_first(number: int, digits: int) -> str:
    return f"{number:0{digits}d}"[::-1]


def additions(seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training and test problems of the base model's task: all pairs, no pair in both."""
    return _split([Problem(a, "+", b) for a in range(_NUMBERS) for b in range(_NUMBERS)], seed)


def subtractions(seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training and test problems of the new task: all pairs with a >= b, no pair in both."""
    return _split([Problem(a, "-", b) for a in range(_NUMBERS) for b in range(a + 1)], seed)


def _split(problems: list[Problem], seed: int) -> tuple[list[Problem], list[Problem]]:
    random.Random(seed).shuffle(problems)
    return problems[TEST_PROBLEMS:], problems[:TEST_PROBLEMS]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `AutoTokenizer` loads the files of its `save_pretrained`."""
    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *_CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # characters are joined without spaces
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def build_base(scale: Scale, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama-shaped decoder with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=scale.hidden,
        intermediate_size=scale.intermediate,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.heads,
        max_position_embeddings=32,
        # The usual 0.02 is for wide models; at a width of 64 attention would be nearly uniform at the start.
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter /= math.sqrt(2 * scale.layers)  # 2 * layers terms add up in the residual stream
    return model


def train_base(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    scale: Scale,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train the whole model on the answers; `on_step` gets the step's number and its loss."""
    texts = [problem.prompt + problem.completion + tokenizer.eos_token for problem in problems]
    ids = tokenizer(texts, return_tensors="pt")["input_ids"]  # [problems, tokens], all of one length
    answer = len(problems[0].prompt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=scale.base_rate, weight_decay=0.1, betas=(0.9, 0.98))
    warmup = max(1, scale.base_steps // 12)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / scale.base_steps))
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(1, scale.base_steps + 1):
        batch = ids[torch.randint(len(ids), (scale.batch,), generator=generator)]  # [batch, tokens]
        logits = model(batch[:, :-1]).logits[:, answer - 1 :]  # [batch, answer tokens, vocabulary]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, answer:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, loss.item())
    model.eval()


@torch.no_grad()
def answers(model: Any, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> list[str]:
    """What the model generates for each problem, greedily: the text up to the end-of-text token."""
    model.eval()
    # All prompts have the same length, so there is no padding.
    prompts = tokenizer([problem.prompt for problem in problems], return_tensors="pt").to(model.device)
    made = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=_ANSWER_DIGITS + 1,
        do_sample=False,
    )
    return tokenizer.batch_decode(made[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def exact_match(problems: Sequence[Problem], texts: Sequence[str]) -> float:
    """The share of problems whose answer is right in every digit."""
    return sum(p.completion == text for p, text in zip(problems, texts, strict=True)) / len(problems)


def readable(text: str) -> str:
    """A model's answer in the usual notation, or the raw text in quotes if it is not a number."""
    return str(int(text[::-1])) if len(text) == _ANSWER_DIGITS and text.isdecimal() else repr(text)
