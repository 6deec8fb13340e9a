"""`idempotent-bus demo`: see it survive."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import click
from rich.console import Console

__all__ = ["COMMANDS"]


@click.command()
@click.option("--mode", default="naive,store,inbox", show_default=True, help="Which runs, separated by commas.")
@click.option("--broker", default="sqlite", show_default=True, help="A kombu URL, or sqlite: the embedded broker.")
@click.option("--store", default=None, help="A store URL (sqlite:, redis:, postgresql: ...); embedded if not given.")
@click.option("--payments", default=2000, show_default=True, type=click.IntRange(1))
@click.option("--consumers", default=4, show_default=True, type=click.IntRange(1, 64), help="Processes at once.")
@click.option("--kills", default=50, show_default=True, type=click.IntRange(0), help="SIGKILLs in each run.")
@click.option("--seed", default=1, show_default=True, help="The same seed, the same planned trouble.")
@click.option("--input", "input_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--biz-id", default="payment_id", show_default=True, help="The column of --input with the id.")
def demo(
    mode: str,
    broker: str,
    store: str | None,
    payments: int,
    consumers: int,
    kills: int,
    seed: int,
    input_file: Path | None,
    biz_id: str,
) -> None:
    """Charge a customer, issue one card: with lost confirms, lost acks and killed consumers.

    Plays the same input without the library, with a dedup store and with the inbox, and ends in a table. Exits with
    1 if the inbox run has one card too many or too few, if the store run misses one or has more doubles than
    executions that were killed between effect and completion, or if the unprotected run shows no damage.
    """
    try:
        from ..demo import input as rows_of
        from ..demo import show
        from ..demo.settings import Mode
        from ..demo.story import prepare
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("idempotent_bus"):
            raise
        raise click.ClickException(
            f"the demo needs the package {error.name!r}: pip install 'idempotent-bus[demo]'"
        ) from error
    console = Console()
    try:
        modes = [Mode(name.strip()) for name in mode.split(",")]
    except ValueError as error:
        raise click.BadParameter("use naive, store and inbox, separated by commas", param_hint="--mode") from error
    try:
        rows = rows_of.read_rows(input_file, biz_id) if input_file else rows_of.made_up(payments, seed)
    except rows_of.BadInput as error:
        raise click.BadParameter(str(error), param_hint="--input") from error
    if not input_file:
        biz_id = "payment_id"
    console.print(
        f"{len(rows)} payments, {consumers} consumers, {kills} kills in each run, seed {seed}. "
        "Lost on purpose: 3 % of the confirms, 1 % of the acks."
    )
    with tempfile.TemporaryDirectory(prefix="idempotent-bus-demo-") as folder:
        runs = [
            prepare(
                one,
                broker=broker,
                store=store,
                rows=rows,
                biz_id=biz_id,
                consumers=consumers,
                kills=kills,
                seed=seed,
                folder=Path(folder),
            )
            for one in modes
        ]
        results = show.run(console, runs)
    show.table(console, results, _kind(broker), _kind(store or "sqlite"))
    if any(result.failure for result in results):
        sys.exit(1)


def _kind(url: str) -> str:
    """What to call a URL on the screen: its scheme, never its password."""
    return urlsplit(url).scheme or url


COMMANDS = (demo,)
