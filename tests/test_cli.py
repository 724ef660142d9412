"""The command line: what it accepts, what it refuses and how, and that it is wired to what the other tests test."""

import json
import runpy
import sys

import pytest
from typer.testing import CliRunner

import sibo_triton
from sibo_triton import environment
from sibo_triton.cli import app
from sibo_triton.finetune.demo import task as demo_task

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny base model, `base`, and data, `data.csv`."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = demo_task.build_tokenizer()
    scale = demo_task.Scale(layers=2, hidden=16, intermediate=24, heads=2)
    demo_task.build_base(scale, tokenizer, seed=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "data.csv").write_text("prompt,completion\n" + "".join(f"{i}+1=,{i + 1}\n" for i in range(8)))
    return folder


@pytest.fixture
def arguments(folder, tmp_path):
    return {
        "--model": str(folder / "base"),
        "--data": str(folder / "data.csv"),
        "--output": str(tmp_path / "out"),
        "--max-steps": "2",
        "--batch-size": "4",
    }


def finetune(arguments, *flags):
    return runner.invoke(app, ["finetune", *(part for pair in arguments.items() for part in pair), *flags])


def test_the_version():
    assert runner.invoke(app, ["--version"]).stdout.strip() == sibo_triton.__version__


def test_finetune_makes_an_adapter_and_a_report(arguments, tmp_path):
    result = finetune(arguments | {"--target-modules": "q_proj,o_proj", "--sibo-lambda": "0.3"})
    assert result.exit_code == 0, result.output
    assert f"adapter and report: {tmp_path / 'out'}" in result.stdout
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["peft_type"], config["sibo_lambda"]) == ("SIBO_LORA", 0.3)
    assert sorted(config["target_modules"]) == ["o_proj", "q_proj"]
    assert "4, of which 2 mix" in (tmp_path / "out/report.md").read_text()


def test_target_modules_may_be_repeated(arguments, tmp_path):
    result = finetune(arguments, "--target-modules", "q_proj", "--target-modules", "k_proj, v_proj", "--method", "lora")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert sorted(config["target_modules"]) == ["k_proj", "q_proj", "v_proj"]


REFUSED = {
    "method": ({"--method": "dora"}, "--method is 'dora': choose one of lora, sibo-lora, adapter, sibo-adapter"),
    "dtype": ({"--dtype": "int8"}, "--dtype is 'int8': choose one of auto"),
    "lambda": ({"--sibo-lambda": "1.5"}, "--sibo-lambda is 1.5: it must lie in [0, 1]"),
    "lambda NaN": ({"--sibo-lambda": "nan"}, "--sibo-lambda is nan: it must lie in [0, 1]"),
    "lambda of LoRA": ({"--method": "lora", "--sibo-lambda": "0"}, "--sibo-lambda has no effect with --method lora"),
    "lambda of an adapter": (
        {"--method": "adapter", "--sibo-learnable": None},
        "--sibo-learnable has no effect with --method adapter: drop it, or use --method sibo-adapter",
    ),
    "rank of an adapter": (
        {"--method": "sibo-adapter", "--rank": "4"},
        "--rank has no effect with --method sibo-adapter: drop it, or use --method sibo-lora",
    ),
    "bottleneck of LoRA": (
        {"--method": "lora", "--bottleneck-size": "4"},
        "--bottleneck-size has no effect with --method lora: drop it, or use --method adapter",
    ),
    "bottleneck": ({"--method": "adapter", "--bottleneck-size": "0"}, "--bottleneck-size is 0: it must be at least 1"),
    "placement": (
        {"--method": "adapter", "--placement": "beside"},
        "--placement is 'beside': choose one of series, parallel",
    ),
    "side": (
        {"--method": "adapter", "--placement": "parallel", "--side": "output"},
        "--side output is for --placement series",
    ),
    "blocks of LoRA": ({"--method": "lora", "--sibo-blocks": "model.layers"}, "--sibo-blocks has no effect with"),
    "learnable from 0": ({"--sibo-lambda": "0", "--sibo-learnable": None}, "cannot start from --sibo-lambda 0.0"),
    "rank": ({"--rank": "0"}, "--rank is 0: it must be at least 1"),
    "alpha": ({"--alpha": "-1"}, "--alpha is -1: it must be at least 1"),
    "dropout": ({"--dropout": "1"}, "--dropout is 1.0: it must lie in [0, 1)"),
    "epochs": ({"--epochs": "0"}, "--epochs is 0.0: it must be a number above 0"),
    "rate": ({"--learning-rate": "inf"}, "--learning-rate is inf"),
    "steps": ({"--max-steps": "0"}, "--max-steps is 0"),
    "batch": ({"--batch-size": "0"}, "--batch-size is 0"),
    "accumulation": ({"--gradient-accumulation": "0"}, "--gradient-accumulation is 0"),
    "warm-up": ({"--warmup-steps": "-1"}, "--warmup-steps is -1"),
    "length": ({"--max-length": "1"}, "--max-length is 1"),
    "positions": ({"--max-length": "64"}, "--max-length 64 is more than the model's 32 positions"),
    "seed": ({"--seed": "-1"}, "--seed is -1"),
    "fraction": ({"--eval-fraction": "1"}, "--eval-fraction is 1.0"),
    "fraction of few": ({"--eval-fraction": "0.01"}, "--eval-fraction 0.01 of 8 examples is 0"),
    "two evaluations": ({"--eval-fraction": "0.5", "--eval-data": "x.csv"}, "--eval-fraction and --eval-data are both"),
    "no data": ({"--data": "missing.jsonl"}, "missing.jsonl: there is no such file"),
    "no evaluation data": ({"--eval-data": "missing.jsonl"}, "missing.jsonl: there is no such file"),
    "no model": ({"--model": "./missing"}, "--model ./missing: there is no such folder"),
    "no hub model": ({"--model": "nobody/nothing"}, "--model nobody/nothing cannot be loaded"),
    "module": ({"--target-modules": "q_proj,query"}, "--target-modules: the model has no module `query`; choose among"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(name, arguments, tmp_path):
    changes, message = REFUSED[name]
    flags = [flag for flag, value in changes.items() if value is None]
    result = finetune(arguments | {key: value for key, value in changes.items() if value is not None}, *flags)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if "Loading weights" not in line and line.strip()]
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_base_model(arguments, tmp_path):
    adapter, empty = tmp_path / "adapter", tmp_path / "empty"
    for path in (adapter, empty):
        path.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "holds an adapter: give the base model" in finetune(arguments | {"--model": str(adapter)}).stderr
    assert "holds no config.json" in finetune(arguments | {"--model": str(empty)}).stderr


def test_an_output_that_would_lose_something(arguments, tmp_path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    for path in (full / "notes.txt", file):
        path.write_text("mine")
    result = finetune(arguments | {"--output": str(full)})
    assert result.exit_code == 2 and "is not empty: name another folder, or pass --overwrite" in result.stderr
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    result = finetune(arguments | {"--output": str(file)})
    assert result.exit_code == 2 and "is a file: name a folder" in result.stderr
    result = finetune(arguments | {"--output": arguments["--model"]}, "--overwrite")
    assert result.exit_code == 2 and "is the base model's own folder" in result.stderr


def test_a_run_that_diverges_fails_and_says_so(arguments, tmp_path):
    result = finetune(arguments | {"--learning-rate": "3e38", "--max-steps": "4"})
    assert result.exit_code == 1
    assert "training diverged" in result.stderr
    assert "**Training diverged" in (tmp_path / "out/report.md").read_text()


def test_an_interrupted_run_exits_as_shells_expect(arguments, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.training_step", interrupt)
    result = finetune(arguments)
    assert result.exit_code == 130
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    assert "Interrupted after step 0 of 2" in (tmp_path / "out/report.md").read_text()


def test_a_missing_library_is_named_with_the_way_to_get_it(arguments, monkeypatch):
    """Where it is missing when our modules are imported: none of them may need it to be."""
    monkeypatch.setattr(sibo_triton, "finetune", sibo_triton.finetune)  # so that it is put back
    for name in [name for name in sys.modules if name.startswith("sibo_triton.finetune")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = finetune(arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip() == "error: fine-tuning needs datasets: pip install 'sibo-triton[finetune]'."


def test_the_module_runs_as_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sibo_triton", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("sibo_triton", run_name="__main__")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "Usage: sibo-triton" in shown
    assert all(command in shown for command in ("finetune", "demo", "env"))


def test_env_prints_the_environment():
    result = runner.invoke(app, ["env"])
    assert result.exit_code == 0
    assert "tested pair" in result.stdout and environment.installed_version("torch") in result.stdout


def test_the_demo_command_passes_its_verdict_on(monkeypatch, tmp_path):
    from sibo_triton.finetune import demo

    calls = []

    def run_demo(output, seed, methods):
        calls.append((output, seed, methods))
        return ["it did not learn"]

    monkeypatch.setattr(demo, "run_demo", run_demo)
    result = runner.invoke(app, ["demo", "--output", str(tmp_path), "--seed", "3"])
    assert (result.exit_code, calls) == (1, [(tmp_path, 3, ("lora", "sibo-lora"))])
    assert "error: it did not learn" in result.stderr
    runner.invoke(app, ["demo", "--output", str(tmp_path), "--adapters"])
    assert calls[1] == (tmp_path, 0, ("adapter", "sibo-adapter"))
    monkeypatch.setattr(demo, "run_demo", lambda output, seed, methods: [])
    assert runner.invoke(app, ["demo", "--output", str(tmp_path)]).exit_code == 0
    too_large = runner.invoke(app, ["demo", "--output", str(tmp_path), "--seed", str(2**32)])
    assert too_large.exit_code == 2 and "4294967295" in too_large.stderr
    (tmp_path / "thesis.tex").write_text("x")
    monkeypatch.undo()
    result = runner.invoke(app, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 2 and "holds no demonstration" in result.stderr
