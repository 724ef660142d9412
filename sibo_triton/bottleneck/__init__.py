"""SIBO bottleneck adapters as a PEFT method: their config, their layers, and the tuner that injects them."""

from sibo_triton.bottleneck.config import SiboAdapterConfig

__all__ = ["SiboAdapterConfig"]
