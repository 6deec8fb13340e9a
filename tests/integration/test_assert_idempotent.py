"""The example of the kit for users: ten handlers, of which eight have a classic flaw."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "test_your_handlers.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("test_your_handlers", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("number", range(10))
def test_each_handler_is_judged_rightly(example: ModuleType, number: int) -> None:
    """The two that are right pass; each of the eight others is named with its own reason, and with no other."""
    handler, _, _, reason = example.HANDLERS[number]
    assert example.judge(number) == ({reason} if reason else set()), handler.__name__


def test_there_are_two_right_and_eight_different_wrong_ones(example: ModuleType) -> None:
    """No flaw is shown twice."""
    reasons = [reason for *_, reason in example.HANDLERS]
    assert reasons.count(None) == 2
    assert len(set(reasons)) == 9


def test_the_example_runs_by_itself() -> None:
    """`python examples/test_your_handlers.py` prints what is wrong, and what to do about it."""
    shown = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=120, check=True).stdout
    assert shown.count("is not idempotent") == 8
    assert "idempotency_key" in shown
