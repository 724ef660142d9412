"""SIBO-LoRA as a PEFT method: its config, what its layers compute, and how a `LoraModel` gets it."""

from sibo_triton.lora.config import SiboLoraConfig

__all__ = ["SiboLoraConfig"]
