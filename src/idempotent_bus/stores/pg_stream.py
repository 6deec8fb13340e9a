"""Completions that are sent to PostgreSQL at once and not waited for: each its own commit, several at the same time.

A commit waits for the disk, and commits that wait together share one flush. So a stream has a few connections of its
own, and each carries one completion at a time. It is one on purpose. A server that cannot answer its client any more
ends the session at the next statement, so that of several completions sent ahead over one connection (libpq's pipeline)
a killed client's later ones are lost; the one that a session is at is always brought to its end. And each is a
transaction of its own, with the durability that the database is set to: a shared one would be rolled back with a killed
client, and `synchronous_commit = off` would show others a completion that a crash of the server still takes back (I6).

Only psycopg 3 is spoken to: its `pgconn` is libpq as it is, which neither waits nor opens a transaction.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import selectors
import struct
import time
from collections.abc import Callable
from typing import Any, Final

import psycopg
from psycopg.pq import ConnStatus, ExecStatus

from ..errors import StoreError, StoreUnavailable
from ..model import Completion, Settled

__all__ = ["PgStream"]

_NAME: Final = b"idempotent_bus_complete"
_BIGINT: Final = struct.Struct(">q")
#: The parameters of `complete`, in the order in which they are sent.
_ORDER: Final = ("key", "token", "nonce", "result", "retention")
#: Seconds for which a stream that may have no further connection goes on with those that it has.
_CONTENT: Final = 30.0
#: What was opened by a parent process: closing it would end the parent's session.
_inherited: list[Any] = []

_Selector: Any = selectors.PollSelector if hasattr(select, "poll") else selectors.SelectSelector


class _Lane:
    """One connection, with at most one completion under way.

    ticket, completion: what is under way. deadline: when its answer is overdue. durable: True once the server has said
    that it was done now; counts only when `over`.
    """

    def __init__(self, connection: psycopg.Connection[Any], text: bytes, limit: float) -> None:
        self._connection = connection
        self._limit = limit
        self.ticket = 0
        self.completion: Completion | None = None
        self.deadline = 0.0
        self.durable = False
        self._failed = False
        pgconn = self._pgconn = connection.pgconn
        self.fileno = pgconn.socket
        # A named statement spares the server to read and plan it each time. Where the user has told psycopg to name
        # none (a pooler in between does not keep them), neither do we.
        self._text = None if connection.prepare_threshold is not None else text
        pgconn.nonblocking = 1
        if pgconn.server_version >= 140_000:
            # Where it is set, the server would look whether we still live, and give up a completion if we do not.
            setting = b"SELECT set_config('client_connection_check_interval', '0', false)"
            self._ask(lambda: pgconn.send_query_params(setting, None))
        if self._text is None:
            self._ask(lambda: pgconn.send_prepare(_NAME, text))

    def begin(self, ticket: int, completion: Completion) -> None:
        """Send it: when this returns, the kernel has all of it."""
        self.ticket, self.completion = ticket, completion
        hold = completion.hold
        retention = _BIGINT.pack(round(completion.retention * 1_000_000))
        parameters = [hold.key, _BIGINT.pack(hold.token), hold.nonce, completion.result, retention]
        formats = (1,) * len(parameters)
        self._expect()
        if self._text is None:
            self._pgconn.send_query_prepared(_NAME, parameters, formats, 1)
        else:
            self._pgconn.send_query_params(self._text, parameters, None, formats, 1)
        self._flush()

    def over(self) -> bool:
        """Read what has come. True once the transaction has ended, which is after the statement has."""
        pgconn = self._pgconn
        pgconn.consume_input()
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if pgconn.status != ConnStatus.OK:
                raise psycopg.OperationalError("the connection was lost")
            if result is None:
                self.durable = self.durable and not self._failed
                return True
            if result.status in (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK):
                self.durable = result.command_tuples == 1
            else:  # also of the commit: it comes behind the statement's own answer
                self._failed = True
        return False

    def close(self) -> None:
        with contextlib.suppress(psycopg.Error):
            self._connection.close()

    def _expect(self) -> None:
        self.durable = self._failed = False
        self.deadline = time.monotonic() + self._limit

    def _ask(self, send: Callable[[], None]) -> None:
        self._expect()
        send()
        self._flush()
        while not self.over():
            self._wait(selectors.EVENT_READ)
        if self._failed:
            raise StoreUnavailable("PostgreSQL refused to prepare a completion; they are waited for one by one")

    def _flush(self) -> None:
        while self._pgconn.flush():
            if self._wait(selectors.EVENT_READ | selectors.EVENT_WRITE) & selectors.EVENT_READ:
                self._pgconn.consume_input()  # it may not take more before it has got rid of something

    def _wait(self, events: int) -> int:
        with _Selector() as selector:
            selector.register(self.fileno, events)
            ready = selector.select(max(0.0, self.deadline - time.monotonic()))
        if not ready and time.monotonic() >= self.deadline:
            raise TimeoutError("PostgreSQL did not answer in time")
        return int(ready[0][1]) if ready else 0


class PgStream:
    """A `CompletionStream` over a few connections of its own. For one thread at a time.

    connect: gives a psycopg connection that nobody else uses, or raises StoreError. text: the statement of a completion
    with the parameters that `_ORDER` names, asked for when first needed. singly: `complete`, as the store does it
    otherwise. most: connections; another one is opened when all that there are have something under way, and where
    there may be no more, `begin` waits for one of them. limit: seconds after which an answer is waited for no more.
    """

    survives = True  # each has left when `begin` returns, and no session is sent a second one before it has answered

    def __init__(
        self,
        connect: Callable[[], psycopg.Connection[Any]],
        text: Callable[[], str],
        singly: Callable[[Completion], bool],
        *,
        most: int,
        limit: float,
    ) -> None:
        self._connect = connect
        self._text = text
        self._singly = singly
        self._most = most
        self._limit = limit
        self._pid = os.getpid()
        self._begun = 0
        self._told = 0
        self._idle: list[_Lane] = []
        self._busy: dict[int, _Lane] = {}
        self._selector: Any = _Selector()  # knows every lane
        #: How those have ended that cannot be told of yet, since an earlier one is under way.
        self._ended: dict[int, bool | None] = {}
        self._content_until = 0.0

    @property
    def pending(self) -> int:
        return self._begun - self._told

    def begin(self, completion: Completion, /) -> int:
        self._begun += 1
        ticket = self._begun
        self._ended[ticket] = None  # in doubt, unless it is known better
        try:
            lane = self._free()
        except (psycopg.Error, OSError, StoreError):
            return ticket
        self._busy[ticket] = lane
        try:
            lane.begin(ticket, completion)
        except (psycopg.Error, OSError):
            self._broken(lane)
        except BaseException:
            self._broken(lane)  # a signal in the middle of a send: what the server has is unknown
            raise
        else:
            del self._ended[ticket]
        return ticket

    def poll(self, timeout: float = 0.0) -> list[Settled]:
        gives_up = time.monotonic() + timeout
        self._read(0.0)
        while True:
            told = self._tell()
            left = gives_up - time.monotonic()
            if told or left <= 0 or not self._busy:
                return told
            self._read(left)

    def settle(self) -> list[Settled]:
        while self._busy:
            self._read(self._limit)
        return self._tell()

    def close(self) -> None:
        lanes = [*self._idle, *self._busy.values()]
        self._idle, self._busy, self._ended = [], {}, {}
        self._told = self._begun
        if os.getpid() != self._pid:
            _inherited.extend(lanes)
            return
        for lane in lanes:
            self._drop(lane)

    def __del__(self) -> None:
        if hasattr(self, "_ended"):
            self.close()

    # --- lanes ---------------------------------------------------------------------------------------

    def _free(self) -> _Lane:
        """A connection with nothing under way."""
        while not self._idle:
            may_open = len(self._busy) < self._most and time.monotonic() >= self._content_until
            self._read(0.0 if may_open else self._limit)
            if self._idle:
                break
            if not self._busy:
                return self._open()
            if may_open and len(self._busy) < self._most:
                try:
                    return self._open()
                except (psycopg.Error, OSError, StoreError):  # the server has no more of them: fewer will do
                    self._content_until = time.monotonic() + _CONTENT
        return self._idle.pop()

    def _open(self) -> _Lane:
        text = _numbered(self._text())
        connection = self._connect()
        try:
            lane = _Lane(connection, text, self._limit)
        except BaseException:
            connection.close()
            raise
        self._selector.register(lane.fileno, selectors.EVENT_READ, lane)
        return lane

    def _drop(self, lane: _Lane) -> None:
        self._selector.unregister(lane.fileno)
        lane.close()

    def _read(self, timeout: float) -> None:
        """Take the answers that have come; wait for one if none has."""
        if not self._busy:
            return
        soonest = next(iter(self._busy.values())).deadline  # the first that was sent
        for key, _ in self._selector.select(max(0.0, min(timeout, soonest - time.monotonic())) if timeout else 0.0):
            self._take(key.data)
        now = time.monotonic()
        if now >= soonest:
            for lane in [lane for lane in self._busy.values() if now >= lane.deadline]:
                self._broken(lane)

    def _take(self, lane: _Lane) -> None:
        ticket, completion = lane.ticket, lane.completion
        idle = self._busy.get(ticket) is not lane
        if idle and lane not in self._idle:
            return  # another one broke, and this one was let go of with it
        try:
            if not lane.over() or idle:  # the server says something to one that is idle: most often that it is over
                return
        except (psycopg.Error, OSError):
            self._broken(lane)
            return
        except BaseException:
            self._broken(lane)
            raise
        self._ended[ticket] = lane.durable or None
        del self._busy[ticket]
        self._idle.append(lane)
        if not lane.durable and completion is not None:
            # Refused, or there was nothing to change: it was completed before, or is another's. Asked once more, the
            # ordinary way, which tells these apart.
            with contextlib.suppress(StoreError):
                self._ended[ticket] = self._singly(completion)

    def _broken(self, lane: _Lane) -> None:
        """A connection is gone, or what it would say next is unknown: what was under way there is in doubt."""
        if self._busy.get(lane.ticket) is lane:
            self._ended[lane.ticket] = None
            del self._busy[lane.ticket]
            self._drop(lane)
        # Those that are idle may have gone with it, and nobody would notice before the next completion.
        while self._idle:
            self._drop(self._idle.pop())

    def _tell(self) -> list[Settled]:
        told = []
        while (ticket := self._told + 1) in self._ended:
            told.append(Settled(ticket, self._ended.pop(ticket)))
            self._told = ticket
        return told


def _numbered(text: str) -> bytes:
    """A statement with `:word` parameters as libpq takes it: `$1`, `$2`, ..."""
    return re.sub(r"(?<!:):([a-z]+)", lambda word: f"${_ORDER.index(word.group(1)) + 1}", text).encode()
