"""Files of timed results: written whole after each row, so that a run cut short loses nothing; and the time budget."""

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
MIB = 2**20


class ResultsFile:
    """A JSON document with a list of rows, each with a title that is its own.

    Args:
        path: written atomically.
        head: where the results come from.
        resume: keep the rows that a run of the same title wrote, and note which provider was under way when it ended.
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
        """What ended an earlier process in the middle of a row, if it was this provider."""
        for crash in self.document.get("crashed", []):
            if (crash["row"], crash["provider"]) == (title, provider):
                return crash.get("error", "the process ended while it ran")
        return None

    def begin(self, title: str, provider: str, error: str | None = None) -> None:
        """Note what runs, for whoever finds that the process ended."""
        self.document["under_way"] = {"row": title, "provider": provider, **({"error": error} if error else {})}
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        self.document.pop("under_way", None)
        self.document["rows"].append(row)
        self.write()

    def note(self, **facts: Any) -> None:
        """Put facts beside the rows."""
        self.document |= facts
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)


class Budget:
    """Seconds for a benchmark. A row begins only if one like the last would still fit."""

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
        """Whether there is time for one more."""
        self.row_started = time.monotonic()
        return self.left > self.last_row

    def end_row(self) -> None:
        self.last_row = time.monotonic() - self.row_started


def slug(device_name: str) -> str:
    """A GPU's name as a part of a file's: "NVIDIA H100 80GB HBM3" is "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


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
    """The file to write.

    Raises:
        SystemExit: there is no GPU, or a CPU's times were to land among the results.
    """
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"benchmarks.{name}: torch sees no CUDA device (--device cpu --output FILE only tries the code)")
    if options.output is not None:
        return options.output
    if options.device == "cpu":
        sys.exit(f"benchmarks.{name}: times on a CPU say nothing of a GPU and are no result: name a file by --output")
    return RESULTS / f"{name}-{slug(torch.cuda.get_device_name(0))}.json"


def command_line(name: str) -> str:
    """As it was given, without what the supervisor puts behind it."""
    words = sys.argv[1:]
    if "--unsupervised" in words:
        words = words[: words.index("--unsupervised")]
    return shlex.join(["python", "-m", f"benchmarks.{name}", *words])
