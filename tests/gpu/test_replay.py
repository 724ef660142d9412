"""The operations by their recorded launches give the bits that they give through every launcher."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bottleneck_cases import BOTTLENECK_CASES
from bottleneck_cases import make as make_bottleneck
from bottleneck_cases import name_of as name_of_bottleneck
from bottleneck_cases import run as run_bottleneck
from captured import Captured
from group_cases import GROUPS, make_group, outputs_of_group, results_of
from op_cases import CASES, OpCase, make, name_of, operations, output_and_gradients
from peft import get_peft_model
from tiny_models import ARCHITECTURES, randomise_adapters

from sibo_triton import SiboLoraConfig
from sibo_triton.kernels import launching, replay
from sibo_triton.kernels.launching import forget_launches
from sibo_triton.kernels.precision import INTERPRETED
from sibo_triton.ops import add_bottleneck, lora_linear

pytestmark = [pytest.mark.gpu, pytest.mark.as_allocated]

#: Of each kind of case; in the interpreter nothing is recorded, and this file shows only that it runs.
SOME = slice(2) if INTERPRETED else slice(None)


@pytest.fixture
def replays(monkeypatch):
    """How many times recorded launches ran."""
    count, run = [], replay.Tape.__call__

    def counted(self, tensors):
        result = run(self, tensors)
        if result is not None:
            count.append(1)
        return result

    monkeypatch.setattr(replay.Tape, "__call__", counted)
    return count


def check(run, replays, monkeypatch, seeds=3, same=torch.equal):
    """``run``, of a seed for its data, returns results by name."""
    forget_launches()
    found = [run(seed) for seed in range(seeds)]
    with monkeypatch.context() as patch:
        patch.setattr(launching, "_DIRECT", False)
        forget_launches()
        expected = [run(seed) for seed in range(seeds)]
    forget_launches()
    for these, those in zip(found, expected, strict=True):
        assert these.keys() == those.keys()
        for name in those:
            assert same(these[name], those[name]), name
    # which of them: kernels_compiled/test_replayed_launches.py
    assert INTERPRETED or replays or any(of.numel() == 0 for of in expected[0].values())


@pytest.mark.parametrize("case", CASES[SOME], ids=name_of)
def test_one_layer(case, device, replays, monkeypatch):
    operation, _ = operations(case)

    def run(seed):
        grad_y = torch.randn(*case.tokens, case.out_features, generator=torch.Generator().manual_seed(seed))
        return output_and_gradients(operation, make(case, device, seed), grad_y.to(device))

    check(run, replays, monkeypatch)


@pytest.mark.parametrize("case", BOTTLENECK_CASES[SOME], ids=name_of_bottleneck)
def test_bottleneck_adapter(case, device, replays, monkeypatch):
    def run(seed):
        arguments = make_bottleneck(case, device, seed)
        shape = *arguments["x"].shape[:-1], case.out_features or case.in_features
        grad_y = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, arguments["x"].dtype)
        return run_bottleneck(add_bottleneck, arguments, grad_y)

    check(run, replays, monkeypatch)


@pytest.mark.parametrize("name", sorted(set(GROUPS) - {"nothing"})[SOME])
def test_layers_that_share_x(name, device, replays, monkeypatch):
    cases = GROUPS[name]
    layers = make_group(cases, device)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in (value for layer in layers for value in layer.values() if isinstance(value, torch.Tensor)):
                if value.is_floating_point() and value.numel() > 1:
                    value.copy_(torch.randn(value.shape, generator=generator))
        grads_y = [torch.randn(*case.tokens, case.out_features, generator=generator).to(case.dtype) for case in cases]
        return results_of(outputs_of_group, layers, grads_y)

    check(run, replays, monkeypatch)


def checkpointed(use_reentrant):
    def change(model):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        return nullcontext()

    return change


#: In which a model trains: what is done to it, and a context.
WAYS = {
    "": lambda model: nullcontext(),
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
    "saved tensors on the CPU": lambda model: torch.autograd.graph.save_on_cpu(),
}
TRAININGS = [("bert", ""), *(("llama", way) for way in WAYS)]


@pytest.mark.parametrize(("name", "way"), TRAININGS[: 1 if INTERPRETED else None])
def test_training(name, way, device, replays, monkeypatch):
    """Layers of one form share what was recorded; of BERT's first, x is h0."""
    architecture, steps = ARCHITECTURES[name], 1 if INTERPRETED else 4
    config = SiboLoraConfig(r=4, target_modules=list(architecture.targets), sibo_lambda=0.4, lora_dropout=0.1)

    def run(seed):
        torch.manual_seed(seed)
        model, inputs = get_peft_model(architecture.build(), config).train(), architecture.inputs()
        randomise_adapters(model)
        model, inputs = model.to(device), {key: value.to(device) for key, value in inputs.items()}
        trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
        context, results = WAYS[way](model), {}
        for step in range(steps):
            with context:
                loss = model(**inputs).loss
            loss.backward()  # autograd.grad finds no weight behind a reentrant checkpoint
            with torch.no_grad():
                for value in trained.values():
                    value.sub_(value.grad, alpha=0.1)
                    value.grad = None
            results[f"loss {step}"] = loss.detach()
        return results | {key: value.detach() for key, value in trained.items()}

    # torch's attention need not give the same bits twice
    check(run, replays, monkeypatch, 1 if INTERPRETED else 2, lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-6))


def known_step(arguments, wanted, grad_y):
    """A forward and backward of a layer, whose next call is known."""

    def step():
        y = lora_linear(**arguments)
        gradients = torch.autograd.grad(y, list(wanted.values()), grad_y)
        return {"y": y.detach()} | dict(zip(wanted, gradients, strict=True))

    for _ in range(1 if INTERPRETED else 3):
        step()
    return step


def a_layer(device, seed=0):
    """Its arguments, the tensors whose gradients are wanted, and dY."""
    tokens, in_features, out_features = (5, 16, 24) if INTERPRETED else (130, 200, 96)
    case = OpCase((tokens,), in_features, out_features, 16, torch.bfloat16, torch.float32, "number", 0.1)
    arguments = make(case, device, seed)
    wanted = {name: arguments[name] for name in case.wants}
    return arguments, wanted, torch.randn(tokens, out_features, device=device).bfloat16()


def test_known_calls_in_a_graph(device, replays):
    """Captured as they run; what the graph reads may change between its replays."""
    arguments, wanted, grad_y = a_layer(device)
    forget_launches()
    step = known_step(arguments, wanted, grad_y)
    count = len(replays)
    captured = Captured(step, device)
    assert INTERPRETED or len(replays) > count
    for _ in range(1 if INTERPRETED else 3):
        with torch.no_grad():
            arguments["x"].mul_(-1.25)
            arguments["dropout_seed"].add_(1)
        results = {name: of.clone() for name, of in captured.replay().items()}
        again = step()
        assert all(torch.equal(results[name], again[name]) for name in again)
    forget_launches()


def test_known_calls_on_two_streams(device, replays):
    """Each runs on the stream that is current, with scratch of its own."""
    layers = [a_layer(device, seed) for seed in range(2)]
    forget_launches()
    steps = [known_step(*layer) for layer in layers]
    expected = [step() for step in steps]
    streams = [torch.cuda.Stream() if device == "cuda" else None for _ in steps]
    results = []
    for _ in range(1 if INTERPRETED else 20):
        for i, stream in enumerate(streams):
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append((i, steps[i]()))
    if device == "cuda":
        torch.cuda.synchronize()
    assert all(torch.equal(expected[i][name], found[name]) for i, found in results for name in found)
    assert INTERPRETED or len(replays) > 40
    forget_launches()


def test_known_calls_on_the_second_device(device, replays):
    """While the first is the current one."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices, there is one")
    on_first = a_layer(device)
    second = "cuda:1" if device == "cuda" else device
    arguments, _, _ = a_layer(second)
    wanted = {name: arguments[name] for name in on_first[1]}
    forget_launches()
    steps = [known_step(*on_first), known_step(arguments, wanted, on_first[2].to(second))]
    count = len(replays)
    first, other = (step() for step in steps)
    assert INTERPRETED or len(replays) >= count + 4
    for name, result in other.items():
        assert result.device == arguments["x"].device
        torch.testing.assert_close(result.to(first[name].device), first[name], rtol=1e-2, atol=1e-2)
    forget_launches()


def test_two_tensors_that_are_one_here_are_not_taken_for_one_elsewhere(device, replays):
    arguments = make(OpCase((70,), 48, 40, 4, mixes="number", wants=()), device)
    as_one = arguments | {"initial_residual": arguments["x"]}
    forget_launches()
    with torch.no_grad():
        first = [lora_linear(**of) for of in (as_one, as_one, arguments)]
        assert not replays
        second = [lora_linear(**of) for of in (as_one, as_one, arguments)]
    assert INTERPRETED or len(replays) == 3
    assert all(map(torch.equal, first, second)) and not torch.equal(first[0], first[2])
    forget_launches()


def test_a_tensor_on_the_cpu_is_refused_also_where_all_else_was_seen(device):
    arguments = make(OpCase((70,), 48, 40, 4, mixes="tensor", wants=()), device)
    forget_launches()
    for _ in range(2):
        lora_linear(**arguments)
    if device == "cuda":
        with pytest.raises(ValueError, match="cannot be accessed"):
            lora_linear(**arguments | {"lambda_": arguments["lambda_"].cpu()})
    forget_launches()
