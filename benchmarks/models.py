"""The benchmarks' models, with real widths and random weights: whole, one layer, or some linears of a layer.

All providers of a comparison share one set of frozen weights (`copy_of`), so that the GPU holds them only once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.settings import Linears

BERT_LINEARS = Linears(
    all=("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    mixing=("query", "key", "value", "intermediate.dense"),
    groups=(("query", "key", "value"), ("attention.output.dense",), ("intermediate.dense",), ("output.dense",)),
    feed_forward=("intermediate.dense",),
)

_CLASSES: dict[str, tuple[type, type, type | None]] = {
    "llama": (LlamaConfig, LlamaModel, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2Model, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3Model, Qwen3ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3TextModel, Gemma3ForCausalLM),
    "bert": (BertConfig, BertModel, None),
}

#: BERT without its dropout, whose masks would differ between providers; Gemma's first layers have a sliding window.
_OPTIONS: dict[str, dict[str, float]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gemma3": {"sliding_window": 512},
}


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model.

    Attributes:
        name: for tables.
        kind: which classes of transformers it uses.
        head: the width of an attention head.
        layers: of the whole model.
    """

    name: str
    kind: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    layers: int
    vocabulary: int
    bias: bool = False  # of its linears; for qwen2 of q, k and v only

    @property
    def linears(self) -> Linears:
        return BERT_LINEARS if self.kind == "bert" else Linears()

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(K, N) of each linear of a layer, in the order of the forward."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        up = [(self.hidden, self.ffn)] * (1 if self.kind == "bert" else 2)
        attention = [(self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden)]
        return dict(zip(self.linears.all, [*attention, *up, (self.ffn, self.hidden)], strict=True))

    def with_layers(self, layers: int) -> Architecture:
        return replace(self, layers=layers)


LLAMA_3_8B = Architecture("Llama-3-8B", "llama", 4096, 14336, 32, 8, 128, 32, 128256)
QWEN3_4B = Architecture("Qwen3-4B", "qwen3", 2560, 9728, 32, 8, 128, 36, 151936)
GEMMA_3_1B = Architecture("Gemma-3-1B", "gemma3", 1152, 6912, 4, 1, 256, 26, 262144)
BERT_LARGE = Architecture("BERT-large", "bert", 1024, 4096, 16, 16, 64, 24, 30522, bias=True)
QWEN2_5_0_5B = Architecture("Qwen2.5-0.5B", "qwen2", 896, 4864, 14, 2, 64, 24, 151936, bias=True)
ARCHITECTURES = (LLAMA_3_8B, QWEN3_4B, GEMMA_3_1B, BERT_LARGE)

#: Rows of the embedding table when one layer is timed: enough that no token recurs while it is in the cache.
EMBEDDINGS = 32768


def frozen_model(
    architecture: Architecture, device: str, dtype: torch.dtype, vocabulary: int, head: bool
) -> PreTrainedModel:
    """A frozen model of transformers' class with its initialisation; with a language model's head if `head`."""
    config_class, plain, with_head = _CLASSES[architecture.kind]
    config = config_class(
        hidden_size=architecture.hidden,
        intermediate_size=architecture.ffn,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        head_dim=architecture.head,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        pad_token_id=0,
        attn_implementation="sdpa",
        **_OPTIONS.get(architecture.kind, {}),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if head:
                assert with_head is not None, f"{architecture.name} has no language model's head"
                model = with_head(config)
            else:
                model = plain(config, add_pooling_layer=False) if architecture.kind == "bert" else plain(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def copy_of(model: nn.Module, trains: bool = True) -> nn.Module:
    """A copy that shares parameters and buffers, so that its modules may be replaced."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, shared)
    if trains and isinstance(made, PreTrainedModel):
        made.enable_input_require_grads()  # the first layer's x needs a gradient, as in all other layers
    return made


class _Entry(GradientCheckpointingLayer):
    """The first block: its input is h0 and its output another tensor, as deep in a network."""

    def forward(self, initial_residual: Tensor, x: Tensor) -> Tensor:
        return x


class _Linears(GradientCheckpointingLayer):
    """The second block: linears that share x."""

    def __init__(self, shapes: dict[str, tuple[int, int]], bias: bool) -> None:
        super().__init__()
        for name, (K, N) in shapes.items():
            self.add_module(name, nn.Linear(K, N, bias=bias))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.children())


class Part(nn.Module):
    """Only linears that share x, with a separate h0.

    In the forward ``initial_residual`` is ``[batch, length, hidden]``, x ``[batch, length, K]``; an output for each
    linear, ``[batch, length, N]``.
    """

    def __init__(self, architecture: Architecture, names: Sequence[str], device: str, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = architecture.shapes()
        # BERT's names such as "attention.output.dense" are no valid module names
        linears = {name.replace(".", "_"): shapes[name] for name in names}
        with torch.device(device):
            self.layers = nn.ModuleList([_Entry(), _Linears(linears, architecture.kind == "bert")])
        self.to(dtype).requires_grad_(False)

    def forward(self, initial_residual: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return self.layers[1](self.layers[0](initial_residual, x))


def part_linears(architecture: Architecture, names: Sequence[str]) -> Linears:
    """The linears of a :class:`Part`."""
    module_names = tuple(name.replace(".", "_") for name in names)
    mixing, feed_forward = (
        tuple(name.replace(".", "_") for name in names if name in subset)
        for subset in (architecture.linears.mixing, architecture.linears.feed_forward)
    )
    return Linears(all=module_names, mixing=mixing, groups=(module_names,), feed_forward=feed_forward)
