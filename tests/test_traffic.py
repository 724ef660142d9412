"""The traffic benchmark: what it counts of single operations and launches, and the committed results."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import providers, traffic
from benchmarks.bottleneck_providers import (
    BOTTLENECK_PROVIDERS,
    EagerAdapter,
    EagerMixedAdapter,
    OursAdapter,
    OursSiboAdapter,
)
from benchmarks.compiled_kept import added_kept_bytes
from benchmarks.counting import Counts, counted, summed, to_fake
from benchmarks.definitions import weights_of
from benchmarks.launch_traffic import Traffic
from benchmarks.model_counts import Workload, operations_of, step_of, uninitialised_model
from benchmarks.models import ARCHITECTURES, LLAMA_3_8B, Architecture
from benchmarks.providers import PROVIDERS
from benchmarks.results_file import ADDED_PER_LAYER
from benchmarks.settings import BottleneckSetting, Setting
from sibo_triton.ops import LoraArguments, lora_linear, lora_linear_group

BF16, FP32 = torch.bfloat16, torch.float32
SMALL = Workload(Architecture("small", "llama", 256, 512, 4, 2, 64, 3, 128), batch=2, length=64)


def counted_of(run, *tensors):
    with FakeTensorMode() as mode, counted() as operations:
        run(*(mode.from_tensor(tensor) for tensor in tensors))
    return [(of.name.removeprefix("aten."), of.read, of.written, of.flops) for of in operations]


def test_a_product():
    a, b = torch.empty(8, 16, dtype=BF16), torch.empty(32, 16, dtype=BF16)
    assert counted_of(lambda a, b: a @ b.T, a, b) == [("mm", 2 * (8 * 16 + 32 * 16), 2 * 8 * 32, 2 * 8 * 16 * 32)]


X, ROW = torch.empty(4, 8), torch.empty(1, 8)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x, row: x.add_(1), ("add_", 128, 128, 0)),
        (lambda x, row: x * x, ("mul", 128, 128, 0)),
        (lambda x, row: x + row.expand(4, 8), ("add", 128 + 32, 128, 0)),
        (lambda x, row: x.copy_(row), ("copy_", 32, 128, 0)),
        (lambda x, row: x.zero_(), ("zero_", 0, 128, 0)),
        (lambda x, row: x.to(BF16), ("_to_copy", 128, 64, 0)),
        (lambda x, row: x.addmm_(row.T[:4], row), ("addmm_", 128 + 16 + 32, 128, 2 * 4 * 8)),
        (lambda x, row: torch.nn.functional.dropout(x, 0.1), ("native_dropout", 128, 128 + 32, 0)),
        (lambda x, row: torch.empty_like(x.view(8, 4).T.detach()), None),
    ],
)
def test_an_operation(run, expected):
    assert counted_of(run, X, ROW) == ([] if expected is None else [expected])


def test_a_layer_of_ours_is_counted_launch_by_launch():
    """By hand, for 128 tokens, K = 256, N = 384, r = 16 in bfloat16: tiles of 64 rows, and 128 or 64 columns."""
    M, K, N, r = 128, 256, 384, 16
    x, weight = torch.empty(M, K, dtype=BF16, requires_grad=True), torch.empty(N, K, dtype=BF16)
    a, b = (torch.empty(*shape, dtype=BF16, requires_grad=True) for shape in ((r, K), (N, r)))
    with FakeTensorMode() as mode, counted() as operations:
        x, weight, a, b = (mode.from_tensor(tensor) for tensor in (x, weight, a, b))
        y = lora_linear(x, weight, None, a, b, 2.0)
        forward = len(operations)
        y.backward(torch.empty_like(y))
    gemm = 2 * M * K * N
    rank, t = M * r * 4, M * r * 2  # a matrix of u, in float32, and of t, in bfloat16
    assert operations[:forward] == [
        # 2 tiles of rows, not split: K is 4 steps, the least of a split
        Traffic("down_kernel", 2 * (M * K + r * K), t, 2 * M * K * r, reread=2 * r * K, grid=(2, 1)),
        Traffic("up_kernel", t + 2 * N * r, 2 * M * N, 2 * M * N * r, reread=2 * t + 2 * N * r, grid=(6,)),
        Traffic("aten.addmm_", 2 * (M * N + M * K + N * K), 2 * M * N, gemm),
    ]
    both, sums, grad_a, sum_a, dx, accumulated = operations[forward:]
    # 2 strips of one tile of rows, 2 tiles of 256 columns, of which N fills one and a half
    assert both == Traffic(
        "both_kernel",
        2 * (M * N + N * r) + t,
        2 * rank + 2 * N * r * 4,
        2 * 2 * M * 512 * r,
        reread=2 * N * r + t,
        grid=(4,),
    )
    assert sums == Traffic("sum_parts_kernel", both.written, rank + N * r * 2, 0, grid=(8 + 24,))
    assert (grad_a.name, grad_a.read, grad_a.grid) == ("down_weight_gradient_kernel", 2 * M * K + rank, (8,))
    # 4 parts of 32 rows, of 2 tiles of 128 columns
    assert (grad_a.written, grad_a.flops) == (4 * r * K * 4, 2 * M * K * r)
    assert (sum_a.name, sum_a.read, sum_a.written) == ("sum_parts_kernel", grad_a.written, r * K * 2)
    assert (dx.name, dx.read, dx.written) == ("down_input_gradient_kernel", rank + 2 * r * K, 2 * M * K)
    assert accumulated == Traffic("aten.addmm_", 2 * (M * N + N * K + M * K), 2 * M * K, gemm)


def test_the_roofline_takes_the_longer_of_copying_and_multiplying():
    copies, multiplies = Traffic("a", 43 * 10**8, 0, 0), Traffic("b", 0, 0, 78 * 10**10, reread=43 * 10**9)
    counts = summed([copies, multiplies])
    assert (counts.modelled_ms, counts.modelled_ms_no_cache) == pytest.approx((1 + 1, 1 + 10))


SMALL_ADAPTERS = [replace(setting, bottleneck_size=16) for setting in traffic.BOTTLENECK.settings[1:3]]
AVAILABLE = [
    *((of, setting) for setting in traffic.SETTINGS for of in PROVIDERS if not of.unavailable(setting)),
    *((of, setting) for setting in SMALL_ADAPTERS for of in BOTTLENECK_PROVIDERS),
]


@pytest.mark.parametrize(("provider", "setting"), AVAILABLE, ids=lambda of: getattr(of, "name", str(of)))
def test_every_further_layer_counts_as_the_second(provider, setting):
    step = step_of(provider, setting, SMALL)
    third = summed(*operations_of(provider, setting, SMALL, 3))
    by_line = step.per_layer(3) * 3
    assert all(getattr(by_line, name) == pytest.approx(getattr(third, name), rel=1e-12) for name in vars(Counts()))


@pytest.mark.parametrize(
    ("setting", "ours"),
    [
        (traffic.SETTINGS[1], (providers.OursLora(), providers.OursSibo())),
        (SMALL_ADAPTERS[0], (OursAdapter(), OursSiboAdapter())),
    ],
    ids=["LoRA", "bottleneck"],
)
def test_h0_is_kept_once_per_network(setting, ours):
    plain, mixed = (step_of(of, setting, SMALL) for of in ours)
    assert mixed.one_layer.saved - plain.one_layer.saved == 2 * SMALL.tokens * SMALL.architecture.hidden
    assert mixed.further_layer.saved == plain.further_layer.saved


def results_file():
    return json.loads(traffic.OUTPUT.read_text(encoding="utf-8"))


def test_the_committed_results_are_what_is_counted_now():
    found, kept = traffic.document(), results_file()
    different = [key for key in found if json.loads(json.dumps(found[key])) != kept[key]]
    changed = f"changed: run {traffic.COMMAND}, and look at what it costs"
    assert not different, f"{different} {changed}"
    bert = ARCHITECTURES[-1]  # of the others, whose counts take as long together, the one of another family
    assert traffic.ratios_of_others(others=[bert])[bert.name] == kept["other_models"][bert.name], changed


def test_the_committed_results_of_compiled_peers_are_what_is_counted_now():
    """Of one of them, as each takes seconds; and a mix is kept in place of x, for all linears that share it."""
    compiled = results_file()["kept_when_compiled"]
    setting, (_, mixed) = next(iter(traffic.COMPILED.items()))
    assert compiled[str(setting)][mixed.name] == added_kept_bytes(mixed, setting, Workload())
    assert list(compiled) == [str(of) for of in traffic.COMPILED]
    for kept in compiled.values():
        plain, mixed = kept.values()
        assert plain == mixed


def test_committed_counts():
    """The numbers that a change of a kernel or of a pass must not raise unseen, in MiB over the frozen layer."""
    settings = results_file()["settings"]
    of = {
        (name, setting): counts[ADDED_PER_LAYER]
        for setting, providers_ in settings.items()
        for name, counts in providers_.items()
        if ADDED_PER_LAYER in counts and "apart" not in name
    }
    moved = {key: round((counts["read"] + counts["written"]) / traffic.MIB) for key, counts in of.items()}
    bf16, fp32 = (str(setting) for setting in traffic.SETTINGS)
    assert moved == {
        ("PEFT LoRA", bf16): 10386,
        ("addmm_ scheme", bf16): 5144,
        ("addmm_ scheme, siblings grouped", bf16): 4760,
        ("ours, lambda = 0", bf16): 3520,
        ("PEFT LoRA + eager mix", bf16): 11986,
        ("ours, SIBO", bf16): 3776,
        ("PEFT LoRA", fp32): 33444,
        ("ours, lambda = 0", fp32): 3556,
        ("PEFT LoRA + eager mix", fp32): 37604,
        ("ours, SIBO", fp32): 3812,
    }
    ours = {key: counts for key, counts in of.items() if key[0].startswith("ours")}
    for (name, setting), counts in ours.items():  # fewer bytes and launches than every peer that does the same
        mixes = name == "ours, SIBO"
        for peer, peer_counts in of.items():
            if peer[1] == setting and not peer[0].startswith("ours") and (not mixes or "mix" in peer[0]):
                assert moved[name, setting] < moved[peer] and counts["launches"] < peer_counts["launches"], peer
        assert counts["launches"] < {bf16: 0.5, fp32: 0.3}[setting] * of["PEFT LoRA", setting]["launches"]
        assert counts["saved"] < {bf16: 1.02, fp32: 0.25}[setting] * of["PEFT LoRA", setting]["saved"]
    for (name, setting), counts in of.items():
        least = settings[setting][name]["minimum"]
        assert counts["read"] > least["read"] and counts["written"] > least["written"]
    # h0's two reads by each of two groups, forward and for dA, are all that the mix adds
    h0 = 2 * 2 * 2 * Workload().tokens * LLAMA_3_8B.hidden // traffic.MIB
    assert moved["ours, SIBO", bf16] - moved["ours, lambda = 0", bf16] == h0


def ratios_of(found, ours):
    """Those of ours to each peer that does no more, by the peer's name."""
    pairs = {tuple(pair.split(" / ")): ratio for pair, ratio in found.items()}
    return {peer: ratio for (name, peer), ratio in pairs.items() if name == ours and not peer.startswith("ours")}


@pytest.mark.parametrize("of", ARCHITECTURES[1:], ids=lambda of: of.name)
def test_committed_ratios_of_other_models(of):
    """Fewer launches and bytes than every peer; and no more is kept, but for t, which is float32."""
    for setting, found in results_file()["other_models"][of.name].items():
        assert len(found) == (6 if "bf16" in setting else 4)
        for ours in ("ours, lambda = 0", "ours, SIBO"):
            for peer, ratio in ratios_of(found, ours).items():
                assert ratio["launches"] < 0.7 and ratio["moved"] < 0.95 and ratio["kept"] < 1.02, (setting, ours, peer)


def test_committed_ratios_of_bottleneck_adapters():
    """With the mix, or in float32 under dropout, fewer bytes are moved and kept than by an eager adapter."""
    results = results_file()["bottleneck_adapters"]
    assert list(results) == [str(setting) for setting in traffic.BOTTLENECK.settings]
    series = [results[str(setting)] for setting in traffic.BOTTLENECK.settings[:2]]
    # forward: two products, f, the sum, of each of two linears; backward: four products, f' and the sum of dx's parts
    assert [of["eager adapter"][ADDED_PER_LAYER]["launches"] for of in series] == [2 * (4 + 6), 34]
    assert [of["eager adapter + eager mix"][ADDED_PER_LAYER]["launches"] for of in series] == [2 * (5 + 7), 40]
    for setting, found in results.items():
        ratios = found["ratios"]
        compared = [ratios["ours, SIBO adapter / eager adapter + eager mix"]]
        if "fp32" in setting:
            compared += [ratios["ours, adapter, lambda = 0 / eager adapter"]]
            assert all(ratio["launches"] < 1 for ratio in compared), setting
        assert all(ratio["moved"] < 0.9 and ratio["kept"] < 0.8 for ratio in compared), setting
        for name in ("eager adapter", "ours, adapter, lambda = 0", "ours, SIBO adapter"):
            least, counts = found[name]["minimum"], found[name][ADDED_PER_LAYER]
            assert counts["read"] > least["read"] and counts["written"] > least["written"]


def step_values(provider, setting):
    """The output and the gradients of the adapters of a real, small model, all from the same numbers."""
    torch.manual_seed(0)
    model = uninitialised_model(Architecture("small", "llama", 64, 96, 4, 2, 16, 2, 128))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.ones(()) if "norm" in name else torch.randn(parameter.shape) / 8)
    wrapped = provider.wrap(model.float(), setting)
    torch.manual_seed(1)  # providers draw their own weights each in its way
    model.rotary_emb.inv_freq = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    adapters = [
        weight
        for _, module in sorted(wrapped.named_modules(), key=lambda of: of[0].removeprefix("base_model.model."))
        for weight in weights_of(module).values()
    ]
    with torch.no_grad():
        for parameter in adapters:
            parameter.copy_(torch.randn(parameter.shape) / 8)
    output = wrapped(input_ids=torch.arange(12).reshape(2, 6)).last_hidden_state
    output.backward(torch.randn(output.shape))
    return [output.detach(), *(parameter.grad for parameter in adapters)]


LORA = Setting(fp32_adapters=True, dropout=0.0, rank=4, lambda_=0.3)
SERIES = BottleneckSetting(fp32_adapters=True, dropout=0.0, bottleneck_size=6, lambda_=0.3, scaling=1.5)
PARALLEL = replace(SERIES, placement="parallel", biases=True, activation="silu")


@pytest.mark.parametrize(
    ("one", "other", "setting", "plain", "gradients"),
    [
        (providers.Addmm(), providers.Peft(), LORA, providers.Peft(), 2 * 2 * 7),
        (providers.AddmmGrouped(), providers.Peft(), LORA, providers.Peft(), 2 * 2 * 7),
        (providers.OursLora(), providers.Peft(), LORA, providers.Peft(), 2 * 2 * 7),
        (providers.OursSibo(), providers.PeftMixed(), LORA, providers.Peft(), 2 * 2 * 7),
        *(
            (ours, eager, setting, EagerAdapter(), gradients)
            for setting, gradients in ((SERIES, 2 * 2 * 2), (PARALLEL, 2 * 4 * 2))
            for ours, eager in ((OursAdapter(), EagerAdapter()), (OursSiboAdapter(), EagerMixedAdapter()))
        ),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_providers_compute_the_same(one, other, setting, plain, gradients):
    ours, theirs = step_values(one, setting), step_values(other, setting)
    assert len(ours) == 1 + gradients
    for value, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.allclose(ours[0], step_values(plain, setting)[0], rtol=1e-3) != one.mixes


def test_a_step_of_generation_takes_two_launches_for_linears_that_share_x():
    """Beside the frozen products, which accumulate; one row, bfloat16; also a linear that is alone."""
    x, h0 = (torch.empty(1, 1, 512, dtype=BF16) for _ in range(2))
    layers = [
        {
            "weight": torch.empty(n, 512, dtype=BF16),
            "bias": None,
            "lora_a": torch.empty(16, 512, dtype=BF16),
            "lora_b": torch.empty(n, 16, dtype=BF16),
            "scaling": 2.0,
            "initial_residual": h0,
            "lambda_": 0.1,
        }
        for n in (512, 128, 128)
    ]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), counted() as operations:
        group = lora_linear_group(x, [LoraArguments(**layer) for layer in layers])
        for i in range(3):
            group.output(i)
    names = ["down_kernel", "up_siblings_kernel"]
    assert [of.name for of in operations] == [*names, *["aten.addmm_"] * 3]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), counted() as operations:
        lora_linear(x, **layers[0])
    assert [of.name for of in operations] == [*names, "aten.addmm_"]


@pytest.mark.parametrize("setting", [LORA, Setting(fp32_adapters=True, dropout=0.05)])
@pytest.mark.parametrize("provider", [providers.OursLora(), providers.OursSibo()])
def test_a_step_of_generation_of_a_model(provider, setting):
    """One row through a layer: two launches for q, k and v, for o, for gate and up, and for down; no operation else."""
    names = []
    for each in (providers.Provider(), provider):
        model = each.wrap(uninitialised_model(SMALL.architecture.with_layers(1)), setting).eval()
        with FakeTensorMode() as mode:
            to_fake(model, mode)
            with torch.no_grad(), counted() as operations:
                model(input_ids=torch.zeros(1, 1, dtype=torch.int64))
        names.append([of.name for of in operations])
    frozen, ours = names
    assert [name for name in ours if name.endswith("kernel")] == ["down_kernel", "up_siblings_kernel"] * 4
    assert len(ours) == len(frozen) + 8
