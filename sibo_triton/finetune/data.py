"""Read examples from a JSONL, CSV or Parquet file, with errors that name file, line and column."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sibo_triton.finetune.options import InputError, first_line

_PAIR = ("prompt", "completion")
_NEEDED = "it needs a column `text`, or the two columns `prompt` and `completion`"
# The position of a row as users know it: a line, except in Parquet, which has none.
_Place = str


@dataclass
class Examples:
    """The examples of one file.

    Attributes:
        columns: those that are read: ("text",), or ("prompt", "completion").
        rows: one tuple of strings for each example, in the order of `columns`.
        places: the position of each example in the file, such as "line 3"; for messages.
        ignored: names of the other columns in the file.
        notes: messages for the user about the data.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    places: list[_Place] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def read_examples(path: Path) -> Examples:
    """Read a data file: .jsonl, .ndjson, .json with one object per line, .csv or .parquet.

    Raises:
        InputError: the file is missing, empty, of another kind, or a row differs from the others. Nothing is skipped
            silently: the first unusable row raises, with its line and column.
    """
    examples: Examples | None = None
    for place, row in read_rows(path):
        if examples is None:
            examples = Examples(path, _columns_of(path, place, row))
        # An empty prompt is allowed: the completion then starts from nothing.
        values = tuple(text_value(path, place, row, column, column == "prompt") for column in examples.columns)
        examples.rows.append(values)
        examples.places.append(place)
        examples.ignored.update(name for name in row if name not in examples.columns)
    if examples is None:
        raise InputError(f"{path}: holds no examples; {_NEEDED}.")
    return examples


def read_rows(path: Path, needed: str = _NEEDED, lists: bool = False) -> Iterator[tuple[_Place, Mapping[str, Any]]]:
    """Each row of a data file, with its position.

    Args:
        path: .jsonl, .ndjson, .json, .csv or .parquet.
        needed: description of the required columns, for messages.
        lists: whether a .json file may also be one list of objects; its places are "item 1", "item 2"...

    Raises:
        InputError: the file is missing, of another kind, or does not match its suffix.
    """
    readers = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json if lists else _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if not path.exists():
        raise InputError(f"{path}: there is no such file.")
    if reader is None or path.is_dir():
        kind = "a folder" if path.is_dir() else f"of kind {path.suffix or 'unknown'!r}"
        raise InputError(
            f"{path}: is {kind}; give a file that ends in {'.json, ' if lists else ''}.jsonl, .csv or .parquet."
        )
    for place, row in reader(path):
        if not isinstance(row, dict):
            raise InputError(f"{path}, {place}: is a JSON {type(row).__name__}, not an object; {needed}.")
        yield place, row


def _columns_of(path: Path, place: _Place, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns to read, determined by the first row."""
    pair = [name for name in _PAIR if name in row]
    if "text" in row and len(pair) == 2:
        raise InputError(
            f"{path}, {place}: has the columns `text`, `prompt` and `completion`; keep `text` alone to train on every "
            "token, or the other two to train on completions."
        )
    if len(pair) == 2:
        return _PAIR
    if "text" in row:
        return ("text",)
    if pair:
        (missing,) = set(_PAIR) - set(pair)
        raise InputError(f"{path}, {place}: has a column `{pair[0]}` but no column `{missing}`; {_NEEDED}.")
    names = ", ".join(f"`{name}`" for name in row) or "none"
    raise InputError(f"{path}, {place}: no column to train on (found: {names}); {_NEEDED}.")


def text_value(path: Path, place: _Place, row: Mapping[str, Any], column: str, may_be_empty: bool) -> str:
    """The string in a column of a row.

    Raises:
        InputError: it is missing, not a string, not encodable, or empty although it must not be.
    """
    where = f"{path}, {place}, column `{column}`"
    if column not in row:
        raise InputError(f"{where}: missing; every example needs the columns of the first one.")
    value = row[column]
    if not isinstance(value, str):
        kind = "a chat or another list" if isinstance(value, list) else f"{type(value).__name__} {value!r}"
        raise InputError(f"{where}: expected a string, got {kind:.60}; write it as text, with the template applied.")
    if not value and not may_be_empty:
        raise InputError(f"{where}: is empty; remove the example or fill it in.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half of a surrogate pair at position {error.start}; repair it.") from error
    return value


def _read_jsonl(path: Path) -> Iterator[tuple[_Place, Any]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"line {number}"
            line = _decode(path, place, raw, first=number == 1)
            if not line.strip():
                continue
            if number == 1 and line.lstrip().startswith("["):
                raise InputError(f"{path}, {place}: is one JSON list; write one object per line (JSONL) instead.")
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, {place}, character {error.colno}: is not JSON ({error.msg}).") from error
            except (RecursionError, ValueError) as error:  # too deep; a number with thousands of digits
                raise InputError(f"{path}, {place}: cannot be read as JSON ({first_line(error)}).") from error
            yield place, row


def _read_json(path: Path) -> Iterator[tuple[_Place, Any]]:
    """A file that is one JSON list, or has one object per line."""
    content = path.read_bytes()
    if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _read_jsonl(path)
        return
    lines = content.splitlines(keepends=True)
    text = "".join(_decode(path, f"line {i}", line, first=i == 1) for i, line in enumerate(lines, start=1))
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, character {error.colno}: is not JSON ({error.msg}).") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({first_line(error)}).") from error
    for number, item in enumerate(items, start=1):
        yield f"item {number}", item


def _decode(path: Path, place: _Place, raw: bytes, first: bool) -> str:
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, {place}: is not UTF-8 (byte {error.start}); convert the file to UTF-8.") from error


def _read_csv(path: Path) -> Iterator[tuple[_Place, Mapping[str, Any]]]:
    csv.field_size_limit(sys.maxsize)  # Python's limit, 128 KiB, is less than a long document

    def lines() -> Iterator[str]:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield _decode(path, f"line {number}", raw, first=number == 1)

    reader = csv.reader(lines(), strict=True)
    try:
        header = next(reader, [])
        doubled = sorted({name for name in header if header.count(name) > 1})
        if doubled:
            raise InputError(f"{path}, line 1: the column `{doubled[0]}` stands there twice; rename one.")
        while True:
            place = f"line {reader.line_num + 1}"
            row = next(reader, None)
            if row is None:
                return
            if not row:  # a blank line
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{path}, {place}: has {len(row)} fields where the header names {len(header)}; put quotes around "
                    "a field that holds a comma or a line break."
                )
            yield place, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: is not CSV ({error}).") from error


def _read_parquet(path: Path) -> Iterator[tuple[_Place, Mapping[str, Any]]]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:  # it comes with datasets
        raise InputError("reading Parquet needs pyarrow: pip install 'sibo-triton[finetune]'.") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}, after row {number}: cannot be read as Parquet ({str(error):.120}).") from error
