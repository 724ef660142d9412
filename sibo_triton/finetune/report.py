"""report.md: one page with what was run, the outcome, and how to load the adapter."""

from __future__ import annotations

from pathlib import Path

from sibo_triton._version import __version__
from sibo_triton.bottleneck import SiboAdapterConfig
from sibo_triton.environment import installed_version
from sibo_triton.finetune.plots import NO_PLOTS, Curve, can_plot, plot
from sibo_triton.finetune.result import FinetuneResult
from sibo_triton.markdown import markdown_table

REPORT = "report.md"
LOSS_PLOT = "loss.png"
SIMILARITY_PLOT = "similarity.png"

_LOSS_ROWS = 8  # in the table; loss.csv has all
_LAMBDA_ROWS = 12


def write_report(result: FinetuneResult, output: Path) -> None:
    """Write report.md and, with matplotlib, its two plots into the folder `output`."""
    if can_plot():
        _plot_loss(result, output / LOSS_PLOT)
        if result.has_similarity:
            _plot_similarity(result, output / SIMILARITY_PLOT)
    sections = [
        f"# Fine-tuning report: {result.options.method}",
        *_warnings(result),
        _outcome(result),
        _loss(result),
        _similarity(result),
        _learned_lambdas(result),
        _settings(result),
        _notes(result),
        _how_to_load(result, output),
    ]
    (output / REPORT).write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def format_bytes(count: int) -> str:
    """A number of bytes in KiB or MiB, whichever reads better."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def versions() -> str:
    """The versions on which a result depends."""
    others = (f"{name} {installed_version(name)}" for name in ("torch", "transformers", "peft"))
    return ", ".join([f"sibo-triton {__version__}", *others])


def _warnings(result: FinetuneResult) -> list[str]:
    warnings = []
    if result.diverged:
        warnings.append("**Training diverged: a loss was NaN or infinite. Do not use this adapter; lower the rate.**")
    if result.interrupted:
        warnings.append(f"**Interrupted after step {result.steps} of {result.planned_steps}; saved as it was then.**")
    return warnings


def _outcome(result: FinetuneResult) -> str:
    share = 100 * result.trainable_parameters / (result.parameters + result.trainable_parameters)
    mixing = f", of which {result.mixing_modules} mix" if result.options.mixes else ""
    rows: list[tuple[str, str]] = [
        ("optimizer steps", f"{result.steps}"),
        ("examples", f"{result.examples:,}" + (f", {result.eval_examples:,} held out" if result.eval_examples else "")),
        ("trainable parameters", f"{result.trainable_parameters:,} ({share:.2f} % of all)"),
        ("modules with an adapter", f"{result.modules}{mixing}"),
    ]
    for name, label in (("loss", "training loss"), ("eval_loss", "held-out loss")):
        losses = result.losses(name)
        if len(losses) > 1:
            rows.append((f"{label}, first → last", f"{losses[0][1]:.4f} → {losses[-1][1]:.4f}"))
        elif losses:
            rows.append((f"{label}, step {losses[0][0]}", f"{losses[0][1]:.4f}"))
    if result.metrics:
        (_, before), (_, after) = result.metrics[0], result.metrics[-1]
        rows += [(f"held-out {name}, first → last", f"{before[name]:.4f} → {after[name]:.4f}") for name in after]
    if result.seconds_per_step is not None:
        rows.append(("seconds per step (median)", f"{result.seconds_per_step:.3f} on {result.device}"))
    rows.append(("saved activations, one forward pass", format_bytes(result.saved_activation_bytes)))
    return markdown_table(("", ""), rows)


def _loss(result: FinetuneResult) -> str:
    by_step: dict[int, dict[str, float]] = {}  # the Trainer logs training and evaluation separately
    for name in ("loss", "eval_loss"):
        for step, value in result.losses(name):
            by_step.setdefault(step, {})[name] = value
    if not by_step:
        return ""
    evaluated = [step for step, values in by_step.items() if "eval_loss" in values]
    steps = sorted(evaluated or by_step)
    # Evenly spaced over the run, including the last.
    chosen = sorted({round(i * (len(steps) - 1) / (_LOSS_ROWS - 1)) for i in range(_LOSS_ROWS)})
    names = ("loss", "eval_loss") if evaluated else ("loss",)
    table = markdown_table(
        ("step", "training loss", "held-out loss")[: 1 + len(names)],
        [
            [steps[i], *(f"{by_step[steps[i]][name]:.4f}" if name in by_step[steps[i]] else "" for name in names)]
            for i in chosen
        ],
    )
    image = f"![Loss over steps]({LOSS_PLOT})" if can_plot() else NO_PLOTS
    return f"## Loss\n\n{image}\n\n{table}\n\nAll of it: loss.csv."


def _similarity(result: FinetuneResult) -> str:
    if not result.has_similarity:  # a note says why
        return ""
    image = f"![Token similarity by layer]({SIMILARITY_PLOT})\n\n" if can_plot() else ""
    table = markdown_table(
        ("layer", "base", result.options.method),
        [
            ("input" if layer == 0 else layer, f"{base:.3f}", f"{adapted:.3f}")
            for layer, (base, adapted) in enumerate(zip(result.base_similarity, result.similarity, strict=True))
        ],
    )
    what = "Mean cosine between the tokens of a sequence, after each layer; 1 means that all point the same way."
    return f"## Token similarity by layer\n\n{image}{what}\n\n{table}"


def _learned_lambdas(result: FinetuneResult) -> str:
    if not result.options.sibo_learnable or not result.lambdas:
        return ""
    values = list(result.lambdas.values())
    summary = f"Started at {result.options.lambda_}; now {min(values):.3f} to {max(values):.3f}."
    shown = list(result.lambdas.items())[:_LAMBDA_ROWS]
    rest = len(values) - len(shown)
    table = markdown_table(("module", "lambda"), [(name, f"{value:.4f}") for name, value in shown])
    return f"## Learned lambda\n\n{summary}\n\n{table}" + (f"\n\nand {rest} more." if rest else "")


def _settings(result: FinetuneResult) -> str:
    o, defaults = result.options, SiboAdapterConfig
    size = (
        f"rank {o.lora_rank}, alpha {o.lora_alpha}"
        if o.is_lora
        else f"bottleneck {o.bottleneck}, {o.activation or defaults.activation}, in {o.placement or defaults.placement}"
        + (" behind the module" if o.side == "output" else "")
        + f", initialised as {o.init_weights or 'zero'}"
    )
    method = f"{o.method}, {size}, dropout {o.dropout}"
    if o.mixes:
        method += f", lambda {o.lambda_}" + (" (learnable)" if o.sibo_learnable else "")
        if o.sibo_target_modules:
            method += f" in {', '.join(o.sibo_target_modules)}"
    length = f"{o.max_steps} steps" if o.max_steps else f"{o.epochs:g} epochs"
    rows = [
        ("base model", f"`{o.model}`, {result.parameters:,} parameters, {result.dtype}"),
        ("data", f"`{o.data}`" + (f", evaluated on `{o.eval_data}`" if o.eval_data else "")),
        ("method", method),
        ("target modules", ", ".join(o.target_modules) if o.target_modules else "default (see notes)"),
        ("length", f"{length}, batch {o.batch_size} x {o.gradient_accumulation}, at most {result.max_length} tokens"),
        ("optimizer", f"AdamW, rate {o.learning_rate:g}, {result.warmup_steps} warm-up steps, then linear decay"),
        ("seed", f"{o.seed}"),
        ("gradient checkpointing", "on" if o.gradient_checkpointing else "off"),
        ("versions", versions()),
    ]
    if o.recipe:
        loss = "every token" if o.recipe.train_on_inputs else "the output only"
        rows.insert(0, ("recipe", f"{o.recipe.name} ({o.recipe.description}); loss on {loss}"))
    return f"## Settings\n\n{markdown_table(('', ''), rows)}"


def _notes(result: FinetuneResult) -> str:
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in result.notes) if result.notes else ""


def _how_to_load(result: FinetuneResult, output: Path) -> str:
    own_type = result.mixing_modules or not result.options.is_lora
    needed = "import sibo_triton  # registers the adapter type with PEFT\n" if own_type else ""
    return f"""## Load it

```python
{needed}from peft import PeftModel
from transformers import {result.task.model_class}

base = {result.task.model_class}.from_pretrained({result.options.model!r}{result.task.load_arguments})
model = PeftModel.from_pretrained(base, {str(output)!r})
```"""


def _plot_loss(result: FinetuneResult, path: Path) -> None:
    curves = []
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        points = result.losses(name)
        if points:
            steps, values = zip(*points, strict=True)
            curves.append(Curve(label, steps, values, marked=name == "eval_loss"))
    if curves:
        plot(path, curves, "step", "loss")


def _plot_similarity(result: FinetuneResult, path: Path) -> None:
    layers = range(len(result.similarity))
    curves = [
        Curve("base", layers, result.base_similarity, marked=True),
        Curve(result.options.method, layers, result.similarity, marked=True),
    ]
    plot(path, curves, "layer (0: what enters the first block)", "token similarity")
