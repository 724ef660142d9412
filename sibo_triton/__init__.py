"""SIBO-LoRA for PEFT."""

from sibo_triton._paths import append_repository_root
from sibo_triton._version import __version__

append_repository_root(__path__)

__all__ = ["__version__"]
