"""The operations that the SIBO layers call: one place that chooses between the Triton kernels and plain PyTorch."""

from sibo_triton.ops.bottleneck import BottleneckArguments, add_bottleneck, bottleneck_group, bottleneck_linear
from sibo_triton.ops.dispatch import BACKEND_VARIABLE, Choice, backend_for
from sibo_triton.ops.group import Group
from sibo_triton.ops.lora import LoraArguments, add_lora, lora_linear, lora_linear_group
from sibo_triton.ops.prepare import shares_passes
from sibo_triton.ops.tensors import autocast_dtype

__all__ = [
    "BACKEND_VARIABLE",
    "BottleneckArguments",
    "Choice",
    "Group",
    "LoraArguments",
    "add_bottleneck",
    "add_lora",
    "autocast_dtype",
    "bottleneck_group",
    "bottleneck_linear",
    "backend_for",
    "lora_linear",
    "lora_linear_group",
    "shares_passes",
]
