"""Hooks of pytest, part of `conftest.py`: a run says what it ran on, and SIBO_EXPECT_VERSIONS holds it to versions.

SIBO_EXPECT_VERSIONS="triton==3.6.0,numpy==2.3.5" stops a run on other versions, and fails one that skips any test:
`make` sets it where it lays versions over the environment, which nobody else would notice to be missing.
"""

import importlib
import importlib.metadata
import os

import pytest

EXPECTED_VERSIONS = [pin.split("==") for pin in os.environ.get("SIBO_EXPECT_VERSIONS", "").split(",") if pin]


def pytest_configure():
    for name, version in EXPECTED_VERSIONS:
        found = importlib.import_module(name).__version__, importlib.metadata.version(name)
        if found != (version, version):
            raise pytest.UsageError(
                f"SIBO_EXPECT_VERSIONS asks for {name} {version}; imported is {found[0]}, installed {found[1]}"
            )


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    if EXPECTED_VERSIONS and exitstatus == pytest.ExitCode.OK and _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    names = ["torch", "transformers", "peft", *(name for name, _ in EXPECTED_VERSIONS)]
    versions = (f"{name} {importlib.metadata.version(name)}" for name in names)
    terminalreporter.write_line(f"ran on {', '.join(versions)}")
    if EXPECTED_VERSIONS and _skipped(config):
        terminalreporter.write_line("failed: tests were skipped, SIBO_EXPECT_VERSIONS allows none", red=True)


def _skipped(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")  # a worker process of xdist has none
    return reporter.stats.get("skipped") if reporter is not None else None
