"""Inject an adapter so that a refusal, or a loading that fails afterwards, leaves the model as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from sibo_triton.injection.snapshot import Snapshot
from sibo_triton.layers.adapters import adapters_on, tuner_layers

# Each adapter's config as it was injected. Injecting another adapter of the same name replaces the config in PEFT's
# dictionary before our code runs; a refusal puts it back.
_configs: WeakKeyDictionary[nn.Module, dict[str, PeftConfig]] = WeakKeyDictionary()


class _Loads(threading.local):
    undo: list[Callable[[], None]] | None = None


_loads = _Loads()


@contextmanager
def loading() -> Iterator[None]:
    """Context in which an adapter's folder is loaded: if it raises, the injections within it are undone."""
    outer, _loads.undo = _loads.undo, []
    try:
        yield
    except BaseException:
        for undo in reversed(_loads.undo):
            undo()
        raise
    finally:
        _loads.undo = outer


def is_loading() -> bool:
    """Whether an adapter's folder is being loaded in this thread."""
    return _loads.undo is not None


def note_config(model: nn.Module, adapter_name: str, config: PeftConfig) -> None:
    """Remember the config of an adapter that has been injected."""
    _configs.setdefault(model, {})[adapter_name] = config


def inject_reversibly(
    inject: Callable[[], None],
    tuner: BaseTuner,
    model: nn.Module,
    adapter_name: str,
    remove_unused_hooks: Callable[[nn.Module], None],
) -> None:
    """Run `inject`, and undo what it did to `model` and `tuner` if it raises, or if loading fails later."""
    snapshot = Snapshot(model)
    targeted = (tuner.targeted_module_names, tuner.targeted_parameter_names)
    targeted_before = [list(names) for names in targeted]

    def take_back() -> None:
        snapshot.restore()
        remove_unused_hooks(model)
        previous = _configs.get(model, {}).get(adapter_name)  # PEFT has put the new one in its place
        if previous is not None and any(adapter_name in adapters_on(layer) for _, layer in tuner_layers(model)):
            tuner.peft_config[adapter_name] = previous
        else:
            tuner.peft_config.pop(adapter_name, None)
        for names, before in zip(targeted, targeted_before, strict=True):
            names[:] = before

    try:
        inject()
        remove_unused_hooks(model)
    except BaseException:
        take_back()
        raise
    if _loads.undo is not None:
        _loads.undo.append(take_back)
