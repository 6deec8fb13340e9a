"""Says from the histories and the effects what was lost, doubled, unexpected and recovered.

An execution is *cut off* if its effect is there and its completion was never told: by its own process, as durable. What
may follow is one effect more, and only where the cause is one that no library can mend for an effect in another
system: its process was killed, or stopped for longer than its lease; or the store answered nobody while the completion
was asked for again and again, until it was given up in doubt (a process that is stopped while it writes to SQLite locks
all others out); or, in the cell where replicas are promoted, the store forgot it. Whatever is doubled beyond that is
unexcused. Where a probe or a person decides on what was abandoned, and in the inbox, no kill excuses anything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

__all__ = ["Life", "check"]

_EXCUSES = ("killed", "under way", "frozen", "in doubt", "forgotten")
_MOST_TOLD = 50
#: Seconds between the tries of a completion: the first pause, doubled each time, and the longest. It is given up where
#: the next one would go past a lease's time.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


@dataclass
class Life:
    """What the supervisor knows of a process. stopped: the longest time for which it was frozen, in seconds."""

    role: str
    killed: bool = False
    stopped: float = 0.0
    status: int = 0


@dataclass
class _Run:
    biz_id: str
    key: str
    token: str
    life: int
    began: float


@dataclass
class _Read:
    """A history, sorted by what it tells of."""

    runs: dict[str, _Run] = field(default_factory=dict)
    completed: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    begun: set[tuple[str, str]] = field(default_factory=set)
    refused: dict[tuple[str, str], float] = field(default_factory=dict)
    #: Completions without a clear answer: when first asked, when last told so, and how many tries. And when anybody's
    #: had a clear one.
    unclear: dict[tuple[str, str], tuple[float, float, int]] = field(default_factory=dict)
    answers: list[float] = field(default_factory=list)
    replayed: set[str] = field(default_factory=set)
    acked_early: list[str] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)
    tokens: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))


def _read(lines: Iterable[list[str]]) -> _Read:
    found = _Read()
    known: set[tuple[str, str]] = set()  # by life and key: it knows that this record is completed
    for line in lines:
        what = line[0]
        if what == "attempt":
            _, biz_id, key, token, run, life, time = line
            found.runs[run] = _Run(biz_id, key, token, int(life), float(time))
            found.attempts[biz_id] += 1
            if token != "-":
                found.tokens[key, token].add(life)
        elif what == "completed":
            found.answers.append(float(line[-1]))
            found.completed[line[1]].add(line[2])
            known.add((line[3], line[1]))
        elif what == "begun":
            found.begun.add((line[1], line[2]))
        elif what == "refused":
            found.answers.append(float(line[-1]))
            found.refused[line[1], line[2]] = float(line[-1])
        elif what == "unclear":
            asked, _, tries = found.unclear.get((line[1], line[2]), (float(line[3]), 0.0, 0))
            found.unclear[line[1], line[2]] = asked, float(line[-1]), tries + 1
        elif what == "replayed":
            found.replayed.add(line[1])
            known.add((line[2], line[1]))
        elif what == "acking" and (line[2], line[1]) not in known:
            found.acked_early.append(line[1])
    return found


def check(
    lines: list[list[str]], effects: Iterable[tuple[str, str, int]], dead: Mapping[str, Iterable[str]],
    lives: Mapping[int, Life], wanted: Mapping[str, str], *, mode: str, lease: float, forgets: bool, left: list[str],
) -> dict[str, Any]:  # fmt: skip
    """wanted: every biz-id with its kind. dead: the dead letters by biz-id, with their reasons. left: in the queues."""
    checked = _Checked(_read(lines), lives, lease, forgets)
    for biz_id, run, life in effects:
        checked.effects[biz_id].append((run, life))
    checked.outcomes(wanted, dead, mode)
    checked.doubles(wanted, mode)
    if mode == "store":
        checked.records()
    checked.processes(left)
    return checked.report(wanted, dead)


class _Checked:
    """What is found, a check after the other. told: what must not be, each in words."""

    def __init__(self, history: _Read, lives: Mapping[int, Life], lease: float, forgets: bool) -> None:
        self.history, self.lives, self.lease, self.forgets = history, lives, lease, forgets
        self.effects: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self.told: list[str] = []

    def wrong(self, kind: str, text: str, number: int = 1) -> None:
        self.counts[kind] += number
        if len(self.told) < _MOST_TOLD:
            self.told.append(f"{kind}: {text}")

    def outcomes(self, wanted: Mapping[str, str], dead: Mapping[str, Iterable[str]], mode: str) -> None:
        """Each message has its effect, or is where a person finds it, if that is where it belongs."""
        for biz_id, kind in wanted.items():
            if kind == "never":
                if biz_id in self.effects:
                    self.wrong("unexpected", f"{biz_id} has an effect, although its handler raises before")
                if biz_id not in dead:
                    self.wrong("lost", f"{biz_id} is not in the dead letter")
            elif biz_id not in self.effects:
                if biz_id not in dead:
                    self.wrong("lost", f"{biz_id}, {self.history.attempts[biz_id]} attempts")
                elif mode == "inbox" or kind != "doubt":
                    self.wrong("unexpected", f"{biz_id} is dead: {', '.join(dead[biz_id])}")
        for biz_id in self.effects.keys() - wanted.keys():
            self.wrong("unexpected", f"{biz_id} has an effect, and was never committed")

    def doubles(self, wanted: Mapping[str, str], mode: str) -> None:
        """Each effect after the first has an execution that was cut off, in the mode where that excuses it."""
        for biz_id, rows in self.effects.items():
            kind, doubles = wanted.get(biz_id, ""), len(rows) - 1
            excuses = self._excuses(rows) if mode == "store" else Counter[str]()
            if kind in ("doubt", "asked"):  # a person, or a probe, has decided: it knows whether the effect is there
                excuses = Counter(frozen=excuses["frozen"])
            self.counts["doubled"] += doubles
            if (more := doubles - excuses.total()) > 0:
                self.wrong("unexcused", f"{biz_id} ({kind}) has {len(rows)} effects, excused: {dict(excuses)}", more)
            for excuse in _EXCUSES:
                used = min(doubles, excuses[excuse])
                self.counts[f"doubled, {excuse}"] += used
                doubles -= used

    def _excuses(self, rows: list[tuple[str, int]]) -> Counter[str]:
        found: Counter[str] = Counter()
        for number, life in set(rows):  # an execution excuses one, however often it had its effect
            run = self.history.runs[number]
            if run.token in self.history.completed[run.key]:
                continue
            if self.lives[life].killed:
                self.counts["cut off by kills"] += 1
                self.counts["completion under way"] += (run.key, run.token) in self.history.begun
            if excuse := _excuse(run, self.lives[life], self.history, self.lease, self.forgets):
                found[excuse] += 1
        return found

    def records(self) -> None:
        """A record is completed by one token, a token is one process's, and an ack follows what it is for."""
        for key, tokens in self.history.completed.items():
            if len(tokens) > 1:
                self.wrong("superseded", f"record {key} was completed by tokens {', '.join(sorted(tokens))}")
        for (key, token), holders in self.history.tokens.items():
            if len(holders) > 1:
                self.wrong("unexpected", f"record {key}: token {token} was given twice")
        for key in self.history.acked_early:
            self.wrong("acked early", f"record {key}")

    def processes(self, left: list[str]) -> None:
        """None ended by itself, and nothing waits for one."""
        for number, life in self.lives.items():
            if life.status and not life.killed:
                self.wrong("unexpected", f"life {number}, a {life.role}, ended by itself with {life.status}")
        if left:
            self.wrong("unexpected", f"{len(left)} messages are left in the queues, such as {', '.join(left[:5])}")

    def report(self, wanted: Mapping[str, str], dead: Mapping[str, Iterable[str]]) -> dict[str, Any]:
        history, counts = self.history, self.counts
        again = {biz_id for biz_id, number in history.attempts.items() if number > 1}
        again |= {run.biz_id for run in history.runs.values() if run.key in history.replayed}
        by = {excuse: counts[f"doubled, {excuse}"] for excuse in _EXCUSES}
        return {
            "effects": sum(map(len, self.effects.values())),
            "dead": sum(biz_id in dead for biz_id in wanted),
            "lost": counts["lost"],
            "doubled": counts["doubled"],
            "unexcused": counts["unexcused"],
            "superseded": counts["superseded"],
            "acked_early": counts["acked early"],
            "unexpected": counts["unexpected"],
            "recovered": len(again & set(self.effects) & set(wanted)),
            "cut_off_by_kills": counts["cut off by kills"],
            "completion_under_way": counts["completion under way"],
            "doubled_by": {excuse: number for excuse, number in by.items() if number},
            "wrong": self.told,
        }


def _excuse(run: _Run, life: Life, history: _Read, lease: float, forgets: bool) -> str:
    """Why a completion was never told; empty if there is no reason that excuses it."""
    lasted = history.refused.get((run.key, run.token), run.began) - run.began
    if life.stopped >= lease * 0.9 or lasted >= lease * 0.9:  # also where the machine gave it no time
        return "frozen"
    if _given_up(run, history, lease):
        return "in doubt"
    if life.killed:
        return "under way" if (run.key, run.token) in history.begun else "killed"
    return "forgotten" if forgets else ""


def _given_up(run: _Run, history: _Read, lease: float) -> bool:
    """Whether its completion was given up in doubt, as it may be: after a lease's time of tries without any answer.

    Not if the store answered others' completions through most of that time, nor if another one ran before its lease
    can have been over: a handler starts in the first half of it.
    """
    hold = run.key, run.token
    if hold not in history.unclear or hold in history.refused:
        return False
    asked, told, tries = history.unclear[hold]
    pause = min(_FIRST_PAUSE * 2 ** (tries - 1), _LONGEST_PAUSE)
    moments = [asked, *sorted(time for time in history.answers if asked < time < told), told]
    silent = max(after - before for before, after in pairwise(moments))
    later = [one for one in history.runs.values() if one.key == run.key and int(one.token) > int(run.token)]
    return (
        told - asked >= lease * 0.9 - pause
        and silent >= lease - _LONGEST_PAUSE
        and all(one.began - run.began >= lease / 2 for one in later)
    )
