"""SIBO_EXPECT_VERSIONS stops what would otherwise pass on versions that nobody meant, or by running nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_pytest(tmp_path, test, versions, *arguments):
    (tmp_path / "conftest.py").write_text((ROOT / "tests/expected_versions.py").read_text())
    (tmp_path / "test_one.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, "test_one.py"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"SIBO_EXPECT_VERSIONS": versions, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins take seconds to import
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)


SKIPPED = "import pytest\ndef test_one(): pytest.skip('no reason')\n"
PASSED = "def test_one(): pass\n"


@pytest.mark.parametrize(
    ("test", "versions", "code", "message"),
    [
        (PASSED, f"numpy=={np.__version__}", 0, f"numpy {np.__version__}"),
        (PASSED, "numpy==1.0", 4, f"asks for numpy 1.0; imported is {np.__version__}"),
        (SKIPPED, f"numpy=={np.__version__}", 1, "failed: tests were skipped"),
        (SKIPPED, "", 0, "1 skipped"),
    ],
)
def test_other_versions_and_skipped_tests_fail_a_run(test, versions, code, message, tmp_path):
    run = run_pytest(tmp_path, test, versions)
    assert run.returncode == code and message in run.stdout + run.stderr, run.stdout + run.stderr


def test_a_test_that_a_worker_process_skips_fails_the_run(tmp_path):
    run = run_pytest(tmp_path, SKIPPED, f"numpy=={np.__version__}", "-p", "xdist", "-n", "1")
    assert run.returncode == 1 and "failed: tests were skipped" in run.stdout, run.stdout + run.stderr
