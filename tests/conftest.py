"""Fixtures that every kind of test may use, and the line that says what was left out."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Generator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import servers


@pytest.fixture
def unique() -> str:
    """A name that no other test has: for queues, scopes and table prefixes."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI nothing may be left out: whatever was skipped there, for want of a server or a tool, has failed."""
    report = yield
    if servers.IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where nothing may be left out: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if servers.left_out:
        terminalreporter.write_line(f"left out or stood in for: {', '.join(sorted(servers.left_out))}")
