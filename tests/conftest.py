"""What every test gets: no network, one thread, fixed seeds, and `gpu` tests skipped where there is no GPU."""

import gc
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
import torch.distributed as dist
from expected_versions import pytest_configure, pytest_sessionfinish, pytest_terminal_summary

__all__ = ["pytest_configure", "pytest_sessionfinish", "pytest_terminal_summary"]  # pytest finds hooks by their names

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_finish():
    """What was imported stays: no garbage collection has to look through it, which many tests ask for."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture
def process_group():
    """A group of this process alone, as FSDP and DDP need one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def recipe_bases(tmp_path_factory):
    """Folders of a tiny model of each architecture, by its name in the recipes."""
    from instruction_data import save_model

    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_model(kind, folder / kind) for kind in ("gptj", "llama")}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A SIBO adapter of each kind in a folder. Tests that change a folder copy it (`adapter_folders.py`)."""
    from adapter_folders import KINDS, save_adapter, saved_base

    root = tmp_path_factory.mktemp("saved")
    saved_base(root / "base")
    return {kind: save_adapter(root / kind, root / "base", kind) for kind in KINDS}


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


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, there is none here")
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("gpu") and not (interpreting and item.path.is_relative_to(ROOT / "tests/gpu")):
            item.add_marker(skip)
