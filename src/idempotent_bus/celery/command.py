"""`celery -A app idempotency ...`: what a person does about guarded tasks, with the app's own broker and stores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..errors import ConfigurationError, IdempotentBusError, InvalidBizId
from ..model import Record, State
from ..quarantine import quarantined, record_of, resolve
from ..redrive import Redriven, depth, redrive
from ..store import ForgetStore, LookupStore, PurgeStore, QuarantineStore
from .guard import Guard
from .task import guard_of

__all__ = ["idempotency"]

_TASK = click.argument("task")
_BIZ_ID = click.argument("biz_id")


@click.group()
def idempotency() -> None:
    """Look at guarded tasks and their records, and decide what a person must decide.

    TASK is a task's name or its scope.
    """


@idempotency.command()
@click.argument("task", required=False)
@click.argument("biz_id", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for scripts.")
@click.pass_context
def inspect(context: click.Context, task: str | None, biz_id: str | None, as_json: bool) -> None:
    """Show all guarded tasks; or what waits in one's quarantine; or the record of one biz-id."""
    app = _app_of(context)
    with _telling():
        if task is None:
            rows = [_row(app, name, guard) for name, guard in _guards(app).items()]
            _show(rows, "guarded tasks", as_json)
            return
        guard = _guard(app, task)
        if biz_id is None:
            _show(list(_waiting(guard)), f"in quarantine: {guard.scope}", as_json)
            return
        _show([_record(guard, biz_id)], f"the record of one biz-id in {guard.scope}", as_json)


@idempotency.command()
@_TASK
@_BIZ_ID
@click.confirmation_option(prompt="A message with this biz-id will run again, even if it was done. Forget it?")
@click.pass_context
def forget(context: click.Context, task: str, biz_id: str) -> None:
    """Delete the record of a biz-id, so that it may run again: its result and its attempts are gone too."""
    with _telling():
        guard = _guard(_app_of(context), task)
        if guard.inbox is not None:
            done = guard.inbox.forget(guard.scope, biz_id, tenant=guard.tenant)
            click.echo("forgotten" if done else "there was no record")
            return
        store = _able(guard, ForgetStore, "forget records")
        if not store.forget(bytes.fromhex(record_of(guard.scope, biz_id, tenant=guard.tenant))):
            raise click.ClickException(
                "it is being run, or is in quarantine: wait until its lease is over, or use `idempotency resolve`"
            )
        click.echo("forgotten")


@idempotency.command("redrive")
@click.argument("tasks", nargs=-1, required=True)
@click.option("--limit", type=click.IntRange(1), help="Move at most so many messages of each task.")
@click.option("--discard-completed", is_flag=True, help="Throw away what is done already.")
@click.pass_context
def redrive_(context: click.Context, tasks: tuple[str, ...], limit: int | None, discard_completed: bool) -> None:
    """Move the dead letters of tasks back to the queues that they came from, for another round of attempts."""
    app = _app_of(context)
    table = Table("task", "found", "moved", "done already", "in quarantine", "left", title="redriven")
    with _telling(), Progress(console=Console(stderr=True), transient=True) as progress:
        for name in tasks:
            guard = _guard(app, name)
            if guard.dead_letter is None:
                raise ConfigurationError(f"{name} has no dead letter: its option dead_letter is False")
            bar = progress.add_task(guard.dead_letter, total=None)
            store = guard.store()

            def tell(_: Any, done: Redriven, bar: Any = bar) -> None:
                progress.update(bar, completed=done.seen, total=done.found)

            done = redrive(
                app.connection_for_write(),
                guard.dead_letter,
                store=store if isinstance(store, LookupStore) else None,
                limit=limit,
                discard_completed=discard_completed,
                on_message=tell,
            )
            table.add_row(name, *map(str, (done.found, done.moved, done.completed, done.quarantined, done.left)))
    Console().print(table)


@idempotency.command("resolve")
@_TASK
@_BIZ_ID
@click.option("--done", is_flag=True, help="The effect is there.")
@click.option("--not-done", is_flag=True, help="The effect is not there.")
@click.pass_context
def resolve_(context: click.Context, task: str, biz_id: str, done: bool, not_done: bool) -> None:
    """Say what was found about a quarantined record. After --not-done the task runs when it is redriven."""
    if done == not_done:
        raise click.UsageError("say what was found: either --done or --not-done")
    with _telling():
        guard = _guard(_app_of(context), task)
        store = _able(guard, QuarantineStore, "keep a quarantine")
        record = record_of(guard.scope, biz_id, tenant=guard.tenant)
        if not resolve(store, record, completed=done, retention=guard.policy.retention):
            raise click.ClickException("this biz-id is not in quarantine: nothing was changed")
    click.echo("resolved: done" if done else "resolved: not done; redrive the task's dead letter to run it")


@idempotency.command()
@click.argument("tasks", nargs=-1)
@click.pass_context
def purge(context: click.Context, tasks: tuple[str, ...]) -> None:
    """Delete the records whose retention is over, in small steps; of all guarded tasks, or of these."""
    app = _app_of(context)
    with _telling(), Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("purging", total=None)
        total = 0
        guards = [_guard(app, name) for name in tasks] or list(_guards(app).values())
        for keeper in _unique(guard.inbox or guard.store() for guard in guards):
            # Redis forgets by itself.
            while isinstance(keeper, PurgeStore) and (gone := keeper.purge()):
                total += gone
                progress.update(bar, completed=total)
    click.echo(f"{total} records purged")


# --- the app --------------------------------------------------------------------------------------------


def _app_of(context: click.Context) -> Any:
    app = context.obj.app
    app.loader.import_default_modules()
    app.finalize()
    return app


def _guards(app: Any) -> dict[str, Guard]:
    found = {name: guard_of(task) for name, task in sorted(app.tasks.items())}
    return {name: guard for name, guard in found.items() if guard is not None}


def _guard(app: Any, name: str) -> Guard:
    guards = _guards(app)
    found = guards.get(name) or next((guard for guard in guards.values() if guard.scope == name), None)
    if found is None:
        raise ConfigurationError(f"no guarded task is called {name!r}, by name or by scope: {', '.join(guards)}")
    return found


def _able(guard: Guard, kind: Any, what: str) -> Any:
    store = guard.store()
    if not isinstance(store, kind):
        raise ConfigurationError(f"the store of {guard.scope} cannot {what}")
    return store


def _unique(values: Iterable[Any]) -> Iterator[Any]:
    seen: set[int] = set()
    for value in values:
        if value is not None and id(value) not in seen:
            seen.add(id(value))
            yield value


# --- what is shown ----------------------------------------------------------------------------------------


def _row(app: Any, name: str, guard: Guard) -> dict[str, Any]:
    dead = None if guard.dead_letter is None else depth(app.connection_for_read(), guard.dead_letter)
    return {
        "task": name,
        "scope": guard.scope,
        "kept by": "inbox" if guard.inbox is not None else type(guard.store()).__name__,
        "in quarantine": sum(1 for _ in _waiting(guard)),
        "dead letter": guard.dead_letter or "none",
        "dead": dead or 0,
    }


def _waiting(guard: Guard) -> Iterator[dict[str, Any]]:
    store = guard.store()
    if not isinstance(store, QuarantineStore):
        return
    for record in quarantined(store):
        if record.scope == guard.scope:
            yield {name: getattr(record, name) for name in record.__slots__}


def _record(guard: Guard, biz_id: str) -> dict[str, Any]:
    record = record_of(guard.scope, biz_id, tenant=guard.tenant)
    if guard.inbox is not None:
        done = guard.inbox.is_done(guard.scope, biz_id, tenant=guard.tenant)
        return {"record": record, "state": {None: "absent", True: "completed", False: "not completed"}[done]}
    found = _able(guard, LookupStore, "show records").lookup(bytes.fromhex(record))
    return {"record": record, **({"state": "absent"} if found is None else _of_record(found))}


def _of_record(record: Record) -> dict[str, Any]:
    abandoned = record.state is State.IN_PROGRESS and record.lease_left <= 0
    return {
        "state": "abandoned" if abandoned else record.state.name.lower().replace("_", " "),
        "attempts": record.attempts,
        "token": record.token,
        "lease left (s)": round(record.lease_left, 1),
        "kept for (s)": None if record.retention_left == float("inf") else round(record.retention_left),
        "result": None if record.result is None else f"{len(record.result)} bytes",
    }


def _show(rows: list[dict[str, Any]], title: str, as_json: bool) -> None:
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    if not rows:
        click.echo(f"{title}: none")
        return
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


@contextmanager
def _telling() -> Iterator[None]:
    """Turn errors into what a command says. Of a driver's only the class: its text may hold a password."""
    try:
        yield
    except (ConfigurationError, InvalidBizId) as error:
        raise click.UsageError(str(error)) from error
    except IdempotentBusError as error:
        raise click.ClickException(str(error)) from error
    except click.ClickException:
        raise
    except Exception as error:
        raise click.ClickException(f"stopped by {type(error).__name__}; nothing is half done, run it again") from error
