"""Which implementation computes: the only place that chooses a backend, by device, dtype and whether Triton is there.

| backend | what it is | chosen |
|---|---|---|
| ``triton`` | the kernels | on a CUDA or ROCm device, 16-bit and float32 tensors, Triton installed |
| ``torch`` | the same passes and the same saved tensors in plain PyTorch (``ops/plain.py``) | everywhere else |
| ``reference`` | the definition | in ``torch.func``, forward-mode AD, ``torch.jit.trace`` and ``torch.export`` |

The environment variable ``SIBO_TRITON_BACKEND`` forces one of them: ``reference`` everywhere, the others where the
table would not choose ``reference``. Unset or ``auto`` is the table.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch.autograd import forward_ad

BACKEND_VARIABLE = "SIBO_TRITON_BACKEND"
_BACKENDS = ("auto", "triton", "torch", "reference")

# Where os.environ keeps what it has: to ask it for what is not there raises and catches an exception, which is a
# twentieth of a small layer's host time.
_NAME = os.environ.encodekey(BACKEND_VARIABLE)
_ENVIRONMENT: dict = os.environ._data  # type: ignore[attr-defined]

_KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
_OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Choice:
    """A backend, and why it is that one.

    Attributes:
        name: "triton", "torch" or "reference"; "compiled" while `torch.compile` traces, which leaves the choice open.
        reason: why, in words.
        is_fallback: whether the kernels could be expected to run here, and do not.
    """

    name: str
    reason: str
    is_fallback: bool = False


_TRANSFORM = Choice("reference", "inside a torch.func transform, which hand-written gradients do not take part in")
_FORWARD_MODE = Choice("reference", "inside forward-mode AD, which hand-written gradients do not take part in")
_TRACED = Choice("reference", "traced by torch.jit, which would keep this call's shapes")
_EXPORTED = Choice("reference", "exported by torch.export, into a program that others are to read")
_DEFINITION = Choice("reference", f"{BACKEND_VARIABLE}=reference")
_PLAIN = Choice("torch", f"{BACKEND_VARIABLE}=torch")
_COMPILED = Choice("compiled", "chosen when the compiled code runs")


def requested_backend() -> str:
    """What the environment asks for.

    Raises:
        ValueError: it asks for something that there is not.
    """
    value = os.environ.get(BACKEND_VARIABLE, "auto") if _NAME in _ENVIRONMENT else "auto"
    if value not in _BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}={value!r} is no backend: set it to one of {', '.join(_BACKENDS)}.")
    return value


def backend_for(device: torch.device, dtypes: Iterable[torch.dtype]) -> Choice:
    """Choose what computes for tensors on `device` of these `dtypes`.

    Raises:
        ValueError: the environment asks for a backend that there is not.
        RuntimeError: it asks for the kernels, which cannot run on these tensors.
    """
    requested = requested_backend()
    if requested == "reference":
        return _DEFINITION
    if torch._C._are_functorch_transforms_active():
        return _TRANSFORM
    if forward_ad._current_level >= 0:
        return _FORWARD_MODE
    if torch._C._get_tracing_state() is not None:
        return _TRACED
    if torch.compiler.is_exporting():
        return _EXPORTED
    if requested == "torch":
        return _PLAIN
    if torch.compiler.is_compiling():
        return _COMPILED
    return _choose(requested, device, tuple(dtypes))


def kernels_compute(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`backend_for` chooses the kernels, unless a `torch.func` transform or `torch.jit.trace` is active.

    A known call (`known_calls.py`) need not look for these: under them no tensor fits its guards.

    Raises:
        ValueError, RuntimeError: as :func:`backend_for`.
    """
    requested = requested_backend()
    if requested in ("reference", "torch") or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    return _choose(requested, device, (dtype,)).name == "triton"


@cache
def _choose(requested: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Choice:
    obstacle = _obstacle(device) or _dtype_obstacle(dtypes)
    if requested == "triton":
        if obstacle is not None:
            raise RuntimeError(f"{BACKEND_VARIABLE}=triton, but {obstacle}. Unset it, or set it to torch.")
        return Choice("triton", f"{BACKEND_VARIABLE}=triton")
    if obstacle is None:
        return Choice("triton", f"on {device}")
    return Choice("torch", obstacle, is_fallback=device.type == "cuda")


_said: set[str] = set()


def warn_of_fallback(choice: Choice) -> None:
    """Warn, once for each reason, that the kernels do not run on a GPU."""
    if choice.is_fallback and choice.reason not in _said:
        _said.add(choice.reason)
        warnings.warn(
            f"Adapters run in plain PyTorch on this GPU and not on the Triton kernels, because {choice.reason}. That "
            f"computes the same, slower; {BACKEND_VARIABLE}=torch says that this is wanted.",
            stacklevel=2,
        )


def _dtype_obstacle(dtypes: Iterable[torch.dtype]) -> str | None:
    for dtype in dtypes:
        if dtype not in _KERNEL_DTYPES:
            return f"the kernels do not take {dtype}"
    return None


def _obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1" and device.type == "cpu":
        return None
    if device.type != "cuda":  # also AMD's
        return f"the tensors are on {device.type}, where the kernels do not run"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_CAPABILITY:
            name, (major, minor) = torch.cuda.get_device_name(device), capability
            return f"{name} has compute capability {major}.{minor}, and the kernels need 8.0"
    return None


@cache
def implementation(name: str) -> ModuleType:
    """The module with the functions of the backend "triton", or else "torch".

    What `torch_backend.__all__` names is in both, with the same arguments; what repeats known calls is Triton's alone.
    """
    return importlib.import_module(f"sibo_triton.ops.{'triton' if name == 'triton' else 'torch'}_backend")
