"""The section of a saved adapter's model card that says how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_START, _END = "<!-- sibo-triton -->", "<!-- /sibo-triton -->"


_KINDS = {
    "SIBO-LoRA": "not a plain LoRA adapter: the adapter reads",
    "SIBO adapter": "a bottleneck adapter whose branch reads",
}


def remove_from_model_card(directory: str) -> None:
    """Remove the SIBO section of `directory`/README.md, if there is one."""
    path = Path(directory) / "README.md"
    if path.exists():
        before, _, rest = path.read_text(encoding="utf-8").partition(_START)
        _, end, after = rest.partition(_END)
        if end:
            path.write_text(f"{before.rstrip()}\n{after}", encoding="utf-8")


def update_model_card(
    directory: str, lambda_: float, learnable: bool, source: str, method: Literal["SIBO-LoRA", "SIBO adapter"]
) -> None:
    """Write or replace the SIBO section of `directory`/README.md."""
    path = Path(directory) / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else "---\nlibrary_name: peft\n---\n"
    before, start, rest = text.partition(_START)
    after = rest.partition(_END)[2] if start else ""
    value = f"learnable, one per module, starting at {lambda_}" if learnable else f"{lambda_}"
    section = f"""{_START}
## {method}

This is a {method.removesuffix(" adapter")} adapter (arXiv 2402.11896), {_KINDS[method]}
`(1 - lambda) * x + lambda * h0`, where h0 is the initial residual.

- lambda: {value}
- initial residual: {source}

It needs the library sibo-triton, and one line before it is loaded:

```python
import sibo_triton  # registers the adapter type with PEFT
```
{_END}"""
    path.write_text(f"{before.rstrip()}\n\n{section}\n{after.lstrip()}", encoding="utf-8")
