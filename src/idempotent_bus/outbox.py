"""The transactional upper half: a message is added in the same transaction as the effect that it tells of.

Effect and message commit together or not at all (I3). A `Relay` sends what was committed, under the inner-msg-id that
was made here, until the broker confirms it, so that however often it is sent it lands once.

    outbox = Outbox(engine)
    with engine.begin() as connection:
        charge(connection, payment)
        outbox.add(connection, {"payment_id": payment.id}, exchange=paid, routing_key="paid")
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, Final

import sqlalchemy as sa
from kombu import Exchange, Queue
from kombu.utils import json
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.pool import QueuePool

from . import schema
from .connections import Link, is_duplicate, link_to
from .errors import ConfigurationError, InvalidBizId, InvalidBody
from .execution import current_execution
from .headers import INNER_MSG_ID
from .identity import BizIdSpec, canonical_biz_id, extract_biz_id
from .msgid import is_inner_msg_id, new_inner_msg_id
from .relaying.entities import described, described_exchange
from .relaying.rows import load
from .relaying.words import RowState
from .sending.outgoing import Outgoing, prepare, serialised
from .signing import Signer

__all__ = ["Added", "OrderSpec", "Outbox"]

#: A path into the body, a function of the body, or the key itself where that is an int or a UUID.
OrderSpec = str | int | uuid.UUID | Callable[[Any], Any]

_DIALECTS: Final[dict[str, Any]] = {
    "postgresql": postgresql.dialect,
    "mysql": mysql.dialect,
    "sqlite": sqlite.dialect,
}
_NOTHING: Final = (None,) * 9
_JSON: Final = (None, "json")
_ORDER: Final = b"idempotent-bus/o"
_MOST_DELAY: Final = 366 * 86400.0
_PICKLES: Final = frozenset({"application/x-python-serialize", "application/x-python", "application/pickle"})


class Added(str):
    """The inner-msg-id of a message in the outbox. added: False if the outbox had that id already.

    Then nothing was added, also where the earlier one is part of this very transaction.
    """

    __slots__ = ("added",)

    added: bool

    def __new__(cls, inner_msg_id: str, added: bool) -> Added:
        made = super().__new__(cls, inner_msg_id)
        made.added = added
        return made


class Outbox:
    """Messages that are to be sent, in the database where the effects are.

    engine: only for making the table, on a connection of its own; None where `idempotent-bus schema create` or your
        migrations do that (`schema.metadata`).
    table_prefix, database_schema: where the table is.
    exchange, routing_key, serializer: defaults of `add`.
    biz_id: a path or a function; a body without a valid id there is refused (InvalidBizId) before it is added.
    signer: signs each message, as that of a producer does.
    create: make the table now, if it is missing. Raises SQLAlchemy's error if the database cannot be reached.

    Safe for threads: it holds no connection. PostgreSQL, MariaDB, MySQL 8 and SQLite 3.35.
    """

    def __init__(
        self,
        engine: sa.Engine | None = None,
        *,
        table_prefix: str = schema.PREFIX,
        database_schema: str | None = None,
        exchange: Exchange | str | None = None,
        routing_key: str | None = None,
        serializer: str | None = None,
        biz_id: BizIdSpec | None = None,
        signer: Signer | None = None,
        create: bool = True,
    ) -> None:
        self._tables = schema.metadata(table_prefix, database_schema, parts=("outbox",))
        self._exchange = exchange
        self._routing_key = routing_key
        self._serializer = serializer
        self._biz_id = biz_id
        self._signer = signer
        texts = {name: load(self._tables, dialect()) for name, dialect in _DIALECTS.items()}
        self._texts = {name: of["add"] for name, of in texts.items()}
        self._plain = {name: of["add_plain"] for name, of in texts.items()}
        self._checked = False
        if engine is not None and create:
            # Here rather than at the first `add`: then a transaction is open, and where the pool has one connection
            # only (SQLite in memory) a CREATE would run within it, and its COMMIT would be yours.
            schema.create(engine, self._tables)
            _leave_nothing_in(engine)

    def add(
        self,
        connection: Any,
        body: Any,
        *,
        exchange: Exchange | str | None = None,
        routing_key: str | None = None,
        headers: Mapping[str, Any] | None = None,
        order_by: OrderSpec | None = None,
        delay: float = 0.0,
        inner_msg_id: str | None = None,
        once: str | None = None,
        biz_id: BizIdSpec | None = None,
        serializer: str | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        compression: str | None = None,
        priority: int | None = None,
        expiration: float | None = None,
        declare: Queue | None = None,
        **properties: Any,
    ) -> Added:
        """Add one message in the transaction that is open on `connection`; returns its inner-msg-id.

        connection: a SQLAlchemy Connection or Session, a Django connection, or a driver's own. It is neither committed
            nor rolled back here.
        exchange: an Exchange object is declared by the relay before the first message goes there, a name is not.
        order_by: send it after all earlier messages with the same key: a path into the body (`"payment_id"`), a
            function of it, or an int or UUID that is the key. Earlier is what was added before in the same transaction,
            or in one that was committed before this call. Two transactions that overlap have no order, unless they
            both write a row of yours first, as two for the same account do. A message that cannot be sent holds up
            the later ones of its key until a person decides.
        delay: seconds before it is sent at the earliest.
        inner_msg_id: adds that very message, for instance from a PublishError; nothing is added if it is there.
        once: inside a guarded handler, a name for this message: its id is derived from the execution and that name,
            so that a handler that is run again adds the very same message again.
        expiration: seconds, from when the broker has it.
        declare: a queue that the relay declares first, with its exchange and binding.

        Other keywords are those of `IdempotentProducer.publish`, message properties among them. Raises
        ConfigurationError (for a connection in autocommit, too, and on MySQL and MariaDB for a table in an engine
        without transactions), InvalidBizId, InvalidBody or NoExecution before anything is added, and what the
        connection raises.
        """
        link = link_to(connection)
        link.check_transaction()
        if link.database == "mysql" and not self._checked:
            schema.refuse_engines(link.run(schema.engines_query(self._tables), {})[0])
            self._checked = True
        spec = self._biz_id if biz_id is None else biz_id
        if spec is not None and (isinstance(spec, str) or callable(spec)):  # else the inner-msg-id is the id
            extract_biz_id(spec, body)
        if not 0 <= delay <= _MOST_DELAY:
            raise ConfigurationError("delay must be from 0 seconds to 366 days")
        exchange = self._exchange if exchange is None else exchange
        routing_key = self._routing_key if routing_key is None else routing_key
        serializer = self._serializer if serializer is None else serializer
        # Nearly all messages have none of these; what is left to do for them is done in a tenth of the code.
        special = (
            inner_msg_id,
            once,
            order_by,
            content_type,
            content_encoding,
            compression,
            priority,
            expiration,
            declare,
        )
        if special == _NOTHING and not (headers or properties or delay) and self._signer is None:
            added = self._add_plain(link, body, serializer, exchange, routing_key)
            if added is not None:
                return added
        order_key = None if order_by is None else _order_key(order_by, body)
        outgoing = prepare(
            body,
            inner_msg_id=_identify(inner_msg_id, once, properties),
            exchange=exchange,
            routing_key=routing_key,
            headers=headers,
            declare=(),
            serializer=serializer,
            content_type=content_type,
            content_encoding=content_encoding,
            compression=compression,
            priority=priority,
            expiration=None,  # counted by the broker from when it has the message, so it is added by the relay
            properties=properties,
            signer=self._signer,
        )
        parameters = _row(outgoing, expiration, declare)
        parameters["delay"] = round(delay * 1_000_000)
        parameters["state"] = int(RowState.FREE if order_key is None else RowState.ORDERED)
        parameters["order_key"] = order_key
        if link.database == "postgresql":  # 16 bytes are a uuid there
            for name in ("inner_msg_id", "order_key"):
                parameters[name] = None if parameters[name] is None else parameters[name].hex()
        fresh = inner_msg_id is None and once is None
        return Added(outgoing.inner_msg_id or "", self._insert(link, parameters, fresh=fresh))

    def _add_plain(
        self, link: Link, body: Any, serializer: str | None, exchange: Exchange | str | None, routing_key: str | None
    ) -> Added | None:
        """Add JSON under a fresh id, with nothing special about it. None: it is no JSON, and nothing was added."""
        if serializer not in _JSON or isinstance(body, (str, bytes)):
            return None
        content_type, content_encoding, text = serialised(body, serializer)
        if content_type != "application/json" or content_encoding != "utf-8":
            return None  # the user has given the name, or the default, to another
        options = "{}"
        if isinstance(exchange, Exchange):
            if exchange.name:
                options = _json({"exchange": described_exchange(exchange)}, "message properties")
            exchange = exchange.name
        inner_msg_id = new_inner_msg_id()
        parameters = {
            "inner_msg_id": inner_msg_id if link.database == "postgresql" else _sixteen(inner_msg_id),
            "exchange": _short(exchange or "", "the exchange's name"),
            "routing_key": _short(routing_key or "", "the routing key"),
            "options": options,
            "body": text.encode() if isinstance(text, str) else bytes(text),
        }
        link.run(self._plain[link.database], parameters, fetch=False)
        return Added(inner_msg_id, True)

    def _insert(self, link: Link, parameters: dict[str, Any], *, fresh: bool) -> bool:
        text = self._texts[link.database]
        if link.database != "mysql":
            rows, _ = link.run(text, parameters)
            return bool(rows)
        try:
            link.run(text, parameters)
        except Exception as error:
            # An error of one statement ends no transaction there.
            if fresh or not is_duplicate(error):
                raise
            return False
        return True


def _identify(inner_msg_id: str | None, once: str | None, properties: dict[str, Any]) -> str:
    if once is not None:
        if inner_msg_id is not None:
            raise ConfigurationError("give once or inner_msg_id, not both: each of them says which message it is")
        properties.setdefault("timestamp", int(time.time()))  # which a derived id does not tell
        return current_execution().derived_id(once)
    if inner_msg_id is None:
        return new_inner_msg_id()
    if not is_inner_msg_id(inner_msg_id):
        raise ConfigurationError("inner_msg_id must be one that the library made, as a receipt or an error gives it")
    return inner_msg_id


def _row(outgoing: Outgoing, expiration: float | None, queue: Queue | None) -> dict[str, Any]:
    if outgoing.content_type in _PICKLES:
        raise ConfigurationError("the outbox takes no pickles: whoever may write to its table could run code elsewhere")
    body = outgoing.body
    encoding = outgoing.content_encoding or "binary"
    if isinstance(body, str):
        body = body.encode("utf-8" if encoding == "binary" else encoding)
    properties = {name: value for name, value in outgoing.properties.items() if name != "delivery_mode"}
    options: dict[str, Any] = {}
    if properties:
        options["properties"] = properties
    if outgoing.priority:
        options["priority"] = outgoing.priority
    if expiration is not None:
        options["expiration"] = float(expiration)
    if outgoing.declare:
        options["exchange"] = described_exchange(outgoing.declare[0])
    if queue is not None:
        options["queue"] = described(queue)
    # The id has a column of its own, and the relay's producer puts it back.
    headers = {name: value for name, value in outgoing.headers.items() if name != INNER_MSG_ID}
    return {
        "inner_msg_id": _sixteen(outgoing.inner_msg_id or ""),
        "exchange": _short(outgoing.exchange, "the exchange's name"),
        "routing_key": _short(outgoing.routing_key, "the routing key"),
        "content_type": _short(outgoing.content_type or "", "the content type"),
        "content_encoding": _short(encoding, "the content encoding"),
        "headers": _json(headers, "headers") if headers else "{}",
        "options": _json(options, "message properties") if options else "{}",
        "body": bytes(body),
    }


def _sixteen(inner_msg_id: str) -> bytes:
    return bytes.fromhex(inner_msg_id.replace("-", ""))


def _order_key(spec: OrderSpec, body: Any) -> bytes:
    """16 bytes that stand for the key, whichever way it was written."""
    try:
        text = canonical_biz_id(spec) if isinstance(spec, (int, uuid.UUID)) else extract_biz_id(spec, body)
    except InvalidBizId as error:
        raise InvalidBody(
            f"no order key: {str(error).replace('biz-id', 'key').replace('biz_id', 'order_by')}"
        ) from error
    return blake2b(text.encode(), digest_size=16, person=_ORDER).digest()


def _json(value: Any, what: str) -> str:
    try:
        return str(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"the {what} cannot be kept as JSON ({type(error).__name__})") from error


def _short(text: str, what: str) -> str:
    if len(text) < 64 and text.isprintable():  # nearly always
        return text
    # AMQP's own limit. A column that cut it would send the message elsewhere.
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        length = 256
    if length > 255 or "\0" in text:
        raise ConfigurationError(f"{what} must be a text of at most 255 bytes of UTF-8 without NUL")
    return text


def _leave_nothing_in(engine: sa.Engine) -> None:
    """Close the one connection that was opened here: an outbox made at import must not hand a socket to forks."""
    pool = engine.pool
    if isinstance(pool, QueuePool) and pool.checkedout() == 0 and pool.checkedin() == 1:
        engine.dispose()
