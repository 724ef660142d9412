"""Checks without a GPU that every kernel fits every supported GPU: `make compile-check`.

Compiles each case of `ahead_of_time/cases.py` for each target, at the tiles that a launch would choose, and
reads the binaries: no register may be spilled, shared memory must stay within the target's limit, 16-bit operands must
be multiplied by tensor cores, and global memory must be loaded 16 bytes at a time. Prints registers and shared memory
of every kernel, writes them to `benchmarks/results/compile-check-TARGET.json` as soon as a target is finished, and ends
with status 1 if there is a violation.
"""

import argparse
import json
import os
import sys
from dataclasses import astuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # has the classes of launches

from benchmarks.ahead_of_time.binaries import TARGETS
from benchmarks.ahead_of_time.cases import CASES, COLUMNS, Row, check
from benchmarks.in_parallel import in_parallel
from benchmarks.results_file import RESULTS
from sibo_triton.environment import provenance


def main() -> int:
    options = parse_arguments()
    cases = [i for i, case in enumerate(CASES) if all(word in str(case) for word in options.only)]
    if not cases:
        sys.exit(f"no case is named by {' '.join(options.only)!r}; the first of {len(CASES)} is {str(CASES[0])!r}")
    all_rows = []
    for target in options.targets:
        rows = run([(i, target) for i in cases], options.workers)
        print_table(rows)
        if options.merge:
            write(merged(rows, target), target, options.only)
        elif options.only:
            print("not all cases: nothing is written")
        else:
            write(rows, target)
        all_rows += rows
    violations = [row for row in all_rows if row.violation]
    for row in violations:
        print(f"VIOLATION {row.target}, {row.case}, {row.kernel} ({row.tiles}): {row.violation}")
    print(f"{len(all_rows)} kernels in {len(cases) * len(options.targets)} cases, {len(violations)} violations")
    return 1 if violations else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose name holds all of these")
    parser.add_argument("--merge", action="store_true", help="replace the file's rows by those of --only")
    return parser.parse_args()


def merged(rows: list[Row], target: str) -> list[Row]:
    """The file's rows in the order of the cases, where `rows` replace the file's rows of the same cases."""
    of_file = [Row(*row) for row in json.loads((RESULTS / f"compile-check-{target}.json").read_text())["rows"]]
    again = {row.case for row in rows}
    by_case: dict[str, list[Row]] = {}
    for row in [*(row for row in of_file if row.case not in again), *rows]:
        by_case.setdefault(row.case, []).append(row)
    missing = [case for case in map(str, CASES) if case not in by_case]
    if missing:
        sys.exit(f"{len(missing)} cases are in neither, {missing[0]!r} among them: run it without --only")
    return [row for case in dict.fromkeys(map(str, CASES)) for row in by_case[case]]


def run(jobs: list[tuple[int, str]], workers: int) -> list[Row]:
    """The rows of all jobs, in their order."""
    rows: dict[tuple[int, str], list[Row]] = {}
    # Processes are replaced regularly, or Triton's data about each kernel would fill the memory.
    results = in_parallel("compiling cases", check_job, jobs, workers, chunk=4, chunks_of_process=50)
    for job, rows_of_job in results:
        rows[job] = rows_of_job
        for row in rows_of_job:
            if row.violation:
                print(f"VIOLATION {row.target}, {row.case}, {row.kernel}: {row.violation}", flush=True)
    return [row for job in jobs for row in rows[job]]


def check_job(job: tuple[int, str]) -> tuple[tuple[int, str], list[Row]]:
    i, target = job
    return job, check(CASES[i], target)


def print_table(rows: list[Row]) -> None:
    """Registers, shared memory and more, one kernel per line."""
    heads = ("target", "case", "kernel", "tiles", "warps", "stages", "regs", "KiB", "spilled", "tensor", "128-bit")
    table = [
        (
            row.target,
            row.case,
            row.kernel.removesuffix("_kernel"),
            row.tiles,
            str(row.warps),
            str(row.stages),
            str(row.registers),
            f"{row.shared / 1024:.1f}",
            str(row.spilled),
            "yes" if row.tensor_cores else "no",
            "yes" if row.loads_128 else "no",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *table, strict=True)]
    for line in (heads, *table):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write(rows: list[Row], target: str, merged_in: list[str] | None = None) -> None:
    """One line per row, so that a change of one kernel changes only its lines."""
    head = {
        "command": f"python -m benchmarks.compile_check --targets {target}",
        **({"merged_in_last": f"--only {' '.join(merged_in)} --merge"} if merged_in else {}),
        **provenance(with_devices=False),
        "target": target,
        "shared_memory_limit": TARGETS[target][1],
        "kernels": len(rows),
        "violations": sum(bool(row.violation) for row in rows),
        "columns": COLUMNS,
    }
    lines = ",\n".join("  " + json.dumps(astuple(row)) for row in rows)
    text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "rows": [\n' + lines + "\n ]\n}\n"
    output = RESULTS / f"compile-check-{target}.json"
    output.write_text(text, encoding="utf-8")
    print(f"written: {output}")


if __name__ == "__main__":
    sys.exit(main())
