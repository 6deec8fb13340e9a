"""How much room the remembered ids need: the README's table, made from the figures of the committed reports.

    python tests/benchmarks/capacity.py        # prints the table

Redis takes the most that `reports/redis_store.md` shows for an id, at any size and after turns of the retention. SQL
stores take what `reports/store_growth*.md` show for the largest store of their kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["PLANS", "bytes_each", "room", "table"]

REPORTS = Path(__file__).parent / "reports"
#: Ids a day, and for how many days each is remembered.
PLANS = [(day, days) for day in (100_000, 1_000_000, 10_000_000) for days in (7, 30)]
#: The columns, and the name of the store in the reports.
COLUMNS = {"Redis, memory": "redis", "PostgreSQL, disk": "postgresql", "SQLite, disk": "sqlite"}


def bytes_each(reports: Path = REPORTS) -> dict[str, float]:
    """Bytes an id by store, as measured."""
    largest: dict[str, tuple[int, float]] = {}
    for report in sorted(reports.glob("store_growth*.md")):
        for line in report.read_text("utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) > 2 and re.fullmatch(r"[\d,]+", cells[1]) and re.fullmatch(r"[\d,]+", cells[-1]):
                size, each = (int(cell.replace(",", "")) for cell in (cells[1], cells[-1]))
                largest[cells[0]] = max(largest.get(cells[0], (0, 0.0)), (size, float(each)))
    found = {name: each for name, (_, each) in largest.items()}
    told = (reports / "redis_store.md").read_text("utf-8")
    found["redis"] = max(float(each) for each in re.findall(r"^\| bytes an id [^|]*\| ([\d.]+)", told, re.MULTILINE))
    return found


def room(total: float) -> str:
    """Bytes in words, of two digits, rounded up."""
    for unit, size in (("MB", 1e6), ("GB", 1e9), ("TB", 1e12)):
        if total < 999.5 * size or unit == "TB":
            digits = total / size
            step = 10 ** max(0, len(str(int(digits))) - 2)
            if digits < 10:
                return f"{-(-digits * 10 // 1) / 10:g} {unit}"
            return f"{int(-(-digits // step) * step)} {unit}"
    raise AssertionError


def table(each: Mapping[str, float]) -> str:
    """The table, with a last line break."""
    lines = [f"| ids a day, remembered for | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for day, days in PLANS:
        cells = [room(day * days * each[name]) for name in COLUMNS.values()]
        lines.append(f"| {day:,}, {days} days | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(bytes_each()), end="")
