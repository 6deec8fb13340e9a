"""The command `idempotent-bus`: one module for each group of its commands."""

from __future__ import annotations

import sys

try:
    import click
    import rich  # noqa: F401 - asked for here, so that a missing one is said in one sentence
except ImportError:  # the library itself needs neither
    sys.exit("idempotent-bus: the command line needs two more packages: pip install 'idempotent-bus[cli]'")

from . import demo, quarantine, redrive, relay, restore, schema, worker

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="idempotent-bus")
def main() -> None:
    """In a system that must not lose messages, nothing is ever done twice."""


for _module in (demo, quarantine, redrive, relay, restore, schema, worker):
    for _command in _module.COMMANDS:
        main.add_command(_command)
