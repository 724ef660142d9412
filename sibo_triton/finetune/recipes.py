"""Recipes: the settings of a published run, as TOML files in `examples/recipes/`.

A recipe says which adapter goes where, how it is trained, the prompt around the data, and how answers are generated and
scored: everything except the weights and the data, which the user provides.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sibo_triton.finetune.instructions import TEMPLATES, PromptTemplate
from sibo_triton.finetune.options import FinetuneOptions, InputError
from sibo_triton.finetune.scoring import ANSWERS

_SUFFIX = ".toml"
_TEXTS = "a list of strings"

# The keys that each table of a recipe may have, with their types.
_HEAD = {"description": str, "model_type": str, "base_model": str, "train_data": str, "test_data": list}
_PROMPT = {"template": str, "train_on_inputs": bool}
_EVALUATION = {"answers": list, "num_beams": int, "max_new_tokens": int}
_ADAPTER = {
    "method": str,
    "target_modules": list,
    "sibo_lambda": float,
    "sibo_learnable": bool,
    "sibo_target_modules": list,
    "rank": int,
    "alpha": int,
    "bottleneck_size": int,
    "activation": str,
    "placement": str,
    "side": str,
    "init_weights": str,
    "dropout": float,
}
_TRAINING = {
    "epochs": float,
    "batch_size": int,
    "gradient_accumulation": int,
    "learning_rate": float,
    "warmup_steps": int,
    "max_length": int,
    "dtype": str,
    "gradient_checkpointing": bool,
}
_TABLES = {"adapter": _ADAPTER, "training": _TRAINING, "prompt": _PROMPT, "evaluation": _EVALUATION}
# These tables must be complete; the others have the defaults of `sibo-triton finetune`.
_COMPLETE = ("", "prompt", "evaluation")


@dataclass(frozen=True)
class Recipe:
    """The settings of a published run.

    Attributes:
        name: the file's name without its ending.
        description: one line.
        model_type: transformers' name of the architecture to which the module names belong.
        base_model, train_data, test_data: what the authors trained and evaluated on; not downloaded.
        options: fields of `FinetuneOptions`: the tables `adapter` and `training`.
        template: the prompt around the data.
        train_on_inputs: whether the loss is on the prompt too.
        answers: kinds of answers that it is evaluated on, keys of `sibo_triton.finetune.scoring.ANSWERS`.
        num_beams, max_new_tokens: of generation, which never samples.
    """

    name: str
    description: str
    model_type: str
    base_model: str
    train_data: str
    test_data: tuple[str, ...]
    options: Mapping[str, Any]
    template: PromptTemplate
    train_on_inputs: bool
    answers: tuple[str, ...]
    num_beams: int
    max_new_tokens: int

    def note_on(self, model_type: str) -> str | None:
        """What to say of a model that is of another architecture than the recipe's; None of one that is not."""
        if self.model_type == model_type:
            return None
        return f"the recipe {self.name} is for {self.model_type} models, this is a {model_type}"


def recipe_folder() -> Path:
    """The folder of the recipes: in the installed package, or `examples/recipes/` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "examples" / "recipes"


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in recipe_folder().glob(f"*{_SUFFIX}"))


def load_recipe(name: str) -> Recipe:
    """Read a recipe.

    Args:
        name: a recipe that comes with the package, or the path of a .toml file.

    Raises:
        InputError: there is no such recipe, or the file is not one; it names file, key and value.
    """
    path = Path(name)
    if path.suffix != _SUFFIX:
        if name not in recipe_names():
            raise InputError(
                f"--recipe {name}: there is no such recipe; choose one of {', '.join(recipe_names()) or 'none'}, or "
                f"give the path of a {_SUFFIX} file."
            )
        path = recipe_folder() / (name + _SUFFIX)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"--recipe {path}: there is no such file.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--recipe {path}: cannot be read as TOML ({error}).") from error
    return _recipe(path, content)


def apply_recipe(recipe: Recipe, options: FinetuneOptions, given: Collection[str]) -> FinetuneOptions:
    """The options with the recipe's settings, except for the names in `given`, which the user has set.

    `--method lora` on a recipe of SIBO-LoRA is the plain method with all else equal.

    Raises:
        InputError: the given method belongs to another family than the recipe's.
    """
    settings = dict(recipe.options)
    if "method" in given and "method" in settings and options.method != settings["method"]:
        families = {method.removeprefix("sibo-") for method in (options.method, settings["method"])}
        if len(families) > 1:
            raise InputError(
                f"--method {options.method}: the recipe {recipe.name} is for {settings['method']}; choose a recipe of "
                "the other kind."
            )
        if not options.mixes:
            settings = {name: value for name, value in settings.items() if not name.startswith("sibo_")}
    settings = {name: value for name, value in settings.items() if name not in given}
    if "max_steps" in given:
        settings.pop("epochs", None)
    return replace(options, recipe=recipe, **settings)


def _recipe(path: Path, content: Mapping[str, Any]) -> Recipe:
    head = {key: value for key, value in content.items() if key not in _TABLES}
    tables = {"": _checked(path, "", head, _HEAD)}
    for name, keys in _TABLES.items():
        table = content.get(name, {})
        if not isinstance(table, dict):
            raise InputError(f"--recipe {path}: `{name}` is {table!r:.40}; write it as a table, [{name}].")
        tables[name] = _checked(path, name, table, keys)
    prompt, evaluation = tables["prompt"], tables["evaluation"]
    template = _choice(path, "[prompt] template", prompt["template"], TEMPLATES)
    for kind in evaluation["answers"]:
        _choice(path, "[evaluation] answers", kind, ANSWERS)
    for key in ("num_beams", "max_new_tokens"):
        if evaluation[key] < 1:
            raise InputError(f"--recipe {path}, [evaluation] {key} is {evaluation[key]}: it must be at least 1.")
    return Recipe(
        name=path.stem,
        options=tables["adapter"] | tables["training"],
        template=template,
        train_on_inputs=prompt["train_on_inputs"],
        **evaluation,
        **tables[""],
    )


def _checked(path: Path, table: str, values: Mapping[str, Any], keys: Mapping[str, type]) -> dict[str, Any]:
    """The values of a table, with their types checked; lists as tuples."""
    where = f"--recipe {path}, " + (f"[{table}] " if table else "")
    for key in values:
        if key not in keys:
            raise InputError(f"{where}{key}: there is no such setting; choose among {', '.join(keys)}.")
    missing = [key for key in keys if key not in values]
    if missing and table in _COMPLETE:
        raise InputError(f"{where}{missing[0]}: is missing.")
    result: dict[str, Any] = {}
    for key, value in values.items():
        if keys[key] is list:
            right = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
            result[key] = tuple(value) if right else None
        elif keys[key] is float:
            right = isinstance(value, (int, float)) and not isinstance(value, bool)
            result[key] = float(value) if right else None
        else:
            right = type(value) is keys[key]
            result[key] = value
        if not right:
            expected = _TEXTS if keys[key] is list else keys[key].__name__
            raise InputError(f"{where}{key} is {value!r:.60}: expected {expected}.")
    return result


def _choice(path: Path, key: str, value: str, choices: Mapping[str, Any]) -> Any:
    if value not in choices:
        raise InputError(f"--recipe {path}, {key} is {value!r}: choose one of {', '.join(choices)}.")
    return choices[value]
