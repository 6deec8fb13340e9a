"""Redrive: dead-lettered messages go back to the queues that they came from, for another round of attempts.

A move, not a new publish: body and inner-msg-id stay, the redrive number grows by one (which starts the attempts afresh
in the store), and the message goes past the edge's mark. The move is confirmed before the dead copy is acked, so a
process that is killed in between leaves two copies, of which the record lets one run.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from kombu import Connection
from kombu.message import Message
from kombu.transport import virtual

from .errors import ConfigurationError, Rejected, Unroutable
from .frames import read_everything
from .headers import DEAD_FINGERPRINT, DEAD_REASON, DEAD_RECORD, ORIGIN_QUEUE, REDRIVE
from .hooks import ACK, PUBLISH, Step, direct
from .inflating import limit_inflation
from .kombu_message import DELIVERY_COUNT, OF_ONE_DEATH, driver_type, is_amqp, redrives
from .model import KEY_BYTES, Reason, Record, State
from .moving import let_go, move, send
from .sending.lane import private_copy
from .store import LookupStore

__all__ = ["Outcome", "Redriven", "dead_letter_of", "depth", "redrive"]

log = logging.getLogger(__name__)

#: What AMQP allows a queue's name, in bytes.
_LONGEST_NAME: Final = 255


class Outcome(str, enum.Enum):
    """What became of one dead letter."""

    MOVED = "moved"
    COMPLETED = "completed"
    """Its record is completed, with this very body: there is nothing to do, and it was left where it is."""
    DISCARDED = "discarded"
    """As COMPLETED, and acked away, as was asked for."""
    QUARANTINED = "quarantined"
    """Its record waits for a person: resolve it first. Left where it is."""
    CONFLICT = "conflict"
    """Its biz-id was completed with another body, so this one was never done, and never will be. Left where it is."""
    NO_ORIGIN = "no origin"
    """It does not say which queue it came from, and no other was given. Left where it is."""
    INVALID = "invalid"
    """Its redrive number is none, so a consumer would refuse it at once. Left where it is."""
    REFUSED = "refused"
    """The queue that it came from is not there any more, or takes nothing. Left where it is."""


@dataclass(slots=True, eq=False)
class Redriven:
    """What a redrive did. queue: the dead letter; found: how many messages were there at the start."""

    queue: str
    found: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)

    @property
    def seen(self) -> int:
        """How many messages were looked at."""
        return self.outcomes.total()

    @property
    def moved(self) -> int:
        """Back in the queue that they came from."""
        return self.outcomes[Outcome.MOVED]

    @property
    def completed(self) -> int:
        """Done already: left, or discarded if that was asked for."""
        return self.outcomes[Outcome.COMPLETED] + self.outcomes[Outcome.DISCARDED]

    @property
    def quarantined(self) -> int:
        """Left until a person has resolved their records."""
        return self.outcomes[Outcome.QUARANTINED]

    @property
    def left(self) -> int:
        """Looked at, and left in the dead letter, for whatever reason."""
        return self.seen - self.moved - self.outcomes[Outcome.DISCARDED]


def redrive(
    connection: Connection | str | Any,
    queue: str,
    *,
    store: LookupStore | None = None,
    limit: int | None = None,
    to: str | None = None,
    discard_completed: bool = False,
    on_message: Callable[[Outcome, Redriven], None] | None = None,
    step: Step = direct,
) -> Redriven:
    """Move the messages of a dead letter back to the queues that they came from; confirmed, then acked.

    connection: a kombu Connection, a pool of them, or a URL; it is copied. queue: the dead letter's name.
    store: shows whether a message's record was completed meanwhile, or is in quarantine: then it is left. It decides
        nothing else: a message that is moved all the same does nothing when its record is completed.
    limit: move at most so many. to: the queue for messages that do not say where they came from.
    discard_completed: ack completed ones away. on_message: told of each message, with the counts so far.
    step: performs each move and each ack; for fault injection.

    A message that lay in the dead letter for longer than its consumer's retention is in doubt: another copy may have
    been done and forgotten meanwhile. It is moved, and the consumer puts it back, as "too old", without running it.
    Redriven once more within the retention, it runs: that is for a person who has looked whether it was done.

    Looks at no more messages than were there at the start, so it does not chase what fails again at once. What is left
    keeps its place on our transports and in classic queues; elsewhere it may go to the end, in its order.

    Raises PublishUnknown, StoreUnavailable or the broker's connection errors: what was not moved is still there, and
    the next redrive goes on. ConfigurationError for a store that cannot show records, or for a queue that is not there.
    """
    if store is not None and not isinstance(store, LookupStore):
        raise ConfigurationError("redrive needs a store that can show records (lookup), or none")
    if discard_completed and store is None:
        raise ConfigurationError("discard_completed needs the store: only it knows what is completed")
    if limit is not None and limit < 0:
        raise ConfigurationError("limit must be at least 0")
    if to is not None and not _is_queue_name(to):
        raise ConfigurationError("to must be the name of a queue")
    done = Redriven(queue)
    with _own_channel(connection) as channel:
        found = _size(channel, queue)
        if found is None:
            raise ConfigurationError(f"there is no queue {queue!r} to redrive")
        done.found = found
        rules = _Rules(queue, store, to, discard_completed)
        visit = _Visit(channel, queue, step)
        try:
            while done.seen < found and (limit is None or done.moved < limit):
                message = visit.next_message()
                if message is None:
                    break  # somebody else took it
                outcome, target = rules.judge(message)
                if target is not None:
                    outcome = visit.move_back(message, target)
                elif outcome is Outcome.DISCARDED:
                    step(ACK, message.ack)
                if outcome not in (Outcome.MOVED, Outcome.DISCARDED):
                    visit.leave(message)
                done.outcomes[outcome] += 1
                if on_message is not None:
                    on_message(outcome, done)
        finally:
            visit.put_back()
    return done


def dead_letter_of(connection: Connection | str | Any, name: str) -> str:
    """The dead letter that a scope's or a queue's name means: `<name>.dead` if there is such a queue, else `name`.

    Redis knows of no queue without messages. Raises the broker's connection errors.
    """
    usual = f"{name}.dead"
    if name.endswith(".dead") or not _is_queue_name(usual):
        return name
    with _own_channel(connection) as channel:
        size = _size(channel, usual)
        return name if size is None or (size == 0 and not _knows_queues(channel)) else usual


def depth(connection: Connection | str | Any, queue: str) -> int | None:
    """How many messages are ready in a queue; None if there is no such queue, and the broker can tell.

    Raises the broker's connection errors.
    """
    with _own_channel(connection) as channel:
        return _size(channel, queue)


# --- what is to become of a message -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rules:
    """What the user asked for, applied to one message after the other."""

    queue: str
    store: LookupStore | None
    to: str | None
    discard_completed: bool

    def judge(self, message: Message) -> tuple[Outcome, str | None]:
        """What becomes of the message, and the queue to which it is to be moved, or None if it is not."""
        headers = message.headers
        state = self._state(headers)
        if state is State.COMPLETED:
            return (Outcome.DISCARDED if self.discard_completed else Outcome.COMPLETED), None
        if state is State.QUARANTINED:
            return Outcome.QUARANTINED, None
        if state is not None:
            return Outcome.CONFLICT, None
        number = redrives(headers)
        if number is None or redrives({REDRIVE: number + 1}) is None:
            return Outcome.INVALID, None
        origin = headers.get(ORIGIN_QUEUE)
        target = origin if _is_queue_name(origin) else self.to
        if target is None or target == self.queue:
            return Outcome.NO_ORIGIN, None
        return Outcome.MOVED, target

    def _state(self, headers: Mapping[str, Any]) -> State | None:
        """COMPLETED or QUARANTINED if the record says so, another state for a conflict, None if nothing keeps it."""
        key = _bytes_of(headers.get(DEAD_RECORD))
        if self.store is None or key is None or len(key) != KEY_BYTES:
            return None
        record = self.store.lookup(key)
        if record is None or record.state not in (State.COMPLETED, State.QUARANTINED):
            return None  # to be run, or being run: then the copy waits until it is known what came of that
        if record.state is State.COMPLETED and _is_of_another_body(headers, record):
            return State.RELEASED
        return record.state


def _is_of_another_body(headers: Mapping[str, Any], record: Record) -> bool:
    """True if what was completed is not this message: to discard that would lose something that was never done."""
    mine = _bytes_of(headers.get(DEAD_FINGERPRINT))
    if mine is not None and record.fingerprint is not None:
        return mine != record.fingerprint
    return bool(headers.get(DEAD_REASON) == Reason.CONFLICT.value)


def _bytes_of(text: Any) -> bytes | None:
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        return None


def _is_queue_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name.encode(errors="replace")) <= _LONGEST_NAME


# --- on one channel ------------------------------------------------------------------------------------


class _Visit:
    """Takes messages one by one; moves them, or keeps them aside and puts them back in the end."""

    def __init__(self, channel: Any, queue: str, step: Step) -> None:
        self._channel = channel
        self._queue = queue
        self._step = step
        self._amqp = is_amqp(channel)

    def next_message(self) -> Message | None:
        raw = self._channel.basic_get(self._queue, no_ack=False)
        if raw is None or isinstance(raw, Message):
            return raw
        message = self._channel.message_to_python(raw)
        message._raw = raw  # the bytes as they came, should kombu have decompressed them
        return message

    def move_back(self, message: Message, target: str) -> Outcome:
        # Since when it is dead stays as it is: by that the consumer knows whether its record may be forgotten (I11).
        headers = {REDRIVE: (redrives(message.headers) or 0) + 1}
        try:
            self._step(PUBLISH, self._move, message, target, headers)
        except (Unroutable, Rejected) as error:
            log.warning("a message of %s stays there, %s did not take it: %s", self._queue, target, error)
            return Outcome.REFUSED
        self._step(ACK, message.ack)
        return Outcome.MOVED

    def _move(self, message: Message, target: str, headers: Mapping[str, Any]) -> None:
        if self._amqp:
            # Not declared: a queue that nobody consumes any more is no place for it.
            send(message, target, headers, drop=OF_ONE_DEATH, make=False)
        else:
            move(message, target, headers, drop=OF_ONE_DEATH)

    def leave(self, message: Message) -> None:
        # It stays taken, so that it is not met again, and goes back in the end. But on a quorum queue that counts as a
        # delivery, and comes nearer to the limit at which the message is destroyed: there a new copy takes its place.
        if self._amqp and message.headers.get(DELIVERY_COUNT):
            with contextlib.suppress(Unroutable, Rejected):
                send(message, self._queue, {}, make=False)
                message.ack()

    def put_back(self) -> None:
        """Give back all that was taken and not settled, in its place where the broker can."""
        channel = self._channel
        if self._amqp:
            return  # closing the channel does it
        put_back = getattr(channel, "put_back", None)
        if put_back is not None:  # ours: uncounted, so that no number of redrives uses up its deliveries
            put_back()
            return
        qos = channel.qos
        qos._flush()
        for message in list(qos._delivered.values()):
            message.requeue()


@contextlib.contextmanager
def _own_channel(connection: Any) -> Iterator[Any]:
    copy = private_copy(connection)
    read_everything(copy)
    with copy:
        copy.ensure_connection(max_retries=1)
        channel = copy.channel()
        channel.auto_decode = False  # py-amqp: the bodies as they came
        limit_inflation(channel, 0)  # nobody looks into them here, and some may be dead for what is in them
        try:
            yield channel
        finally:
            let_go(copy)
            with contextlib.suppress(*copy.connection_errors, *copy.channel_errors):
                channel.close()


def _knows_queues(channel: Any) -> bool:
    """True if the broker can tell an empty queue from none."""
    if is_amqp(channel):
        return True
    return driver_type(channel) != "redis" and type(channel)._has_queue is not virtual.Channel._has_queue


def _size(channel: Any, queue: str) -> int | None:
    """How many messages are ready in a queue; None if it is not there, and the broker can tell."""
    if not is_amqp(channel):
        if _knows_queues(channel) and not channel._has_queue(queue):
            return None
        return int(channel._size(queue))
    client = channel.connection.client
    asking = client.channel()  # of its own: the answer that it is not there closes it
    try:
        return int(asking.queue_declare(queue, passive=True).message_count)
    except client.channel_errors as error:
        if getattr(error, "reply_code", None) == 404:
            return None
        raise
    finally:
        with contextlib.suppress(*client.connection_errors, *client.channel_errors):
            asking.close()
