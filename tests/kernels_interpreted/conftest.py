"""These tests run Triton's interpreter, which must be chosen before triton is imported: a process of their own."""

import os
from pathlib import Path

import pytest
from unwritten import empty_is_nan

__all__ = ["empty_is_nan"]

HERE = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    if INTERPRETING:
        return
    skip = pytest.mark.skip(reason="run by TRITON_INTERPRET=1 pytest tests/kernels_interpreted (make test-interpreter)")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def launches_are_planned_anew():
    """What a test replaces, a plan or a kernel, is in no launcher's key."""
    launching = pytest.importorskip("sibo_triton.kernels.launching")
    launching.forget_launches()
    yield
    launching.forget_launches()
