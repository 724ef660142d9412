"""Writes the tables of README and docs from the files that they name: `python -m benchmarks.readme_table`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_file import ADDED_PER_LAYER, FLOOR, MIB, RESULTS, is_ours
from benchmarks.settings import Linears
from sibo_triton.finetune.demo.report import demo_table
from sibo_triton.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "operations.md")


def traffic_table(results: dict[str, Any]) -> str:
    """What each provider adds to one of 32 decoder layers: launches, bytes moved and bytes kept."""
    return markdown_table(ADDED[:-1], [cells[:-1] for cells in _added(results["settings"])])


def bottleneck_table(results: dict[str, Any]) -> str:
    """The same for bottleneck adapters, and what our kernels' tiles load repeatedly."""
    return markdown_table(ADDED, _added(results["bottleneck_adapters"]))


#: Heads of the columns that `_added` fills.
ADDED = ("adapters", "", "launches", "MiB moved", "MiB kept", "MiB loaded again")


def _added(settings: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for setting, providers in settings.items():
        for provider, counts in providers.items():
            added = counts.get(ADDED_PER_LAYER)
            if added is None or "apart" in provider:  # frozen model, unsupported setting, or without grouping
                continue
            sizes = (added["read"] + added["written"], added["saved"], added["reread"])
            moved, kept, again = (f"{size / MIB:,.0f}" for size in sizes)
            again = again if is_ours(provider) else "not known"
            rows.append((setting, provider, f"{added['launches']:.0f}", moved, kept, again))
    return rows


def models_table(results: dict[str, Any]) -> str:
    """LoRA on other models: the ratios of ours to each peer."""
    measures = ("launches", "moved", "kept")
    rows = [
        (model, setting, pair, *(f"{ratio[measure]:.2f}" for measure in measures))
        for model, settings in results["other_models"].items()
        for setting, pairs in settings.items()
        for pair, ratio in pairs.items()
        if not pair.endswith("ours, lambda = 0")
    ]
    return markdown_table(("model", "adapters", "", *measures), rows)


def compiled_table(results: dict[str, Any]) -> str:
    """What peers keep with and without `torch.compile`, and what our equivalent keeps."""
    rows = []
    for setting, compiled in results["kept_when_compiled"].items():
        eager = results["settings"].get(setting) or results["bottleneck_adapters"][setting]
        kept = {name: counts[ADDED_PER_LAYER]["saved"] for name, counts in eager.items() if "minimum" in counts}
        for name, bytes_ in compiled.items():
            mixes = "mix" in name
            ours = next(other for other in kept if is_ours(other) and ("SIBO" in other) == mixes)
            cells = (f"{size / MIB:,.0f}" for size in (kept[name], bytes_, kept[ours]))
            rows.append((setting, name, *cells))
    return markdown_table(("adapters", "", "eager", "compiled", "ours"), rows)


#: The providers in the tables of a GPU.
SHOWN = ("PEFT LoRA", "addmm_ scheme, siblings grouped", "ours, lambda = 0", "PEFT LoRA + eager mix", "ours, SIBO")
SHOWN_ADAPTERS = ("eager adapter", "ours, adapter, lambda = 0", "eager adapter + eager mix", "ours, SIBO adapter")
NOT_MEASURED = "Speed on a GPU: not measured yet."


def layer_table(rows: Sequence[dict[str, Any]], shown: Sequence[str]) -> str:
    """Time over the frozen layer, forward and backward, of each row."""
    table = []
    for row in rows:
        cells = [_over_frozen(row["providers"].get(name, {})) for name in shown]
        kind = f"r = {row['rank']}" if "rank" in row else row["title"].split(", ")[3]
        adapters = f"{kind}, {row['adapters']}, dropout {row['dropout']:g}"
        table.append((row["model"], f"{row['tokens']:,}", adapters, *cells))
    return markdown_table(("layer", "tokens", "adapters", *shown), table)


def _over_frozen(facts: dict[str, Any]) -> str:
    if "percent_over_frozen" in facts:
        return f"{facts['percent_over_frozen']['both']['p50']:+.1f} %"
    for why in ("wrong", "error", "unavailable"):
        if why in facts:
            return facts[why].partition(":")[0] if why == "unavailable" else why
    return "not run"


def _layers(results: Path, whole: bool = True) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """For each GPU a description of the measurement, with a link, and the rows of whole layers, or of their linears."""
    for file in sorted(results.glob("layer-*.json"), reverse=True):
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in content["rows"] if (row["part"] == "layer") == whole]
        if rows:
            link = f"[benchmarks/results/{file.name}](benchmarks/results/{file.name})"
            yield f"measured on {content['gpu']} ({link})", rows


def _is_first(row: dict[str, Any]) -> bool:
    return (row["model"], row.get("rank"), row["tokens"]) == ("Llama-3-8B", 16, 8192)


def gpu_tables(results: Path) -> str:
    """A table of README's layer for each GPU that timed it, or a note that there is none."""
    parts = []
    for where, rows in _layers(results):
        first = [row for row in rows if _is_first(row)]
        if first:
            parts.append(f"Time over the frozen layer, {where}:\n\n{layer_table(first, SHOWN)}")
    parts = parts or [NOT_MEASURED]
    for benchmark, what in (("step", "Whole training steps"), ("decode", "Generation")):
        if not any(results.glob(f"{benchmark}-*.json")):
            parts.append(f"{what} on a GPU: not measured yet.")
    return "\n\n".join(parts)


def other_layers(results: Path) -> str:
    """Tables of all other timed layers for each GPU, for LoRA and for bottleneck adapters."""
    parts = []
    for where, rows in _layers(results):
        for shown in (SHOWN, SHOWN_ADAPTERS):
            selected = [row for row in rows if ("rank" in row) == (shown is SHOWN) and not _is_first(row)]
            if selected:
                parts.append(f"Time over the frozen layer, {where}:\n\n{layer_table(selected, shown)}")
    return "\n\n".join(parts) or NOT_MEASURED


def linears_tables(results: Path) -> str:
    """For each GPU a table of the groups of linears of README's layer, timed by themselves, and of all of them."""
    parts = []
    groups = ["+".join(names) for names in Linears().groups]
    for where, rows in _layers(results, whole=False):
        table, by_adapters = [], {}
        for row in (row for row in rows if _is_first(row) and row["part"] in groups):
            adapters = f"{row['adapters']}, dropout {row['dropout']:g}"
            cells = [_over_frozen(row["providers"].get(name, {})) for name in SHOWN]
            table.append((row["part"], adapters, *cells))
            by_adapters.setdefault(adapters, []).append(row["providers"])
        table += [
            ("all, by the sums of medians", adapters, *(_sum_over_frozen(timed, name) for name in SHOWN))
            for adapters, timed in by_adapters.items()
            if len(timed) == len(groups)
        ]
        if table:
            head = ("linears", "adapters", *SHOWN)
            parts.append(f"Linears by themselves, time over the frozen ones, {where}:\n\n{markdown_table(head, table)}")
    return "\n\n".join(parts) or NOT_MEASURED


def _sum_over_frozen(timed: Sequence[dict[str, Any]], name: str) -> str:
    if not all("ms" in providers.get(one, {}) for providers in timed for one in (name, FLOOR)):
        return "not all"
    ours, frozen = (sum(providers[one]["ms"]["both"]["p50"] for providers in timed) for one in (name, FLOOR))
    return f"{100 * (ours / frozen - 1):+.1f} %"


#: Columns of the table of kernels, and the kernels that each sums up.
OF_OURS = {
    "`down`": ("down_kernel",),
    "`up`": ("up_kernel",),
    "`up_backward`": ("both_kernel", "product_kernel"),
    "dA": ("down_weight_gradient_kernel",),
    "dx": ("down_input_gradient_kernel",),
    "sums": ("sum_parts_kernel",),
}


def kernels_table(results: Path) -> str:
    """Microseconds of a layer's kernels on each GPU, with a column for each of ours; a "-before" file is listed too."""
    rows = []
    for file in sorted(results.glob("kernel-times-*.json"), reverse=True):
        content = json.loads(file.read_text(encoding="utf-8"))
        when = f"{content['gpu']}, before" if file.stem.endswith("-before") else content["gpu"]
        frozen = 0.0
        for row in content["rows"]:
            layer, _, provider = row["title"].partition(" adapters, ")
            dropout, _, provider = provider.partition(", ")
            if provider == FLOOR:
                frozen = row["us"]
            times = [
                sum(launch["us"] for launch in row["launches_of_ours"] if launch["kernel"] in names)
                for names in OF_OURS.values()
            ]
            cells = [f"{us:,.0f}" if us else "" for us in times]
            over = f"{100 * (row['us'] / frozen - 1):+.1f} %" if provider != FLOOR else ""
            _, tokens, _, adapters = layer.split(", ")
            name = f"{int(tokens.removeprefix('M=')):,} tokens, {adapters}, {dropout}"
            rows.append((when, name, provider, *cells, f"{row['us']:,.0f}", over))
    return markdown_table(("GPU", "layer", "", *OF_OURS, "all kernels", "over frozen"), rows)


def tuning_table(results: Path) -> str:
    """The fastest tiles of each timed case, next to those that the plans chose then."""
    rows = []
    for file in sorted(results.glob("tune-*.json")):
        for case, timed in json.loads(file.read_text(encoding="utf-8"))["cases"].items():
            of_plan = next(us for us, variant in timed if not variant)
            us, variant = next((us, variant) for us, variant in timed if "torch" not in variant)
            tiles = ", ".join(f"{name} {value}" for name, value in variant.items()) or "the plan's"
            rows.append((case, f"{of_plan:.1f}", f"{us:.1f}", tiles))
    return markdown_table(("launcher, linears, adapters", "the plan's, us", "fastest, us", "with"), rows)


def host_time_table(results: dict[str, Any]) -> str:
    """Microseconds that a module adds to its frozen linear, and the ratios of the kernels' path to its peers."""
    times: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}  # by linears and provider, by base and dropout
    for row in results["rows"]:
        column = row["base"] + (", dropout" if row["dropout"] else "")
        cell = row["forward_backward_us"], row["forward_without_gradients_us"]
        times.setdefault((row["linears"], row["provider"]), {})[column] = cell
    columns = list(next(iter(times.values())))
    table = [
        (linears, provider, *(f"{both:.0f} ({alone:.0f})" for both, alone in cells.values()))
        for (linears, provider), cells in times.items()
    ]
    for (linears, provider), cells in times.items():
        if "kernels' path" in provider:
            peer = "PEFT LoRA + eager mix" if "SIBO" in provider else "PEFT LoRA"
            others = times[linears, peer]
            ratios = [
                f"{cells[column][0] / others[column][0]:.2f} ({cells[column][1] / others[column][1]:.2f})"
                for column in columns
            ]
            table.append((linears, f"{provider} / {peer}", *ratios))
    return markdown_table(("", "", *columns), table)


#: The GPUs that `make compile-check` compiles for, by target.
GPUS = {"sm_80": "A100", "sm_90": "H100, H200", "sm_100": "B200", "sm_120": "RTX 5090", "gfx942": "MI300X"}


def compile_check_table(results: Path) -> str:
    """How many kernels were compiled for each GPU, and how many of them exceed a limit."""
    counts = []
    for target, gpu in GPUS.items():
        file = results / f"compile-check-{target}.json"
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            counts.append((gpu, content["kernels"], content["violations"]))
    counts.append(("all", sum(kernels for _, kernels, _ in counts), sum(violations for *_, violations in counts)))
    rows = [(gpu, f"{kernels:,}", violations) for gpu, kernels, violations in counts]
    return markdown_table(("compiled for", "kernels", "violations"), rows)


TABLES = {
    "demo": ("demo-cpu.json", demo_table),
    "traffic": ("traffic.json", traffic_table),
    "bottleneck": ("traffic.json", bottleneck_table),
    "models": ("traffic.json", models_table),
    "compiled": ("traffic.json", compiled_table),
    "host-time": ("host-time.json", host_time_table),
}
#: Tables made from several files.
OF_RESULTS = {
    "gpu": gpu_tables,
    "layers": other_layers,
    "linears": linears_tables,
    "kernels": kernels_table,
    "tuning": tuning_table,
    "compile-check": compile_check_table,
}


def with_tables(text: str, root: str = "") -> str:
    """A document's text with new tables between its markers; `root`: the path from it to the project's root."""
    for name, (file, table) in TABLES.items():
        text = _between_markers(text, name, table(json.loads((RESULTS / file).read_text(encoding="utf-8"))))
    for name, table in OF_RESULTS.items():
        text = _between_markers(text, name, table(RESULTS).replace("](benchmarks/", f"]({root}benchmarks/"))
    return text


def root_of(document: Path) -> str:
    """The relative path from a document to the project's root, for links."""
    return "../" * (len(document.relative_to(ROOT).parts) - 1)


def _between_markers(text: str, name: str, made: str) -> str:
    start, end = f"<!-- {name}-results -->", f"<!-- /{name}-results -->"
    before, marker, rest = text.partition(start)
    if not marker:
        return text
    return f"{before}{start}\n{made}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text(encoding="utf-8"), root_of(document)), encoding="utf-8")
