"""Tiny rows of the timed benchmarks, for a CPU, and providers that fail in one way each."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import decode, layer, step
from benchmarks.bottleneck_providers import EagerAdapter, EagerMixedAdapter
from benchmarks.harness import Session
from benchmarks.models import Architecture
from benchmarks.providers import ADAPTER, OursLora, OursSibo, Peft, PeftMixed, Provider
from benchmarks.results_file import Budget, ResultsFile
from benchmarks.timing import Effort

LLAMA = Architecture("tiny", "llama", 64, 96, 4, 2, 16, 2, 128)
BERT = Architecture("tiny BERT", "bert", 64, 96, 4, 4, 16, 2, 128, bias=True)
EFFORT = Effort(rounds=2, seconds=0.0, turn=0.0)
BOTH = (layer.BF16, layer.DEFAULTS)
ADAPTERS = tuple(replace(setting, bottleneck_size=8) for setting in layer.ADAPTERS)


def layer_row(setting=layer.BF16, names=None, of=LLAMA, tokens=96) -> layer.LayerRow:
    return layer.LayerRow(of, tokens, setting, names, vocabulary=128)


def step_row(setting=layer.BF16, checkpointing=False, compiles=False) -> step.StepRow:
    return step.StepRow(LLAMA, (2, 16), setting, checkpointing, compiles)


def decode_row(batch=1) -> decode.DecodeRow:
    return decode.DecodeRow(LLAMA, batch, layer.BF16, new_tokens=3)


class _Changed(PeftMixed):
    """PEFT's LoRA with the mix, and something wrong with it."""

    def wrap(self, model, setting):
        wrapped = super().wrap(model, setting)
        for name, module in wrapped.named_modules():
            if hasattr(module, "lora_A"):
                self.change(name, module)
        return wrapped

    def change(self, name: str, layer: nn.Module) -> None:
        raise NotImplementedError


class WrongScaling(_Changed):
    name = "wrong scaling"

    def change(self, name, layer):
        layer.scaling[ADAPTER] *= 1.2


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * grad


class WrongGradient(_Changed):
    """Of A and what is below, by half; outputs are right."""

    name = "wrong gradient"

    def change(self, name, layer):
        if name.endswith("v_proj"):
            layer.lora_A[ADAPTER].register_forward_hook(lambda module, args, t: _NoGradient.apply(t))


class NoMix(Peft):
    name = "does not mix"
    mixes = True


class NoDropout(Peft):
    name = "does not drop"

    def wrap(self, model, setting):
        return super().wrap(model, replace(setting, dropout=0.0))


class AdapterWithoutMix(EagerAdapter):
    name = "adapter that does not mix"
    mixes = True

    def wrap(self, model, setting):
        return super().wrap(model, replace(setting, lambda_=0.0))


class AdapterWithoutDropout(EagerMixedAdapter):
    name = "adapter that does not drop"

    def wrap(self, model, setting):
        return super().wrap(model, replace(setting, dropout=0.0))


class AdapterWithAnotherActivation(EagerMixedAdapter):
    name = "adapter with another activation"

    def wrap(self, model, setting):
        return super().wrap(model, replace(setting, activation="relu"))


class Crashes(Peft):
    name = "crashes"

    def wrap(self, model, setting):
        raise torch.OutOfMemoryError("out of memory, tried to allocate\nand more lines")


class CrashesLater(Peft):
    """After its check, while it is timed."""

    name = "crashes later"

    def wrap(self, model, setting):
        wrapped, calls = super().wrap(model, setting), []

        def crash(*_):
            calls.append(1)
            if len(calls) > 5:
                raise RuntimeError("the sixth forward")

        wrapped.base_model.model.layers[0].register_forward_pre_hook(crash)
        return wrapped


RIGHT = (Provider(), Peft(), OursLora(), PeftMixed(), OursSibo())


def run(path: Path, rows, providers=RIGHT, effort=EFFORT, budget=None, resume=False) -> Session:
    """A session on a CPU; its results are in the file."""
    results = ResultsFile(path, {"command": "test", "device": "cpu", "torch": torch.__version__, "commit": "c"}, resume)
    session = Session(results, "cpu", Budget(budget), effort)
    session.run(rows, providers)
    return session
