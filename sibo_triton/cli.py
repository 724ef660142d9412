"""The command line: `sibo-triton finetune`, `evaluate`, `recipes`, `demo` and `env`.

A command imports what it needs when it runs: `env` must answer where the fine-tuning libraries are missing.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from sibo_triton._version import __version__

# Exit codes: 2 as for typer's own usage errors; 130 as shells report Ctrl-C.
_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130

# Options of the panels of `sibo-triton finetune --help`.
_adapter_option = partial(typer.Option, rich_help_panel="Adapter")
_training_option = partial(typer.Option, rich_help_panel="Training")
_output_option = partial(typer.Option, rich_help_panel="Output")

app = typer.Typer(
    name="sibo-triton",
    help="SIBO (arXiv 2402.11896) for PEFT: fine-tune, see a demonstration, report the environment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback that can be pasted into a bug report
)


def main() -> None:
    """Run the command line; what the `sibo-triton` command calls."""
    # PEFT reads an attribute that transformers 5.23 renamed; users can do nothing about it.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    app(prog_name="sibo-triton")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


@app.command()
def finetune(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Base model: a folder that save_pretrained wrote, or a hub id.")],
    data: Annotated[
        Path,
        typer.Option(
            help="JSONL, CSV or Parquet with a column `text`, or with `prompt` and `completion` (the loss is then on "
            "the completion only); for the other tasks with `label`, and one or two columns of text as in GLUE."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the adapter, the loss log and the report.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Take the settings of a published run, and instruction data: a name that `sibo-triton recipes` lists, "
            "or a .toml file. Options that are given replace the recipe's."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="causal-lm, classification or regression (of texts or pairs of texts, as in GLUE).")
    ] = "causal-lm",
    method: Annotated[
        str, _adapter_option(help="lora, sibo-lora, adapter (a bottleneck) or sibo-adapter.")
    ] = "sibo-lora",
    target_modules: Annotated[
        list[str] | None,
        _adapter_option(
            help="Modules that get an adapter, by the end of their name; repeat the option or separate by commas; "
            "all-linear for every linear layer but the head. Default: PEFT's for the architecture; for bottleneck "
            "adapters what reads the residual stream in feed-forward networks."
        ),
    ] = None,
    sibo_lambda: Annotated[
        float | None,
        _adapter_option(help="Share of the initial residual in the adapter's input, 0 to 1. Default: 0.1."),
    ] = None,
    sibo_learnable: Annotated[bool, _adapter_option("--sibo-learnable", help="Train lambda, one per module.")] = False,
    sibo_target_modules: Annotated[
        list[str] | None,
        _adapter_option(help="Which of the target modules mix. Default: those that read the residual stream."),
    ] = None,
    sibo_blocks: Annotated[
        list[str] | None,
        _adapter_option(
            help="The lists of blocks with an initial residual each, as model.layers. Default: by structure."
        ),
    ] = None,
    rank: Annotated[int | None, _adapter_option(help="r of LoRA. Default: 16.")] = None,
    alpha: Annotated[int | None, _adapter_option(help="alpha of LoRA. Default: twice the rank.")] = None,
    bottleneck_size: Annotated[
        int | None, _adapter_option(help="Width of an adapter's bottleneck. Default: 256.")
    ] = None,
    activation: Annotated[str | None, _adapter_option(help="In an adapter's bottleneck. Default: tanh.")] = None,
    placement: Annotated[
        str | None,
        _adapter_option(help="Of an adapter: series (in front, the default) or parallel."),
    ] = None,
    side: Annotated[
        str | None,
        _adapter_option(help="Of an adapter in series: input (in front of the module, the default) or output."),
    ] = None,
    init_weights: Annotated[
        str | None,
        _adapter_option(help="Of an adapter: zero (starts as the base model, the default) or bert (a small normal)."),
    ] = None,
    dropout: Annotated[float, _adapter_option(help="Dropout on the adapter's input.")] = 0.05,
    epochs: Annotated[float, _training_option(help="Passes over the data.")] = 3.0,
    max_steps: Annotated[int | None, _training_option(help="Optimizer steps; replaces --epochs.")] = None,
    batch_size: Annotated[int, _training_option(help="Examples per forward pass.")] = 16,
    gradient_accumulation: Annotated[int, _training_option(help="Forward passes per optimizer step.")] = 1,
    learning_rate: Annotated[float, _training_option(help="Peak rate of AdamW.")] = 3e-4,
    warmup_steps: Annotated[
        int | None,
        _training_option(help="Steps of linear warm-up. Default: 100, or a tenth of the run if that is less."),
    ] = None,
    max_length: Annotated[
        int | None,
        _training_option(
            help="Longer examples are cut to this many tokens. Default: 512, or the model's positions if fewer."
        ),
    ] = None,
    eval_fraction: Annotated[
        float, _training_option(help="Share of the examples that is held out for evaluation.")
    ] = 0.0,
    eval_data: Annotated[Path | None, _training_option(help="A file to evaluate on, like --data.")] = None,
    seed: Annotated[
        int,
        _training_option(help="For the adapter's initial weights, the order of the data and dropout."),
    ] = 0,
    dtype: Annotated[str, _training_option(help="Of the base model: auto (as saved), float32 or bfloat16.")] = "auto",
    gradient_checkpointing: Annotated[
        bool,
        _training_option("--gradient-checkpointing", help="Trade time for memory."),
    ] = False,
    save_steps: Annotated[int, _output_option(help="Steps between the Trainer's checkpoints; two are kept.")] = 500,
    overwrite: Annotated[
        bool,
        _output_option("--overwrite", help="Replace an earlier run's files in --output."),
    ] = False,
) -> None:
    """Fine-tune a model with LoRA, adapters, or SIBO's of either: an adapter folder and a report."""
    from sibo_triton.finetune.options import FinetuneOptions, InputError

    options = FinetuneOptions(
        model=model,
        data=data,
        output=output,
        task=task,
        method=method,
        target_modules=_split(target_modules),
        sibo_lambda=sibo_lambda,
        sibo_learnable=sibo_learnable,
        sibo_target_modules=_split(sibo_target_modules),
        sibo_blocks=_split(sibo_blocks),
        rank=rank,
        alpha=alpha,
        bottleneck_size=bottleneck_size,
        activation=activation,
        placement=placement,
        side=side,
        init_weights=init_weights,
        dropout=dropout,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        max_length=max_length,
        eval_fraction=eval_fraction,
        eval_data=eval_data,
        seed=seed,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
        overwrite=overwrite,
    )
    try:
        result = _run_finetune(options, recipe, _given(context))
    except InputError as error:
        _fail(error, _BAD_INPUT)
    typer.echo(f"adapter and report: {output}")
    if result.diverged:
        _fail("training diverged: a loss was NaN or infinite; lower --learning-rate", _FAILED)
    if result.interrupted:
        raise typer.Exit(_INTERRUPTED)


@app.command()
def recipes() -> None:
    """List the recipes: the settings of published runs, for `finetune` and `evaluate`."""
    from rich.console import Console
    from rich.table import Table

    from sibo_triton.finetune.recipes import load_recipe, recipe_names

    table = Table("recipe", "what it is")
    for name in recipe_names():
        recipe = load_recipe(name)
        data = f"trained on {recipe.train_data}, evaluated on {', '.join(recipe.test_data)}"
        table.add_row(name, f"{recipe.description} ({recipe.base_model}), {data}")
    Console().print(table)


@app.command()
def evaluate(
    recipe: Annotated[
        str,
        typer.Option(help="Prompt, generation and scoring: a name that `sibo-triton recipes` lists, or a file."),
    ],
    model: Annotated[str, typer.Option(help="Base model: a folder that save_pretrained wrote, or a hub id.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="JSON (a list, or an object per line), CSV or Parquet with the columns `instruction` and `answer`; "
            "repeat the option for several."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the predictions and the report.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a trained adapter. Without it the base model answers.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions per batch; each takes one row per beam.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Ask only the first questions of each file.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams of the search. Default: the recipe's.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximal length of a response. Default: the recipe's.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the base model: auto (as saved), float32 or bfloat16. Default: the recipe's."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier evaluation's files in --output.")
    ] = False,
) -> None:
    """Let a model answer questions and score it as LLM-Adapters does: predictions, a JSON report and a table."""
    from sibo_triton.finetune.options import InputError

    try:
        from sibo_triton.finetune.evaluate import EvaluateOptions, run_evaluation
        from sibo_triton.finetune.recipes import load_recipe

        run_evaluation(
            EvaluateOptions(
                recipe=load_recipe(recipe),
                model=model,
                data=tuple(data),
                output=output,
                adapter=adapter,
                batch_size=batch_size,
                limit=limit,
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                dtype=dtype,
                overwrite=overwrite,
            )
        )
    except InputError as error:
        _fail(error, _BAD_INPUT)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: the predictions so far, if any, are in {output}", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    typer.echo(f"predictions and report: {output}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything that the demonstration makes.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the base model, the data and the adapters.")] = 0,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Bottleneck adapters, plain and SIBO's, instead of LoRA.")
    ] = False,
) -> None:
    """Train a small decoder to add, then teach it to subtract with LoRA and SIBO-LoRA: about 3 minutes, offline."""
    from sibo_triton.finetune.options import ADAPTER_METHODS, LORA_METHODS, InputError

    try:
        from sibo_triton.finetune.demo import run_demo

        problems = run_demo(output, seed, methods=ADAPTER_METHODS if adapters else LORA_METHODS)
    except InputError as error:
        _fail(error, _BAD_INPUT)
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(_FAILED)


@app.command()
def env() -> None:
    """Print what a bug report needs: versions, devices, and whether these versions were tested together."""
    from sibo_triton import environment

    environment.main()


def _run_finetune(options: Any, recipe: str | None, given: set[str]) -> Any:
    from sibo_triton.finetune.recipes import apply_recipe, load_recipe
    from sibo_triton.finetune.train import finetune as run

    return run(options if recipe is None else apply_recipe(load_recipe(recipe), options, given))


def _given(context: typer.Context) -> set[str]:
    """The names of the options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


def _split(names: list[str] | None) -> tuple[str, ...] | None:
    """The values of a repeatable option, each of which may hold several separated by commas."""
    split = [part.strip() for name in names or [] for part in name.split(",")]
    return tuple(part for part in split if part) or None


def _fail(message: object, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
