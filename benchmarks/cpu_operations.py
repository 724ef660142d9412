"""How long one LoRA linear takes on this CPU, forward and backward: ``sibo_triton.ops.plain`` beside PEFT's formula.

    python benchmarks/cpu_operations.py --threads 1 --tokens 1024 --in-features 1024 --out-features 1024

Everything but the operations is the same for all: a frozen linear with a bias, whose input needs a gradient, and an
adapter that trains. Medians of runs that take turns, the frozen linear alone as the floor. CPU time, of all threads,
is what to compare on a busy machine.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from sibo_triton.ops.plain import down, down_backward, up, up_backward
from sibo_triton.reference import draw_seed

SCALING = 2.0


class PlainLora(torch.autograd.Function):
    """One layer through ``sibo_triton.ops.plain``: it saves x, h0, t and a seed, no mask."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, h0, lambda_, dropout_p):
        seed = draw_seed() if dropout_p else None
        t, _ = down(x, lora_a, h0, lambda_, dropout_p, seed)
        y = up(t, lora_b, SCALING, x.dtype, base_bias=bias)
        ctx.save_for_backward(x, weight, lora_a, lora_b, h0, t, seed)
        ctx.options = lambda_, dropout_p
        return y.addmm_(x, weight.T)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, lora_a, lora_b, h0, t, seed = ctx.saved_tensors
        u, grad_b = up_backward(grad_y, t, lora_b, SCALING)
        grad_a, dx, _ = down_backward(u, lora_a, x, h0, *ctx.options, seed, lora_a.dtype, x.dtype, None)
        dx.addmm_(grad_y, weight)
        return dx, None, None, grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype), None, None, None


def peft_lora(x, weight, bias, lora_a, lora_b, h0, lambda_, dropout_p):
    """What ``peft.tuners.lora.Linear`` computes, after an eager mix where lambda is not 0."""
    x_mixed = x if lambda_ == 0 else (1 - lambda_) * x + lambda_ * h0
    x_mixed = F.dropout(x_mixed.to(lora_a.dtype), dropout_p)
    return F.linear(x, weight, bias) + F.linear(F.linear(x_mixed, lora_a), lora_b) * SCALING


def frozen(x, weight, bias, lora_a, lora_b, h0, lambda_, dropout_p):
    return F.linear(x, weight, bias)


def runners(arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    dtype = getattr(torch, arguments.dtype)
    adapter_dtype = getattr(torch, arguments.adapter_dtype or arguments.dtype)
    M, K, N, r = arguments.tokens, arguments.in_features, arguments.out_features, arguments.rank
    x, h0, grad_y = torch.randn(M, K, dtype=dtype), torch.randn(M, K, dtype=dtype), torch.randn(M, N, dtype=dtype)
    weight, bias = torch.randn(N, K, dtype=dtype) / K**0.5, torch.randn(N, dtype=dtype)
    lora_a, lora_b = torch.randn(r, K, dtype=adapter_dtype), torch.randn(N, r, dtype=adapter_dtype)

    def runner(layer: Callable[..., Tensor], lambda_: float, dropout_p: float) -> Callable[[], None]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, lora_a, lora_b)]

        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            y = layer(leaves[0], weight, bias, *leaves[1:], h0 if lambda_ else None, lambda_, dropout_p)
            y.to(dtype).backward(grad_y)

        return run

    chosen = {"frozen linear": runner(frozen, 0.0, 0.0)}
    for dropout_p in (0.0, 0.05):
        for name, lambda_ in (("LoRA", 0.0), ("SIBO-LoRA", 0.1)):
            chosen[f"{name}, dropout {dropout_p}, PEFT's formula"] = runner(peft_lora, lambda_, dropout_p)
            chosen[f"{name}, dropout {dropout_p}, plain operations"] = runner(PlainLora.apply, lambda_, dropout_p)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--in-features", type=int, default=1024)
    parser.add_argument("--out-features", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32", help="of the frozen layer and the activations")
    parser.add_argument("--adapter-dtype", help="of A and B; the same by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)

    chosen = runners(arguments)
    wall: dict[str, list[float]] = {name: [] for name in chosen}
    cpu: dict[str, list[float]] = {name: [] for name in chosen}
    for i in range(arguments.rounds + 2):
        for name, run in chosen.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            if i >= 2:  # the first rounds warm up
                wall[name].append(1000 * (time.perf_counter() - start))
                cpu[name].append(1000 * (time.process_time() - cpu_start))

    floor = median(cpu["frozen linear"])
    print(f"{' '.join(f'{key}={value}' for key, value in vars(arguments).items())} torch={torch.__version__}\n")
    print("| forward + backward | ms | CPU ms | CPU over the frozen linear |\n|---|---|---|---|")
    for name in chosen:
        over = 100 * (median(cpu[name]) / floor - 1)
        print(f"| {name} | {median(wall[name]):.2f} | {median(cpu[name]):.2f} | {over:+.1f} % |")


if __name__ == "__main__":
    main()
