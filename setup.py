"""Metadata, dependencies, and the mapping of the folder ``kernels/`` to the package ``sibo_triton.kernels``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version, read from its file: importing the package here would need torch to build a wheel."""
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "sibo_triton/_version.py").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError('sibo_triton/_version.py holds no line __version__ = "..."')
    return match.group(1)


extras = {
    # Triton has no wheels elsewhere; without it everything runs on the plain PyTorch path.
    "triton": ["triton>=3.6; platform_system == 'Linux'"],
    "finetune": ["accelerate>=1.10", "datasets>=4.7", "torchmetrics>=1.4"],
    "viz": ["matplotlib>=3.8"],
}
extras["dev"] = [
    *(requirement for extra in extras.values() for requirement in extra),
    "build",
    "hypothesis",
    "mypy",
    "packaging",
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "ruff",
    "scipy",
    "setuptools>=77",
    "trl>=1.0",
]

setup(
    name="sibo-triton",
    version=read_version(),
    description="SIBO-LoRA, LoRA fed with the initial residual, as a drop-in for PEFT",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The sibo-triton authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # `kernels/` must not be installed under its own name, which belongs to a package that transformers imports.
    packages=[*find_packages(include=["sibo_triton", "sibo_triton.*"]), "sibo_triton.kernels", "sibo_triton.recipes"],
    package_dir={"sibo_triton.kernels": "kernels", "sibo_triton.recipes": "examples/recipes"},
    package_data={"sibo_triton": ["py.typed"], "sibo_triton.recipes": ["*.toml"]},
    include_package_data=False,
    zip_safe=False,
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "peft>=0.19.1",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "rich>=13",
        "typer>=0.12",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["sibo-triton = sibo_triton.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
