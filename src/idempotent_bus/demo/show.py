"""What the person sees: progress while it runs, a table at the end, and a verdict."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from .settings import Mode, Settings
from .story import Result, play

_TITLES = {
    Mode.NAIVE: "without the library",
    Mode.STORE: "dedup store",
    Mode.INBOX: "inbox",
}

_ROWS = (
    ("payments", "payments"),
    ("cards", "cards"),
    ("cards too many", "too_many"),
    ("cards missing", "missing"),
    ("consumers killed (SIGKILL)", "kills"),
    ("  of these after the effect", "kills_between"),
    ("acks lost", "acks_lost"),
    ("confirms lost, so resent", "resends"),
    ("duplicates refused at edge", "refused_at_edge"),
    ("duplicates refused at handler", "refused_at_handler"),
    ("dead-lettered", "dead"),
)


def run(console: Console, runs: Sequence[Settings]) -> list[Result]:
    """Play each mode with a progress bar."""
    results = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("cards, {task.fields[kills]} kills"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for settings in runs:
            total = len({str(row[settings.biz_id]) for row in settings.rows})
            task = progress.add_task(_TITLES[settings.mode], total=total, kills=0)
            results.append(play(settings, functools.partial(_update, progress, task)))
            progress.update(task, completed=results[-1].payments - results[-1].missing, kills=results[-1].kills)
            progress.stop_task(task)
    return results


def _update(progress: Progress, task: TaskID, done: int, kills: int) -> None:
    progress.update(task, completed=done, kills=kills)


#: kombu's own transports that lose messages by themselves, by URL scheme, and why.
_LOSES = {
    "redis": "kombu's Redis transport pops a message and notes it as unacked in two steps, and what was on its way "
    "when a consumer died or its connection was cut is gone: use idempotent-redis:// instead",
    "sqla": "kombu's SQLAlchemy transport marks a message as taken and never brings it back: "
    "use idempotent-sqla+... instead",
}
_LOSES["rediss"] = _LOSES["redis"]
_LOSES["sqlalchemy"] = _LOSES["sqla"]


def loses(broker: str) -> str | None:
    """Why a broker of this URL scheme loses messages by itself, or None."""
    return _LOSES.get(broker.partition("+")[0])


def table(console: Console, results: Sequence[Result], broker: str, store: str) -> None:
    """The end of the demo: what each mode came to."""
    sheet = Table(title=f"one charge, one card?  broker: {broker}, store: {store}")
    sheet.add_column("")
    for result in results:
        sheet.add_column(_TITLES[result.mode], justify="right")
    for title, name in _ROWS:
        values = [getattr(result, name) for result in results]
        if name in ("too_many", "missing"):
            sheet.add_row(title, *(f"[red]{value}[/red]" if value else f"[green]{value}[/green]" for value in values))
        else:
            sheet.add_row(title, *map(str, values))
    sheet.add_row("seconds", *(f"{result.seconds:.0f}" for result in results))
    console.print(sheet)
    for result in results:
        title = _TITLES[result.mode]
        if result.failure:
            console.print(f"[red]FAILED[/red]  {title}: {result.failure} (for example {', '.join(result.examples)})")
        elif result.mode is Mode.NAIVE:
            console.print(f"[yellow]as expected[/yellow]  {title}: damage, so the trouble above was real")
        elif result.mode is Mode.STORE:
            console.print(
                f"[green]held[/green]  {title}: none missing; {result.too_many} doubled, of at most "
                f"{result.kills_between} killed between effect and completion (an external effect cannot do better)"
            )
        else:
            console.print(f"[green]held[/green]  {title}: one charge, one card")
    why = loses(broker)
    if why and any(result.missing for result in results):
        console.print(f"[yellow]why[/yellow]  cards are missing: {why}. No consumer can mend that.")
