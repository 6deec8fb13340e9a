"""The machine's facts for a report, without its name."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version

__all__ = ["LoadWatch", "facts", "spread"]


class LoadWatch:
    """The load average during a run: looked at whenever `look` is called."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.look()

    def look(self) -> None:
        """Note the load average of the last minute."""
        self.seen.append(os.getloadavg()[0])

    def __str__(self) -> str:
        return f"{min(self.seen):.1f} to {max(self.seen):.1f}"


def spread(values: Sequence[float], form: str) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def facts(load: LoadWatch, packages: Sequence[str], servers: Sequence[str]) -> str:
    """One paragraph. packages: whose versions count here. servers: with their versions."""
    named = ", ".join(f"{name} {version(name)}" for name in packages)
    load.look()
    return (
        f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {named}, "
        f"{', '.join(servers)}; servers and client share the machine. {datetime.now(timezone.utc):%Y-%m-%d}. "
        f"Load average during the run {load}: where it is above the number of cores, other work ran at the same time, "
        "and only the ratios are of use."
    )
