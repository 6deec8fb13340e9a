"""`idempotent-bus relay`: send what was committed to an outbox."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import click

from .schema import first_line, opened

if TYPE_CHECKING:
    from ..relay import Relay, RelayCounts

__all__ = ["COMMANDS"]

#: Exit code where --once leaves rows behind that could not be sent.
LEFT_BEHIND: Final = 3
#: Seconds between two counts of the table, or so many times what the last one took.
_COUNT_EVERY: Final = 2.0
_COUNT_SHARE: Final = 20


@click.command()
@click.option("--database", required=True, help="A SQLAlchemy URL: where the outbox is.")
@click.option("--broker", required=True, help="A broker URL, as kombu takes it or one of our own schemes.")
@click.option("--table-prefix", default="idempotent_bus_", show_default=True, help="In front of the table's name.")
@click.option("--schema", "database_schema", default=None, help="The database schema that the table lies in.")
@click.option("--batch", type=click.IntRange(1, 5000), default=500, show_default=True, help="Rows claimed at once.")
@click.option(
    "--lease", type=click.FloatRange(1), default=30.0, show_default=True, help="Seconds they are claimed for."
)
@click.option(
    "--max-attempts", type=click.IntRange(1), default=20, show_default=True, help="Refusals until a row is dead."
)
@click.option("--once", is_flag=True, help="Send what is due now, and end.")
@click.option("--redrive-dead", is_flag=True, help="First let all dead rows be sent again.")
def relay(
    database: str,
    broker: str,
    table_prefix: str,
    database_schema: str | None,
    batch: int,
    lease: float,
    max_attempts: int,
    once: bool,
    redrive_dead: bool,
) -> None:
    """Send what was committed to the outbox, under the same inner-msg-id until the broker confirms it.

    Any number may run at once. Ends cleanly on SIGTERM and SIGINT, after the batch that is under way. Exit codes: 0
    ended as asked, 1 it could not run, 2 wrong usage, 3 with --once: rows are left that could not be sent.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from ..errors import ConfigurationError
    from ..relay import Relay

    with opened(database) as engine:
        try:
            made = Relay(
                engine,
                broker,
                table_prefix=table_prefix,
                database_schema=database_schema,
                batch=batch,
                lease=lease,
                max_attempts=max_attempts,
            )
        except (ConfigurationError, KeyError) as error:
            raise click.UsageError(str(error).strip("\"'")) from error
        with made:
            try:
                made.backlog()  # a wrong URL or a missing right shows here, where waiting would not help
                if redrive_dead:
                    click.echo(f"to be sent again: {made.redrive()}", err=True)
                with _ending_on_signals(made), _showing(made) as show:
                    complete = _once(made, show) if once else bool(made.run(progress=show))
            except SQLAlchemyError as error:
                raise click.ClickException(f"the outbox cannot be read: {first_line(error)}") from error
    if not complete:
        sys.exit(LEFT_BEHIND)


def _once(relay: Relay, show: Any) -> bool:
    """Send what is due now. False: some of it could not be sent."""
    while not relay.stopping:
        counts = relay.run_once()
        show(counts)
        if counts.away:
            return False
        if counts.exhausted:
            break
    left = relay.backlog()
    return not left.dead and not left.failing


@contextlib.contextmanager
def _ending_on_signals(relay: Relay) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        relay.stop()
        signal.signal(number, signal.SIG_DFL)  # whoever asks twice does not want to wait

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Meter:
    """Counts what was sent, and now and then what is left."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.began = self._last = time.monotonic()
        self._next_count = 0.0
        self._last_sent = 0
        self.sent = self.duplicates = 0
        self.rate = 0.0
        self.away = False
        self.backlog = relay.backlog()

    def add(self, counts: RelayCounts) -> bool:
        """Take in one pass. True: the table was counted, so there is something to show."""
        self.sent += counts.sent
        self.duplicates += counts.duplicates
        self.away = counts.away
        now = time.monotonic()
        if now < self._next_count:
            return False
        from sqlalchemy.exc import SQLAlchemyError

        with contextlib.suppress(SQLAlchemyError):  # the relay itself says so
            self.backlog = self._relay.backlog()
        took = time.monotonic() - now
        self._next_count = now + max(_COUNT_EVERY, took * _COUNT_SHARE)
        self.rate = (self.sent - self._last_sent) / max(now - self._last, 0.001)
        self._last, self._last_sent = now, self.sent
        return True

    def line(self) -> str:
        """All of it in one line."""
        left = self.backlog
        text = f"sent {self.sent} ({self.rate:.0f}/s), pending {left.pending}, oldest {left.oldest:.0f} s"
        if left.failing:
            text += f", failing {left.failing}"
        if left.dead:
            text += f", dead {left.dead}"
        if self.duplicates:
            text += f", refused at the edge {self.duplicates}"
        return text + (", the broker does not answer" if self.away else "")


@contextlib.contextmanager
def _showing(relay: Relay) -> Iterator[Any]:
    """What `run` is to call: one line that is kept up to date, or a line every now and then where no person looks."""
    from rich.console import Console

    console = Console(stderr=True)
    meter = _Meter(relay)
    if console.is_terminal:
        with console.status("looking") as status:

            def show(counts: RelayCounts) -> None:
                meter.add(counts)
                status.update(meter.line())

            yield show
    else:
        shown = ""

        def log(counts: RelayCounts) -> None:
            nonlocal shown
            if meter.add(counts) and meter.line() != shown:
                shown = meter.line()
                click.echo(shown, err=True)

        yield log
    meter.backlog = relay.backlog()
    took = max(time.monotonic() - meter.began, 0.001)
    meter.rate = meter.sent / took
    click.echo(f"ended after {took:.1f} s: {meter.line()}", err=True)


COMMANDS = (relay,)
