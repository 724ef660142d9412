"""Our folder `kernels/` and Hugging Face's package `kernels` never meet.

transformers imports `kernels` where it is installed, so a package of that name on the path, in a wheel or beside a
script, breaks `from transformers import LlamaForCausalLM`. A stand-in for Hugging Face's package, of a version that
the installed transformers accepts and with the names that it takes from it, is installed next to ours here.
"""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))

# Started with -S, so that nothing but what is named here is installed: argv holds the folder that plays site-packages,
# then the folders of the dependencies (added as plain paths, so that no .pth file there installs our checkout).
PRELUDE = "import site, sys; site.addsitedir(sys.argv[1]); sys.path += sys.argv[2:]\n"

# Says where each name comes from, as JSON.
WHERE = """
import importlib.util, json
import sibo_triton
found = {m: importlib.util.find_spec("sibo_triton.kernels." + m) for m in MODULES}
try:
    import kernels
except ModuleNotFoundError:
    kernels = None
print(json.dumps({
    "sibo_triton": sibo_triton.__file__,
    "ours": {m: spec and spec.origin for m, spec in found.items()},
    "theirs": getattr(kernels, "__file__", None),
}))
"""


def run_python(code, site, cwd, path=None, dependencies=()):
    """Run code in a fresh interpreter whose site-packages is the folder `site`; its standard output."""
    env = dict(os.environ)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, "-S", "-c", PRELUDE + code, site, *dependencies]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def locate(site, cwd, path=""):
    return json.loads(run_python(f"MODULES = {MODULES!r}\n{WHERE}", site, cwd, path))


def names_that_transformers_imports():
    """What transformers imports from `kernels` when its own modules are loaded."""
    from transformers.integrations import hub_kernels

    imports = [node for node in ast.walk(ast.parse(inspect.getsource(hub_kernels))) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports if node.module == "kernels" and not node.level for alias in node.names}


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """A folder with a distribution `kernels` that the installed transformers takes for Hugging Face's."""
    from transformers.utils import import_utils

    names = names_that_transformers_imports()
    assert {"use_kernel_forward_from_hub", "LayerRepository"} <= names, "transformers uses `kernels` in another way now"
    folder = tmp_path_factory.mktemp("stand-in")
    version = import_utils.KERNELS_MIN_VERSION
    lines = [f"__version__ = {version!r}", "decorator = lambda *args, **kwargs: lambda decorated: decorated"]
    for name in sorted(names):
        lines.append(f"class {name}: pass" if name[0].isupper() else f"{name} = decorator")
    (folder / "kernels").mkdir()
    (folder / "kernels/__init__.py").write_text("\n".join(lines) + "\n")
    dist_info = folder / f"kernels-{version}.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    record = ("kernels/__init__.py", f"{dist_info.name}/METADATA", f"{dist_info.name}/RECORD")
    (dist_info / "RECORD").write_text("".join(f"{file},,\n" for file in record))
    return folder


@pytest.fixture(scope="session")
def light_checkout(source_copy, tmp_path_factory):
    """A checkout whose `__init__` does nothing but extend the path: where names are found is asked without torch."""
    checkout = tmp_path_factory.mktemp("checkout") / "sibo-triton"
    shutil.copytree(source_copy, checkout, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    (checkout / "sibo_triton/__init__.py").write_text(
        "from sibo_triton._paths import append_repository_root\nappend_repository_root(__path__)\n"
    )
    return checkout


@pytest.fixture(scope="session")
def light_sites(light_checkout, tmp_path_factory):
    """Folders that play site-packages, by the way in which ours is installed there."""
    sites = tmp_path_factory.mktemp("sites")
    for installed, hook in (("regular", "build_wheel"), ("editable", "build_editable")):  # what pip calls for each
        wheels = sites / "wheels" / installed
        wheels.mkdir(parents=True)
        build = f"from setuptools import build_meta; build_meta.{hook}({str(wheels)!r})"
        subprocess.run([sys.executable, "-c", build], cwd=light_checkout, check=True, capture_output=True)
        (built,) = wheels.glob("*.whl")
        zipfile.ZipFile(built).extractall(sites / installed)
    (sites / "none").mkdir()
    return sites


@pytest.fixture
def site(request, light_sites, tmp_path, stand_in):
    """`site(installed, with_stand_in)` gives a fresh folder that plays site-packages."""

    def make(installed, with_stand_in):
        folder = tmp_path / "site-packages"
        shutil.copytree(light_sites / installed, folder)
        if with_stand_in:
            shutil.copytree(stand_in, folder, dirs_exist_ok=True)
        return folder

    return make


def test_the_source_folder_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists(), (
        "kernels/__init__.py makes the folder a package named like Hugging Face's `kernels`, which transformers "
        "imports: remove it (the folder is imported as sibo_triton.kernels)"
    )


@pytest.mark.parametrize("with_stand_in", [False, True], ids=["alone", "beside-theirs"])
@pytest.mark.parametrize("start", ["root", "outside"])
@pytest.mark.parametrize("installed", ["regular", "editable", "none"])
def test_each_name_leads_to_its_own_package(installed, start, with_stand_in, site, light_checkout, tmp_path):
    folder = site(installed, with_stand_in)
    cwd = light_checkout if start == "root" else tmp_path
    # Not installed and outside: the checkout is on PYTHONPATH, in front of site-packages.
    path = light_checkout if installed == "none" and start == "outside" else ""
    where = locate(folder, cwd, path)

    ours = folder if installed == "regular" and start == "outside" else light_checkout
    assert Path(where["sibo_triton"]) == ours / "sibo_triton/__init__.py"
    kernels = ours / "sibo_triton/kernels" if ours == folder else ours / "kernels"
    assert where["ours"] == {module: str(kernels / f"{module}.py") for module in MODULES}
    assert where["theirs"] == (str(folder / "kernels/__init__.py") if with_stand_in else None)


def test_an_init_file_would_be_noticed(site, light_checkout, tmp_path):
    checkout = tmp_path / "with-init"
    shutil.copytree(light_checkout, checkout)
    (checkout / "kernels/__init__.py").touch()
    where = locate(site("none", with_stand_in=True), cwd=checkout)
    assert where["theirs"] == str(checkout / "kernels/__init__.py"), "the trap that these tests watch is gone"


def test_theirs_is_not_taken_for_ours(site, tmp_path):
    # A broken install: our package without its kernels, in a folder that holds Hugging Face's.
    folder = site("regular", with_stand_in=True)
    shutil.rmtree(folder / "sibo_triton/kernels")
    where = run_python("import sibo_triton; print(sibo_triton.__path__)", folder, tmp_path, path="")
    assert where.strip() == str([str(folder / "sibo_triton")])


USE_BOTH = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import hub_kernels
from transformers.utils.import_utils import is_kernels_available
import kernels

assert is_kernels_available(), "the stand-in is not of a version that transformers accepts"
assert hub_kernels.LayerRepository is kernels.LayerRepository
assert kernels.__file__ == sys.argv[1] + "/kernels/__init__.py", kernels.__file__
sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
LlamaForCausalLM(LlamaConfig(**sizes))

import importlib, importlib.util, sibo_triton
for module in MODULES:
    name = "sibo_triton.kernels." + module
    if importlib.util.find_spec("triton"):
        print(importlib.import_module(name).__file__)
    else:
        print(importlib.util.find_spec(name).origin)
"""


@pytest.mark.oldest
def test_transformers_and_ours_import_beside_their_kernels(stand_in, wheel, tmp_path):
    """Both installed; how a checkout's names are found is asked above."""
    folder = tmp_path / "site-packages"
    shutil.copytree(stand_in, folder)
    zipfile.ZipFile(wheel).extractall(folder)
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    output = run_python(f"MODULES = {MODULES!r}\n{USE_BOTH}", folder, tmp_path, dependencies=sorted(dependencies))
    assert output.split() == [str(folder / f"sibo_triton/kernels/{module}.py") for module in MODULES]
