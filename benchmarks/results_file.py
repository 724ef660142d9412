"""Files of timed results, written after each row, so that an interrupted run loses nothing; and the time budget."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
#: The provider that the others are compared with.
FLOOR = "frozen model"
#: Layers of the models whose traffic is counted, and under which name a file has what a provider adds to one of them.
LAYERS = 32
ADDED_PER_LAYER = f"added_per_layer_of_{LAYERS}"
MIB = 2**20


def is_ours(provider: str) -> bool:
    """Whether a provider of this name, as results have it, is this library."""
    return provider.startswith("ours")


class ResultsFile:
    """A JSON document with a list of rows, each with a unique title.

    Args:
        path: written atomically.
        head: the origin of the results.
        resume: keep the rows that an earlier run wrote, and note which provider was running when it ended.
    """

    def __init__(self, path: Path, head: dict[str, Any], resume: bool = False) -> None:
        self.path = path
        self.document: dict[str, Any] = {**head, "rows": []}
        if resume and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            self.document["rows"] = before["rows"]
            self.document["crashed"] = before.get("crashed", [])
            if "under_way" in before:
                self.document["crashed"] = [*self.document["crashed"], before["under_way"]]
        self.write()

    def has(self, title: str) -> bool:
        return any(row["title"] == title for row in self.document["rows"])

    def crash_of(self, title: str, provider: str) -> str | None:
        """The error that ended an earlier process in the middle of a row, if this provider was running."""
        for crash in self.document.get("crashed", []):
            if (crash["row"], crash["provider"]) == (title, provider):
                return crash.get("error", "the process ended while it ran")
        return None

    def begin(self, title: str, provider: str, error: str | None = None) -> None:
        """Note what is running, in case the process ends."""
        self.document["under_way"] = {"row": title, "provider": provider, **({"error": error} if error else {})}
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        self.document.pop("under_way", None)
        self.document["rows"].append(row)
        self.write()

    def note(self, **facts: Any) -> None:
        """Add facts to the document."""
        self.document |= facts
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)


class Budget:
    """Seconds for a benchmark. A row begins only if one that takes as long as the last would still fit."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.started = self.row_started = time.monotonic()
        self.last_row = 0.0

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return float("inf") if self.seconds is None else self.seconds - self.spent

    def begin_row(self) -> bool:
        """Whether there is time for one more row."""
        self.row_started = time.monotonic()
        return self.left > self.last_row

    def end_row(self) -> None:
        self.last_row = time.monotonic() - self.row_started


def gpu_name(name: str, without: str = "") -> str:
    """The GPU's name, for the benchmark of this name.

    Raises:
        SystemExit: there is no GPU, with what to do `without` one.
    """
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"benchmarks.{name}: torch sees no CUDA device{without}")
    return torch.cuda.get_device_name(0)


def file_of(name: str, gpu: str) -> Path:
    """A benchmark's results on a GPU: of "layer" on an "NVIDIA H100 80GB HBM3", layer-nvidia-h100-80gb-hbm3.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return RESULTS / f"{name}-{slug}.json"


def parser_of(description: str) -> argparse.ArgumentParser:
    """The options that the timed benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the most important rows only, and fewer rounds")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no row that would not fit any more")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these, and the frozen model")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose title holds all of these")
    parser.add_argument("--list", action="store_true", help="print the titles of the rows and end")
    parser.add_argument("--output", type=Path, help="default: a file of this GPU's in benchmarks/results/")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has, and time the others")
    parser.add_argument("--unsupervised", action="store_true", help=argparse.SUPPRESS)
    return parser


def output_of(name: str, options: argparse.Namespace) -> Path:
    """The output file.

    Raises:
        SystemExit: there is no GPU, or a CPU's times would be written to the results.
    """
    if options.device == "cuda":
        gpu = gpu_name(name, without=" (--device cpu --output FILE only tries the code)")
        return options.output or file_of(name, gpu)
    if options.output is None:
        sys.exit(f"benchmarks.{name}: times on a CPU say nothing of a GPU and are no result: name a file by --output")
    return options.output


def command_line(name: str) -> str:
    """The command line as the user gave it, without the supervisor's additions."""
    words = sys.argv[1:]
    if "--unsupervised" in words:
        words = words[: words.index("--unsupervised")]
    return shlex.join(["python", "-m", f"benchmarks.{name}", *words])
