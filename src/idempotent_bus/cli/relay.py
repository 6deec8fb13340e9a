"""`idempotent-bus relay`: send what was committed to an outbox."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from .schema import first_line, opened

if TYPE_CHECKING:
    from ..relay import Relay, RelayCounts

__all__ = ["COMMANDS"]


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
    from ..relaying.meter import LEFT_BEHIND, ending_on_signals, send_once

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
                with ending_on_signals(made), _showing(made) as show:
                    complete = send_once(made, show) if once else bool(made.run(progress=show))
            except SQLAlchemyError as error:
                raise click.ClickException(f"the outbox cannot be read: {first_line(error)}") from error
    if not complete:
        sys.exit(LEFT_BEHIND)


@contextlib.contextmanager
def _showing(relay: Relay) -> Iterator[Any]:
    """What `run` is to call: one line that is kept up to date, or a line every now and then where no person looks."""
    from rich.console import Console

    from ..relaying.meter import Meter

    console = Console(stderr=True)
    meter = Meter(relay)
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
    click.echo(meter.last_line(), err=True)


COMMANDS = (relay,)
