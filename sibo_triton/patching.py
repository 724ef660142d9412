"""`wrap`, by which functions of PEFT and transformers are changed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import peft
import transformers

from sibo_triton.environment import tested_pairs

_ORIGINAL = "_sibo_triton_wraps"  # attribute of a wrapper


def wrap(owner: type | ModuleType, name: str, wrapper: Callable) -> None:
    """Put `wrapper(original, *args, **kwargs)` in the place of a function of `owner`; a second time does nothing.

    Raises:
        ImportError: this PEFT or transformers has no such function.
    """
    try:
        attribute = inspect.getattr_static(owner, name)
    except AttributeError:
        installed = f"transformers {transformers.__version__} with peft {peft.__version__}"
        raise ImportError(
            f"sibo_triton changes {owner.__name__}.{name}, which {installed} does not have. Install versions that "
            f"it is tested with: {tested_pairs()}."
        ) from None
    is_classmethod = isinstance(attribute, classmethod)
    original = attribute.__func__ if is_classmethod else attribute
    if hasattr(original, _ORIGINAL):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _ORIGINAL, original)
    setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)
