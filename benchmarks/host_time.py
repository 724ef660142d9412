"""Python and dispatch time of one LoRA module on tiny tensors: `python benchmarks/host_time.py`.

Forward + backward, and forward without gradients, of PEFT's eager LoRA, of ours and of ours with the mix, on the CPU,
where tensors this small cost next to nothing themselves. Runs take turns; medians in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sibo_triton import reference
from sibo_triton.lora.forward import FusedLinear, SiboLoraVariant
from sibo_triton.lora.layer import MixingSite
from sibo_triton.lora.paths import Notices
from sibo_triton.ops import lora_linear

SIZE, RANK, TOKENS = 16, 4, 2


class Block(nn.Module):
    """A model of one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(SIZE, SIZE, bias=False)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layers[0](hidden_states)


def peft_layer(dropout: float, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """PEFT's lora.Linear, eager; its adapter is float32 whatever the dtype of its base, as PEFT makes it."""
    config = LoraConfig(r=RANK, lora_dropout=dropout, target_modules=["0"])
    return get_peft_model(Block().to(dtype), config).train().base_model.model.layers[0]


def our_layer(dropout: float, dtype: torch.dtype, sibo: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer that PEFT made, ours by its class; without h0's hooks, which belong to the stack and not to a layer."""
    layer = peft_layer(dropout, dtype)
    layer.sibo_sites = {"default": MixingSite("0", None, "", Notices())}
    layer.lora_variant["default"] = SiboLoraVariant()
    layer.__class__ = FusedLinear
    if not sibo:
        return layer
    h0, lambda_ = torch.randn(TOKENS, SIZE, dtype=dtype), torch.tensor([0.1])
    a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    weight = layer.base_layer.weight

    def run(x: torch.Tensor) -> torch.Tensor:
        seed = reference.draw_seed() if dropout else None
        return lora_linear(x, weight, None, a, b, s, h0, lambda_, dropout, seed)

    return run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for dtype, dropout in product((torch.float32, torch.bfloat16), (0.0, 0.05)):
        x = torch.randn(TOKENS, SIZE, dtype=dtype, requires_grad=True)
        grad = torch.randn(TOKENS, SIZE, dtype=dtype)
        layers = {
            "PEFT LoRA, eager": peft_layer(dropout, dtype),
            "ours, lambda = 0": our_layer(dropout, dtype, sibo=False),
            "ours, SIBO (operation alone)": our_layer(dropout, dtype, sibo=True),
        }
        times: dict[str, list[list[float]]] = {name: [[], []] for name in layers}
        for _ in range(rounds):
            for name, layer in layers.items():
                start = time.process_time()
                for _ in range(20):
                    layer(x).backward(grad)
                middle = time.process_time()
                with torch.no_grad():
                    for _ in range(20):
                        layer(x)
                end = time.process_time()
                times[name][0].append((middle - start) / 20e-6)
                times[name][1].append((end - middle) / 20e-6)
        print(f"{dtype}, dropout {dropout}: microseconds, forward + backward / forward without gradients")
        for name, (both, alone) in times.items():
            print(f"  {name:30} {statistics.median(both):7.1f} {statistics.median(alone):7.1f}")


if __name__ == "__main__":
    main()
