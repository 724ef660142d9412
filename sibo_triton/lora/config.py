"""`SiboLoraConfig`: PEFT's `LoraConfig` with the options of SIBO."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

from peft import LoraConfig

from sibo_triton.options import SiboOptions
from sibo_triton.saving.model_card import update_model_card

# The type in adapter_config.json. Stock PEFT does not know it and fails, instead of loading the adapter as plain LoRA
# and computing something else. In memory the type is LORA, so that hotswap, weight conversion, Trainer and TRL work.
SIBO_LORA_TYPE = "SIBO_LORA"

# Initialisations that leave the base weights unchanged. The others subtract s B A from W0, which a fresh adapter adds
# back only if it reads x itself.
_SAFE_INITS = (True, False, "gaussian", "eva", "orthogonal")

# Options that make LoRA another method. PEFT >= 0.20 marks them in the field's metadata; 0.19 does not.
_VARIANT_FIELDS = ("use_dora", "alora_invocation_tokens", "use_qalora", "arrow_config", "use_bdlora")


@dataclass
class SiboLoraConfig(SiboOptions, LoraConfig):
    """Configuration of a SIBO-LoRA adapter (arXiv 2402.11896).

        y = W0 x + b + s * B A drop((1 - lambda) * x + lambda * h0)

    with x and h0 [..., K], W0 [N, K], A [r, K], B [N, r], y [..., N] in the base layer's dtype, and s = alpha / r, or
    alpha / sqrt(r) with `use_rslora`. `h0` is the initial residual: the hidden state that enters the first transformer
    block. All options of `LoraConfig` are accepted, with the same meaning.

    Args:
        sibo_lambda: lambda in [0, 1], the share of the initial residual. 0 is plain LoRA: stock PEFT layers run, and a
            plain LoRA adapter is saved.
        sibo_learnable: train one lambda per mixing module (a sigmoid, starting at `sibo_lambda`, which must then lie
            strictly between 0 and 1; no weight decay).
        sibo_target_modules: which of the LoRA targets mix, matched as PEFT matches `target_modules`. Default: those
            that read the residual stream of their stack, found by running the model once on a tiny input and
            following what feeds them. The attention output projection, down projections and cross-attention keys and
            values never do; they get plain LoRA.
        sibo_source: "block_input", what enters the first block, or "embedding", what the token embedding returns.
        sibo_blocks: names of the block lists from the base model's root ("model.layers"), if detection finds no list,
            or lists that must not mix. Default: every list of transformers' blocks that holds a LoRA target, each with
            its own h0.
        sibo_mixing_modules: not to be set by hand: what the default of `sibo_target_modules` chose, in a saved adapter.

    Raises:
        TypeError: `sibo_lambda` is not a number, `sibo_learnable` not a bool, or a list option is of another type.
        ValueError: `sibo_lambda` is NaN or outside of [0, 1], or 0 or 1 and learnable; `sibo_source` is unknown; a list
            option is empty; `sibo_target_modules` is "all-linear"; or the config asks for something that SIBO cannot
            compute correctly: DoRA, aLoRA and other variants of LoRA, initialisations that change the base weights
            (PiSSA, OLoRA, CorDA, LoftQ...), layer replication.
    """

    _plain_method = "plain LoRA"

    def __post_init__(self) -> None:
        # PEFT hands the file's peft_type to the constructor; LoraConfig then overwrites it with LORA.
        self._note_origin(from_file=self.peft_type == SIBO_LORA_TYPE)
        super().__post_init__()
        self.check_options()

    def check_options(self) -> None:
        """Raise what the constructor raises; injection calls it again, as options may have been set since."""
        super().check_options()
        if self.mixes:
            self._refuse_what_cannot_mix()

    def to_dict(self) -> dict[str, Any]:
        """The config as it is saved: a plain LoRA adapter's if nothing mixes, else with a peft_type of its own."""
        config = super().to_dict()
        sibo_options = [f.name for f in fields(SiboLoraConfig) if f.name.startswith("sibo_")]
        if not self.mixes:
            return {key: value for key, value in config.items() if key not in sibo_options}
        return self._with_mixing_modules(config | {"peft_type": SIBO_LORA_TYPE})

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        if self.mixes:
            options = (self.sibo_lambda, self.sibo_learnable, self.sibo_source)
            update_model_card(str(save_directory), *options, method="SIBO-LoRA")

    def _refuse_what_cannot_mix(self) -> None:
        marked = [f.name for f in fields(self) if f.metadata.get("is_lora_variant")]
        for name in dict.fromkeys([*_VARIANT_FIELDS, *marked]):
            if getattr(self, name, None):
                raise ValueError(
                    f"{name} cannot be combined with sibo_lambda={self.sibo_lambda}: it computes another adapter, and "
                    f"SIBO mixes the input of plain LoRA. Drop {name}, or use peft.LoraConfig for it."
                )
        init = self.init_lora_weights
        if init not in _SAFE_INITS:
            why = (
                "makes another method of LoRA, which does not go with a mix"
                if init == "mica"
                else "changes the base weights so that base plus fresh adapter equals the original, which does not "
                "hold when the adapter reads a mix"
            )
            raise ValueError(
                f"init_lora_weights={init!r} {why} (sibo_lambda={self.sibo_lambda}). Use init_lora_weights=True, "
                "'gaussian', 'orthogonal' or 'eva', or peft.LoraConfig."
            )
        if self.layer_replication:
            raise ValueError(
                "layer_replication cannot be combined with SIBO: replicated blocks share modules, so what their "
                "initial residual is cannot be told. Drop layer_replication, or use peft.LoraConfig."
            )
