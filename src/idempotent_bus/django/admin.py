"""The admin pages: what is in inbox, outbox and store, read-only, and what a person decides about dead and in doubt.

biz-ids are digests here, as in the tables; `scope biz-id` typed into the search of the inbox or of the store finds the
record. Only the page of what is in quarantine says them in clear, to users who may resolve: somebody must look whether
the effect is there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse

from ..abandoned import QuarantinedRecord as Abandoned
from ..errors import IdempotentBusError
from ..model import State
from ..quarantine import quarantined, record_of, resolve
from ..redrive import Redriven, dead_letter_of, depth, redrive
from ..relaying.words import RowState
from ..store import LookupStore
from . import outbox
from .conf import bus_settings
from .models import (
    DeadLetterQueue,
    DeadMessage,
    InboxRecord,
    OutboxMessage,
    QuarantinedRecord,
    StoreRecord,
    moment,
)
from .stores import store_here

__all__ = [
    "DeadLetterQueueAdmin",
    "DeadMessageAdmin",
    "InboxRecordAdmin",
    "OutboxMessageAdmin",
    "QuarantinedRecordAdmin",
    "StoreRecordAdmin",
]

#: Bytes of a body, or of a result, that are shown.
_SHOWN: Final = 500
#: Rows on a page of ours.
_MOST: Final = 200
#: Messages that one click moves at most.
_MOST_MOVED: Final = 1000


def _time(field: str, title: str) -> Callable[..., Any]:
    """A column of the admin for a time in microseconds; sorted by the column itself."""

    @admin.display(description=title, ordering=field)
    def show(_: Any, row: Any) -> Any:
        """The time."""
        return moment(getattr(row, field))

    return show


def _text(field: str, title: str) -> Callable[..., Any]:
    """A field of bytes, the beginning of it as text."""

    @admin.display(description=title)
    def show(_: Any, row: Any) -> str:
        """The beginning of it."""
        content = getattr(row, field)
        if content is None:
            return ""
        content = bytes(content)
        more = f"... ({len(content)} bytes)" if len(content) > _SHOWN else ""
        return content[:_SHOWN].decode("utf-8", "replace") + more

    return show


class _ReadOnly(admin.ModelAdmin):
    """A page to look at, in the database of the settings."""

    actions: Any = ()
    show_full_result_count = False  # it would read the whole table
    key = "record_key"
    large: tuple[str, ...] = ("result",)

    def get_queryset(self, request: HttpRequest) -> Any:
        """In IDEMPOTENT_BUS['DATABASE']; what may be large is read for one row only."""
        return super().get_queryset(request).using(bus_settings().database).defer(*self.large)

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Nobody."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody."""
        return False

    def get_search_results(self, request: HttpRequest, queryset: Any, search_term: str) -> tuple[Any, bool]:
        """By the digest, or by `scope biz-id`; it is not searched for in bodies."""
        if not search_term:
            return queryset, False
        return queryset.filter(**{f"{self.key}__in": list(self._keys(search_term))}), False

    def _keys(self, term: str) -> Iterator[str]:
        with contextlib.suppress(ValidationError):
            yield self.model._meta.get_field(self.key).to_python(term)


class _Records(_ReadOnly):
    """Records by key."""

    def _keys(self, term: str) -> Iterator[str]:
        yield from super()._keys(term)
        scope, _, biz_id = term.partition(" ")
        if biz_id:
            with contextlib.suppress(IdempotentBusError):
                yield record_of(scope, biz_id.strip())


@admin.register(InboxRecord)
class InboxRecordAdmin(_Records):
    """What was handled in transactions."""

    list_display = ("record_key", "done", "attempts", "kept")
    fields = ("record_key", "done", "attempts", "redrive", "kept", "fingerprint", "what_it_returned")
    readonly_fields = fields
    search_fields = ("record_key",)
    search_help_text = "a digest, or: scope biz-id"
    ordering = ("kept_until",)
    kept = _time("kept_until", "kept until")
    what_it_returned = _text("result", "result")

    @admin.display(boolean=True, description="completed", ordering="completed")
    def done(self, row: Any) -> bool:
        """Completed."""
        return bool(row.completed)


@admin.register(StoreRecord)
class StoreRecordAdmin(_Records):
    """The dedup store's records, where it is in this database."""

    list_display = ("record_key", "state_name", "attempts", "lease", "kept")
    fields = ("record_key", "state_name", "attempts", "redrive", "token", "lease", "kept", "fingerprint")
    readonly_fields = fields
    search_fields = ("record_key",)
    search_help_text = "a digest, or: scope biz-id"
    ordering = ("purge_after",)
    lease = _time("lease_ends", "lease ends")
    kept = _time("kept_until", "kept until")

    @admin.display(description="state", ordering="state")
    def state_name(self, row: Any) -> str:
        """In words."""
        return _word(State, row.state)


class _Messages(_ReadOnly):
    """Rows of the outbox."""

    key = "inner_msg_id"
    large = ("body", "headers", "options")
    fields = (
        "id", "message", "state_name", "exchange", "routing_key", "made", "due", "attempts", "last_error", "order_key",
        "content_type", "headers_shown", "options", "body_shown",
    )  # fmt: skip
    readonly_fields = fields
    search_fields = ("inner_msg_id",)
    search_help_text = "an inner-msg-id"
    ordering = ("id",)
    made = _time("made_at", "made")
    due = _time("due_at", "due")
    body_shown = _text("body", "body")

    @admin.display(description="headers")
    def headers_shown(self, row: Any) -> str:
        """The beginning of them."""
        return str(row.headers)[:_SHOWN]

    @admin.display(description="inner-msg-id")
    def message(self, row: Any) -> str:
        """As the message's header has it."""
        digits = str(row.inner_msg_id)
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    @admin.display(description="state", ordering="state")
    def state_name(self, row: Any) -> str:
        """In words."""
        return _word(RowState, row.state)


@admin.register(OutboxMessage)
class OutboxMessageAdmin(_Messages):
    """What is still to be sent, and what was given up."""

    list_display = ("id", "message", "state_name", "exchange", "routing_key", "made", "due", "attempts")


@admin.register(DeadMessage)
class DeadMessageAdmin(_Messages):
    """What the broker has refused too often: to be sent again, or never."""

    list_display = ("id", "message", "exchange", "routing_key", "made", "attempts", "last_error")
    actions = ("send_again", "discard")

    def has_redrive_permission(self, request: HttpRequest) -> bool:
        """Who may change them."""
        return bool(request.user.has_perm("idempotent_bus.change_deadmessage"))

    def has_discard_permission(self, request: HttpRequest) -> bool:
        """Who may delete them."""
        return bool(request.user.has_perm("idempotent_bus.delete_deadmessage"))

    @admin.action(permissions=["redrive"], description="Send the selected messages again")
    def send_again(self, request: HttpRequest, queryset: Any) -> None:
        """With fresh attempts, under the same inner-msg-ids."""
        self._decide(request, queryset, outbox.redrive, "to be sent again")

    @admin.action(permissions=["discard"], description="Discard the selected messages: they are never sent")
    def discard(self, request: HttpRequest, queryset: Any) -> None:
        """For good; what waits behind them goes on."""
        self._decide(request, queryset, outbox.discard, "discarded")

    def _decide(self, request: HttpRequest, queryset: Any, act: Callable[[Any], int], word: str) -> None:
        chosen = list(queryset.values_list("pk", flat=True))
        done = act(chosen)
        self.message_user(request, f"{done} {word}", messages.SUCCESS)
        if done < len(chosen):
            self.message_user(request, f"{len(chosen) - done} were not dead any more", messages.WARNING)


class _Page(admin.ModelAdmin):
    """A page of ours in the place of a list of rows. To look needs the view permission, to act that to change."""

    page = ""

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Nobody."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody."""
        return False

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        """Show, or act and show again."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        acting = self.has_change_permission(request)
        if request.method == "POST":
            if not acting:
                raise PermissionDenied
            try:
                self.act(request)
            except Exception as error:  # noqa: BLE001 - a driver's too: its class is told, its text may hold a password
                self.message_user(request, _said(error), messages.ERROR)
            return HttpResponseRedirect(request.path)
        context = {
            **self.admin_site.each_context(request),
            **(extra_context or {}),
            "title": self.opts.verbose_name_plural,
            "opts": self.opts,
            "acting": acting,
        }
        try:
            context |= self.look(acting)
        except Exception as error:  # noqa: BLE001 - as above
            context["error"] = _said(error)
        return TemplateResponse(request, f"admin/idempotent_bus/{self.page}.html", context)

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        """There is only the one page."""
        raise PermissionDenied

    def look(self, acting: bool) -> dict[str, Any]:
        """What the page shows. acting: to somebody who may decide."""
        raise NotImplementedError

    def act(self, request: HttpRequest) -> None:
        """What was asked for; tells the user what came of it."""
        raise NotImplementedError


@admin.register(QuarantinedRecord)
class QuarantinedRecordAdmin(_Page):
    """Records whose handler died, or could not tell: somebody looks whether the effect is there, and says so."""

    page = "quarantine"

    def look(self, acting: bool) -> dict[str, Any]:
        """The first of them."""
        with _store() as store:
            found = list(itertools.islice(quarantined(store), _MOST + 1))
        return {"records": [_shown(record, acting) for record in found[:_MOST]], "more": len(found) > _MOST}

    def act(self, request: HttpRequest) -> None:
        """Resolve the selected ones."""
        found = request.POST.get("found")
        chosen = request.POST.getlist("record")[:_MOST]
        if found not in ("done", "not_done") or not chosen:
            self.message_user(request, "Select records, and say what was found.", messages.WARNING)
            return
        done = 0
        with _store() as store:
            for record in chosen:
                retention = bus_settings().retention
                done += resolve(store, record, completed=found == "done", retention=retention)
        what = "done" if found == "done" else "not done; redrive their messages to run them"
        self.message_user(request, f"{done} resolved: {what}", messages.SUCCESS)
        if done < len(chosen):
            self.message_user(request, f"{len(chosen) - done} were not in quarantine any more", messages.WARNING)


@admin.register(DeadLetterQueue)
class DeadLetterQueueAdmin(_Page):
    """The broker's dead letters that the settings name: how many messages, and back to their queues."""

    page = "dead_letters"

    def look(self, acting: bool) -> dict[str, Any]:
        """Their names and sizes."""
        settings = bus_settings()
        if settings.broker is None or not settings.dead_letters:
            return {"error": "IDEMPOTENT_BUS needs BROKER and DEAD_LETTERS, a list of scopes or queues, for this page."}
        names = [dead_letter_of(settings.broker, name) for name in settings.dead_letters]
        return {"queues": [{"name": name, "depth": depth(settings.broker, name)} for name in names]}

    def act(self, request: HttpRequest) -> None:
        """Move the messages of one back."""
        settings = bus_settings()
        queue = request.POST.get("queue", "")
        if queue not in {dead_letter_of(settings.broker, name) for name in settings.dead_letters}:
            self.message_user(request, "That is none of IDEMPOTENT_BUS['DEAD_LETTERS'].", messages.ERROR)
            return
        with _store() as store:
            known = store if isinstance(store, LookupStore) else None
            done = redrive(settings.broker, queue, store=known, limit=_MOST_MOVED)
        self.message_user(request, _told(done), messages.SUCCESS if done.left == 0 else messages.WARNING)


def _shown(record: Abandoned, acting: bool) -> dict[str, Any]:
    return {
        "record": record.record,
        "scope": record.scope,
        "biz_id": record.biz_id if acting else "",
        "attempts": record.attempts,
        "since": moment(int(record.since * 1_000_000)),
    }


def _told(done: Redriven) -> str:
    parts = [f"{number} {outcome.value}" for outcome, number in done.outcomes.items()]
    return f"{done.queue}: {', '.join(parts) or 'nothing was there'}"


@contextlib.contextmanager
def _store() -> Iterator[Any]:
    store: Any = store_here()
    try:
        yield store
    finally:
        store.close()


def _word(kind: Any, number: int) -> str:
    try:
        return str(kind(number).name.lower().replace("_", " "))
    except ValueError:
        return str(number)


def _said(error: BaseException) -> str:
    if isinstance(error, IdempotentBusError):
        return str(error)
    return f"it did not work: {type(getattr(error, 'orig', None) or error).__name__}"
