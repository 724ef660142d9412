"""No kernel reads or writes what is not its own, by NVIDIA's compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent
SCRIPT = """
import sys
sys.path[:0] = sys.argv[2:]
from launches import INTERPRETED, SMALL
for launch in SMALL[-1:] if INTERPRETED else SMALL:
    print(len(launch.launch(launch.inputs(sys.argv[1]))), "results of", launch)
"""


def sanitizer() -> str | None:
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{toolkit}/bin")


def test_memory_accesses_are_clean(device):
    tool = []
    if device == "cuda":
        if sanitizer() is None:
            pytest.skip("needs compute-sanitizer, in PATH or CUDA_HOME/bin")
        tool = [sanitizer(), "--tool", "memcheck", "--error-exitcode", "9"]
    folders = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]
    # Without torch's pool every tensor is an allocation of its own, beyond whose end an access is an error.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*tool, sys.executable, "-c", SCRIPT, device, *folders]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "results of InputGradient" in run.stdout
    if device == "cuda":
        assert "ERROR SUMMARY: 0 errors" in run.stdout + run.stderr
