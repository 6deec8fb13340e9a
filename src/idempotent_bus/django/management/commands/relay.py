"""`manage.py relay`: send what was committed to the outbox."""

from __future__ import annotations

import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from sqlalchemy.exc import SQLAlchemyError

from ....errors import ConfigurationError
from ....relay import Relay
from ....relaying.meter import LEFT_BEHIND, Meter, ending_on_signals, send_once
from ...conf import bus_settings
from ...databases import engine_of

__all__ = ["Command"]

#: Seconds: to count a large outbox takes a while.
_ANSWER_TIMEOUT = 600.0


class Command(BaseCommand):
    """As `idempotent-bus relay`, with the database and the broker of the settings."""

    help = (
        "Send what was committed to the outbox, under the same inner-msg-id until the broker confirms it. Any number "
        "may run at once. Ends cleanly on SIGTERM and SIGINT, after the batch that is under way. Exit codes: 0 ended "
        "as asked, 1 it could not run, 3 with --once: rows are left that could not be sent."
    )

    def add_arguments(self, parser: Any) -> None:
        """What is not given is as in IDEMPOTENT_BUS."""
        parser.add_argument("--database", help="The alias of the database where the outbox is.")
        parser.add_argument("--broker", help="A broker URL, as kombu takes it or one of our own schemes.")
        parser.add_argument("--batch", type=int, help="Rows claimed at once (500).")
        parser.add_argument("--lease", type=float, help="Seconds they are claimed for (30).")
        parser.add_argument("--poll-interval", type=float, help="Seconds between two looks at an empty outbox (1).")
        parser.add_argument("--max-attempts", type=int, help="Refusals until a row is dead (20).")
        parser.add_argument("--once", action="store_true", help="Send what is due now, and end.")
        parser.add_argument("--redrive-dead", action="store_true", help="First let all dead rows be sent again.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Run it."""
        settings = bus_settings()
        broker = options["broker"] or settings.broker
        if not broker:
            raise CommandError("no broker: give --broker, or IDEMPOTENT_BUS['BROKER']")
        given = {
            name: options[name]
            for name in ("batch", "lease", "poll_interval", "max_attempts")
            if options[name] is not None
        }
        try:
            engine = engine_of(options["database"] or settings.database, answer_timeout=_ANSWER_TIMEOUT)
        except (ConfigurationError, KeyError) as error:
            raise CommandError(str(error).strip("\"'")) from error
        try:
            # The table is the migrations' to make.
            words = {"table_prefix": settings.table_prefix, "create": False, **settings.relay, **given}
            with Relay(engine, broker, **words) as relay:
                complete = self._run(relay, once=options["once"], redrive=options["redrive_dead"])
        except (ConfigurationError, KeyError) as error:
            raise CommandError(str(error).strip("\"'")) from error
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            raise CommandError(
                f"the outbox cannot be read: {type(cause).__name__}: {str(cause).partition(chr(10))[0]} "
                "(manage.py migrate makes its table)"
            ) from error
        finally:
            engine.dispose()
        if not complete:
            sys.exit(LEFT_BEHIND)

    def _run(self, relay: Relay, *, once: bool, redrive: bool) -> bool:
        relay.backlog()  # a wrong entry or a missing table shows here, where waiting would not help
        if redrive:
            self.stderr.write(f"to be sent again: {relay.redrive()}")
        meter, shown = Meter(relay), ""

        def show(counts: Any) -> None:
            nonlocal shown
            if meter.add(counts) and meter.line() != shown:
                shown = meter.line()
                self.stderr.write(shown)

        with ending_on_signals(relay):
            complete = send_once(relay, show) if once else bool(relay.run(progress=show))
        self.stderr.write(meter.last_line())
        return complete
