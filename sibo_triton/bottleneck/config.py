"""`SiboAdapterConfig`: bottleneck adapters in series or in parallel, with the options of SIBO."""

from __future__ import annotations

import math
import numbers
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType

from sibo_triton.layers.adapters import BOTTLENECK_TYPE
from sibo_triton.options import SiboOptions
from sibo_triton.reference import check_activation
from sibo_triton.saving.model_card import update_model_card


@dataclass
class SiboAdapterConfig(SiboOptions, PeftConfig):
    """Configuration of a SIBO bottleneck adapter (arXiv 2402.11896), at linear layers or sub-layers of a model.

    With ``v~ = (1 - lambda) v + lambda h0`` and the branch ``g(v) = s (W_up f(W_down drop(v~) + b_down) + b_up)``::

        series, side="input"    y = W0 (x + g(x)) + b
        series, side="output"   y = z + g(z),  z = W0 x + b
        parallel                y = W0 x + b + g(x)

    `h0` is the initial residual: the hidden state that enters the first transformer block; it has the shape of what it
    is mixed with, v = x or z. lambda = 0 is the plain bottleneck adapter. For x [..., K], z and y [..., N], W0 [N, K]:
    W_down is [bottleneck, K] and W_up [N, bottleneck]; on the input side W_up is [K, bottleneck], on the output side
    W_down is [bottleneck, N]. y has the dtype of the frozen module's output. The branches of several active adapters
    add up: each reads the x or z that the others have not changed.

    The paper's equation defines v~, what the PEFT module reads. That the skip of an adapter in series (x, or z) stays
    unmixed follows the authors' code, and so do the defaults: in series, in front of Llama's gate and up projection,
    bottleneck 256, tanh, s = 1, no biases. Two things differ: they draw both projections from a normal distribution
    (`init_weights="bert"`), so that their fresh adapter is not the base model; and they list the modules for each kind
    of model, which are found by structure here.

    Args:
        target_modules: what to put adapters on, matched as PEFT matches it: linears of any kind, by name; in parallel
            or on the output side also whole sub-layers ("mlp", "self_attn"): if the sub-layer returns a tuple, the
            branch is added to its first element. Default: found by structure, the linears of feed-forward networks
            that read the residual stream (gate and up projection, the first of an MLP); the model then runs once on a
            tiny input.
        exclude_modules: what not to put them on, matched likewise.
        bottleneck_size: rows of W_down, an integer of at least 1.
        activation: f: "tanh", "relu", "gelu", "gelu_pytorch_tanh", "silu" or "sigmoid".
        placement: "series" or "parallel".
        side: in series, "input" (in front of the linear) or "output" (behind it; what mixes must be as wide as h0).
        adapter_dropout: probability of dropping an element of v~, in [0, 1).
        scaling: s, a finite number other than 0, or "learnable": one value per module, which starts at 1.
        adapter_bias: whether W_down and W_up have biases, which start at zero.
        init_weights: True: W_up starts at zero, so that a fresh adapter is the base model, and W_down as in torch's
            linears; "bert": both from a normal distribution of standard deviation 0.02.
        modules_to_save: other modules to be trained and saved with the adapter.
        sibo_lambda: lambda in [0, 1], the share of the initial residual.
        sibo_learnable: train one lambda per mixing module (a sigmoid, starting at `sibo_lambda`, which must then lie
            strictly between 0 and 1; no weight decay).
        sibo_target_modules: which of the targets mix, matched as `target_modules`. Default: on the input side and in
            parallel those that read the residual stream of their stack, the others get a plain adapter; on the output
            side all, and it is an error if one is not as wide as h0.
        sibo_source: "block_input", what enters the first block, or "embedding", what the token embedding returns.
        sibo_blocks: names of the block lists from the base model's root ("model.layers"), if detection finds no list,
            or lists that must not mix. Default: every list of transformers' blocks that holds a target, each with its
            own h0.
        sibo_mixing_modules: not to be set by hand: what the default of `sibo_target_modules` chose, in a saved adapter.

    Raises:
        TypeError: an option is of another type.
        ValueError: `bottleneck_size` is below 1; `adapter_dropout` is outside of [0, 1); `scaling` is 0 or not finite;
            `sibo_lambda` is NaN or outside of [0, 1], or 0 or 1 and learnable; `activation`, `placement`, `side`,
            `init_weights` or `sibo_source` is none of its values; `side="output"` is combined with
            `placement="parallel"`; `sibo_blocks` or `sibo_target_modules` is empty, or the latter "all-linear".
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Modules to put adapters on; default: FFN linears that read the residual stream."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    bottleneck_size: int = field(default=256, metadata={"help": "Width of the bottleneck."})
    activation: str = field(default="tanh", metadata={"help": "Activation in the bottleneck."})
    placement: Literal["series", "parallel"] = field(
        default="series", metadata={"help": "'series' or 'parallel' to the frozen module."}
    )
    side: Literal["input", "output"] = field(
        default="input",
        metadata={"help": "In series: in front of the frozen linear, or behind it ('output')."},
    )
    adapter_dropout: float = field(default=0.0, metadata={"help": "Dropout on what the adapter reads."})
    scaling: float | Literal["learnable"] = field(
        default=1.0, metadata={"help": "What the branch is multiplied with: a number, or 'learnable'."}
    )
    adapter_bias: bool = field(default=False, metadata={"help": "Biases in the projections of the adapter."})
    init_weights: bool | Literal["bert"] = field(
        default=True,
        metadata={"help": "True: a fresh adapter is the base model; 'bert': a small normal."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to be trained and saved with the adapter."}
    )

    _plain_method = "a plain adapter"

    def __post_init__(self) -> None:
        # a config that was read from a file is given the type that the file says
        self._note_origin(from_file=self.peft_type is not None)
        super().__post_init__()
        self.peft_type: Any = PeftType(BOTTLENECK_TYPE)  # which stock PEFT does not know, and fails
        self.check_options()

    def check_options(self) -> None:
        """Raise what the constructor raises; injection calls it again, as options may have been set since."""
        super().check_options()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))  # as PEFT has it
            elif value is not None and not isinstance(value, (str, set)):
                raise TypeError(f"{name} must be a list of module names or a pattern, got {value!r}.")
        if isinstance(self.bottleneck_size, bool) or not isinstance(self.bottleneck_size, int):
            raise TypeError(f"bottleneck_size must be an integer, got {self.bottleneck_size!r}.")
        if self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size must be at least 1, got {self.bottleneck_size}; 8 to 1024 are usual.")
        check_activation(self.activation)
        self._check_placement()
        self._check_numbers()
        if not isinstance(self.adapter_bias, bool):
            raise TypeError(f"adapter_bias must be True or False, got {self.adapter_bias!r}.")
        if self.init_weights is not True and self.init_weights != "bert":
            raise ValueError(
                f"init_weights must be True (a fresh adapter is the base model) or 'bert' (a small normal), got "
                f"{self.init_weights!r}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The config as it is saved."""
        return self._with_mixing_modules(super().to_dict())

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        options = (self.sibo_lambda, self.sibo_learnable, self.sibo_source)
        update_model_card(str(save_directory), *options, method="SIBO adapter")

    def options_outside_weights(self) -> tuple[str, ...]:
        # loaders drop biases that an adapter does not have, and leave those that the weights do not have
        return ("activation", "placement", "side", "scaling", "adapter_bias", *super().options_outside_weights())

    def _check_placement(self) -> None:
        if self.placement not in ("series", "parallel"):
            raise ValueError(f"placement must be 'series' or 'parallel', got {self.placement!r}.")
        if self.side not in ("input", "output"):
            raise ValueError(f"side must be 'input' or 'output', got {self.side!r}.")
        if self.placement == "parallel" and self.side == "output":
            raise ValueError(
                "side='output' is for placement='series': a parallel adapter reads the module's input and writes "
                "beside it. Drop side, or use placement='series'."
            )

    def _check_numbers(self) -> None:
        rate = self.adapter_dropout
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
            raise TypeError(f"adapter_dropout must be a number in [0, 1), got {rate!r}.")
        self.adapter_dropout = float(rate)
        if not 0.0 <= self.adapter_dropout < 1.0:  # also NaN
            raise ValueError(f"adapter_dropout must lie in [0, 1), got {rate}; 0.0 turns dropout off.")
        if self.scaling == "learnable":
            return
        if isinstance(self.scaling, bool) or not isinstance(self.scaling, numbers.Real):
            raise TypeError(f"scaling must be a number or 'learnable', got {self.scaling!r}.")
        self.scaling = float(self.scaling)
        if not math.isfinite(self.scaling) or self.scaling == 0.0:
            raise ValueError(f"scaling must be finite and not 0, with which nothing would train, got {self.scaling}.")
