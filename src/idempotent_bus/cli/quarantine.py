"""`idempotent-bus quarantine` and `resolve`: what a person does about abandoned records."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from .. import quarantine as actions
from ..errors import ConfigurationError, InvalidBizId, StoreError

__all__ = ["COMMANDS"]

T = TypeVar("T")
_STORE = click.option("--store", required=True, help="The dedup store's URL, such as redis://localhost:6379/0.")


@click.command()
@_STORE
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for scripts.")
def quarantine(store: str, as_json: bool) -> None:
    """List the records whose worker died in the middle of the handler, and which wait for a decision.

    Look whether the effect is there, say so with `idempotent-bus resolve`, and redrive the message if it is to run.
    """
    records = _tell_errors(lambda: list(actions.quarantined(store)))
    if as_json:
        for record in records:
            click.echo(json.dumps({name: getattr(record, name) for name in record.__slots__}))
        return
    table = Table("scope", "biz-id", "attempts", "since (UTC)", "record", title=f"{len(records)} in quarantine")
    for record in records:
        since = datetime.datetime.fromtimestamp(record.since, datetime.timezone.utc)
        table.add_row(record.scope, record.biz_id, str(record.attempts), f"{since:%Y-%m-%d %H:%M:%S}", record.record)
    Console().print(table)


@click.command()
@_STORE
@click.option("--done", is_flag=True, help="The effect is there.")
@click.option("--not-done", is_flag=True, help="The effect is not there.")
@click.option("--scope", help="The scope, with --biz-id.")
@click.option("--biz-id", help="The biz-id, with --scope.")
@click.option("--tenant", default="", help="The consumer's tenant, if it has one.")
@click.option("--record", help="Instead of scope and biz-id: the record, as `quarantine` lists it.")
@click.option("--retention", default=7.0, show_default=True, help="Days for which the answer is remembered.")
def resolve(
    store: str,
    done: bool,
    not_done: bool,
    scope: str | None,
    biz_id: str | None,
    tenant: str,
    record: str | None,
    retention: float,
) -> None:
    """Say what was found about a quarantined record: --done, the effect is there; --not-done, it is not.

    After --done every copy is a replay. After --not-done the message runs when it is redriven.
    """
    if done == not_done:
        raise click.UsageError("say what was found: either --done or --not-done")
    if (record is None) == (scope is None or biz_id is None):
        raise click.UsageError("give either --record, or --scope and --biz-id")
    if record is None:
        assert scope is not None
        assert biz_id is not None
        named = scope, biz_id
        record = _tell_errors(lambda: actions.record_of(*named, tenant=tenant))
    which = record
    if not _tell_errors(lambda: actions.resolve(store, which, completed=done, retention=retention * 86_400)):
        raise click.ClickException(f"record {which} is not in quarantine: nothing was changed")
    click.echo("resolved: done" if done else "resolved: not done; redrive its message from the dead letter to run it")


def _tell_errors(act: Callable[[], T]) -> T:
    try:
        return act()
    except (ConfigurationError, InvalidBizId) as error:
        raise click.UsageError(str(error)) from error
    except StoreError as error:
        raise click.ClickException(str(error)) from error


COMMANDS: tuple[Any, ...] = (quarantine, resolve)
