"""What is built and installed: the files of wheel and sdist, the metadata, the pinned versions, the tested pair."""

import email
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from peft.tuners.lora import LoraModel

from sibo_triton import __version__, environment
from sibo_triton.patching import wrap

ROOT = Path(__file__).resolve().parents[1]
KERNEL_FILES = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))


def pins(name):
    """The pinned versions in a constraints file, by canonical name."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(distribution): version for distribution, version in pairs}


def active_requirements(distribution, extras=()):
    """What an installed distribution requires on this machine, with these of its extras."""
    for line in importlib.metadata.requires(distribution) or ():
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
            yield requirement


def metadata_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_wheel_holds_the_package_and_no_top_level_kernels(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"sibo_triton", f"sibo_triton-{__version__}.dist-info"}
    assert "sibo_triton/py.typed" in names
    shipped = sorted(Path(name).name for name in names if name.startswith("sibo_triton/kernels/"))
    assert KERNEL_FILES and shipped == KERNEL_FILES
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sibo_triton").rglob("*.py")}
    assert sources <= set(names)


def test_sdist_can_build_the_wheel(source_copy, tmp_path):
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source_copy, check=True, stdout=subprocess.DEVNULL)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "sibo_triton/__init__.py", "sibo_triton/py.typed"}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples/recipes").glob("*.toml")}
    assert recipes and needed | recipes | {f"kernels/{name}" for name in KERNEL_FILES} <= names


def test_metadata(wheel):
    metadata = metadata_of(wheel)
    assert metadata["Name"] == "sibo-triton"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"triton", "finetune", "viz", "dev"} <= set(metadata.get_all("Provides-Extra"))
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    required = {requirement.name: str(requirement.specifier) for requirement in requirements if not requirement.marker}
    assert (required["torch"], required["transformers"], required["peft"]) == (">=2.11", ">=5.17", ">=0.19.1")
    assert "triton" not in required, "importing must work where triton is not installed"
    for requirement in requirements:
        if requirement.name == "triton":
            assert not requirement.marker.evaluate({"extra": "triton", "platform_system": "Darwin"})
            assert not requirement.marker.evaluate({"extra": "", "platform_system": "Linux"})


def test_command_is_installed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read(f"sibo_triton-{__version__}.dist-info/entry_points.txt").decode()
    assert "sibo-triton = sibo_triton.cli:main" in entry_points


def test_oldest_and_newest_tested_pairs_are_the_pinned_ones():
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    assert set(oldest) == {"transformers", "peft"}
    assert environment.TESTED_PAIRS[0] == (oldest["transformers"], oldest["peft"])
    assert environment.TESTED_PAIRS[-1] == (newest["transformers"], newest["peft"])


@pytest.mark.oldest
def test_the_installed_pair_is_the_expected_one():
    if "SIBO_EXPECT_PAIR" not in os.environ:
        pytest.skip("SIBO_EXPECT_PAIR=<transformers>,<peft> says which pair to expect; `make test` sets it")
    import peft
    import transformers

    expected = tuple(os.environ["SIBO_EXPECT_PAIR"].split(","))
    assert (transformers.__version__, peft.__version__) == expected
    assert environment.pair_verdict(*expected) == "yes"
    installed = tuple(importlib.metadata.version(name) for name in ("transformers", "peft"))
    assert installed == expected, "the modules and their metadata come from different folders"


@pytest.mark.oldest
@pytest.mark.parametrize("distribution", ["transformers", "peft", "accelerate", "datasets", "trl", "tokenizers"])
def test_what_the_pair_requires_is_installed(distribution):
    # pip lays the oldest pair over the environment without looking at its requirements.
    for requirement in active_requirements(distribution):
        installed = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), f"{requirement}, but {installed}"


def test_every_distribution_that_the_tests_use_is_pinned(wheel):
    pinned = pins("constraints.txt")
    to_visit = [
        requirement
        for requirement in map(Requirement, metadata_of(wheel).get_all("Requires-Dist"))
        if requirement.marker is None or requirement.marker.evaluate({"extra": "dev"})
    ]
    seen = set()
    while to_visit:
        requirement = to_visit.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen or re.match("nvidia-|cuda-", name):
            continue  # the CUDA libraries that a build of torch pins itself
        seen.add((name, frozenset(requirement.extras)))
        assert name in pinned, f"{name} is required but not in constraints.txt"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{requirement} excludes the pin"
        to_visit.extend(active_requirements(name, requirement.extras))
    unused = set(pinned) - {name for name, _ in seen} - {"triton"}  # required on Linux only
    assert not unused, f"pinned but not required by anything: {sorted(unused)}"


def test_environment_report_names_every_version():
    facts = environment.environment()
    for name in ("torch", "transformers", "peft"):
        assert facts[name] == importlib.metadata.version(name)
    text = environment.format_environment(facts)
    assert len(text.splitlines()) == len(facts)
    assert all(label in text for label in ("python", "platform", "triton", "tested pair", "device 0"))


def test_pair_verdict():
    assert all(environment.pair_verdict(*pair) == "yes" for pair in environment.TESTED_PAIRS)
    verdict = environment.pair_verdict("5.23.0", "0.19.1")
    assert (
        verdict.startswith("no: transformers 5.23.0 with peft 0.19.1")
        and "transformers 5.23.0 + peft 0.21.2" in verdict
    )


def test_a_peft_without_a_function_that_is_changed_is_named():
    with pytest.raises(ImportError, match=r"LoraModel.no_such, which transformers .* with peft .* tested with: trans"):
        wrap(LoraModel, "no_such", print)


def test_environment_report_runs_where_the_package_cannot_be_imported():
    code = (ROOT / "sibo_triton/environment.py").read_text()
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'peft', 'transformers', 'sibo_triton')))\n"
    result = subprocess.run([sys.executable, "-"], input=blocked + code, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert "unknown: torch cannot be imported" in result.stdout


def test_everything_but_the_kernels_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # any import of it fails
import torch, transformers, peft, sibo_triton
from sibo_triton import SiboLoraConfig, reference
x, h0 = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
y = reference.lora_linear(x, torch.eye(8), None, torch.ones(2, 8), torch.ones(8, 2), 1.0, h0, 0.5, 0.1, 3)
one = torch.ones(1, 4)
assert reference.lora_linear(one, one, None, one, one[:, :1], 2.0, 3 * one, 0.5).item() == 20
config = transformers.LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
)
model = peft.get_peft_model(transformers.LlamaForCausalLM(config), SiboLoraConfig(target_modules="all-linear"))
model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
print(tuple(y.shape), sum(p.grad is not None for p in model.parameters()))
"""
    environment_ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment_, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split(") ")[0] == "(2, 3, 8" and int(run.stdout.split()[-1]) == 28
