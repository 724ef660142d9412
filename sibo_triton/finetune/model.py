"""Load the base model and add the adapter; failures become one-line errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from sibo_triton import SiboAdapterConfig, SiboLoraConfig
from sibo_triton.finetune.options import ALL_LINEAR, FinetuneOptions, InputError, first_line
from sibo_triton.finetune.tokens import ensure_pad_token
from sibo_triton.initial_residual.output_uses import is_linear_like
from sibo_triton.injection.module_names import matches

# The default of --max-length if the model allows it: keeps a batch of 16 modest.
_DEFAULT_MAX_LENGTH = 512
_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError)
_HEADS = ("classifier", "score")  # PEFT trains and saves these by itself


def load_base(name: str, dtype: str) -> tuple[Any, Any]:
    """The causal language model and its tokenizer.

    Args:
        name: a folder, or a hub id.
        dtype: "auto" (as saved), "float32" or "bfloat16".

    Raises:
        InputError: there is no such model, it is an adapter folder, or it is no causal language model.
    """
    name = _checked_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=_dtype(dtype))
    except _LOADING_ERRORS as error:
        raise InputError(f"--model {name} cannot be loaded as a causal language model: {first_line(error)}") from error
    return model, tokenizer


def load_classifier(name: str, dtype: str, names: Sequence[str], regression: bool) -> tuple[Any, Any, list[str]]:
    """A model with a classification head, its tokenizer, and the other modules without weights in the file.

    Those start from random weights, like the head, and must be trained and saved with the adapter; an example is the
    pooler of a BERT that was saved as a masked language model.

    Args:
        name: a folder, or a hub id.
        dtype: "auto" (as saved), "float32" or "bfloat16".
        names: of the classes, by id; one for regression.
        regression: whether the loss is the squared error, or cross-entropy.

    Raises:
        InputError: there is no such model, it is an adapter folder, it cannot have such a head, or it has no token to
            pad with.
    """
    name = _checked_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=_dtype(dtype),
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={label: i for i, label in enumerate(names)},
            problem_type="regression" if regression else "single_label_classification",
            output_loading_info=True,
        )
    except (*_LOADING_ERRORS, RuntimeError) as error:
        reason = first_line(error)
        if "ignore_mismatched_sizes" in str(error):
            reason = (
                f"weights have other shapes than a model for the data's {len(names)} classes (a head for other ones?). "
                "Give the base model."
            )
        raise InputError(f"--model {name} cannot be loaded as a sequence classifier: {reason}") from error
    ensure_pad_token(tokenizer, name)
    if model.config.pad_token_id is None:  # a decoder reads it to find the last token of a text
        model.config.pad_token_id = tokenizer.pad_token_id
    fresh = {key.rpartition(".")[0] for key in loading["missing_keys"]}
    return model, tokenizer, sorted(module for module in fresh if module.split(".")[0] not in _HEADS)


def _checked_name(name: str) -> str:
    """The name of a model: a folder with a model, or a possible hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
        if (folder / "adapter_config.json").exists():
            raise InputError(f"--model {name} holds an adapter: give the base model that it was trained on.")
        if not (folder / "config.json").exists():
            raise InputError(f"--model {name} holds no config.json: give a folder that save_pretrained wrote.")
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"--model {name}: there is no such folder.")  # and it cannot be a hub id
    return name


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)


def positions_of(model: Any) -> int | None:
    """How many tokens a sequence may have, or None where the model sets no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 2:
        return None
    for name, module in model.named_modules():  # RoBERTa counts positions from behind that of padding
        padding = getattr(module, "padding_idx", None) if name.endswith("position_embeddings") else None
        if padding is not None:
            positions = min(positions, module.weight.shape[0] - padding - 1)
    return positions


def choose_max_length(options: FinetuneOptions, model: Any) -> int:
    """The length to which examples are cut, at most the model's number of positions.

    Raises:
        InputError: --max-length is more than the model has positions.
    """
    positions = positions_of(model)
    if positions is None:
        return options.max_length or _DEFAULT_MAX_LENGTH
    if options.max_length is not None and options.max_length > positions:
        raise InputError(f"--max-length {options.max_length} is more than the model's {positions} positions.")
    return options.max_length or min(_DEFAULT_MAX_LENGTH, positions)


def check_vocabulary(model: Any, largest_id: int) -> None:
    """Raise an `InputError` if the tokenizer produces ids without an embedding in the model."""
    rows = model.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise InputError(
            f"the tokenizer made the token id {largest_id}, and the model's vocabulary ends at {rows - 1}: model and "
            "tokenizer do not belong together."
        )


def add_adapter(
    model: Any, options: FinetuneOptions, task_type: str = "CAUSAL_LM", modules_to_save: Sequence[str] = ()
) -> tuple[PeftModel, list[str]]:
    """Wrap the model with an adapter of the chosen method; returns it and notes for the user.

    Args:
        model: the base model.
        options: of the run.
        task_type: PEFT's name of the task.
        modules_to_save: modules that are trained and saved whole.

    Raises:
        InputError: PEFT or SIBO does not support it for this model; the message has their reason.
    """
    notes: list[str] = []
    targets = _target_modules(model, options, notes)
    config = _adapter_config(options, targets, task_type)
    if modules_to_save:
        config.modules_to_save = list(modules_to_save)
        notes.append(f"no weights in --model for {', '.join(modules_to_save)}: trained, and saved with the adapter")
    try:
        peft_model = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"--method {options.method} is not possible on this model: {error}") from error
    return peft_model, notes


def _adapter_config(options: FinetuneOptions, target_modules: list[str] | str | None, task_type: str) -> PeftConfig:
    """The PEFT config of the chosen method; a plain method and its SIBO differ in lambda alone."""
    common: dict[str, Any] = {"task_type": task_type, "target_modules": target_modules}
    mixing: dict[str, Any] = {"sibo_lambda": options.lambda_, "sibo_learnable": options.sibo_learnable}
    for name in ("sibo_target_modules", "sibo_blocks"):
        if getattr(options, name) is not None:
            mixing[name] = list(getattr(options, name))
    if not options.is_lora:
        chosen: dict[str, Any] = {"init_weights": True if options.init_weights in (None, "zero") else "bert"}
        for name in ("activation", "placement", "side"):
            if getattr(options, name) is not None:
                chosen[name] = getattr(options, name)
        return SiboAdapterConfig(
            bottleneck_size=options.bottleneck,
            adapter_dropout=options.dropout,
            **chosen,
            **common,
            **mixing,
        )
    common |= {"r": options.lora_rank, "lora_alpha": options.lora_alpha, "lora_dropout": options.dropout}
    return SiboLoraConfig(**common, **mixing) if options.mixes else LoraConfig(**common)


def _target_modules(model: Any, options: FinetuneOptions, notes: list[str]) -> list[str] | str | None:
    if options.target_modules is None and not options.is_lora:
        notes.append("target modules: the feed-forward linears that read the residual stream")
        return None
    if options.target_modules is None:
        kind = model.config.model_type
        if kind in PEFT_DEFAULTS:
            notes.append(f"target modules: PEFT's default for {kind}, {', '.join(PEFT_DEFAULTS[kind])}")
            return None
        notes.append(
            f"target modules: PEFT has no default for {kind}, so every linear layer but the output head "
            f"({ALL_LINEAR}) gets an adapter; --target-modules chooses"
        )
        return ALL_LINEAR
    wanted = list(options.target_modules)
    if wanted == [ALL_LINEAR]:
        return ALL_LINEAR
    note = None if options.recipe is None else options.recipe.note_on(model.config.model_type)
    if note is not None:
        notes.append(note)
    # PEFT raises only if no name matches at all, so a mistyped name among others would go unnoticed.
    names = [name for name, _ in model.named_modules()]
    for target in wanted:
        if not any(matches([target], name) for name in names):
            linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if is_linear_like(m)})
            raise InputError(f"--target-modules: the model has no module `{target}`; choose among {', '.join(linear)}.")
    return wanted
