"""`sibo-triton demo`: a small decoder learns to add, is frozen, and learns to subtract through adapters."""

from sibo_triton.finetune.demo.run import run_demo

__all__ = ["run_demo"]
