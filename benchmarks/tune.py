"""Times the launches of a layer with tiles other than the plans', on a GPU: `python -m benchmarks.tune`.

The choices of the plans in `kernels/` come from this. Each case is the work of a launcher for the linears of a
Llama-3-8B layer that share an input, second stages of sums included, captured in a CUDA graph, which excludes host
time. Variants are compiled in parallel first. For comparison, torch's products of the same operands, without dropout,
are timed too.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.ahead_of_time.without_gpu import compiling_for, target_of_device
from benchmarks.in_parallel import in_parallel
from benchmarks.models import LLAMA_3_8B
from benchmarks.results_file import command_line, file_of, gpu_name
from sibo_triton.environment import provenance
from sibo_triton.kernels import down, down_input_gradient, down_weight_gradient, up, up_backward_plan
from sibo_triton.kernels.down import down_siblings
from sibo_triton.kernels.launching import forget_launches
from sibo_triton.kernels.siblings import DownGradients, DownProjection, UpGradients
from sibo_triton.kernels.targets import cdiv
from sibo_triton.kernels.up_backward import up_backward_siblings

BF16, FP32 = torch.bfloat16, torch.float32
Variant = dict[str, int]  # of a plan's configuration, and PROGRAMS


@dataclass(frozen=True)
class Case:
    """The work of one launcher for siblings.

    Attributes:
        job: the launcher's name here.
        names: of the linears.
        fp32: adapters in float32 with dropout 0.05; otherwise in bfloat16 without.
        mixes: whether h0 is read.
    """

    job: str
    names: tuple[str, ...]
    tokens: int
    rank: int
    fp32: bool
    mixes: bool

    def __str__(self) -> str:
        dtype = "fp32, dropout" if self.fp32 else "bf16"
        return f"{self.job} {'+'.join(self.names)}, M={self.tokens}, r={self.rank}, {dtype}{', mixes' * self.mixes}"

    def variants(self) -> list[Variant]:
        """All variants; the first is the plan's choice."""
        return [{}, *(dict(zip(AXES[self.job], values, strict=True)) for values in _values(self.job))]

    def calls(self, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """The launcher's call and torch's, on new inputs."""
        torch.manual_seed(0)
        M, r, dtype = self.tokens, self.rank, FP32 if self.fp32 else BF16
        shapes = [LLAMA_3_8B.shapes()[name] for name in self.names]
        K = shapes[0][0]

        def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        x, h0, p, lambda_ = random(M, K), random(M, K), 0.05 if self.fp32 else 0.0, 0.1 if self.mixes else 0.0
        seed = torch.zeros(1, dtype=torch.int64, device=device) if p else None
        As, Bs = [random(r, K, dtype=dtype) for _ in shapes], [random(N, r, dtype=dtype) for _, N in shapes]
        ts = [random(M, r, dtype=dtype) for _ in shapes]
        if self.job == "down":
            projections = [DownProjection(A, lambda_, p, seed) for A in As]
            together = torch.cat(As).to(BF16)
            return lambda: down_siblings(x, projections, h0), lambda: x @ together.T
        if self.job == "up":
            ys = [random(M, N) for _, N in shapes]
            pairs = list(zip(ts, Bs, strict=True))
            return (
                lambda: [up.up(t, B, 2.0, BF16) for t, B in pairs],
                lambda: [y.addmm_(t.to(BF16), B.to(BF16).T) for (t, B), y in zip(pairs, ys, strict=True)],
            )
        if self.job == "up_backward":
            dys = [random(M, N) for _, N in shapes]
            siblings = [UpGradients(dy, t, B, 2.0, True, dtype) for dy, t, B in zip(dys, ts, Bs, strict=True)]
            low = [(sibling.grad_y, sibling.lora_b.to(BF16), sibling.t.to(BF16)) for sibling in siblings]
            return lambda: up_backward_siblings(siblings), lambda: [(dy @ B, dy.T @ t) for dy, B, t in low]
        us = [random(M, r, dtype=FP32) for _ in shapes]
        gradients = [DownGradients(u, A, dtype, lambda_, p, seed, dtype) for u, A in zip(us, As, strict=True)]
        u16, A16 = torch.cat(us, 1).to(BF16), torch.cat(As).to(BF16)
        if self.job == "weight_gradient":
            return lambda: down_weight_gradient.down_weight_gradient(gradients, x, h0), lambda: u16.T @ x
        if self.job == "input_gradient":
            return lambda: down_input_gradient.down_input_gradient(gradients, dtype=BF16), lambda: u16 @ A16
        raise ValueError(self.job)


AXES = {
    "down": ("BM", "BK", "num_warps", "num_stages", "PROGRAMS"),
    "up": ("BM", "BN", "num_warps"),
    "up_backward": ("BM", "BN", "num_warps", "num_stages", "PROGRAMS"),
    "weight_gradient": ("BM", "BK", "num_warps", "num_stages", "PROGRAMS"),
    "input_gradient": ("BM", "BK", "num_warps", "num_stages", "PROGRAMS"),
}


def _values(job: str) -> list[tuple[int, ...]]:
    return {
        "down": [
            *product((64,), (64,), (4,), (3, 5), (1, 2, 3, 4)),
            *product((64,), (128,), (4, 8), (3,), (1, 2, 3)),
            *product((128,), (64,), (4, 8), (3,), (1, 2)),
            *product((32,), (128,), (4,), (3, 5), (1, 2)),
        ],
        "up": [*product((32, 64, 128), (64, 128, 256), (4, 8)), (16, 256, 4)],
        "up_backward": [
            *product((64,), (256,), (4, 8), (2, 3), (1, 2)),
            *product((64,), (128,), (4, 8), (2, 3), (1, 2, 4)),
            *product((64,), (512,), (8,), (2, 3), (1,)),
            *product((32,), (256,), (8,), (3,), (1, 2)),
        ],
        "weight_gradient": [
            *product((64,), (64,), (4,), (3, 4), (4, 8)),
            *product((64,), (128,), (4, 8), (2, 3), (2, 4)),
            *product((32,), (64, 128), (4,), (3,), (2, 4, 8)),
            *product((128,), (64,), (4, 8), (2,), (2, 4)),
        ],
        "input_gradient": [
            *product((64,), (64, 128), (4, 8), (1, 2), (2, 4, 8)),
            *product((128,), (64, 128), (8,), (2,), (2, 4)),
            *product((32,), (128, 256), (4,), (2,), (4,)),
        ],
    }[job]


def cases(tokens: int, rank: int) -> list[Case]:
    qkv, mlp, down_proj = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)
    all_cases = []
    for fp32 in (False, True):
        for job in ("down", "weight_gradient"):
            all_cases += [Case(job, names, tokens, rank, fp32, True) for names in (qkv, mlp)]
            all_cases += [Case(job, names, tokens, rank, fp32, False) for names in (qkv, down_proj)]
        for job in ("up", "up_backward"):
            all_cases += [Case(job, names, tokens, rank, fp32, False) for names in (qkv, mlp, down_proj)]
        all_cases += [
            Case("input_gradient", names, tokens, rank, fp32, names != down_proj) for names in (qkv, mlp, down_proj)
        ]
    return all_cases


@contextmanager
def planned(job: str, variant: Variant) -> Iterator[None]:
    """Inside, launches use the variant's tiles instead of the plan's."""
    tiles = {name: value for name, value in variant.items() if name != "PROGRAMS"}
    patch = mock.patch.object

    def changed(module: Any) -> Any:
        plan = module.plan.__wrapped__

        def other(*arguments: Any, **keywords: Any) -> Any:
            chosen = plan(*arguments, **keywords)
            programs = {"programs": variant["PROGRAMS"]} if "PROGRAMS" in variant and job != "down" else {}
            return replace(chosen, config=chosen.config | tiles, **programs)

        return patch(module, "plan", other)

    forget_launches()
    with ExitStack() as stack:
        if job == "up_backward":
            original = up_backward_plan.launch_of_both

            def launch_of_both(M: int, N: int, r: int, *rest: Any) -> Any:
                chosen = original(M, N, r, *rest)
                if chosen is None:
                    return None
                if not variant:
                    return chosen
                config, wanted = chosen.config | tiles, variant["PROGRAMS"] * rest[3].multiprocessors
                u_parts = cdiv(N, config["BN"])
                steps, parts = up_backward_plan.cut(cdiv(M, config["BM"]), u_parts, wanted)
                return up_backward_plan.Pass(config | {"STEPS": steps}, u_parts * parts, u_parts, parts)

            stack.enter_context(patch(up_backward_plan, "launch_of_both", launch_of_both))
            up_backward_plan.plan.cache_clear()
        else:
            module = {"down": down, "up": up, "weight_gradient": down_weight_gradient}.get(job, down_input_gradient)
            stack.enter_context(changed(module))
            if job == "down" and "PROGRAMS" in variant:  # K is cut below three quarters of a program per multiprocessor
                cut, share = down.cut, variant["PROGRAMS"] / 0.75
                stack.enter_context(patch(down, "cut", lambda *rest: cut(*rest[:-1], round(rest[-1] * share))))
        yield
    up_backward_plan.plan.cache_clear()
    forget_launches()


def compile_variant(task: tuple[Case, Variant, Any, Any]) -> str | None:
    """Compile into Triton's cache; returns the error if there is one."""
    case, variant, gpu, target = task
    try:
        with compiling_for(gpu, target), planned(case.job, variant):
            case.calls("meta")[0]()
    except Exception as error:
        return f"{case} {variant}: {type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def compile_all(chosen: list[Case], gpu: Any, target: Any, workers: int) -> None:
    tasks = [(case, variant, gpu, target) for case in chosen for variant in case.variants()]
    for error in in_parallel("compiling variants", compile_variant, tasks, workers, chunk=4):
        if error:
            print(f"not compiled: {error}", flush=True)


def time_case(case: Case, milliseconds: float) -> list[tuple[float, Variant]]:
    """Microseconds of each variant, the fastest first; torch's products are the variant {"torch": 1}."""
    from triton.testing import do_bench_cudagraph

    times = []
    ours, theirs = case.calls("cuda")
    for variant in case.variants():
        try:
            with planned(case.job, variant):
                ours()
                times.append((1e3 * do_bench_cudagraph(ours, rep=milliseconds, return_mode="median"), variant))
        except Exception as error:
            torch.cuda.synchronize()  # ends here if the device is broken
            print(f"  {variant}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
    times.append((1e3 * do_bench_cudagraph(theirs, rep=milliseconds, return_mode="median"), {"torch": 1}))
    return sorted(times, key=lambda timed: timed[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose name holds all of these")
    parser.add_argument("--not", nargs="+", default=[], dest="without", metavar="WORD", help="and none of these")
    parser.add_argument("--compile-only", action="store_true", help="into Triton's cache, for a later run")
    parser.add_argument("--milliseconds", type=float, default=2, help="for each variant")
    parser.add_argument("--output", type=Path, help="default: a file of this GPU's in benchmarks/results/")
    options = parser.parse_args()
    gpu = gpu_name("tune")
    from triton.runtime.driver import driver

    chosen = [
        case
        for case in cases(options.tokens, options.rank)
        if all(word in str(case) for word in options.only) and not any(word in str(case) for word in options.without)
    ]
    compile_all(chosen, driver.active.get_current_target(), target_of_device(), len(os.sched_getaffinity(0)))
    if options.compile_only:
        return
    output = options.output or file_of("tune", gpu)
    document = {"command": command_line("tune"), "what": "microseconds", **provenance(), "gpu": gpu, "cases": {}}
    for case in chosen:
        times = time_case(case, options.milliseconds)
        document["cases"][str(case)] = [[round(us, 2), variant] for us, variant in times]
        output.write_text(json.dumps(document) + "\n", encoding="utf-8")
        plans, torchs = (next(us for us, variant in times if variant == wanted) for wanted in ({}, {"torch": 1}))
        print(f"{case}: the plan's {plans:.1f} us, torch's products {torchs:.1f} us", flush=True)
        for us, variant in times[:4]:
            print(f"  {us:8.1f}  {variant}", flush=True)


if __name__ == "__main__":
    main()
