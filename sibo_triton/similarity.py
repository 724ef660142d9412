"""Token similarity: how alike the tokens of a sequence are at each layer, the paper's measure of over-smoothing.

For hidden states h_1 ... h_n of one sequence at one layer, the mean cosine over the pairs of different tokens:

    similarity = 1 / (n (n - 1)) * sum over i != j of  <h_i, h_j> / (|h_i| |h_j|)

It lies in [-1/(n-1), 1] and is 1 where every token has the same direction. SIBO (arXiv 2402.11896) motivates the
initial residual by this value growing with depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

_OUTPUTS = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


class NoPairs(ValueError):
    """No sequence has two tokens."""


def token_similarity(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean pairwise cosine similarity between the tokens of each sequence.

    Args:
        hidden_states: [batch, tokens, hidden], any floating dtype, any device.
        attention_mask: [batch, tokens], nonzero where there is a token and 0 where there is padding, on either side.
            None: no padding.

    Returns:
        [batch] in float32 on the device of `hidden_states`; NaN for a sequence with fewer than two tokens, which has no
        pair. A token whose hidden state is zero has cosine 0 with every other.

    Raises:
        ValueError: a shape does not fit.
    """
    if hidden_states.dim() != 3:
        raise ValueError(f"hidden_states must be [batch, tokens, hidden], got {list(hidden_states.shape)}.")
    if attention_mask is None:
        mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    elif attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask must be [batch, tokens] = {list(hidden_states.shape[:2])}, got "
            f"{list(attention_mask.shape)}: pass the mask that went into the model."
        )
    else:
        mask = attention_mask.to(hidden_states.device) != 0

    # `where`, not a product: padding may hold NaN, and NaN * 0 is NaN.
    states = torch.where(mask[..., None], hidden_states.float(), 0.0)
    unit = torch.nn.functional.normalize(states, dim=-1, eps=1e-12)  # [batch, tokens, hidden]
    # The sum of <u_i, u_j> over all pairs is |sum u_i|^2; the pairs with i == j are subtracted.
    all_pairs = unit.sum(dim=1).square().sum(dim=-1)
    same_token = unit.square().sum(dim=(1, 2))
    count = mask.sum(dim=1).float()
    pairs = torch.where(count > 1, count * (count - 1), torch.nan)
    return (all_pairs - same_token) / pairs


@torch.no_grad()
def similarity_by_layer(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], output: str = "hidden_states"
) -> list[float]:
    """Token similarity at every layer of a transformers model, averaged over sequences.

    Args:
        model: any model that takes `output_hidden_states=True`, with or without adapters. It runs in eval mode and
            without gradients; the modes of its modules are restored.
        batches: keyword arguments of the model, such as `input_ids` [batch, tokens] and `attention_mask` [batch,
            tokens], on the model's device. `labels` are left out.
        output: the field of the model's output that is read. For an encoder-decoder model "encoder_hidden_states",
            masked by `attention_mask`, or "decoder_hidden_states", masked by `decoder_attention_mask`.

    Returns:
        One number for each entry of the model's hidden states: first what enters the first block (the initial
        residual), then the output of each block. Where the model has a final norm, transformers returns the last
        entry after it. Every sequence with at least two tokens counts once.

    Raises:
        ValueError: `output` is not a field of the model's output, or no sequence has two tokens.
    """
    if output not in _OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(_OUTPUTS)}, got {output!r}.")
    mask_name = "decoder_attention_mask" if output.startswith("decoder") else "attention_mask"
    totals: torch.Tensor | None = None  # [layers + 1]
    sequences = 0
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            states = _hidden_states(model(**inputs, output_hidden_states=True, return_dict=True), output)
            mask = inputs.get(mask_name)
            by_layer = torch.stack([token_similarity(layer, mask).double().cpu() for layer in states])  # [layers+1, B]
            tokens = mask.cpu().ne(0) if mask is not None else torch.ones(states[0].shape[:2], dtype=torch.bool)
            counted = tokens.sum(dim=1) > 1  # [B]
            part = by_layer[:, counted].sum(dim=1)
            totals = part if totals is None else totals + part
            sequences += int(counted.sum())
    finally:
        for module, training in modes.items():
            module.training = training
    if totals is None or sequences == 0:
        raise NoPairs("token similarity needs at least one sequence of two tokens, and `batches` held none.")
    return (totals / sequences).tolist()


def _hidden_states(outputs: Any, name: str) -> tuple[torch.Tensor, ...]:
    states = getattr(outputs, name, None)
    if states is None:
        offered = [field for field in _OUTPUTS if getattr(outputs, field, None) is not None]
        raise ValueError(f"the model returned no {name}" + (f"; it returned {', '.join(offered)}." if offered else "."))
    return states
