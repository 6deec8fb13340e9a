"""`idempotent-bus restore`: take the library out again."""

from __future__ import annotations

import click

__all__ = ["COMMANDS"]


@click.command()
@click.option("--broker", required=True, help="A URL of one of our schemes, such as idempotent-redis://localhost/0.")
@click.option("--queue", "queues", multiple=True, help="Only this queue; may be given several times.")
@click.option("--dead", is_flag=True, help="The transport's dead messages too.")
@click.option("--force", is_flag=True, help="Also what live consumers hold. Stop them first.")
def restore(broker: str, queues: tuple[str, ...], dead: bool, force: bool) -> None:
    """Move all that our transport holds back to plain queues, so that plain kombu reads it.

    Run it to take the library out: stop the consumers, restore, and start them with kombu's own URL.
    """
    from kombu import Connection

    from .. import leaving
    from ..errors import ConfigurationError

    try:
        with Connection(broker) as connection:
            moved = leaving.restore(connection, queues=queues, dead=dead, force=force)
    except (ConfigurationError, KeyError) as error:
        raise click.BadParameter(str(error).strip("\"'"), param_hint="--broker") from error
    left = moved.pop("left")
    click.echo("moved back: " + ", ".join(f"{number} {kind}" for kind, number in moved.items()))
    if left:
        click.echo(f"left with live consumers: {left} (stop them and run this again)")


COMMANDS = (restore,)
