"""`idempotent-bus redrive`: dead letters go back to work."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from ..redrive import Redriven

__all__ = ["COMMANDS"]


@click.command()
@click.argument("names", metavar="QUEUE_OR_SCOPE...", nargs=-1, required=True)
@click.option("--broker", required=True, help="A kombu URL of the broker.")
@click.option("--store", "store_url", help="The dedup store's URL: then what is done or in quarantine is left.")
@click.option("--limit", type=click.IntRange(1), help="Move at most so many messages of each queue.")
@click.option("--to", help="The queue for messages that do not say where they came from. Name exact queues then.")
@click.option("--discard-completed", is_flag=True, help="Throw away what is done already. Needs --store.")
def redrive(
    names: tuple[str, ...],
    broker: str,
    store_url: str | None,
    limit: int | None,
    to: str | None,
    discard_completed: bool,
) -> None:
    """Move dead letters back to the queues that they came from, for another round of attempts.

    A scope means its dead letter, SCOPE.dead. What was completed meanwhile does nothing when it is redriven; with
    --store it is left, and said so. Messages in quarantine are left until they are resolved (idempotent-bus resolve).
    What lay there for longer than its consumer's retention may have been done and forgotten: it comes back as "too
    old". Look whether it was done; redriven once more, it runs.
    """
    from ..errors import ConfigurationError, IdempotentBusError
    from ..redrive import dead_letter_of
    from ..redrive import redrive as move_back
    from ..store import LookupStore

    if discard_completed and store_url is None:
        raise click.UsageError("--discard-completed needs --store: only the store knows what is completed")
    console, error_console = Console(), Console(stderr=True)
    results: list[Redriven] = []
    failure: str | None = None
    with contextlib.ExitStack() as stack:
        store: Any = None
        try:
            if store_url is not None:
                from ..stores import open_store

                store = open_store(store_url)
                stack.callback(store.close)
                if not isinstance(store, LookupStore):
                    raise click.BadParameter("this store cannot show records", param_hint="--store")
            progress = stack.enter_context(Progress(console=error_console, transient=True))
            for name in names:
                queue = name if to is not None else dead_letter_of(broker, name)
                task = progress.add_task(queue, total=None)

                def tell(_: Any, done: Redriven, task: Any = task, progress: Progress = progress) -> None:
                    if done not in results:
                        results.append(done)
                    progress.update(task, completed=done.seen, total=done.found)

                done = move_back(
                    broker, queue, store=store, limit=limit, to=to, discard_completed=discard_completed, on_message=tell
                )
                if done not in results:
                    results.append(done)
        except ConfigurationError as error:
            failure = str(error)
        except IdempotentBusError as error:
            failure = f"stopped: {error}; what was not moved is still there, run it again"
        except Exception as error:  # noqa: BLE001 - a driver's: its class says enough, its text may hold a password
            failure = f"stopped by {type(error).__name__}; what was not moved is still there, run it again"
    console.print(_table(results))
    if failure is not None:
        raise click.ClickException(failure)


def _table(results: list[Redriven]) -> Table:
    from ..redrive import Outcome

    table = Table("dead letter", title="redriven")
    columns = (Outcome.MOVED, Outcome.COMPLETED, Outcome.DISCARDED, Outcome.QUARANTINED)
    for outcome in columns:
        table.add_column(outcome.value, justify="right")
    table.add_column("left for other reasons")
    for done in results:
        others = [f"{number} {outcome.value}" for outcome, number in done.outcomes.items() if outcome not in columns]
        table.add_row(done.queue, *(str(done.outcomes[outcome]) for outcome in columns), ", ".join(others) or "0")
    return table


COMMANDS = (redrive,)
