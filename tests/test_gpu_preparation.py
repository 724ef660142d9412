"""`make gpu` says what is missing before it compiles anything."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "gpu/prepare.py"


@pytest.fixture
def prepare(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "a CUDA device is needed" in stopped.value.code or "triton 3.6 or newer is needed" in stopped.value.code
    assert "compiling" not in capsys.readouterr().out


def test_every_missing_library_is_named(prepare, monkeypatch):
    versions = {"torch": "2.10.1+cu130", "triton": "3.6.0", "transformers": "5.17.0", "pytest": "9.2.0"}
    monkeypatch.setattr(prepare.importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(prepare.importlib, "import_module", lambda name: versions[name] if name != "peft" else fail())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def fail():
        raise ImportError("No module named 'peft'")

    torch_line, peft_line = prepare.missing()
    assert torch_line == "torch 2.11 or newer is needed, and 2.10.1+cu130 is installed: pip install --upgrade torch"
    assert peft_line.startswith("peft 0.19.1 or newer is needed") and peft_line.endswith("pip install peft")


def test_the_interpreter_is_refused(prepare, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert prepare.missing()[-1] == "TRITON_INTERPRET=1 interprets kernels on the CPU: unset it"
