"""What is made of timed results, and what keeps a run going: plots, README, budgets, crashes, `make gpu`."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu, plots, readme_table, results_file, supervised
from benchmarks.results_file import Budget, ResultsFile

ROOT = Path(__file__).resolve().parents[1]


def spread(value):
    return {"p20": value - 1, "p50": value, "p80": value + 1}


def timed(percent, phases=("forward", "backward", "both"), **more):
    facts = {"ms": {phase: spread(10 + percent) for phase in phases}, **more}
    return facts | {"percent_over_frozen": {phase: spread(percent) for phase in phases}}


def layer_row(tokens, model="Llama-3-8B", adapters="float32", dropout=0.05, part="layer"):
    providers = {
        "frozen model": {"ms": {phase: spread(10) for phase in ("forward", "backward", "both")}},
        "PEFT LoRA": timed(40.0),
        "addmm_ scheme, siblings grouped": {"unavailable": "no dropout"},
        "ours, lambda = 0": timed(11.5),
        "PEFT LoRA + eager mix": {"error": "OutOfMemoryError: out of memory"},
        "ours, SIBO": {"wrong": "the output is off"} if tokens == 8192 and dropout else timed(12.5),
    }
    setting = {"adapters": adapters, "dropout": dropout}
    return {"title": f"{model} {part}", "model": model, "part": part, "tokens": tokens, "rank": 16, **setting,
            "providers": providers}  # fmt: skip


HEAD = {"gpu": "NVIDIA H200", "device": "cuda", "torch": "2.11.0", "commit": "abc"}


@pytest.fixture
def results(tmp_path):
    """A folder with results of every kind."""
    folder = tmp_path / "results"
    folder.mkdir()
    rows = [layer_row(tokens, **of) for tokens in (512, 8192) for of in ({}, {"adapters": "bfloat16", "dropout": 0.0})]
    rows += [layer_row(8192, part="q_proj"), layer_row(8192, model="BERT-large")]
    whole = {
        "frozen model": {"ms": {"step": spread(5), "token": spread(5)}, "tokens_per_second": 12345.6},
        "PEFT LoRA": timed(50.0, ("step", "token")),
        "ours, SIBO": timed(-2.0, ("step", "token")),
        "Unsloth": {"unavailable": "not installed"},
    }
    step = [{"title": "Llama-3-8B, 8 layers, 4 x 2048 tokens, fp32 adapters, dropout 0.05", "providers": whole}] * 3
    for name, of in (("layer", rows), ("step", step), ("decode", step)):
        (folder / f"{name}-nvidia-h200.json").write_text(json.dumps({**HEAD, "rows": of}))
    (folder / "traffic.json").write_bytes((ROOT / "benchmarks/results/traffic.json").read_bytes())
    return folder


def test_the_table_is_the_measured_rows_of_whole_layers(results):
    text = readme_table.gpu_tables(results)
    assert "measured on NVIDIA H200" in text and "benchmarks/results/layer-nvidia-h200.json" in text
    assert rows_of(text) == [
        "| Llama-3-8B | 8,192 | r = 16, float32, dropout 0.05 | +40.0 % | no dropout | +11.5 % | error | wrong |",
        "| Llama-3-8B | 8,192 | r = 16, bfloat16, dropout 0 | +40.0 % | no dropout | +11.5 % | error | +12.5 % |",
    ]
    assert rows_of(readme_table.other_layers(results)) == [
        "| Llama-3-8B | 512 | r = 16, float32, dropout 0.05 | +40.0 % | no dropout | +11.5 % | error | +12.5 % |",
        "| Llama-3-8B | 512 | r = 16, bfloat16, dropout 0 | +40.0 % | no dropout | +11.5 % | error | +12.5 % |",
        "| BERT-large | 8,192 | r = 16, float32, dropout 0.05 | +40.0 % | no dropout | +11.5 % | error | wrong |",
    ]


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith(("| Llama", "| BERT"))]


def test_bottleneck_adapters_have_a_table_of_their_own(tmp_path):
    row = layer_row(8192)
    row["title"] = "Llama-3-8B layer, M=8192, bottleneck 256, in parallel, fp32 adapters, dropout 0.05"
    del row["rank"]
    row["providers"] = {"eager adapter": timed(5.0, ("both",)), "ours, SIBO adapter": {"error": "OutOfMemoryError"}}
    (tmp_path / "layer-a-gpu.json").write_text(json.dumps({**HEAD, "rows": [row, layer_row(512)]}))
    text = readme_table.other_layers(tmp_path)
    assert text.count("measured on NVIDIA H200") == 2
    assert "| Llama-3-8B | 8,192 | in parallel, float32, dropout 0.05 | +5.0 % | not run | not run | error |" in text


def test_without_results_of_a_gpu_the_readme_says_so(tmp_path, results, monkeypatch):
    missing = ("Speed on a GPU", "Whole training steps on a GPU", "Generation on a GPU")
    said = "\n\n".join(f"{what}: not measured yet." for what in missing)
    assert readme_table.gpu_tables(tmp_path) == said
    readme = "before\n<!-- gpu-results -->\nold\n<!-- /gpu-results -->\nafter"
    monkeypatch.setattr(readme_table, "TABLES", {})
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    assert readme_table.with_tables(readme) == f"before\n<!-- gpu-results -->\n{said}\n<!-- /gpu-results -->\nafter"
    monkeypatch.setattr(readme_table, "RESULTS", results)
    assert "| Llama-3-8B |" in readme_table.with_tables(readme)


def test_kernels_and_tiles_have_tables(tmp_path):
    rows = [
        {"title": "A layer, M=8, r=16, bf16 adapters, dropout 0, frozen model", "us": 100.0, "launches_of_ours": []},
        {
            "title": "A layer, M=8, r=16, bf16 adapters, dropout 0, ours, SIBO",
            "us": 110.0,
            "launches_of_ours": [{"kernel": "up_kernel", "us": 1.5}, {"kernel": "up_kernel", "us": 2.0}],
        },
    ]
    for name in ("kernel-times-a-gpu", "kernel-times-a-gpu-before"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"gpu": "A GPU", "rows": rows}))
    table = readme_table.kernels_table(tmp_path).splitlines()
    assert table[2:4] == [
        "| A GPU | 8 tokens, bf16, dropout 0 | frozen model |  |  |  |  |  |  | 100 |  |",
        "| A GPU | 8 tokens, bf16, dropout 0 | ours, SIBO |  | 4 |  |  |  |  | 110 | +10.0 % |",
    ]
    assert [line.split("|")[1].strip() for line in table[4:]] == ["A GPU, before"] * 2

    cases = {"up q_proj": [[1.0, {"torch": 1}], [2.0, {"BM": 32}], [3.0, {}]], "up k_proj": [[1.0, {}]]}
    (tmp_path / "tune-a-gpu.json").write_text(json.dumps({"gpu": "A GPU", "cases": cases}))
    assert readme_table.tuning_table(tmp_path).splitlines()[2:] == [
        "| up q_proj | 3.0 | 2.0 | BM 32 |",
        "| up k_proj | 1.0 | 1.0 | the plan's |",
    ]


def test_plots_are_drawn_from_the_files_alone(results, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    written = {path.name: path.read_bytes() for path in plots.draw(results, tmp_path / "plots")}
    assert set(written) == {
        "decode-nvidia-h200.png", "layer-llama-3-8b-nvidia-h200.png", "step-nvidia-h200.png", "traffic.png"
    }  # fmt: skip
    again = {path.name: path.read_bytes() for path in plots.draw(results, tmp_path / "again")}
    assert written == again
    assert all(content.startswith(b"\x89PNG") and len(content) > 10_000 for content in written.values())
    lines = {
        line.get_label(): list(line.get_ydata())
        for line in plots.layer_plot(json.loads((results / "layer-nvidia-h200.json").read_text()), "Llama-3-8B")
        .axes[0]
        .lines
    }
    assert lines["ours, lambda = 0"] == [11.5, 11.5] and lines["ours, SIBO"] == [12.5]
    assert "PEFT + eager mix" not in lines  # it has no time


def test_the_committed_plot_is_of_the_committed_results():
    content = (ROOT / "benchmarks/plots/traffic.png").read_bytes()
    digest = plots.digest(ROOT / "benchmarks/results/traffic.json")
    assert digest.encode() in content, "run: python -m benchmarks.plots"


def test_the_tables_of_the_docs_are_of_the_committed_results():
    texts = [document.read_text(encoding="utf-8") for document in readme_table.DOCUMENTS]
    for document, text in zip(readme_table.DOCUMENTS, texts, strict=True):
        made = readme_table.with_tables(text, readme_table.root_of(document))
        assert made == text, "run: python -m benchmarks.readme_table"
    for cell in ("ours, SIBO adapter", "BERT-large", "q_proj+k_proj+v_proj", "three that share x"):
        assert any(f"| {cell} |" in text for text in texts), cell


def test_without_matplotlib_a_line_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    monkeypatch.setattr(sys, "argv", ["plots", "--plots", str(tmp_path)])
    assert plots.main() == 0
    assert "matplotlib is not installed" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_no_row_begins_that_would_not_fit(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(results_file.time, "monotonic", lambda: now[0])
    budget = Budget(100.0)
    assert budget.begin_row()
    now[0] += 40
    budget.end_row()
    assert budget.begin_row()  # 60 are left
    now[0] += 41
    budget.end_row()
    assert not budget.begin_row() and budget.left == 19
    assert Budget(None).begin_row() and not Budget(0.0).begin_row()


def test_what_was_not_run_is_in_the_file(tmp_path):
    import timed_rows as tiny

    tiny.run(tmp_path / "layer.json", [tiny.layer_row(), tiny.layer_row(tokens=48)], tiny.RIGHT[:1], budget=0.0)
    document = json.loads((tmp_path / "layer.json").read_text())
    assert document["rows"] == [] and len(document["not_run_for_lack_of_time"]) == 2


def test_a_resumed_run_keeps_rows_and_leaves_out_what_crashed(tmp_path):
    import timed_rows as tiny

    path, rows = tmp_path / "layer.json", [tiny.layer_row(names=("o_proj",)), tiny.layer_row(names=("down_proj",))]
    tiny.run(path, rows[:1], tiny.RIGHT[:3])
    first = json.loads(path.read_text())["rows"][0]
    ResultsFile(path, {}, resume=True).begin(rows[1].title, "PEFT LoRA")  # and the process ends
    tiny.run(path, rows, tiny.RIGHT[:3], resume=True)
    document = json.loads(path.read_text())
    assert document["rows"][0] == first and len(document["rows"]) == 2 and "under_way" not in document
    providers = document["rows"][1]["providers"]
    assert providers["PEFT LoRA"] == {"error": "the process ended while it ran"}
    assert "ms" in providers["frozen model"] and "ms" in providers["ours, lambda = 0"]


#: Ends in the middle of "b" the first time, and well when it is resumed.
CRASHING = """
import json, os, sys
path = sys.argv[1]
resumed = "--resume" in sys.argv
print(sys.argv[2:], flush=True)
if resumed:
    document = json.load(open(path))
    document["crashed"] = [document.pop("under_way")]
    json.dump(document, open(path, "w"))
else:
    json.dump({"rows": [], "under_way": {"row": "a", "provider": "b"}}, open(path, "w"))
    os.kill(os.getpid(), 11)
"""


def test_a_process_that_crashes_is_started_again(tmp_path, capfd):
    output = tmp_path / "out.json"
    command = [sys.executable, "-c", CRASHING, str(output), "--quick"]
    assert supervised.supervise(command, output, 100.0) == 0
    assert json.loads(output.read_text())["crashed"] == [{"row": "a", "provider": "b"}]
    printed = capfd.readouterr().out
    assert "CRASHED b, a: the process ended (-11); going on without it" in printed
    assert "['--quick', '--budget', '100']" in printed and "['--quick', '--resume', '--budget'" in printed


def test_a_process_that_fails_without_a_provider_is_not_started_again(tmp_path):
    code = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(3)"
    command = [sys.executable, "-c", code, str(tmp_path / "started")]
    assert supervised.supervise(command, tmp_path / "none.json", None) == 3
    assert (tmp_path / "started").read_text() == "x"


def test_a_process_that_hangs_is_stopped(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(supervised, "GRACE", 0.3)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = time.monotonic()
    assert supervised.supervise(command, tmp_path / "none.json", 0.1) == 1
    assert time.monotonic() - started < 30 and "stopped" in capfd.readouterr().out


def outcomes(statuses, quick, seconds=()):
    """How the stages end with these exit statuses, and what was run for how long; the clock is the seconds'."""
    ran, clock = [], [0.0]

    def run(arguments, limit):
        ran.append((arguments, limit))
        clock[0] += seconds[len(ran) - 1] if seconds else 0.0
        return statuses[len(ran) - 1] if len(ran) <= len(statuses) else 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.time, "monotonic", lambda: clock[0])
        outcome = gpu.run_stages(gpu.stages(quick), quick, run)
    return outcome, ran


def test_make_gpu_goes_on_after_tests_that_fail_and_not_without_a_device():
    outcome, ran = outcomes([0, 0, 1, 0, None], quick=False)
    assert list(outcome.values()) == ["done", "done", "FAILED", "done", "stopped, out of time", "done", "done", "done"]
    assert all(limit is None and "--budget" not in arguments for arguments, limit in ran)
    last = [f"benchmarks.{of}" for of in ("layer", "step", "decode", "plots", "readme_table")]
    assert [arguments[-1] for arguments, _ in ran][3:] == last
    outcome, ran = outcomes([1], quick=False)
    assert list(outcome.values()) == ["FAILED"] and len(ran) == 1


def test_a_quick_run_takes_less_than_8_minutes():
    stages = gpu.stages(quick=True)
    assert sum(stage.seconds for stage in stages) + gpu.GRACE <= 480
    outcome, ran = outcomes([], quick=True)
    by_name = dict(zip(outcome, ran, strict=True))
    assert "--quick" in by_name["layer"][0] and by_name["layer"][0][-2] == "--budget"
    # nothing took any time: the next stage has it
    assert by_name["layer"][0][-1] == str(round(sum(stage.seconds for stage in stages[:4])))
    # all took more than they had: the later ones have half of theirs
    outcome, ran = outcomes([], quick=True, seconds=[1000.0] * 8)
    assert ran[3][0][-1] == str(round(stages[3].seconds / 2)) and ran[3][1] == stages[3].seconds / 2 + gpu.GRACE


def test_a_stage_that_does_not_end_is_stopped_with_what_it_started(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    assert gpu.run_python(["-c", code], 3.0) is None
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    for _ in range(50):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child runs on")


def test_times_on_a_cpu_do_not_land_among_results(monkeypatch):
    parser = results_file.parser_of("")
    with pytest.raises(SystemExit, match="name a file by --output"):
        results_file.output_of("layer", parser.parse_args(["--device", "cpu"]))
    options = parser.parse_args(["--device", "cpu", "--output", "/tmp/x.json"])
    assert results_file.output_of("layer", options) == Path("/tmp/x.json")
    assert results_file.file_of("layer", "NVIDIA H100 80GB HBM3").name == "layer-nvidia-h100-80gb-hbm3.json"


def test_a_benchmark_runs_as_a_command(monkeypatch, tmp_path, capsys):
    """Its options, and the file that it writes."""
    import timed_rows as tiny

    from benchmarks import layer

    rows = [tiny.layer_row(names=("o_proj",)), tiny.layer_row(names=("down_proj",))]
    monkeypatch.setattr(layer, "plan", lambda quick: rows)
    monkeypatch.setattr(layer, "Effort", lambda **_: tiny.EFFORT)
    path = tmp_path / "layer.json"

    def main(*options):
        monkeypatch.setattr(sys, "argv", ["layer", *options])
        return layer.main()

    common = ("--device", "cpu", "--output", str(path), "--unsupervised", "--budget", "900")
    assert main("--quick", "--only", "o_proj", "--providers", "ours, lambda = 0", *common) == 0
    document = json.loads(path.read_text())
    assert [row["title"] for row in document["rows"]] == [rows[0].title]
    assert set(document["rows"][0]["providers"]) == {"frozen model", "ours, lambda = 0"}
    words = f"--quick --only o_proj --providers 'ours, lambda = 0' --device cpu --output {path}"
    assert document["command"] == f"python -m benchmarks.layer {words}"
    assert {"torch", "commit", "date", "machine", "ceilings"} <= document.keys()
    assert main("--list") == 0 and rows[1].title in capsys.readouterr().out
    with pytest.raises(SystemExit, match="'nobody' is no provider"):
        main("--providers", "nobody", *common)
    with pytest.raises(SystemExit, match="no row's title holds 'nothing'"):
        main("--only", "nothing", *common)


def test_every_kind_of_gpu_that_kernels_are_compiled_for_has_a_name_in_the_table():
    targets = pytest.importorskip("sibo_triton.kernels.targets", reason="triton is not installed")
    assert readme_table.GPUS.keys() == targets.KNOWN.keys()
