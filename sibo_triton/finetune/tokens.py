"""Turn examples into token ids and labels, and batches of them into padded tensors.

Labels are the token ids, and -100 (no loss) on the prompt of a prompt/completion pair. The boundary is the same as at
generation: the prompt is tokenised alone, as `generate` will get it.

* Usually the tokens of prompt + completion begin with the tokens of the prompt: the rest is the completion.
* Where they do not (a token spans the boundary, for instance when the prompt ends in a space that the tokenizer joins
  to the next word), prompt and completion are tokenised separately and joined, and the run reports for how many
  examples.

The tokenizer's end-of-text token ends every example, so that the model learns to stop.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import DataCollatorForSeq2Seq

from sibo_triton.finetune.data import Examples
from sibo_triton.finetune.options import InputError

NO_LOSS = -100
_CHUNK = 1000  # examples per call of the tokenizer, which works on a batch in parallel


@dataclass
class TokenizedExamples:
    """Token ids and labels, and how they were made.

    Attributes:
        input_ids, labels: one list of ints for each kept example; labels is -100 where there is no loss. For
            classification labels is a class id for each example, for regression a number.
        others: further columns for the model, such as token_type_ids.
        truncated: how many of these examples were cut to max_length.
        dropped: places (such as "line 3") of examples left out, because the cut left nothing to learn.
        split_apart: how many pairs had a token across the boundary.
    """

    input_ids: list[list[int]] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    others: dict[str, list[list[int]]] = field(default_factory=dict)
    truncated: int = 0
    dropped: list[str] = field(default_factory=list)
    split_apart: int = 0


def tokenize_examples(examples: Examples, tokenizer: Any, max_length: int) -> TokenizedExamples:
    """Tokenise every example and cut it on the right to `max_length` tokens.

    Raises:
        InputError: no example is left, or a short example has no token to predict.
    """
    result = TokenizedExamples()
    end = tokenizer.eos_token_id
    for start in range(0, len(examples.rows), _CHUNK):
        rows = examples.rows[start : start + _CHUNK]
        places = examples.places[start : start + _CHUNK]
        for place, (ids, prompt_length, apart) in zip(places, _tokenize(rows, tokenizer), strict=True):
            if end is not None and (not ids or ids[-1] != end):
                ids = [*ids, end]
            kept = ids[:max_length]
            labels = [NO_LOSS] * min(prompt_length, len(kept)) + kept[prompt_length:]
            # The first token is never predicted: the loss shifts labels by one.
            if all(label == NO_LOSS for label in labels[1:]):
                if len(ids) <= max_length:
                    raise InputError(
                        f"{examples.path}, {place}: its {len(ids)} token(s) leave nothing to predict; remove it."
                    )
                result.dropped.append(place)
                continue
            result.truncated += len(ids) > max_length
            result.split_apart += apart
            result.input_ids.append(kept)
            result.labels.append(labels)
    if not result.input_ids:
        raise InputError(
            f"{examples.path}: no example is left: in all {len(examples.rows)} the prompt alone fills --max-length "
            f"{max_length}; raise it or shorten the prompts."
        )
    return result


def _tokenize(rows: Sequence[tuple[str, ...]], tokenizer: Any) -> list[tuple[list[int], int, bool]]:
    """For each row: token ids, the length of the prompt, and whether the two were tokenised separately."""
    if len(rows[0]) == 1:
        texts = [row[0] for row in rows]
        return [(ids, 0, False) for ids in tokenizer(texts)["input_ids"]]
    prompts = [without_end(ids, tokenizer) for ids in tokenizer([prompt for prompt, _ in rows])["input_ids"]]
    whole = tokenizer([prompt + completion for prompt, completion in rows])["input_ids"]
    result = []
    for (_, completion), prompt, ids in zip(rows, prompts, whole, strict=True):
        apart = ids[: len(prompt)] != prompt or len(ids) == len(prompt)
        if apart:
            ids = prompt + tokenizer(completion, add_special_tokens=False)["input_ids"]
        result.append((ids, len(prompt), apart))
    return result


def without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """A prompt's tokens without the end-of-text token that some tokenizers append to every text."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def ensure_pad_token(tokenizer: Any, model_name: str) -> None:
    """Let the end-of-text token pad where the tokenizer has no padding token.

    Raises:
        InputError: it has neither.
    """
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token is None:
        raise InputError(f"--model {model_name}: its tokenizer has neither a padding nor an end-of-text token.")
    tokenizer.pad_token = tokenizer.eos_token


def completion_collator(tokenizer: Any, model_name: str) -> DataCollatorForSeq2Seq:
    """Pads examples on the right into a batch: input_ids, attention_mask and labels, each int64 [batch, longest]."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = min(vocabulary, key=vocabulary.get)  # any will do: padding is masked and carries no loss
    ensure_pad_token(tokenizer, model_name)
    tokenizer.padding_side = "right"
    if "attention_mask" not in tokenizer.model_input_names:  # of which `pad` makes what it names
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS)
