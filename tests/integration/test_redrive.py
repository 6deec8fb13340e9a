"""Redrive: dead letters go back to the queues that they came from, on every broker, and none is lost on the way."""

from __future__ import annotations

import contextlib
import time
import types
from typing import Any

import pytest
from click.testing import CliRunner
from kombu import Connection, Queue
from kombu.compression import compress
from kombu.message import Message

from consumer_rig import BROKERS, OURS, RABBITMQ, Broker, broker_of, consume, on
from idempotent_bus import Backoff, ConfigurationError, Permanent, StoreUnavailable, current_execution
from idempotent_bus.cli.redrive import redrive as redrive_command
from idempotent_bus.handler import idempotent_consumer
from idempotent_bus.headers import (
    DEAD_AT,
    DEAD_ATTEMPTS,
    DEAD_ERROR,
    DEAD_FINGERPRINT,
    DEAD_REASON,
    DEAD_RECORD,
    DEAD_SCOPE,
    INNER_MSG_ID,
    ORIGIN_QUEUE,
    REDRIVE,
)
from idempotent_bus.identity import fingerprint, record_key
from idempotent_bus.kombu_message import OF_ONE_DEATH
from idempotent_bus.model import Claimed, ClaimRequest, Hold
from idempotent_bus.redrive import Outcome, dead_letter_of, redrive
from idempotent_bus.stores import open_store
from idempotent_bus.stores.memory import MemoryStore
from idempotent_bus.testing import ManualClock

broker = pytest.fixture(broker_of)

QUICK: dict[str, Any] = {"backoff": Backoff(0.05, 0.1), "busy_delay": 0.1}


class Killed(BaseException):
    """The process is gone."""


def guarded(store: Any, scope: str, handler: Any, **options: Any) -> Any:
    return idempotent_consumer(store, scope=scope, biz_id="id", **{**QUICK, **options})(handler)


def bury(broker: Broker, queue: Queue, *bodies: Any, store: Any = None, **options: Any) -> list[str]:
    """Publish messages and let a permanent error put each of them into the dead letter."""

    def handle(body: Any, message: Message) -> None:
        raise Permanent("no")

    ids = [broker.publish(queue, body, **options) for body in bodies]
    handler = guarded(store or MemoryStore(), broker.unique, handle)
    seen: list[int] = []

    def callback(body: Any, message: Message) -> None:
        handler(body, message)
        seen.append(1)

    assert consume(broker, queue, callback, lambda: len(seen) == len(bodies))
    return ids


def write_dead(broker: Broker, name: str, body: bytes, headers: dict[str, Any]) -> None:
    """A dead letter as somebody else may have made it."""
    broker.extra.append(name)
    queue = Queue(name, durable=True)
    if broker.is_rabbitmq:
        with broker.connect() as connection:
            queue(connection.channel()).queue_declare()
    broker.publish_raw(Queue(name, no_declare=broker.is_rabbitmq), body, headers=headers)


def fill(broker: Broker, *headers: dict[str, Any]) -> None:
    for number, one in enumerate(headers):
        write_dead(broker, broker.dead, b'{"id": "%d"}' % number, one)


def complete(store: Any, scope: str, biz_id: str, body: Any) -> None:
    key, nonce = record_key(scope, biz_id), b"somebody else's."
    claimed = store.claim(ClaimRequest(key, nonce, 60.0, 1000.0, fingerprint(body)))
    assert isinstance(claimed, Claimed)
    assert store.complete(Hold(key, claimed.token, nonce), result=None, retention=1000.0)


@on(*BROKERS)
def test_a_redriven_message_is_the_same_and_gets_its_attempts_afresh(broker: Broker) -> None:
    """I12, I1: back in its queue with id, body and headers, a redrive number, no word of its death; it runs again."""
    queue, store, runs, seen, began = broker.queue(), MemoryStore(), [], [], int(time.time())

    def handle(body: Any, message: Message) -> None:
        seen.append(message)
        runs.append((body["id"], current_execution().attempt))
        if len(runs) <= 2:
            raise ValueError("not yet")

    handler = guarded(store, broker.unique, handle, max_attempts=2)
    inner = broker.publish(queue, {"id": "a"}, headers={"trace": "t"}, correlation_id="c")
    assert consume(broker, queue, handler, lambda: len(runs) == 2, timeout=20)
    with broker.connect() as connection:
        done = redrive(connection, broker.dead, store=store)
    after = time.time()
    assert (done.found, done.seen, done.moved, done.left) == (1, 1, 1, 0)
    assert broker.is_empty(broker.dead)
    assert consume(broker, queue, handler, lambda: len(runs) == 3, timeout=20)
    assert runs == [("a", 1), ("a", 2), ("a", 1)]
    last = seen[-1]
    assert last.headers[INNER_MSG_ID] == inner
    assert last.headers["trace"] == "t"
    assert last.headers[REDRIVE] == 1
    assert began <= last.headers[DEAD_AT] <= after
    assert not set(last.headers) & OF_ONE_DEATH
    assert last.properties["correlation_id"] == "c"
    assert broker.is_empty(queue.name)
    assert broker.is_empty(broker.dead)


@on(*BROKERS)
def test_what_lay_dead_for_longer_than_the_retention_is_in_doubt(broker: Broker, monkeypatch: Any) -> None:
    """I11, I2: a copy died, another one was completed, and its record is forgotten. Redriven now, the dead one does not
    run: it is dead-lettered as too old. Whoever has looked whether it was done redrives it once more: then it runs.

    The control: one that died as long ago as is remembered runs at the first redrive.
    """
    queue, clock, runs, died = broker.queue(), ManualClock(), [], []
    store = MemoryStore(clock)

    def wall() -> float:
        return time.time() + clock() - 1000.0

    def handle(body: Any, message: Message) -> None:
        runs.append(body["id"])
        if len(runs) <= 2:
            raise Permanent("no")

    handler = guarded(store, broker.unique, handle, retention=1000.0)
    handler.executor._wall = wall
    for module in ("settlement", "redrive"):
        named = types.SimpleNamespace(time=wall, sleep=time.sleep)
        monkeypatch.setattr(f"idempotent_bus.{module}.time", named, raising=False)
    for biz_id in ("done by another", "never done"):
        broker.publish(queue, {"id": biz_id})
    assert consume(broker, queue, handler, lambda: len(runs) == 2)
    complete(store, broker.unique, "done by another", {"id": "done by another"})
    clock.advance(900)
    with broker.connect() as connection:
        assert redrive(connection, broker.dead, store=store).moved == 1
    assert consume(broker, queue, handler, lambda: len(runs) == 3)
    assert runs == ["done by another", "never done", "never done"]
    clock.advance(200)
    with broker.connect() as connection:
        assert redrive(connection, broker.dead, store=store).moved == 1, "its record is forgotten"
    consume(broker, queue, handler, lambda: bool(died or died.extend(broker.take(broker.dead, timeout=0.1))))
    assert len(runs) == 3, "it ran although it was done, and forgotten"
    assert [message.headers[DEAD_REASON] for message in died] == ["too old"]
    write_dead(broker, broker.dead, b'{"id": "done by another"}', died[0].headers)
    assert redrive(broker.connect(), broker.dead, store=store).moved == 1
    assert consume(broker, queue, handler, lambda: len(runs) == 4)


@on(*BROKERS)
def test_what_dies_again_can_be_redriven_again(broker: Broker) -> None:
    """I1, I12: the number grows with each redrive, and no edge takes the second one for a copy of the first."""
    queue, store = broker.queue(), MemoryStore()
    bury(broker, queue, {"id": "a"}, store=store)
    for number in (1, 2, 3):
        assert redrive(broker.connect(), broker.dead).moved == 1
        died: list[Any] = []

        def handle(body: Any, message: Message, died: list[Any] = died) -> None:
            died.append(message.headers[REDRIVE])
            raise Permanent("still not")

        assert consume(broker, queue, guarded(store, broker.unique, handle), lambda died=died: bool(died))
        assert died == [number]
    (dead,) = broker.take(broker.dead)
    assert dead.headers[DEAD_ERROR].endswith("still not")


@on(*BROKERS)
def test_it_does_not_chase_what_fails_again_at_once(broker: Broker) -> None:
    """I13: a redrive looks at no more messages than were there at the start, whatever arrives meanwhile."""
    queue = broker.queue()
    bury(broker, queue, *({"id": str(number)} for number in range(4)))
    came: list[int] = []

    def another(outcome: Outcome, done: Any) -> None:
        came.append(1)
        if len(came) < 20:
            write_dead(broker, broker.dead, b'{"id": "new"}', {ORIGIN_QUEUE: queue.name})

    done = redrive(broker.connect(), broker.dead, on_message=another)
    assert (done.found, done.moved, len(came)) == (4, 4, 4)
    assert len(broker.take(broker.dead, 4)) == 4
    assert len(broker.take(queue.name, 4)) == 4


@on(*BROKERS)
def test_what_cannot_be_moved_is_left_and_counted(broker: Broker) -> None:
    """I1: no origin, no number, its own dead letter as the origin: left where they are, the others are moved."""
    queue = broker.queue()
    with broker.connect() as connection:
        queue(connection.channel()).declare()
    origin = {ORIGIN_QUEUE: queue.name}
    fill(
        broker,
        {}, origin, {ORIGIN_QUEUE: "x" * 300}, {**origin, REDRIVE: "many"}, origin, {ORIGIN_QUEUE: ""},
        {**origin, REDRIVE: 2**31 - 1}, {ORIGIN_QUEUE: broker.dead}, origin,
    )  # fmt: skip
    for round_ in range(3):
        done = redrive(broker.connect(), broker.dead)
        assert done.outcomes[Outcome.NO_ORIGIN] == 4
        assert done.outcomes[Outcome.INVALID] == 2
        assert done.moved == (3 if round_ == 0 else 0)
        assert done.left == 6
    assert [message.payload["id"] for message in broker.take(queue.name, 3)] == ["1", "4", "8"]
    left = [message.payload["id"] for message in broker.take(broker.dead, 6)]
    assert sorted(left) == ["0", "2", "3", "5", "6", "7"]
    if broker.name != "rabbitmq-quorum":  # there they go to the end before they come near to a delivery limit
        assert left == sorted(left), "what is left keeps its order"


@on(*BROKERS)
def test_to_is_for_those_without_an_origin(broker: Broker) -> None:
    """`to` takes those that do not say where they came from, and no others; `limit` bounds how many are moved."""
    queue, other = broker.queue(), broker.queue("other")
    with broker.connect() as connection:
        queue(connection.channel()).declare()
        other(connection.channel()).declare()
    fill(broker, {}, {ORIGIN_QUEUE: queue.name}, {}, {})
    assert redrive(broker.connect(), broker.dead, to=other.name, limit=3).moved == 3
    assert redrive(broker.connect(), broker.dead, limit=0).seen == 0
    assert [message.payload["id"] for message in broker.take(other.name, 2)] == ["0", "2"]
    assert [message.payload["id"] for message in broker.take(queue.name)] == ["1"]
    assert [message.payload["id"] for message in broker.take(broker.dead)] == ["3"]


@on(*BROKERS)
def test_completed_does_nothing_and_says_so(broker: Broker) -> None:
    """I6, I8: what was completed meanwhile is left, or thrown away if asked; redriven without a look nothing runs."""
    queue, store, ran = broker.queue(), MemoryStore(), []
    bury(broker, queue, {"id": "a"}, {"id": "b"}, {"id": "c"}, store=store)
    for biz_id in ("a", "c"):
        complete(store, broker.unique, biz_id, {"id": biz_id})
    done = redrive(broker.connect(), broker.dead, store=store)
    assert (done.moved, done.completed, done.left) == (1, 2, 2)
    done = redrive(broker.connect(), broker.dead, store=store, discard_completed=True, limit=1)
    assert (done.moved, done.completed, done.left) == (0, 2, 0)
    assert broker.is_empty(broker.dead)
    complete(store, broker.unique, "b", {"id": "b"})
    endings: list[int] = []
    handler = guarded(store, broker.unique, lambda body, message: ran.append(body))

    def callback(body: Any, message: Message) -> None:
        handler(body, message)
        endings.append(1)

    assert consume(broker, queue, callback, lambda: bool(endings))
    assert ran == []
    assert broker.is_empty(queue.name)


@on("memory", "ours-sqlite", "rabbitmq-classic")
def test_what_was_completed_with_another_body_is_never_discarded(broker: Broker) -> None:
    """I8, I1: the record is completed, but by another body: this one was never done, and is nobody's to throw away."""
    queue, store, runs = broker.queue(), MemoryStore(), []

    def handle(body: Any, message: Message) -> None:
        runs.append(body)

    complete(store, broker.unique, "a", {"id": "a", "sum": 1})
    broker.publish(queue, {"id": "a", "sum": 2})  # a conflict when it arrives
    died: list[int] = []
    handler = guarded(store, broker.unique, handle)

    def callback(body: Any, message: Message) -> None:
        handler(body, message)
        died.append(1)

    assert consume(broker, queue, callback, lambda: bool(died))
    bury(broker, queue, {"id": "b", "sum": 1}, store=store)  # dies, and then another body completes
    complete(store, broker.unique, "b", {"id": "b", "sum": 2})
    done = redrive(broker.connect(), broker.dead, store=store, discard_completed=True)
    assert done.outcomes == {Outcome.CONFLICT: 2}
    assert [message.payload["id"] for message in broker.take(broker.dead, 2)] == ["a", "b"]


@on("memory", "ours-redis")
def test_a_record_in_quarantine_is_left_until_it_is_resolved(broker: Broker) -> None:
    """A quarantined record needs a person: its message is left and counted; once resolved it is moved."""
    queue, store = broker.queue(), MemoryStore()
    bury(broker, queue, {"id": "a"}, store=store)
    key, nonce = record_key(broker.unique, "a"), b"somebody else's."
    claimed = store.claim(ClaimRequest(key, nonce, 60.0, 1000.0, fingerprint({"id": "a"})))
    assert isinstance(claimed, Claimed)
    assert store.quarantine(Hold(key, claimed.token, nonce), note=b"{}")
    done = redrive(broker.connect(), broker.dead, store=store, discard_completed=True)
    assert (done.quarantined, done.left, done.moved) == (1, 1, 0)
    assert store.resolve(key, completed=False, retention=1000.0)
    assert redrive(broker.connect(), broker.dead, store=store).moved == 1


@on(*BROKERS)
@pytest.mark.parametrize("when", ["before the move", "after the move", "before the ack", "after the ack"])
def test_killed_in_the_middle_of_a_redrive(broker: Broker, when: str) -> None:
    """I4, I1: killed at any step the message is in at least one place, in two at most, and one effect comes of it."""
    queue, store, ran, acked = broker.queue(), MemoryStore(), [], []
    bury(broker, queue, {"id": "a"}, store=store)

    def step(name: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        wanted = "publish" if "move" in when else "ack"
        if name == wanted and when.startswith("before"):
            raise Killed
        result = function(*args, **kwargs)
        if name == wanted:
            raise Killed
        return result

    with pytest.raises(Killed):
        redrive(broker.connect(), broker.dead, store=store, step=step)
    with contextlib.suppress(ConfigurationError):  # memory: the queue may be gone with its last message
        redrive(broker.connect(), broker.dead, store=store)
    handler = guarded(store, broker.unique, lambda body, message: ran.append(message.headers[REDRIVE]))

    def callback(body: Any, message: Message) -> None:
        handler(body, message)
        acked.append(1)

    copies = 2 if when in ("after the move", "before the ack") else 1
    assert consume(broker, queue, callback, lambda: len(acked) == copies)
    assert ran == [1]
    assert broker.is_empty(queue.name)
    assert broker.is_empty(broker.dead)


BODIES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "undecodable": (b'{"id": ', {"content_type": "application/json", "content_encoding": "utf-8"}),
    "binary": (bytes(range(256)), {"content_type": "application/octet-stream", "content_encoding": "binary"}),
    "not its encoding": (b"\xff\xfe\x00", {"content_type": "application/json", "content_encoding": "utf-8"}),
    "broken compression": (b"not zlib", {"headers": {"compression": "application/x-gzip"}}),
    "latin": (b'{"no": "\xe4"}', {"content_type": "application/json", "content_encoding": "latin-1"}),
    "empty": (b"", {"content_type": "application/json", "content_encoding": "utf-8"}),
    "unknown type": (b"<x/>", {"content_type": "text/xml", "content_encoding": "utf-8"}),
}


def bytes_of(message: Message) -> bytes:
    return message.body.encode(message.content_encoding or "utf-8") if isinstance(message.body, str) else message.body


@on(*BROKERS)
def test_dying_and_being_redriven_changes_no_byte(broker: Broker) -> None:
    """I1: what cannot be read is in its queue again, byte for byte, after it died and was redriven, and again."""
    queue, store, seen = broker.queue(), MemoryStore(), []
    handler = guarded(store, broker.unique, lambda body, message: None)

    def undecodable(message: Message, error: Exception) -> None:
        handler.on_decode_error(message, error)
        seen.append(1)

    def callback(body: Any, message: Message) -> None:
        handler(body, message)
        seen.append(1)

    for body, options in BODIES.values():
        broker.publish_raw(queue, body, **options)
    text = b'{"no": "' + b"x" * 5000 + b'"}'
    packed, kind = compress(text, "gzip")
    broker.publish_raw(queue, packed, headers={"compression": kind})
    expected = sorted([*(body for body, _ in BODIES.values()), text])
    for round_ in (1, 2):
        wanted = round_ * len(expected)
        assert consume(broker, queue, callback, lambda: len(seen) == wanted, timeout=20, on_decode_error=undecodable)  # noqa: B023
        assert redrive(broker.connect(), broker.dead).moved == len(expected)
    found = broker.take(queue.name, len(expected))
    assert sorted(map(bytes_of, found)) == expected
    assert [message.headers[REDRIVE] for message in found] == [2] * len(found)
    compressed = [message for message in found if message.headers.get("compression") == kind]
    assert sorted(map(bytes_of, compressed)) == sorted([b"not zlib", text])
    if not broker.is_rabbitmq:  # kombu shows what is on the wire
        wire = [message.channel.decode_body(message._raw["body"], "base64") for message in compressed]
        assert sorted(wire) == sorted([b"not zlib", packed])


@on(*BROKERS)
def test_a_dead_letter_is_there_before_the_ack_and_says_why(broker: Broker) -> None:
    """I4: reason, last line, attempts, scope, time and record are in the dead letter when the ack is sent."""
    queue, store = broker.queue(), MemoryStore()
    found: list[Message] = []

    def handle(body: Any, message: Message) -> None:
        raise ValueError("never")

    class Watched:
        """Looks into the dead letter at the moment of the ack."""

        def __init__(self, channel: Any) -> None:
            self.ack = channel.basic_ack

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            found.extend(broker.take(broker.dead, timeout=0.5))
            self.ack(*args, **kwargs)

    handler = guarded(store, broker.unique, handle, max_attempts=1)

    def callback(body: Any, message: Message) -> None:
        message.channel.basic_ack = Watched(message.channel)
        handler(body, message)

    broker.publish(queue, {"id": "a"})
    before = int(time.time())
    assert consume(broker, queue, callback, lambda: bool(found)), "the dead letter was not there when the ack was sent"
    (dead,) = found
    assert dead.headers[DEAD_REASON] == "attempts"
    assert dead.headers[DEAD_ERROR] == "ValueError: never"
    assert dead.headers[DEAD_ATTEMPTS] == 1
    assert dead.headers[DEAD_SCOPE] == broker.unique
    assert before <= dead.headers[DEAD_AT] <= time.time()
    assert dead.headers[DEAD_RECORD] == record_key(broker.unique, "a").hex()
    assert dead.headers[DEAD_FINGERPRINT] == fingerprint({"id": "a"}).hex()
    assert dead.headers[ORIGIN_QUEUE] == queue.name


@on(*RABBITMQ)
def test_a_queue_that_is_gone_or_full_leaves_the_message(broker: Broker) -> None:
    """I1: a queue that was deleted is not made anew, one that refuses gets nothing: left, counted, said."""
    gone, full = broker.queue("gone"), broker.queue("full", **{"x-max-length": 1, "x-overflow": "reject-publish"})
    broker.publish(full, {"id": "fills it"})
    fill(broker, {ORIGIN_QUEUE: gone.name}, {ORIGIN_QUEUE: full.name})
    if broker.name == "rabbitmq-quorum":  # its limit is not exact
        for _ in range(3):
            with contextlib.suppress(Exception):
                broker.publish(full, {"id": "fills it"})
    done = redrive(broker.connect(), broker.dead)
    assert done.outcomes == {Outcome.REFUSED: 2}
    with broker.connect() as connection, pytest.raises(connection.channel_errors):
        connection.channel().queue_declare(gone.name, passive=True)
    assert len(broker.take(broker.dead, 2)) == 2


@on("rabbitmq-quorum")
def test_looking_often_does_not_use_up_a_delivery_limit(broker: Broker) -> None:
    """I1: ten redrives that leave a message in a quorum queue with a delivery limit of 2 do not destroy it."""
    dead = Queue(broker.dead, queue_arguments={"x-queue-type": "quorum", "x-delivery-limit": 2})
    with broker.connect() as connection:
        dead(connection.channel()).queue_declare()
        for number in range(3):
            connection.Producer().publish({"id": number}, routing_key=broker.dead)
    for _ in range(10):
        deadline = time.monotonic() + 5
        while redrive(broker.connect(), broker.dead).left < 3:
            assert time.monotonic() < deadline
    assert sorted(message.payload["id"] for message in broker.take(broker.dead, 3)) == [0, 1, 2]


@on(*OURS)
def test_looking_often_does_not_use_up_our_transports_deliveries(broker: Broker) -> None:
    """I1: 30 redrives that leave a message do not send it into the transport's own dead store (max_deliveries 20)."""
    fill(broker, {}, {}, {})
    for _ in range(30):
        assert redrive(broker.connect(), broker.dead).left == 3
    assert [message.payload["id"] for message in broker.take(broker.dead, 3)] == ["0", "1", "2"]


@on("memory", "ours-sqlite", "rabbitmq-classic")
def test_a_store_in_doubt_stops_it_and_nothing_is_lost(broker: Broker) -> None:
    """I9: the store cannot say what is completed: nothing is moved on a guess, and all is still there."""
    queue = broker.queue()
    bury(broker, queue, {"id": "a"}, {"id": "b"})

    class Down(MemoryStore):
        def lookup(self, key: bytes, /) -> Any:
            raise StoreUnavailable("down")

    with pytest.raises(StoreUnavailable):
        redrive(broker.connect(), broker.dead, store=Down())
    assert len(broker.take(broker.dead, 2)) == 2


@on(*RABBITMQ, "memory", "ours-sqlite")
def test_what_cannot_be_asked_is_refused(broker: Broker) -> None:
    """A queue that is not there, a store that cannot look, a discard without one: said before anything is touched."""
    connection = broker.connect()
    with pytest.raises(ConfigurationError, match="no queue"):
        redrive(connection, f"{broker.unique}.none")
    for options in ({"store": object()}, {"discard_completed": True}, {"limit": -1}, {"to": ""}):
        with pytest.raises(ConfigurationError):
            redrive(connection, broker.dead, **options)  # type: ignore[arg-type]


@on(*BROKERS)
def test_a_scope_means_its_dead_letter(broker: Broker) -> None:
    """The name of a scope leads to `<scope>.dead`, where there is one; any other name is that of a queue."""
    fill(broker, {})
    connection: Connection = broker.connect()
    assert dead_letter_of(connection, broker.unique) == broker.dead
    assert dead_letter_of(connection, broker.dead) == broker.dead
    assert dead_letter_of(connection, f"{broker.unique}.else") == f"{broker.unique}.else"


@on("ours-sqlite", "rabbitmq-quorum")
def test_the_command(broker: Broker, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`idempotent-bus redrive` moves, leaves what is completed and says so, and discards only when told."""
    monkeypatch.setenv("COLUMNS", "200")
    queue, path = broker.queue(), f"sqlite:///{tmp_path}/dedup.db"
    with contextlib.closing(open_store(path)) as store:
        bury(broker, queue, *({"id": str(number)} for number in range(5)), store=store)
        for number in (1, 3):
            complete(store, broker.unique, str(number), {"id": str(number)})
    fill(broker, {})

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(redrive_command, ["--broker", broker.url, *arguments])

    done = run("--store", path, broker.unique)
    assert done.exit_code == 0, done.output
    (row,) = [line for line in done.output.splitlines() if broker.dead in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [broker.dead, "3", "2", "0", "0", "1 no origin"]
    again = run("--store", path, "--discard-completed", "--to", queue.name, broker.dead)
    (row,) = [line for line in again.output.splitlines() if broker.dead in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [broker.dead, "1", "0", "2", "0", "0"]
    assert broker.is_empty(broker.dead)
    assert len(broker.take(queue.name, 4)) == 4


@on("rabbitmq-classic")
def test_the_command_says_what_is_wrong(broker: Broker) -> None:
    """A queue that is not there, a discard without a store, a broker that is down: an exit code and one sentence."""

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(redrive_command, arguments)

    missing = run("--broker", broker.url, f"{broker.unique}.none")
    assert missing.exit_code == 1
    assert "there is no queue" in missing.output
    assert run("--broker", broker.url, "--discard-completed", broker.dead).exit_code == 2
    down = run("--broker", "amqp://somebody:secret@127.0.0.1:1//", broker.dead)
    assert down.exit_code == 1
    assert "stopped" in down.output
    assert "secret" not in down.output
