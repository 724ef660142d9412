"""SIBO (arXiv 2402.11896): SIBO-LoRA as a drop-in for PEFT's LoRA, and SIBO bottleneck adapters as a PEFT method.

Importing the package registers the adapter types with PEFT; plain LoRA is left as it is.
"""

from sibo_triton._paths import append_repository_root
from sibo_triton._version import __version__

append_repository_root(__path__)

from sibo_triton.bottleneck import SiboAdapterConfig  # noqa: E402
from sibo_triton.explain import Explanation, ModuleExplanation, explain  # noqa: E402
from sibo_triton.lora import SiboLoraConfig  # noqa: E402
from sibo_triton.lora.acceleration import accelerate, accelerate_all, restore  # noqa: E402
from sibo_triton.registration import register  # noqa: E402

register()

__all__ = [
    "Explanation",
    "ModuleExplanation",
    "SiboAdapterConfig",
    "SiboLoraConfig",
    "__version__",
    "accelerate",
    "accelerate_all",
    "explain",
    "restore",
]
