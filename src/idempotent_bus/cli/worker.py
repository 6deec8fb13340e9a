"""`idempotent-bus worker`: run a worker that is written down in a module."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..worker import IdempotentWorker

__all__ = ["COMMANDS"]


@click.command()
@click.argument("where", metavar="MODULE:WORKER")
@click.option("--processes", type=click.IntRange(1), default=None, help="Instead of the worker's own setting.")
@click.option("--threads", type=click.IntRange(0), default=None, help="In each process; 0: windows, no threads.")
@click.option("--stop-timeout", type=click.FloatRange(0), default=None, help="Seconds for handlers to end.")
@click.option("--health-file", type=click.Path(dir_okay=False, path_type=Path), default=None, help="JSON, each second.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
def worker(
    where: str,
    processes: int | None,
    threads: int | None,
    stop_timeout: float | None,
    health_file: Path | None,
    log_level: str,
) -> None:
    """Run an IdempotentWorker until SIGTERM or SIGINT.

    MODULE:WORKER names it, or a function without arguments that gives it, as in `shop.cards:worker`; modules are looked
    for in the current directory too. The first signal lets the running handlers end, a second one ends all at once; the
    broker delivers again what was not done.

    Exit codes: 0 all that ran has ended, 1 something had to be left behind, 2 wrong usage or settings.
    """
    from ..errors import ConfigurationError

    logging.basicConfig(
        stream=sys.stderr,
        level=log_level.upper(),
        format="%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s",
    )
    try:
        made = _load(where)
        made.configure(processes=processes, threads=threads, stop_timeout=stop_timeout, health_file=health_file)
        ended_well = made.run()
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    logging.getLogger("idempotent_bus").info("stopped%s", "" if ended_well else ", and something was left behind")
    sys.exit(0 if ended_well else 1)


def _load(where: str) -> IdempotentWorker:
    from ..worker import IdempotentWorker

    name, colon, attribute = where.partition(":")
    if not name or not colon or not attribute:
        raise click.BadParameter("write it as module:worker, for example shop.cards:worker", param_hint="MODULE:WORKER")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            raise  # what is missing is something that the module itself imports
        raise click.BadParameter(
            f"there is no module {error.name!r} here or on sys.path", param_hint="MODULE:WORKER"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise click.BadParameter(f"{name} has no {attribute!r}", param_hint="MODULE:WORKER")
        found = getattr(found, part)
    if callable(found) and not isinstance(found, IdempotentWorker):
        found = found()
    if not isinstance(found, IdempotentWorker):
        raise click.BadParameter(
            f"{where} is of type {type(found).__name__}, not an IdempotentWorker or a function that gives one",
            param_hint="MODULE:WORKER",
        )
    return found


COMMANDS = (worker,)
