"""What a model was before an adapter was injected, to put it back when that is refused or its weights fail to load."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


class Snapshot:
    """The modules of a model, their modes and trainability, and PEFT's bookkeeping on them; no weights."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._root = dict(model.__dict__)
        self._children = {module: dict(module._modules) for module in model.modules()}
        self._modes = {module: module.training for module in model.modules()}
        self._trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._entries = {  # LoRA on embeddings and convolutions keeps its matrices by adapter name
            module: (dict(module._parameters), dict(module._keys))
            for module in model.modules()
            if isinstance(module, nn.ParameterDict)
        }
        self._attributes = {
            module: {name: _copy(value) for name, value in module.__dict__.items() if _is_bookkeeping(name, value)}
            for module in model.modules()
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        }

    def restore(self) -> None:
        """Put the model back to what it was."""
        for module, children in self._children.items():
            module._modules.clear()
            module._modules.update(children)
        for module, (parameters, keys) in self._entries.items():
            module._parameters.clear()
            module._parameters.update(parameters)
            module._keys = dict(keys)
        for module, attributes in self._attributes.items():
            for name in [name for name, value in module.__dict__.items() if _is_bookkeeping(name, value)]:
                if name not in attributes:
                    del module.__dict__[name]
            module.__dict__.update({name: _copy(value) for name, value in attributes.items()})
        # what PEFT and transformers note on the base model: peft_config, weight conversions, ...
        self._model.__dict__.clear()
        self._model.__dict__.update(self._root)
        for module, mode in self._modes.items():
            module.training = mode
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad = trainable
        if "peft_config" not in self._root and getattr(self._model, "_hf_peft_config_loaded", False):
            self._model._hf_peft_config_loaded = False  # transformers sets it before it injects


def _is_bookkeeping(name: str, value: Any) -> bool:
    return (
        name not in ("_parameters", "_buffers", "_modules", "training")
        and "hook" not in name
        and (isinstance(value, (dict, list, set, tuple, str, bool, int, float)) or value is None)
    )


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value
