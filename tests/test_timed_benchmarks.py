"""The timed benchmarks, end to end on a CPU: what is checked, in which order it runs, and what is written. No times."""

import json
import math
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="triton is not installed")

import timed_rows as tiny
from timed_rows import ADAPTERS, BERT, BOTH, RIGHT, run
from triton.backends.compiler import GPUTarget

from benchmarks import checks, decode, launch_traffic, layer, peers, precompile, step, supervised, timing
from benchmarks.bottleneck_providers import EagerAdapter, EagerMixedAdapter, OursSiboAdapter
from benchmarks.checks import canonical
from benchmarks.counting import counted, to_fake
from benchmarks.providers import PROVIDERS, OursLora, OursSibo, Peft, Provider
from benchmarks.settings import BottleneckSetting
from benchmarks.timing import Effort, Times, compared, interleaved
from sibo_triton.kernels import targets

FROZEN = Provider.name
FEW = (Provider(), Peft(), OursSibo())
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def facts_of(path, row=0):
    return json.loads(path.read_text(encoding="utf-8"))["rows"][row]["providers"]


LAYERS = [
    tiny.layer_row(BOTH[0]),
    tiny.layer_row(BOTH[1]),
    tiny.layer_row(BOTH[0], ("gate_proj", "up_proj")),
    tiny.layer_row(BOTH[1], ("down_proj",)),
    tiny.layer_row(BOTH[1], of=BERT),
    tiny.layer_row(BOTH[0], ("attention.output.dense",), of=BERT),
    tiny.layer_row(ADAPTERS[0]),
    tiny.layer_row(ADAPTERS[3]),
    tiny.layer_row(ADAPTERS[1], of=BERT),
    tiny.layer_row(ADAPTERS[2], GATE_UP),
]


def expected_in(row):
    if row.setting in ADAPTERS:
        return {FROZEN, "eager adapter", "eager adapter + eager mix", "ours, adapter, lambda = 0", "ours, SIBO adapter"}
    mixing = row.names != ("down_proj",) and row.names != ("attention.output.dense",)
    return {of.name for of in PROVIDERS if (mixing or not of.mixes) and not of.unavailable(row.setting)}


@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.title)
def test_a_layer_is_checked_timed_and_written(row, tmp_path):
    run(tmp_path / "layer.json", [row], peers.TIMED)
    facts = facts_of(tmp_path / "layer.json")
    timed = {name for name, of in facts.items() if "ms" in of}
    assert timed == expected_in(row)
    if row.setting in BOTH:
        assert facts["Unsloth"]["unavailable"] and facts["LoRAFusion"]["unavailable"]
    for name in timed:
        of = facts[name]
        assert set(of["ms"]) == {"forward", "backward", "both"}
        assert 0 < of["worst_error"]["of_tolerance"] < 1 and of["share_of_bf16_gemm"] > 0 and of["saved_MiB"] >= 0
        assert ("percent_over_frozen" in of) == (name != FROZEN)
    plain = next(name for name in timed if name.startswith("ours") and name.endswith("lambda = 0"))
    assert set(facts[plain]["ratio_to"]) == timed - {FROZEN, plain}
    assert json.loads((tmp_path / "layer.json").read_text())["ceilings"].keys() == timing.ceilings("cpu", 2).keys()


@pytest.mark.parametrize("row", [tiny.step_row(BOTH[0]), tiny.step_row(BOTH[1], True)], ids=lambda row: row.title)
def test_a_training_step_is_checked_timed_and_written(row, tmp_path):
    run(tmp_path / "step.json", [row], (*FEW, tiny.WrongScaling()))
    facts = facts_of(tmp_path / "step.json")
    assert {name for name, of in facts.items() if "ms" in of} == {of.name for of in FEW}
    assert "wrong" in facts["wrong scaling"]
    assert all(facts[of.name]["tokens_per_second"] > 0 for of in FEW)


def test_checkpointing_is_on_where_the_row_says_so():
    for provider in (Provider(), Peft(), OursSibo()):
        for checkpointing in (False, True):
            model = tiny.step_row(checkpointing=checkpointing).open("cpu").build(provider).model
            assert any(getattr(of, "gradient_checkpointing", False) for of in model.modules()) == checkpointing


@pytest.mark.parametrize("batch", [1, 3])
def test_generation_is_checked_timed_and_written(batch, tmp_path, monkeypatch):
    wrong = tiny.NoMix()
    monkeypatch.setattr("benchmarks.decode.TIMED", (*FEW, wrong))
    run(tmp_path / "decode.json", [tiny.decode_row(batch)], (*FEW, wrong))
    facts = facts_of(tmp_path / "decode.json")
    assert {name for name, of in facts.items() if "ms" in of} == {of.name for of in FEW}
    assert set(facts["ours, SIBO"]["ms"]) == {"prompt", "token"}
    assert "logits of the next token" in facts[wrong.name]["wrong"] or "prompt" in facts[wrong.name]["wrong"]


@pytest.mark.parametrize(
    ("provider", "setting", "what"),
    [
        (tiny.WrongScaling(), BOTH[0], "is off by"),
        (tiny.WrongGradient(), BOTH[0], "is off by"),
        (tiny.NoMix(), BOTH[0], "is off by"),
        (tiny.NoDropout(), BOTH[1], "changes by 0"),
        (tiny.AdapterWithoutDropout(), ADAPTERS[1], "changes by 0"),
        (tiny.AdapterWithoutMix(), ADAPTERS[0], "is off by"),
        (tiny.AdapterWithAnotherActivation(), ADAPTERS[2], "is off by"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_wrong_provider_is_said_to_be_and_gets_no_time(provider, setting, what, tmp_path, capsys):
    few = FEW if setting in BOTH else (Provider(), EagerAdapter(), EagerMixedAdapter(), OursSiboAdapter())
    run(tmp_path / "layer.json", [tiny.layer_row(setting)], (*few, provider))
    facts = facts_of(tmp_path / "layer.json")
    assert what in facts[provider.name]["wrong"] and "ms" not in facts[provider.name]
    assert f"{provider.name}: WRONG, " in capsys.readouterr().out
    assert all("ms" in facts[of.name] for of in few)


def test_an_error_is_one_line_and_the_others_go_on(tmp_path, capsys):
    rows = [tiny.layer_row(names=QKV), tiny.layer_row(names=QKV, tokens=48)]
    run(tmp_path / "layer.json", rows, (*FEW, tiny.Crashes(), tiny.CrashesLater()), Effort(4, 0.0, 0.0))
    for i in range(2):
        facts = facts_of(tmp_path / "layer.json", i)
        assert facts["crashes"] == {"error": "OutOfMemoryError: out of memory, tried to allocate"}
        assert facts["crashes later"] == {"error": "RuntimeError: the sixth forward"}
        assert all("ms" in facts[of.name] for of in FEW)
    assert "crashes later: FAILED, RuntimeError: the sixth forward" in capsys.readouterr().out


def test_what_is_done_is_in_the_file_when_a_run_is_cut_short(tmp_path):
    class CutShort(type(tiny.layer_row())):
        def open(self, device):
            raise KeyboardInterrupt

    path = tmp_path / "layer.json"
    with pytest.raises(KeyboardInterrupt):
        run(path, [tiny.layer_row(), CutShort(tiny.LLAMA, 48, BOTH[0])], RIGHT[:2])
    assert [row["title"] for row in json.loads(path.read_text())["rows"]] == [tiny.layer_row().title]
    assert list(tmp_path.iterdir()) == [path], "a half-written file is left"


def test_a_device_that_runs_nothing_any_more_ends_the_process(tmp_path, monkeypatch):
    class OnCpu(type(tiny.layer_row())):
        def open(self, device):
            return super().open("cpu")

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    session = run(tmp_path / "layer.json", [])
    session.device = "cuda"
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(SystemExit) as ended:
        session.run([OnCpu(tiny.LLAMA, 48, BOTH[0], vocabulary=128)], [tiny.Crashes()])
    assert ended.value.code == supervised.BROKEN_DEVICE
    under_way = json.loads((tmp_path / "layer.json").read_text())["under_way"]
    assert under_way["provider"] == "crashes" and under_way["error"].startswith("OutOfMemoryError")


def test_on_a_gpu_time_is_that_between_events_and_memory_the_allocators(monkeypatch):
    now, memory = [0.0], {"now": 100, "peak": 0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return end.at - self.at

    class Allocates(Recorded):
        def run(self, i, mark):
            for milliseconds in (3.0, 4.0):
                now[0] += milliseconds
                mark()
            memory["peak"] = max(memory["peak"], memory["now"] + 50)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: memory.update(peak=memory["now"]))
    times = interleaved([Allocates("a", [])], "cuda", Effort(rounds=2, seconds=0.0, turn=21.0))
    assert times.rounds == {"a": {"forward": [3.0, 3.0], "backward": [4.0, 4.0]}} and times.repeats == 3
    assert timing.peak_bytes(Allocates("a", []), "cuda") == 50


class Recorded:
    """A step that notes when it runs."""

    phases = ("forward", "backward")

    def __init__(self, name, log):
        self.name, self.log = name, log

    def run(self, i, mark):
        self.log.append((self.name, i))
        mark()
        mark()

    def reset(self):
        pass

    def reported(self, milliseconds):
        return milliseconds


def test_steps_run_in_turn_each_time_on_other_inputs(monkeypatch):
    log = []
    monkeypatch.setattr(timing, "MIN_ROUNDS", 3)
    times = interleaved([Recorded(name, log) for name in "abc"], "cpu", Effort(rounds=3, turn=0.0))
    assert "".join(name for name, _ in log) == "abc" * 5  # two rounds to warm up
    assert [i for name, i in log if name == "b"] == [0, 1, 2, 3, 4]
    assert {name: len(of["forward"]) for name, of in times.rounds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_turn_takes_as_many_repetitions_as_the_slowest_step_needs():
    class Slow(Recorded):
        def reported(self, milliseconds):
            return [2.0, 2.0]

    log = []
    times = interleaved([Slow("a", log), Recorded("b", log)], "cpu", Effort(rounds=1, seconds=0.0, turn=11.0))
    assert times.repeats == 3 and [i for name, i in log if name == "a"][2:] == [2, 3, 4]


def test_ratios_are_medians_of_the_ratios_of_one_round():
    rounds = {
        "frozen model": [1.0, 2.0, 4.0],
        "peer": [2.0, 8.0, 4.0],
        "ours, SIBO": [1.0, 8.0, 8.0],
    }
    times = Times({name: {"forward": of, "backward": of} for name, of in rounds.items()})
    table = compared(times, "frozen model", ["ours, SIBO"])
    assert table["ours, SIBO"]["ratio_to"]["peer"]["both"]["p50"] == 1.0  # of 0.5, 1 and 2; of medians it would be 2
    assert table["peer"]["percent_over_frozen"]["both"]["p50"] == 100.0  # of 100, 300 and 0
    assert table["ours, SIBO"]["ms"]["both"] == {"p20": 7.6, "p50": 16.0, "p80": 16.0}
    assert "percent_over_frozen" not in table["frozen model"] and "ratio_to" not in table["peer"]


def test_one_wrong_row_among_many_is_found():
    expected = {"y": torch.randn(4096, 64)}
    found = {"y": expected["y"].clone()}
    assert checks.compare(found, expected).problem is None
    found["y"][7] *= 0.5
    assert "worst row" in checks.compare(found, expected).problem
    assert checks.compare({"y": found["y"] * math.nan}, expected).problem
    assert checks.compare({}, expected).problem


def test_three_times_what_pefts_own_lora_is_off_by_is_allowed():
    expected = {"y": torch.randn(64, 64)}
    noise = torch.randn(64, 64)
    off = {error: {"y": expected["y"] + error * noise} for error in (0.02, 0.05, 0.08, 0.2)}
    yardsticks = checks.Yardsticks()
    assert yardsticks.verdict(OursSibo(), off[0.05], expected).problem  # PEFT's is not known
    assert yardsticks.verdict(Peft(), off[0.2], expected).problem
    assert yardsticks.verdict(Peft(), off[0.02], expected).problem is None
    for provider in (OursLora(), OursSibo()):
        assert yardsticks.verdict(provider, off[0.05], expected).problem is None
        assert yardsticks.verdict(provider, off[0.08], expected).problem


def test_adapters_that_are_missing_are_an_error():
    comparison = tiny.layer_row().open("cpu")
    model = comparison.weights.model(Peft())
    del model.base_model.model.layers[0].mlp.up_proj.lora_A["default"]
    with pytest.raises(ValueError, match=r"missing on \['layers.0.mlp.up_proj'\]"):
        checks.put_adapters(model, comparison.weights.adapters)


def test_frozen_weights_are_there_once():
    comparison = tiny.layer_row().open("cpu")
    frozen = {parameter.data_ptr() for parameter in comparison.frozen.parameters()}
    for provider in RIGHT:
        model = comparison.weights.model(provider)
        own = {p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name}
        assert own == frozen, provider.name


def test_timed_providers_begin_with_those_that_are_counted():
    assert peers.TIMED[: len(PROVIDERS)] == PROVIDERS
    names = [of.name for of in peers.TIMED]
    assert len(set(names)) == len(names) and sum(of.compiles for of in peers.TIMED) == 4


def test_a_compiled_provider_is_checked_by_the_same_names(tmp_path, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled(model, backend="eager", **options))
    compiled_peers = (peers.Compiled(Peft()), peers.Compiled(tiny.WrongScaling()))
    rows = [layer.LayerRow(tiny.LLAMA, 48, BOTH[0], QKV, compiles=True), tiny.step_row(compiles=True)]
    for i, row in enumerate(rows):
        run(tmp_path / f"{i}.json", [row], (Provider(), *compiled_peers))
        facts = facts_of(tmp_path / f"{i}.json")
        assert "ms" in facts["PEFT LoRA, compiled"] and "wrong" in facts["wrong scaling, compiled"]
    row = layer.LayerRow(tiny.LLAMA, 48, ADAPTERS[0], GATE_UP, compiles=True)
    compiled_peers = [peers.Compiled(of) for of in (EagerMixedAdapter(), tiny.AdapterWithAnotherActivation())]
    run(tmp_path / "adapters.json", [row], (Provider(), EagerMixedAdapter(), *compiled_peers))
    right, wrong = (facts_of(tmp_path / "adapters.json")[of.name] for of in compiled_peers)
    assert "ms" in right and "wrong" in wrong
    assert canonical("_orig_mod.base_model.model.layers.0.q_proj") == "layers.0.q_proj"


@pytest.fixture
def libraries(monkeypatch):
    """Modules with the functions that the peers call, which do what the libraries do."""
    forward = peers.LoraLinear.forward
    unsloth, fusion = types.ModuleType("unsloth.kernels"), types.ModuleType("lorafusion.ops.lora_v1")
    unsloth.apply_lora_qkv = lambda self, X: tuple(forward(getattr(self, f"{n}_proj"), X) for n in "qkv")
    unsloth.apply_lora_o = lambda self, X: forward(self.o_proj, X)
    unsloth.apply_lora_mlp_swiglu = lambda self, X: forward(
        self.down_proj, torch.nn.functional.silu(forward(self.gate_proj, X)) * forward(self.up_proj, X)
    )
    fusion.fused_linear_lora = lambda x, linear_w, lora_a, lora_b, alpha, dropout_p, linear_bias: (
        torch.nn.functional.linear(x, linear_w, linear_bias)
        + torch.nn.functional.dropout(x, dropout_p) @ lora_a.T @ lora_b.T * alpha
    )
    for name in ("unsloth", "lorafusion", "lorafusion.ops"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "unsloth.kernels", unsloth)
    monkeypatch.setitem(sys.modules, "lorafusion.ops.lora_v1", fusion)
    return unsloth, fusion


def test_other_libraries_are_called_where_they_are_installed(libraries, tmp_path):
    unsloth, fusion = libraries
    both = (Provider(), peers.LoraFusion(), peers.Unsloth())
    run(tmp_path / "right.json", [tiny.layer_row()], both)
    facts = facts_of(tmp_path / "right.json")
    assert "ms" in facts["Unsloth"] and "ms" in facts["LoRAFusion"]
    right_o, right = unsloth.apply_lora_o, fusion.fused_linear_lora
    unsloth.apply_lora_o = lambda self, X: right_o(self, X) * 1.5
    fusion.fused_linear_lora = lambda **arguments: right(**arguments) * 1.1
    run(tmp_path / "wrong.json", [tiny.layer_row()], both)
    facts = facts_of(tmp_path / "wrong.json")
    assert "wrong" in facts["Unsloth"] and "wrong" in facts["LoRAFusion"]


def test_a_library_that_does_not_import_says_why(monkeypatch):
    assert peers.Unsloth().unavailable(BOTH[0]) == "unsloth.kernels cannot be imported: it is not installed"
    assert "no dropout" in peers.Unsloth().unavailable(BOTH[1])
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    assert peers.LoraFusion().unavailable(BOTH[0]).startswith("lorafusion.ops.lora_v1 cannot be imported: Module")


@pytest.mark.parametrize(
    ("provider", "setting", "names"),
    [(OursSibo(), BOTH[1], QKV), (OursSiboAdapter(), ADAPTERS[1], GATE_UP), (OursSiboAdapter(), ADAPTERS[2], GATE_UP)],
    ids=lambda of: of.name if isinstance(of, Provider) else str(of),
)
def test_kernels_are_compiled_for_what_a_row_launches(provider, setting, names, monkeypatch):
    """The launches of a row's linears are those that are compiled first, in the same order, with the same constants."""
    launched = []
    traffic_of_launch = launch_traffic.traffic_of_launch

    def record(name, grid, arguments):
        launched.append((name, {key: value for key, value in arguments.items() if key.isupper() and key != "M"}))
        return traffic_of_launch(name, grid, arguments)

    job = precompile.Job(tiny.LLAMA, names, 64, setting, provider.name)
    compiled = precompile.compiled_of(job, GPUTarget("cuda", 90, 32), targets.KNOWN["sm_90"])
    step = tiny.layer_row(setting, names, tokens=64).open("cpu").build(provider)
    monkeypatch.setattr(launch_traffic, "traffic_of_launch", record)
    with FakeTensorMode() as mode:
        to_fake(step.model, mode)
        h0, x = (torch.empty(1, 64, 64, dtype=torch.bfloat16) for _ in range(2))
        with counted():
            outputs = step.model(h0, x.requires_grad_())
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    assert [(of.name, {key: value for key, value in of.constants.items() if key != "M"}) for of in compiled] == launched
    assert launched and all(constants for _, constants in launched)
    if setting in BOTH:
        kernels = [name for name, _ in launched]
        assert kernels.count("up_kernel") == 3 and kernels.count("down_kernel") == 1  # the siblings share a pass over x


def test_what_cannot_be_compiled_is_said(monkeypatch):
    job = precompile.Job(tiny.LLAMA, QKV, 64, BOTH[1], "nobody")
    what, count, error = precompile.compile_job((job, GPUTarget("cuda", 90, 32), targets.KNOWN["sm_90"]))
    assert what.startswith("nobody, tiny q_proj") and count == 0 and error.startswith("StopIteration")


def test_every_row_of_the_benchmarks_is_compiled_first():
    for quick in (True, False):
        jobs = {(job.architecture.name, job.names, job.tokens, job.setting) for job in precompile.jobs_of(quick)}
        for row in layer.plan(quick):
            groups = [row.names] if row.names else row.architecture.linears.groups
            if isinstance(row.setting, BottleneckSetting):
                groups = [("gate_proj", "up_proj")]  # of these rows' models
            assert all((row.architecture.name, names, row.tokens, row.setting) in jobs for names in groups), row.title
        assert {row.architecture.name for row in step.plan(quick)} <= {name for name, *_ in jobs}
        assert {row.batch for row in decode.plan(quick)} <= {tokens for _, _, tokens, _ in jobs}


def test_the_first_rows_are_the_ones_that_matter_most():
    for quick in (True, False):
        titles = [row.title for row in layer.plan(quick)]
        assert titles[0].startswith("Llama-3-8B layer, M=8192, r=16, bf16") and len(set(titles)) == len(titles)
        assert titles[1].startswith("Llama-3-8B layer, M=8192, r=16, fp32 adapters, dropout 0.05")
    everything = " ".join(row.title for row in layer.plan(False))
    for of in ("Llama-3-8B", "Qwen3-4B", "Gemma-3-1B", "BERT-large"):
        assert all(f"{of} layer, M={tokens}," in everything for tokens in layer.TOKENS)
    assert all(f", r={rank}," in everything for rank in (8, 16, 64))
