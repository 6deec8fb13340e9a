"""`manage.py purge`: forget what need not be remembered any longer."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db.models.expressions import RawSQL
from django.db.utils import Error as DjangoError
from sqlalchemy.exc import SQLAlchemyError

from ....dialects import NOW_US
from ....errors import ConfigurationError, StoreError
from ....store import PurgeStore
from ...conf import bus_settings
from ...consumer import DjangoInbox
from ...databases import known
from ...models import InboxRecord, StoreRecord
from ...stores import store_here

__all__ = ["Command"]


class Command(BaseCommand):
    """Records of the inbox and of the dedup store whose retention is over, in batches."""

    help = (
        "Delete records of the inbox and of the dedup store whose retention is over, in short transactions that lock "
        "no table. Of the outbox nothing is left to purge: a row goes when the broker has confirmed it, and dead ones "
        "are kept for a person. Run it every hour or so."
    )

    def add_arguments(self, parser: Any) -> None:
        """What is not given is as in IDEMPOTENT_BUS."""
        parser.add_argument("--database", help="The alias of the database.")
        parser.add_argument("--batch", type=int, default=1000, help="Records in one transaction (1000).")
        parser.add_argument("--dry-run", action="store_true", help="Only count.")

    def handle(self, *args: Any, **options: Any) -> None:
        """Run it."""
        if options["batch"] < 1:
            raise CommandError("--batch must be at least 1")
        try:
            self._purge(options)
        except (ConfigurationError, StoreError) as error:
            raise CommandError(str(error)) from error
        except (DjangoError, SQLAlchemyError) as error:
            cause = getattr(error, "orig", None) or error
            raise CommandError(f"the database says {type(cause).__name__}: {cause}") from error

    def _purge(self, options: dict[str, Any]) -> None:
        settings = bus_settings()
        alias = options["database"] or settings.database
        connection = known(alias)
        here = settings.store is None and alias == settings.database
        if options["dry_run"]:
            # A text of ours: the clock by which the records were dated.
            clock = RawSQL(  # noqa: S611
                NOW_US[connection.vendor].replace("%", "%%"), ()
            )
            over = InboxRecord.objects.using(alias).filter(kept_until__lte=clock).count()
            self.stdout.write(f"inbox: {over} would be deleted")
            if here:
                over = StoreRecord.objects.using(alias).filter(purge_after__lte=clock).count()
                self.stdout.write(f"store: {over} would be deleted")
            elif settings.store is not None:
                self.stdout.write("store: it is not in this database, and is not counted")
            return
        inbox = DjangoInbox(alias, settings.table_prefix)
        self.stdout.write(f"inbox: {_all(inbox.purge, options['batch'])} deleted")
        if alias == settings.database:
            store: Any = store_here()
            try:
                if isinstance(store, PurgeStore):
                    self.stdout.write(f"store: {_all(store.purge, options['batch'])} deleted")
                else:
                    self.stdout.write("store: it forgets by itself")
            finally:
                store.close()


def _all(purge: Any, batch: int) -> int:
    done = 0
    while purged := purge(limit=batch):
        done += purged
    return done
