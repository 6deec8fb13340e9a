"""Append-only histories: one line for each thing that was done, written in one system call, which no kill can tear."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["History", "Tail"]


class History:
    """Writes lines. Any number of processes may write to one file. Safe for threads."""

    def __init__(self, path: str | Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, *words: object) -> None:
        text = " ".join(map(str, (f"{time.monotonic():.3f}", *words)))  # one clock for all processes of a machine
        os.write(self._file, (text + "\n").encode())


class Tail:
    """Reads what was written since the last time. A line is its words, with the time, in seconds, behind them."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("rb")
        self._rest = b""
        self.lines: list[list[str]] = []

    def read(self) -> list[list[str]]:
        """The new lines, as words; `lines` has all of them."""
        data = self._rest + self._file.read()
        *whole, self._rest = data.split(b"\n")
        fresh = [(words := line.decode().split(" "))[1:] + words[:1] for line in whole]
        self.lines += fresh
        return fresh

    def close(self) -> None:
        self._file.close()
