"""What every test gets: no network, one thread, fixed seeds, and `gpu` tests skipped where there is no GPU.

SIBO_EXPECT_VERSIONS="triton==3.6.0,numpy==2.3.5" stops a run on other versions, and fails one that skips any test:
`make` sets it where it lays versions over the environment, which nobody else would notice to be missing.
"""

import importlib
import importlib.metadata
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

# Before any import of huggingface_hub, which reads them once. Subprocesses of the tests inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random state, alone or among others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def tiny_layers_run_as_large_ones_do():
    """On a CPU few elements take a shorter way (`sibo_triton.ops.small`): tests, which have few, ask for it by name.

    For the whole session, so that what fixtures of any scope compute is to be compared bit for bit.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sibo_triton.ops.small.ELEMENTS", -1)
        yield


@pytest.fixture(scope="session")
def source_copy(tmp_path_factory):
    """A copy of everything that builds look at: they leave files behind, and two may run at a time."""
    copy = tmp_path_factory.mktemp("source")
    for file in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / file, copy)
    for folder in ("benchmarks", "examples", "kernels", "sibo_triton", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="session")
def wheel(source_copy, tmp_path_factory):
    """The wheel as pip builds it, without the network: the path of the file."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", folder, source_copy], check=True)
    (built,) = folder.glob("*.whl")
    return built


EXPECTED_VERSIONS = [pin.split("==") for pin in os.environ.get("SIBO_EXPECT_VERSIONS", "").split(",") if pin]


def pytest_configure():
    for name, version in EXPECTED_VERSIONS:
        found = importlib.import_module(name).__version__, importlib.metadata.version(name)
        if found != (version, version):
            raise pytest.UsageError(
                f"SIBO_EXPECT_VERSIONS asks for {name} {version}; imported is {found[0]}, installed {found[1]}"
            )


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, there is none here")
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("gpu") and not (interpreting and item.path.is_relative_to(ROOT / "tests/gpu")):
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    if EXPECTED_VERSIONS and exitstatus == pytest.ExitCode.OK and _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    names = ["torch", "transformers", "peft", *(name for name, _ in EXPECTED_VERSIONS)]
    versions = (f"{name} {importlib.metadata.version(name)}" for name in names)
    terminalreporter.write_line(f"ran on {', '.join(versions)}")
    if EXPECTED_VERSIONS and _skipped(config):
        terminalreporter.write_line("failed: tests were skipped, SIBO_EXPECT_VERSIONS allows none", red=True)


def _skipped(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")  # a worker process of xdist has none
    return reporter.stats.get("skipped") if reporter is not None else None
