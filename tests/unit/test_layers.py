"""Imports point downward only, and the core knows no broker, no database and no framework: a machine checks it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package that lies in `directory`/src, with its pyproject.toml."""
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory / "src")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package that may be spoiled."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "idempotent_bus", tmp_path / "src" / "idempotent_bus", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_point_downward_only() -> None:
    """The layers of pyproject.toml hold in the package as it is."""
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("policy", "import kombu", "the core knows no broker"),
        ("execution", "def later():\n    import sqlalchemy", "the core knows no broker"),
        ("errors", "from .executor import Executor", "imports point downward only"),
        ("store", "from .stores import open_store", "imports point downward only"),
    ],
)
def test_a_forbidden_import_is_caught(copy: Path, module: str, line: str, contract: str) -> None:
    """The control: one forbidden import in a copy of the package, even one within a function, breaks its contract."""
    with (copy / "src" / "idempotent_bus" / f"{module}.py").open("a") as file:
        file.write(f"\n{line}\n")
    result = lint(copy)
    assert result.returncode != 0, result.stdout
    assert f"{contract}" in result.stdout
    assert f"idempotent_bus.{module}" in result.stdout.partition("Broken contracts")[2]
