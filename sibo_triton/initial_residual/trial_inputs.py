"""Tiny inputs to run a model on, without knowing the model's name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sibo_triton.initial_residual.stacks import BlockStack, path_between

_TOKENS = 5  # a prime, and no common width, so that shapes tell tokens from features
_IMAGE_SIZE = 64  # of models that take any
_SECOND = 16000  # samples of sound
_FRAMES = 64  # of a spectrum


def trial_inputs(root: nn.Module, stack: BlockStack) -> Iterator[tuple[nn.Module, dict[str, torch.Tensor]]]:
    """The models around a stack, outermost first, each with the inputs to try, by their names."""
    for module in path_between(root, stack.owner_name):
        if isinstance(module, PreTrainedModel):
            for inputs in _inputs_of(module):
                if getattr(module.config, "is_encoder_decoder", False):
                    inputs["decoder_input_ids"] = _tokens(module)
                yield module, inputs


def _inputs_of(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    kinds = {
        "input_ids": _tokens,
        "pixel_values": _image,
        "input_features": _spectrogram,
        "input_values": _sound,
    }
    main = model.main_input_name
    for name in dict.fromkeys([main, *kinds]):
        value = kinds[name](model) if name in kinds else None
        if value is not None:
            yield {name: value}
    for inputs in (_features(model), _frames(model), _patches(model)):
        if inputs is not None:
            yield inputs


def _tokens(model: PreTrainedModel) -> torch.Tensor:
    return torch.ones(1, _TOKENS, dtype=torch.long, device=_device_of(model))


def _image(model: PreTrainedModel) -> torch.Tensor | None:
    config: Any = model.config
    visions = [getattr(config, name, None) for name in ("vision_config", "encoder")]
    vision = next((of for of in visions if hasattr(of, "image_size")), config)
    size = getattr(vision, "image_size", None)
    if size is None:
        if model.main_input_name != "pixel_values":
            return None
        size = _IMAGE_SIZE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return _zeros(model, 1, getattr(vision, "num_channels", 3), height, width)


def _spectrogram(model: PreTrainedModel) -> torch.Tensor | None:
    config: Any = model.config
    if not hasattr(config, "num_mel_bins") or not hasattr(config, "max_source_positions"):
        return None
    return _zeros(model, 1, config.num_mel_bins, 2 * config.max_source_positions)


def _sound(model: PreTrainedModel) -> torch.Tensor:
    spectrum: list[Any] = [getattr(model.config, name, None) for name in ("max_length", "num_mel_bins")]
    return _zeros(model, 1, _SECOND) if None in spectrum else _zeros(model, 1, *spectrum)


def _features(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Frames of a spectrum in sequence, [1, frames, width], of speech models that do not take it transposed."""
    names = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins")
    width = next((getattr(model.config, name) for name in names if hasattr(model.config, name)), None)
    if model.main_input_name != "input_features" or not isinstance(width, int):
        return None
    return {"input_features": _zeros(model, 1, _FRAMES, width)}


def _frames(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """A video, of models that take nothing else."""
    count, image = getattr(model.config, "num_frames", None), _image(model)
    if not isinstance(count, int) or image is None:
        return None
    return {"pixel_values": image[:, None].expand(-1, count, -1, -1, -1)}


def _patches(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """Flattened patches and their grid, as vision towers for any resolution take them (Qwen2-VL and its kin)."""
    config: Any = model.config
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    if "grid_thw" not in names[1:] or not isinstance(getattr(config, "patch_size", None), int):
        return None
    channels = next((getattr(config, name) for name in ("in_channels", "in_chans") if hasattr(config, name)), 3)
    width = channels * (getattr(config, "temporal_patch_size", None) or 1) * config.patch_size**2
    side = 2 * (getattr(config, "spatial_merge_size", None) or 1)
    values = _zeros(model, side * side, width)
    return {names[0]: values, "grid_thw": torch.tensor([[1, side, side]], device=_device_of(model))}


def _zeros(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    dtype = next((of.dtype for of in model.parameters() if of.is_floating_point()), torch.float32)
    return torch.zeros(shape, dtype=dtype, device=_device_of(model))


def _device_of(model: PreTrainedModel) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
