"""These tests launch on a CUDA device; with TRITON_INTERPRET=1, in Triton's interpreter on CPU tensors instead.

So every line of them runs without a GPU too (`make test-interpreter`), but for what only CUDA has, which stands behind
`device == "cuda"`.
"""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETING else "cuda"


@pytest.fixture(autouse=True)
def empty_is_nan(monkeypatch, request):
    """What a kernel does not write shows; not where launches are replayed, of which such an operation is none."""
    if request.node.get_closest_marker("as_allocated"):
        return
    empty = torch.empty

    def empty_of_nan(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty_of_nan)


KERNELS = {"found in the cache": 0, "compiled": 0}


def pytest_configure():
    try:
        from triton import knobs
    except ImportError:
        return

    def count(src, metadata, metadata_group, times, cache_hit):
        KERNELS["found in the cache" if cache_hit else "compiled"] += 1

    knobs.compilation.listener = count


def pytest_terminal_summary(terminalreporter):
    if any(KERNELS.values()):
        terminalreporter.write_line("kernels: " + ", ".join(f"{number} {where}" for where, number in KERNELS.items()))
