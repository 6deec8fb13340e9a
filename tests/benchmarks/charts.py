"""The reports as pictures: beside each report with a table of ratios an SVG of the same name, bars with their spread.

    python tests/benchmarks/charts.py

Reads the tables of `reports/*.md` and draws them again; a test sees to it that no picture is older than its report. A
bar is the median of the rounds' ratios, the line on it reaches from the least to the most, and the dashed line is 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

__all__ = ["CHARTS", "REPORTS", "draw", "put_table", "write"]

REPORTS: Final = Path(__file__).with_name("reports")

_NUMBER: Final = r"([\d.]+)"
#: The ratio has a cell of its own, and its spread the next one.
_APART: Final = rf"{_NUMBER} \| {_NUMBER} to {_NUMBER}"
#: One cell: the median, and in brackets the spread.
_WITHIN: Final = rf"{_NUMBER} \({_NUMBER}(?: to |\.\.){_NUMBER}\)"

_WIDTH, _LEFT, _RIGHT, _ROW, _HEAD = 800, 310, 60, 24, 44
_BAR, _BASE, _TEXT = "#2f81f7", "#8b949e", "#6e7681"


@dataclass(frozen=True)
class Chart:
    """A table of a report: the heading that it is under, and how a row tells a name, a ratio and its spread."""

    report: str
    title: str
    heading: str
    row: str


def _row(columns: int, ratio: str) -> str:
    """A row of a Markdown table: the name, so many cells that do not matter, the ratio."""
    return rf"^\| ([^|]+?) \|(?:[^|\n]*\|){{{columns}}} {ratio}"


CHARTS: Final = (
    Chart("consumer", "RabbitMQ, Redis store: rate, plain kombu = 1", "## RabbitMQ, ", _row(2, _APART)),
    Chart("consumer", "Redis broker and store: rate, plain kombu = 1", "## `idempotent-redis` and", _row(2, _APART)),
    Chart("celery", "running a task: rate, plain Celery = 1", "| running,", _row(1, _WITHIN)),
    Chart("celery", "sending a task: rate, plain Celery = 1", "| sending,", _row(1, _WITHIN)),
    Chart("redis_store", "a fresh id, on two cores: rate, SET NX + SET = 1", "# The Redis", _row(1, _WITHIN)),
    Chart("redis_store", "a duplicate, on two cores: rate, SET NX + SET = 1", "# The Redis", _row(3, _WITHIN)),
    Chart("redis_store", "a fresh id, on one core", "Both on one core", _row(1, _WITHIN)),
    Chart("redis_store", "a duplicate, on one core", "Both on one core", _row(3, _WITHIN)),
    Chart("pg_window", "quiet machine: rate, one by one = 1", "## On a quiet machine", _row(1, _WITHIN)),
    Chart("latency", "guarded to plain kombu", "# From publish", _row(2, _WITHIN)),
    Chart(
        "outbox", "rate, the line above it = 1", "# The outbox",
        rf"^\| ([^|]+ \| [^|]+?) \|(?:[^|\n]*\|){{2}} {_APART}",
    ),
    Chart(
        "publish_rabbitmq", "publishing with a confirm: rate, kombu = 1", "```text",
        rf"^(\S.*?)\s{{2,}}\d+\s+\d+\s+\d+\s+{_NUMBER}\s+{_NUMBER}\s+{_NUMBER}",
    ),
)  # fmt: skip


def rows(chart: Chart, text: str) -> list[tuple[str, float, float, float]]:
    """Name, median, least and most of each row of the table that a chart is of. Raises LookupError if there is none."""
    _, found, rest = text.partition(chart.heading)
    begin = 0 if chart.heading.startswith(("|", "`")) else rest.find("\n|")
    match = re.findall(chart.row, rest[begin:].split("\n\n")[0], re.MULTILINE)
    if not found or not match:
        raise LookupError(f"{chart.report}.md has no table under {chart.heading!r}")
    return [
        (re.sub(r"[*`]", "", name).replace(" | ", ": "), float(median), float(low), float(high))
        for name, median, low, high in match
    ]


def draw(report: str, folder: Path = REPORTS) -> str:
    """All charts of a report, one above the other, as SVG."""
    text = (folder / f"{report}.md").read_text("utf-8")
    parts, top = [], 0
    for chart in CHARTS:
        if chart.report == report:
            drawn, height = _panel(chart.title, rows(chart, text), top)
            parts.append(drawn)
            top += height
    size = f'width="{_WIDTH}" height="{top}" viewBox="0 0 {_WIDTH} {top}"'
    style = f'font-family="sans-serif" font-size="12" fill="{_TEXT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{"".join(parts)}</svg>\n'


def _panel(title: str, table: list[tuple[str, float, float, float]], top: int) -> tuple[str, int]:
    scale = (_WIDTH - _LEFT - _RIGHT) / max(high for *_, high in table)
    bottom = top + _HEAD + _ROW * len(table)
    lines = [f'<text x="8" y="{top + 24}" font-size="14" font-weight="bold">{escape(title)}</text>']
    for number, (name, median, low, high) in enumerate(table):
        y = top + _HEAD + _ROW * number
        color = _BASE if low == median == high else _BAR
        least, most = (_LEFT + value * scale for value in (low, high))
        lines += [
            f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{median * scale:.1f}" height="16" fill="{color}"/>',
            f'<path d="M{least:.1f} {y + 8}H{most:.1f}M{least:.1f} {y + 4}v8M{most:.1f} {y + 4}v8" stroke="{_TEXT}"/>',
            f'<text x="{most + 8:.1f}" y="{y + 13}">{median:g}</text>',
        ]
    one = _LEFT + scale
    lines.append(f'<path d="M{one:.1f} {top + _HEAD - 6}V{bottom}" stroke="{_TEXT}" stroke-dasharray="4 3"/>')
    return "\n".join(lines) + "\n", bottom - top + 12


def put_table(report: str, heading: str, table: str) -> None:
    """Replace the table under a heading of a report, and draw its picture again."""
    path = REPORTS / f"{report}.md"
    before, found, rest = path.read_text("utf-8").partition(heading)
    begin = rest.index("\n|") + 1
    end = rest.index("\n\n", begin)
    path.write_text(f"{before}{found}{rest[:begin]}{table.strip()}{rest[end:]}", "utf-8")
    write(report)


def write(*reports: str) -> None:
    """Draw the pictures of these reports, or of all."""
    for report in reports or sorted({chart.report for chart in CHARTS}):
        (REPORTS / f"{report}.svg").write_text(draw(report), "utf-8")


if __name__ == "__main__":
    write()
