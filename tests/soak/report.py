"""Adds up what was gathered on one source, with the upper bounds that such counts allow, and says what is short.

Where something never happened in n independent trials, its probability is below 3/n with 95 % confidence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from idempotent_bus import hooks

from .cells import CELLS, CONTROLS
from .source import source

__all__ = ["FOLDER", "Gathered", "gathered", "line", "most_gathered", "write"]

FOLDER: Final = Path(__file__).parent / "reports"
_REPORT: Final = FOLDER / "soak.md"

#: What has to be shown, see the issue that this answers.
_MESSAGES, _KILLS, _KILLS_AT_EACH, _BROKER_RESTARTS, _STORE_RESTARTS = 200_000, 5_000, 50, 200, 100


@dataclass
class Gathered:
    """The reports of one source. void: runs in which a control showed no damage, or is missing; they do not count."""

    source: str
    cells: list[dict[str, Any]] = field(default_factory=list)
    controls: list[dict[str, Any]] = field(default_factory=list)
    void: list[str] = field(default_factory=list)

    def total(self, name: str, cells: Sequence[dict[str, Any]] | None = None) -> int:
        return sum(one[name] for one in (self.cells if cells is None else cells))

    def counter(self, name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for one in self.cells:
            found.update(one[name])
        return found

    def kills_at(self) -> Counter[str]:
        """By step, before it and after it together; "any moment" and "at the end" are no steps."""
        found: Counter[str] = Counter()
        for place, number in self.counter("kills").items():
            step, _, side = place.rpartition(" ")
            found[step if side in ("before", "after") else place] += number
        return found

    @property
    def broken(self) -> list[dict[str, Any]]:
        return [one for one in self.cells if one["verdict"].startswith(("BROKEN", "RABBITMQ DAMAGED"))]


def _read(path: Path) -> Gathered:
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    found = Gathered(path.stem)
    names = {cell.name for cell in CONTROLS}
    runs = {one["run"]: set[str]() for one in lines}
    for one in lines:
        if one.get("damage"):
            runs[one["run"]].add(one["cell"])
    found.void = [run for run, shown in runs.items() if shown != names]
    for one in lines:
        if one["run"] not in found.void:
            (found.controls if "damage" in one else found.cells).append(one)
    return found


def gathered() -> Gathered:
    """What there is for the source as it lies here."""
    path = FOLDER / f"{source()}.jsonl"
    return _read(path) if path.exists() else Gathered(source())


def most_gathered() -> Gathered:
    """Of all sources that there are reports of, the one with the most messages."""
    return max(
        (_read(path) for path in FOLDER.glob("*.jsonl")), key=lambda one: one.total("messages"), default=Gathered("")
    )


def line(one: dict[str, Any]) -> str:
    """One report on one line, for who watches."""
    doubled = f"{one['doubled']} doubled" + (f" {one['doubled_by']}" if one["doubled_by"] else "")
    return (
        f"{one['cell']}: {one['verdict']}; {one['messages']} messages, {sum(one['kills'].values())} kills, "
        f"{one['broker_restarts']} + {one['store_restarts']} restarts, {one['failovers']} failovers; "
        f"{one['lost']} lost, {doubled}, {one['recovered']} recovered, {one['seconds']:.0f} s"
    )


def _bound(trials: int) -> str:
    return f"< {3 / trials:.1e}" if trials else "-"


def _goals(found: Gathered) -> list[tuple[str, int, int]]:
    """What, wanted, reached."""
    at = found.kills_at()
    return [
        ("messages", _MESSAGES, found.total("messages")),
        ("SIGKILLs", _KILLS, sum(at.values())),
        *((f"SIGKILLs at `{step}`", _KILLS_AT_EACH, at[step]) for step in hooks.STEPS),
        ("restarts of brokers", _BROKER_RESTARTS, found.total("broker_restarts")),
        ("restarts and failovers of stores", _STORE_RESTARTS, found.total("store_restarts") + found.total("failovers")),
    ]


def short_of(found: Gathered) -> list[str]:
    """What has still to be gathered, in words."""
    return [f"{name}: {reached:,} of {wanted:,}" for name, wanted, reached in _goals(found) if reached < wanted]


def text_of(found: Gathered) -> str:
    """The report, as Markdown."""
    modes = {mode: [one for one in found.cells if one["cell"].startswith(mode)] for mode in ("store", "inbox")}
    steady = [one for one in modes["store"] if "failover" not in one["cell"]]
    dates = sorted(one["date"] for one in found.cells)
    by: Counter[str] = found.counter("doubled_by")
    cut_off, messages = found.total("cut_off_by_kills"), found.total("messages")
    kills = sum(found.kills_at().values())
    stops, faults = found.counter("stops"), sum(found.counter("faults").values())
    lines = [
        "# The soak, long form",
        "",
        f"Source `{found.source}`, {len({one['run'] for one in found.cells})} runs, {dates[0][:10]} to {dates[-1][:10]}"
        " (gathered by `python -m tests.soak`, added up by `python -m tests.soak report`).",
        "",
        f"**{messages:,} messages, {kills:,} SIGKILLs, {found.total('broker_restarts')} restarts of brokers, "
        f"{found.total('store_restarts')} of stores, {found.total('failovers')} failovers, {faults} faults of the "
        f"network: {found.total('lost')} lost; {found.total('doubled', modes['inbox'])} doubled with the inbox; "
        f"{found.total('doubled', steady)} doubled with a store, where {found.total('cut_off_by_kills', steady)} "
        "executions were killed between their effect and its completion.**",
        "",
        "| what | wanted | reached | |",
        "|---|---|---|---|",
        *(
            f"| {name} | {wanted:,} | {reached:,} | {'' if reached >= wanted else 'SHORT'} |"
            for name, wanted, reached in _goals(found)
        ),
        "",
        f"Beside these: {stops['short']} short stops (SIGSTOP), {stops['long']} for longer than a lease; "
        f"{found.total('wrong_clocks')} of {found.total('lives')} processes with a wall clock that was an hour fast or "
        f"slow; {found.total('recovered'):,} messages that were cut off or came again, and were done.",
        "",
        "## Bounds",
        "",
        "| what never happened | trials | probability, with 95 % confidence |",
        "|---|---|---|",
        f"| a message is lost | {messages:,} messages | {_bound(messages)} |",
        *(
            f"| a message is lost in the mode `{mode}` | {found.total('messages', cells):,} messages "
            f"| {_bound(found.total('messages', cells))} |"
            for mode, cells in modes.items()
        ),
        f"| a kill loses a message | {kills:,} kills | {_bound(kills)} |",
        f"| an effect is doubled with the inbox | {found.total('messages', modes['inbox']):,} messages "
        f"| {_bound(found.total('messages', modes['inbox']))} |",
        f"| an effect is doubled with a store, without an execution that was cut off "
        f"| {found.total('messages', steady):,} messages | {_bound(found.total('messages', steady))} |",
        "",
        f"Doubled with a store, by what excuses it: {_words(by)}. Executions that were killed between their effect and "
        f"a completion that was known to be durable: {cut_off} (of {found.total('completion_under_way')} it "
        "was under way). The rest of those was never seen twice, since the completion had arrived, or a probe or a "
        "person decided.",
        "",
        "## Cells",
        "",
        "| cell | runs | messages | kills | stops | broker restarts | store restarts, failovers | faults | lost "
        "| doubled | cut off by kills | unexcused | recovered | verdict |",
        "|---" * 14 + "|",
    ]
    for cell in CELLS:
        mine = [one for one in found.cells if one["cell"] == cell.name]
        if mine:
            lines.append(_row(found, cell.name, mine))
    lines += [
        "",
        "In a failover of Redis a replica is promoted that was cut off for a moment, and what it had not got is gone "
        "(asynchronous replication): what was forgotten then may run again, and nothing is lost. A "
        "restart of PostgreSQL or MariaDB is an immediate shutdown and a recovery from its own log; a standby was not "
        "promoted. `answers the next command`: a reply that comes after its asker has given up.",
        "",
        "## Network faults, by way of a proxy",
        "",
        _words(found.counter("faults")),
        "",
        "## Controls",
        "",
        "| control | runs | messages | damage |",
        "|---|---|---|---|",
    ]
    for cell in CONTROLS:
        mine = [one for one in found.controls if one["cell"] == cell.name]
        lines.append(
            f"| {cell.control} | {len(mine)} | {found.total('messages', mine)} | {found.total('damage', mine)} |"
        )
    if found.void:
        lines += ["", f"Void, and not counted: {', '.join(found.void)}."]
    for one in found.broken:
        lines += ["", f"## {one['cell']}, {one['date']}: {one['verdict']}", "", *(f"* {text}" for text in one["wrong"])]
    return "\n".join(lines) + "\n"


def _row(found: Gathered, name: str, mine: list[dict[str, Any]]) -> str:
    verdicts = sorted({one["verdict"] for one in mine})
    values: list[Any] = [
        name, len(mine), f"{found.total('messages', mine):,}", sum(sum(one["kills"].values()) for one in mine),
        sum(sum(one["stops"].values()) for one in mine), found.total("broker_restarts", mine),
        f"{found.total('store_restarts', mine)}, {found.total('failovers', mine)}",
        sum(sum(one["faults"].values()) for one in mine), found.total("lost", mine), found.total("doubled", mine),
        found.total("cut_off_by_kills", mine), found.total("unexcused", mine), found.total("recovered", mine),
        "; ".join(verdicts),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, values))} |"


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counts.items()) if number) or "none"


def write() -> int:
    """Write the report of this source; 1 if something is broken or short."""
    found = gathered()
    if not found.cells:
        print(f"nothing was gathered on the source {found.source}")
        return 1
    _REPORT.write_text(text_of(found))
    print(f"written: {_REPORT}")
    short = short_of(found)
    print("short of:", *short, sep="\n  ") if short else print("nothing is short")
    for one in found.broken:
        print(line(one))
    return 1 if short or found.broken else 0
