"""The options that every SIBO config has beside those of its method."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

InitialResidualSource = Literal["block_input", "embedding"]


def validate_lambda(value: Any, learnable: bool = False) -> float:
    """Check a mixing ratio and return it as a float.

    Args:
        value: the ratio lambda, a real number in [0, 1].
        learnable: whether it will be trained as a sigmoid, which reaches neither 0 nor 1.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is NaN or outside of [0, 1], or 0 or 1 and learnable.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"sibo_lambda must be a number in [0, 1], got {value!r} of type {type(value).__name__}.")
    value = float(value)
    if math.isnan(value) or not 0.0 <= value <= 1.0:
        raise ValueError(
            f"sibo_lambda must lie in [0, 1], got {value}. It is the share of the initial residual in the adapter's "
            "input: 0 is the plain method, the paper uses 0.1 to 0.3."
        )
    if learnable and value in (0.0, 1.0):
        raise ValueError(
            f"sibo_learnable=True needs a sibo_lambda strictly between 0 and 1 to start from, got {value}: a learnable "
            "lambda is a sigmoid, which cannot leave 0 or 1. Choose a start such as 0.1, or sibo_learnable=False."
        )
    return value


def validate_source(source: Any) -> None:
    """Raise a ValueError if `source` names no initial residual."""
    if source not in get_args(InitialResidualSource):
        choices = " or ".join(repr(choice) for choice in get_args(InitialResidualSource))
        raise ValueError(f"sibo_source must be {choices}, got {source!r}.")


@dataclass
class SiboOptions:
    """A mixin for a `PeftConfig`, whose docstring says what the options mean."""

    sibo_lambda: float = field(default=0.1, metadata={"help": "Share of the initial residual in the adapter's input."})
    sibo_learnable: bool = field(default=False, metadata={"help": "Train lambda, one for each mixing module."})
    sibo_target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Which of the targets mix; default: those that read the residual stream."},
    )
    sibo_source: InitialResidualSource = field(
        default="block_input", metadata={"help": "Where the initial residual is taken: 'block_input' or 'embedding'."}
    )
    sibo_blocks: list[str] | None = field(
        default=None, metadata={"help": "Names of the block lists, from the base model's root; default: detected."}
    )
    sibo_mixing_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Written when an adapter is saved: what the default of sibo_target_modules chose."},
    )

    def _note_origin(self, from_file: bool) -> None:
        """Record whether the config was read from a file; `__post_init__` calls it."""
        self._sibo_from_file = from_file
        # Names that injection chose by default; saved, so that loading chooses the same.
        self._sibo_resolved: list[str] | None = None

    @property
    def mixes(self) -> bool:
        """Whether any module may mix: lambda is not 0, or learnable."""
        return self.sibo_learnable or self.sibo_lambda != 0.0

    def options_outside_weights(self) -> tuple[str, ...]:
        """The options that change what saved weights compute, but are stored in no tensor among them."""
        return ("sibo_source",) if self.mixes else ()

    def _with_mixing_modules(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config as it is saved, with the names that the default of `sibo_target_modules` chose."""
        if self.sibo_target_modules is None and self._sibo_resolved is not None:
            config["sibo_mixing_modules"] = list(self._sibo_resolved)
        return config

    def check_options(self) -> None:
        """Raise what the constructor raises; injection calls it again, as options may have been set since."""
        if not isinstance(self.sibo_learnable, bool):
            raise TypeError(f"sibo_learnable must be True or False, got {self.sibo_learnable!r}.")
        self.sibo_lambda = validate_lambda(self.sibo_lambda, self.sibo_learnable)
        validate_source(self.sibo_source)
        if self.sibo_target_modules == "all-linear":
            raise ValueError(
                "sibo_target_modules='all-linear' would ask for linears that cannot mix (attention output, down "
                "projection). Leave it at None for all that can, or name modules."
            )
        if isinstance(self.sibo_blocks, str):
            self.sibo_blocks = [self.sibo_blocks]
        for name in ("sibo_blocks", "sibo_target_modules"):
            self._check_names(name)

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if value is None or isinstance(value, str):
            return
        if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) for item in value):
            pattern = ", a pattern for whole names" if name == "sibo_target_modules" else ""
            raise TypeError(f"{name} must be a list of module names{pattern} or None for the default, got {value!r}.")
        if not value:
            raise ValueError(
                f"{name} is empty. Leave it at None for the default, or use sibo_lambda=0 for {self._plain_method}."
            )
        setattr(self, name, sorted(value) if isinstance(value, set) else list(value))

    _plain_method = "the plain method"
