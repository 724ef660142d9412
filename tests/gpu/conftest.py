"""These tests launch on a CUDA device; with TRITON_INTERPRET=1, in Triton's interpreter on CPU tensors instead.

So every line of them runs without a GPU too (`make test-interpreter`), but for what only CUDA has, which stands behind
`device == "cuda"`.
"""

import os

import pytest
from unwritten import empty_is_nan

__all__ = ["empty_is_nan"]

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETING else "cuda"


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
