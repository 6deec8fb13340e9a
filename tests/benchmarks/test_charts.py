"""The pictures beside the reports show what the reports say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import charts

DRAWN = sorted({chart.report for chart in charts.CHARTS})


@pytest.mark.parametrize("report", DRAWN)
def test_each_picture_is_of_its_report_and_shown_in_it(report: str) -> None:
    """Drawn again from the report's tables it is the same, and the report shows it."""
    picture = charts.REPORTS / f"{report}.svg"
    assert picture.read_text("utf-8") == charts.draw(report), "run python tests/benchmarks/charts.py"
    assert f"({report}.svg)" in (charts.REPORTS / f"{report}.md").read_text("utf-8")


@pytest.mark.parametrize("report", DRAWN)
def test_another_figure_is_another_picture(report: str, tmp_path: Path) -> None:
    """Control: with one ratio changed in the report its picture would be found to be old."""
    text = (charts.REPORTS / f"{report}.md").read_text("utf-8")
    chart = next(chart for chart in charts.CHARTS if chart.report == report)
    before = charts.rows(chart, text)
    at = text.index(chart.heading)
    last = before[-1]
    (tmp_path / f"{report}.md").write_text(text[:at] + text[at:].replace(f" {last[1]:g}", " 77.7"), "utf-8")
    changed = (tmp_path / f"{report}.md").read_text("utf-8")
    assert changed != text
    assert charts.draw(report, tmp_path) != charts.draw(report)


def test_a_table_is_put_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new run replaces its table under its heading and nothing else, and draws the picture."""
    for name in ("consumer.md", "consumer.svg"):
        (tmp_path / name).write_text((charts.REPORTS / name).read_text("utf-8"), "utf-8")
    monkeypatch.setattr(charts, "REPORTS", tmp_path)
    monkeypatch.setattr(charts.draw, "__defaults__", (tmp_path,))
    before = (tmp_path / "consumer.md").read_text("utf-8")
    rows = "| plain | 1 | 1 to 1 | 1.00 | 1.00 to 1.00 | 9 |\n| window | 2 | 2 to 2 | 1.50 | 1.40 to 1.60 | 9 |"
    charts.put_table("consumer", "## RabbitMQ, ", f"| way | messages/s |\n|---|---|\n{rows}\n")
    after = (tmp_path / "consumer.md").read_text("utf-8")
    assert rows in after
    first, rest = before.split("## RabbitMQ, ")
    assert after.startswith(first)
    assert after.endswith(rest[rest.index("\n\n## ") :])
    assert ">1.5<" in (tmp_path / "consumer.svg").read_text("utf-8")
