"""The consuming side of a channel: fetching into a small buffer, handing out, and waiting without polling.

A fetch takes what prefetch allows in one step and registers it in the same step, so nothing is ever in a reply
only. When the queues are empty, the fetch's own reads make the server tell this connection of the next change to
exactly these lists (CLIENT TRACKING, Redis 6 and later), whoever makes it; the channel then sleeps on the socket.
"""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from kombu.log import get_logger

from ...quick_json import loads
from .keys import QueueKeys
from .scripts import FETCH, TEND
from .wire import Command, Wire

if TYPE_CHECKING:
    from .transport import Channel

logger = get_logger(__name__)

#: With prefetch 0 (no limit) a fetch takes as much as was lately handled in this many seconds, so that a slow
#: consumer does not sit on messages that an idle neighbour could handle.
_UNLIMITED_SPAN = 0.05
#: Longest sleep of an idle consumer, in seconds: a dead connection must be noticed.
_LONGEST_SLEEP = 5.0
#: Where the server cannot tell of changes: how often to look.
_LOOK_EVERY = 0.2
#: How long a fetch may take before the connection counts as dead, where no socket_timeout is set.
_DEAD_AFTER = 25.0
_MOST_DUE = 1000

Item = tuple[str, int, bytes]  # queue, number of the delivery, message


class Line:
    """What a channel consumes through. For the consuming thread only."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._wire: Wire | None = None
        self.buffer: deque[Item] = deque()
        self._number = 0
        self._span = 1  # how many to fetch with prefetch 0
        self._fetched_at = 0.0
        #: The last fetch found nothing, and nothing has changed since.
        self._quiet = False
        self._look_at = 0.0
        self._tend_at: dict[str, float] = {}
        #: A fetch failed: the server may hold messages for us that we never saw.
        self._doubt = False

    # --- the connection -----------------------------------------------------------------------------

    @property
    def wire(self) -> Wire:
        if self._wire is None:
            channel = self._channel
            timeout = channel.socket_timeout or channel.health_check_interval or _DEAD_AFTER
            self._wire = Wire(channel.pool, tracking=True, timeout=timeout, before_drop=channel.forget_socket)
        return self._wire

    @property
    def connection(self) -> None:
        """What kombu's poller compares with a connection that it lost; ours tells the poller itself."""

    def close(self) -> None:
        wire, self._wire = self._wire, None
        self._quiet = False
        if wire is not None:
            wire.close()

    # --- waiting --------------------------------------------------------------------------------------

    @property
    def quiet(self) -> bool:
        """Nothing to fetch until the socket or the clock says so."""
        return self._quiet and monotonic() < self._look_at

    @property
    def sleep(self) -> float:
        """Seconds until it is time to look without being told."""
        return max(0.0, self._look_at - monotonic()) if self._quiet else 0.0

    def look_again(self) -> None:
        """Something changed on this side: another queue, or doubt about what the server holds for us."""
        self._quiet = False

    def doubt(self) -> None:
        """A step failed: before the next fetch, compare what the server holds for us with what we know."""
        self._doubt = True
        self._quiet = False

    def heard(self) -> None:
        """The socket is readable: read what the server tells, and look again if it is about our queues."""
        wire = self._wire
        if wire is None:
            return
        try:
            wire.listen()
        except BaseException:
            self.doubt()
            raise
        self._news(wire)

    def _news(self, wire: Wire) -> None:
        changed = wire.changed
        if not changed:
            return
        for queue in self._channel.active_queues:
            keys = self._channel.keys_of(queue)
            if b"" in changed or any(name.encode() in changed for name in keys.lists):
                self._quiet = False
            if b"" in changed or keys.delayed.encode() in changed:
                self._tend_at.pop(queue, None)
                self._quiet = False
        changed.clear()

    # --- handing out ------------------------------------------------------------------------------------

    def hand_out(self) -> bool:
        """Give the next buffered message to its callback. False if there was none."""
        channel = self._channel
        while self.buffer:
            queue, number, text = self.buffer.popleft()
            tag = f"{channel.owner}.{number}"
            if tag not in channel.qos.places:
                continue  # it was given up
            callback = channel.callbacks.get(queue)
            if callback is None:
                channel.give_back_all(queue, [number], how=0)
                channel.qos.places.pop(tag, None)
                continue
            try:
                payload = message_of(text)
            except NO_MESSAGE:
                logger.error("a message on queue %r is not one of kombu's; it is in the dead list", queue)
                channel.bury(queue, number, "undecodable")
                channel.qos.places.pop(tag, None)
                continue
            payload["properties"]["delivery_tag"] = tag
            callback(payload)
            return True
        return False

    def drop_queue(self, queue: str) -> None:
        """A consumer was cancelled: what was fetched for it and not handed out goes back."""
        mine = [number for name, number, _ in self.buffer if name == queue]
        if mine:
            self.buffer = deque(item for item in self.buffer if item[0] != queue)
            self._channel.give_back_all(queue, mine, how=0)
            for number in mine:
                self._channel.qos.places.pop(f"{self._channel.owner}.{number}", None)

    # --- fetching -----------------------------------------------------------------------------------------

    def refill(self) -> bool:
        """Fetch what prefetch allows into the buffer. False if the queues are empty; then the line is quiet."""
        queues = self._channel.queues_in_turn()
        want = self._want()
        if not queues or not want:
            return bool(self.buffer)
        wire = self.wire
        try:
            wire.connect()
            found = self.take(wire, queues, want)
        except BaseException:
            self.doubt()
            raise
        self._fetched_at = monotonic()
        if found:
            self.buffer.extend(found)
            self._channel.served(found[0][0])
            self._news(wire)
            self._quiet = False
            return True
        self._news(wire)  # arrivals before this fetch were seen by it; new delays were not
        self._quiet = True
        now = monotonic()
        self._look_at = now + (_LONGEST_SLEEP if wire.tracking else _LOOK_EVERY)
        for queue in queues:
            self._look_at = min(self._look_at, self._tend_at.get(queue, now))
        if wire.pending:
            self.heard()
        return False

    def _want(self) -> int:
        hold, channel = self._channel.qos, self._channel
        if not hold.can_consume():
            return 0
        if "can_consume" in vars(hold):
            return 1  # somebody (Celery's worker_disable_prefetch) decides message by message
        if not hold.prefetch_count:
            quick = monotonic() - self._fetched_at < _UNLIMITED_SPAN
            self._span = min(self._span * 2, channel.fetch_limit) if quick else max(self._span // 4, 1)
            return self._span
        return int(min(hold.can_consume_max_estimate() - len(self.buffer), channel.fetch_limit))

    def take(self, wire: Wire, queues: list[str], want: int) -> list[Item]:
        """One round trip: acks that wait, what is due, and up to `want` messages."""
        channel = self._channel
        if self._doubt:
            with channel.qos.sending:  # an ack on its way is neither known here nor gone there
                self._settle_doubt(wire)
        while True:
            acks, commands = channel.qos.take_acks()
            acked = len(commands)
            now = monotonic()
            tended = [queue for queue in queues if now >= self._tend_at.get(queue, 0.0)]
            commands += [self._tend(channel.keys_of(queue), queue) for queue in tended]
            number = self._number
            self._number += want  # spent even if the call fails: a number is never used twice
            commands.append(self._fetch([channel.keys_of(queue) for queue in queues], want, number))
            try:
                replies = wire.call(commands)
            except BaseException:
                channel.qos.put_back(acks)
                raise
            groups = replies[-1]
            found = [] if isinstance(groups, Exception) else self._items(groups, queues)
            for queue, item_number, _ in found:
                channel.joined.add(queue)
                channel.qos.places[f"{channel.owner}.{item_number}"] = (queue, item_number)
            if found:
                channel.keeper.notice()
            try:
                channel.qos.check_acks(acks, replies[:acked])
                freed = self._after_tending(wire, tended, replies[acked:-1])
                if isinstance(groups, Exception):
                    raise groups
            except BaseException:
                self.buffer.extend(found)
                raise
            if found or not freed:
                return found

    def _tend(self, keys: QueueKeys, queue: str) -> Command:
        channel = self._channel
        gap = int(channel.lease_ms / 2)
        names = (keys.owners, keys.watch, keys.delayed, *keys.lists)
        return (TEND, len(names), *names, gap, _MOST_DUE, channel.expiry_of(queue), *keys.priorities)

    def _fetch(self, queues: list[QueueKeys], want: int, number: int) -> Command:
        channel = self._channel
        names: list[str] = []
        for keys in queues:
            names += (keys.owners, keys.held(channel.owner), *keys.lists)
        priorities = queues[0].priorities
        numbers = (len(queues), len(priorities))
        return (FETCH, len(names), *names, want, number, channel.owner, channel.lease_ms, *numbers, *priorities)

    @staticmethod
    def _items(groups: list[list[Any]], queues: list[str]) -> list[Item]:
        return [
            (queues[group[0] - 1], group[2] + offset, text) for group in groups for offset, text in enumerate(group[3:])
        ]

    def _after_tending(self, wire: Wire, queues: list[str], replies: list[Any]) -> int:
        """Set when to look next, and free what dead owners held. How many messages were freed."""
        channel, freed = self._channel, 0
        interval = min(_LONGEST_SLEEP, channel.lease / 8)
        for queue, reply in zip(queues, replies, strict=True):
            if isinstance(reply, Exception):
                raise reply
            due, *lapsed = reply
            wait = interval if due < 0 else min(interval, due / 1000)
            self._tend_at[queue] = monotonic() + wait
            for owner in lapsed:
                command = channel.giveback_command(queue, owner.decode(), "lapsed", how=2, head=True)
                back, buried = _checked(wire.call([command])[0])
                if back or buried:
                    logger.warning(
                        "a consumer of queue %r is gone: %d message(s) back, %d to the dead list", queue, back, buried
                    )
                freed += back
        return freed

    def _settle_doubt(self, wire: Wire) -> None:
        """Give back what a lost reply brought: registered for us, but unknown here."""
        channel = self._channel
        for queue in channel.queues_seen():
            held = wire.one("HKEYS", channel.keys_of(queue).held(channel.owner))
            known = {number for place, number in list(channel.qos.places.values()) if place == queue}
            known |= channel.qos.acks_of(queue)
            unseen = [number for number in map(int, held) if number not in known]
            if unseen:
                command = channel.giveback_command(queue, channel.owner, "some", how=0, head=True, numbers=unseen)
                _checked(wire.call([command])[0])
        self._doubt = False


#: What `message_of` raises for text that is no message: whoever may write to Redis can put anything into a list.
NO_MESSAGE: Final = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def message_of(text: bytes) -> dict[str, Any]:
    """The message that a list or a holding has as text. Raises one of NO_MESSAGE if it is none."""
    payload: dict[str, Any] = loads(text.decode())
    properties = payload["properties"]
    returned = payload.pop("idempotent-bus-deliveries", None)
    info = properties.setdefault("delivery_info", {})
    if not isinstance(info, dict) or not isinstance(payload.get("headers") or {}, dict):
        raise ValueError("not a kombu message")
    if returned is not None:
        info["x-delivery-count"] = returned
        info["redelivered"] = True
    return payload


def _checked(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise reply
    return reply
