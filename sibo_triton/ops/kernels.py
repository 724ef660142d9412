"""The Triton backend: what ``ops/plain.py`` does in PyTorch, as launches of the kernels."""

from sibo_triton.kernels.down import down
from sibo_triton.kernels.down_input_gradient import down_input_gradient
from sibo_triton.kernels.down_weight_gradient import down_weight_gradient
from sibo_triton.kernels.up import add_up, up
from sibo_triton.kernels.up_backward import up_backward

__all__ = ["add_up", "down", "down_input_gradient", "down_weight_gradient", "up", "up_backward"]
