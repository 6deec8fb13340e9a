"""The payments of the demo: made-up ones, or the rows of a CSV or JSON-lines file of the user's own."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

from ..errors import InvalidBizId
from ..identity import extract_biz_id

__all__ = ["BadInput", "made_up", "read_rows"]


class BadInput(ValueError):
    """A file of payments cannot be used; the text says which line and why."""


def made_up(payments: int, seed: int) -> tuple[dict[str, Any], ...]:
    """So many payments with ids and amounts of their own."""
    rng = random.Random(seed)  # noqa: S311 - made-up amounts, the same for the same seed
    return tuple(
        {"payment_id": f"p-{number:06}", "amount": f"{rng.randint(100, 99_999) / 100:.2f}", "currency": "EUR"}
        for number in range(1, payments + 1)
    )


def read_rows(path: Path, biz_id: str) -> tuple[dict[str, Any], ...]:
    """The rows of a CSV file with a header line, or of a file with one JSON object a line. Raises BadInput."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path.name} cannot be read as UTF-8 text: {error}") from error
    rows = _json_lines(path, text) if text.lstrip().startswith("{") else list(csv.DictReader(text.splitlines()))
    if not rows:
        raise BadInput(f"{path.name} has no rows")
    for number, row in enumerate(rows, 1):
        try:
            extract_biz_id(biz_id, row)
        except InvalidBizId as error:
            raise BadInput(f"row {number} of {path.name} has no usable id: {error}") from error
    return tuple(rows)


def _json_lines(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadInput(f"line {number} of {path.name} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadInput(f"line {number} of {path.name} is not a JSON object")
        rows.append(row)
    return rows
