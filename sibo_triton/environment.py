"""What a bug report needs: versions, device, and whether the installed transformers and peft were tested together.

Imports nothing of this package and torch only inside a ``try``, so that it also answers where ``import sibo_triton``
fails: that is when somebody needs it (``make env`` runs this file by its path).
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

#: The (transformers, peft) versions that the tests run against: support is this list and not a range.
#: The first is the oldest, the last the newest; `constraints-oldest.txt` and `constraints.txt` pin them.
TESTED_PAIRS: tuple[tuple[str, str], ...] = (("5.17.0", "0.19.1"), ("5.23.0", "0.21.2"))

#: Distributions whose version matters; `kernels` is Hugging Face's, which shares its name with our source folder.
DISTRIBUTIONS = (
    "sibo-triton",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "datasets",
    "huggingface-hub",
    "bitsandbytes",
    "kernels",
    "numpy",
)

#: Environment variables that change what runs; printed only where set.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "SIBO_TRITON_AUTOTUNE",
    "SIBO_TRITON_BACKEND",
    "TRITON_INTERPRET",
)

NOT_INSTALLED = "not installed"


def installed_version(distribution: str) -> str:
    """The installed version of a distribution, or ``"not installed"``."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def tested_pairs() -> str:
    """The pairs of versions that the tests run against, in words."""
    return " or ".join(f"transformers {transformers} + peft {peft}" for transformers, peft in TESTED_PAIRS)


def pair_verdict(transformers: str, peft: str) -> str:
    """One sentence: whether this version of transformers was tested with this version of peft.

    Args:
        transformers: a version such as ``"5.23.0"``.
        peft: a version such as ``"0.21.2"``.
    """
    if (transformers, peft) in TESTED_PAIRS:
        return "yes"
    if NOT_INSTALLED in (transformers, peft):
        return f"no: transformers {transformers}, peft {peft}"
    return f"no: transformers {transformers} with peft {peft} was not tested; tested: {tested_pairs()}"


def devices() -> list[str]:
    """One line for each accelerator that torch sees (name, compute capability, memory), or why there is none."""
    try:
        import torch
    except Exception as error:  # a broken torch is exactly what a report should show
        return [f"unknown: torch cannot be imported ({type(error).__name__}: {error})"]
    build = "CPU only"
    if torch.version.cuda or torch.version.hip:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    if not torch.cuda.is_available():
        return [f"none (build of torch: {build})"]
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        lines.append(f"{device.name}, capability {device.major}.{device.minor}, {memory:.0f} GiB ({build})")
    return lines


def environment() -> dict[str, str]:
    """Everything that a bug report needs, as an ordered mapping from a label to a line of text."""
    facts = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.platform()}, {os.cpu_count()} CPUs",
    }
    facts |= {name: installed_version(name) for name in DISTRIBUTIONS}
    facts["tested pair"] = pair_verdict(facts["transformers"], facts["peft"])
    for index, line in enumerate(devices()):
        facts[f"device {index}"] = line
    facts |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return facts


def provenance(with_devices: bool = True) -> dict[str, str | list[str] | None]:
    """What a file of results must say about its origin: versions, commit and date, and the devices unless told not."""
    return {
        **{name: installed_version(name) for name in DISTRIBUTIONS if installed_version(name) != NOT_INSTALLED},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        **({"devices": devices()} if with_devices else {}),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, with a mark if files were changed; None outside of one."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def format_environment(facts: dict[str, str]) -> str:
    """The facts of :func:`environment` as aligned text, one to a line."""
    width = max(map(len, facts))
    return "\n".join(f"{label:<{width}}  {value}" for label, value in facts.items())


def main() -> None:
    """Print the environment."""
    print(format_environment(environment()))


if __name__ == "__main__":
    main()
