"""Many messages with a window of confirms under way: a stream does not wait for each confirm in turn.

Each message is tracked by its own delivery tag. When the connection breaks, what was under way is in doubt and is
sent again under the same ids, now one at a time: if one of them was the reason, it takes no neighbour along.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from .. import hooks
from ..errors import PublishError
from ..model import Edge, Landing, Receipt
from .amqp import AmqpLane
from .confirms import Ticket
from .outgoing import Outgoing
from .resend import Known, NotConfirmed, ResendPolicy, Sends

__all__ = ["PublishManyError", "publish_stream"]


class PublishManyError(PublishError):
    """Not every message of a `publish_many` landed. `results` has a receipt or an error for each that was taken.

    Where the stream was given up, later messages were never taken from the iterable: len(results) tells how many
    were. `inner_msg_id` is that of the first that failed; each error has its own.
    """

    def __init__(self, text: str, results: list[Receipt | PublishError]) -> None:
        failed = [result.inner_msg_id for result in results if isinstance(result, PublishError)]
        super().__init__(text, failed[0] if failed else "")
        self.results = results


class _Item:
    """One message of the stream. sends: made at its first failure, since most messages have none."""

    __slots__ = ("index", "outgoing", "pause", "sends", "ticket")

    ticket: Ticket

    def __init__(self, index: int, outgoing: Outgoing) -> None:
        self.index = index
        self.outgoing = outgoing
        self.sends: Sends | None = None
        self.pause = 0.0


def publish_stream(
    source: Iterator[Outgoing], lane: AmqpLane, *, window: int, gather: bool, policy: ResendPolicy, step: hooks.Step
) -> list[Receipt]:
    """Send all, at most `window` of them unconfirmed at a time. Returns the receipts in order.

    gather: write several messages at once; only for a source that never keeps anybody waiting.
    Raises PublishManyError after every message that was taken has its receipt or its error. It stops taking when
    the source raises, and when a message ends as unknown for the broker's silence, since the rest would too.
    """
    return _Stream(source, lane, window, gather, policy, step).run()


class _Stream:
    def __init__(
        self,
        source: Iterator[Outgoing],
        lane: AmqpLane,
        window: int,
        gather: bool,
        policy: ResendPolicy,
        step: hooks.Step,
    ) -> None:
        self._source: Iterator[Outgoing] | None = source
        self._lane = lane
        self._window = window
        self._gather = gather
        self._policy = policy
        self._step = step
        self._results: list[Receipt | PublishError | None] = []
        self._under_way: deque[_Item] = deque()
        self._nacked: deque[_Item] = deque()
        self._again: deque[_Item] = deque()
        self._stopped_by: Exception | None = None
        self._given_up = False

    def run(self) -> list[Receipt]:
        under_way = self._under_way
        while True:
            item = self._take() if len(under_way) < self._window else None
            if item is not None:
                if under_way and not self._lane.is_ready_for(item.outgoing):
                    # Declaring reads answers: an error that comes then must not be one of a message under way.
                    self._again.appendleft(item)
                    while under_way:
                        self._wait()
                else:
                    self._post(item)
            elif under_way:
                self._wait()
            elif self._nacked:
                self._policy.sleep(max(item.pause for item in self._nacked))
                self._again.extend(self._nacked)
                self._nacked.clear()
            else:
                return self._outcome()

    def _outcome(self) -> list[Receipt]:
        receipts = [result for result in self._results if isinstance(result, Receipt)]
        errors = [result for result in self._results if isinstance(result, PublishError)]
        assert len(receipts) + len(errors) == len(self._results)
        if errors or self._stopped_by is not None:
            text = f"{len(receipts)} of {len(self._results)} messages landed"
            if errors:
                text += f", {len(errors)} did not; the first: {errors[0]}"
            if self._stopped_by is not None:
                text += f"; the rest was not taken: {type(self._stopped_by).__name__}"
            raise PublishManyError(text, [result for result in self._results if result is not None]) from (
                self._stopped_by or errors[0]
            )
        return receipts

    def _take(self) -> _Item | None:
        if self._again:
            return self._again.popleft()
        if self._source is None or len(self._nacked) >= self._window:
            return None
        try:
            outgoing = next(self._source, None)
        except Exception as error:  # noqa: BLE001 - the caller's iterable: what was sent still gets its answer
            self._stop(error)
            return None
        if outgoing is None:
            self._source = None
            return None
        self._results.append(None)
        return _Item(len(self._results) - 1, outgoing)

    def _post(self, item: _Item) -> None:
        lane, outgoing = self._lane, item.outgoing
        try:
            lane.open()
            if outgoing.declare:
                lane.declare(outgoing.declare)
            lane.check_exchange(outgoing.exchange)
            item.ticket = self._step(hooks.PUBLISH, lane.post, outgoing, gather=self._gather)
        except Exception as error:  # noqa: BLE001 - judged: becomes the results' errors, or stops the stream
            self._recover(error, item)
        except BaseException:
            lane.discard()
            raise
        else:
            self._under_way.append(item)

    def _wait(self) -> None:
        under_way = self._under_way
        try:
            self._lane.wait(under_way[0].ticket)
        except Exception as error:  # noqa: BLE001 - as above
            self._recover(error, None)
            return
        except BaseException:
            self._lane.discard()
            raise
        while under_way and under_way[0].ticket.settled:
            item = under_way.popleft()
            failure = item.ticket.failure
            if failure is None:
                self._landed(item)
            elif self._failed(item, failure):
                self._nacked.append(item)

    def _landed(self, item: _Item) -> None:
        before = 0 if item.sends is None else item.sends.count
        self._results[item.index] = Receipt(item.outgoing.inner_msg_id or "", Landing.LANDED, Edge.CONSUMER, before + 1)

    def _failed(self, item: _Item, failure: NotConfirmed) -> bool:
        """Note a failed send. Returns True if it is to be sent again; otherwise its error is its result."""
        if item.sends is None:
            item.sends = Sends(self._policy)
        pause = None if self._given_up else item.sends.failed(failure)
        if pause is None:
            self._results[item.index] = item.sends.error(failure, item.outgoing.inner_msg_id or "")
            return False
        item.pause = pause
        return True

    def _recover(self, error: Exception, posted: _Item | None) -> None:
        """After an exception: what was under way is in doubt, and is settled one by one before the stream goes on."""
        failure = self._lane.judge(error)
        if posted is not None and failure is not None and failure.known is Known.UNROUTABLE:
            self._failed(posted, failure)  # a missing exchange, found before the send: it touches nothing else
            return
        text = f"the send raised {type(error).__name__}" if failure is None else failure.text
        doubt = NotConfirmed(Known.UNKNOWN, text)
        items = list(self._under_way)
        self._under_way.clear()
        if failure is not None and posted is None and len(items) == 1:
            doubt = failure  # only one message can be meant
        unsettled = [item for item in items if self._failed(item, doubt)]
        if posted is not None:
            if failure is None:
                self._stop(error)
                self._failed(posted, NotConfirmed(Known.UNKNOWN, text, final=True))
            elif self._failed(posted, failure):
                unsettled.append(posted)
        elif failure is None:
            self._stop(error)
        for item in unsettled:
            self._settle(item)

    def _settle(self, item: _Item) -> None:
        assert item.sends is not None
        while not self._given_up:
            self._policy.sleep(item.pause)
            try:
                self._step(hooks.PUBLISH, self._lane.send, item.outgoing)
            except Exception as error:  # noqa: BLE001 - as above
                failure = self._lane.judge(error)
                if failure is None:
                    self._stop(error)
                    failure = NotConfirmed(Known.UNKNOWN, f"the send raised {type(error).__name__}", final=True)
                if not self._failed(item, failure):
                    if failure.known in (Known.NOT_SENT, Known.UNKNOWN):
                        self._give_up(failure)
                    return
            except BaseException:
                self._lane.discard()
                raise
            else:
                self._landed(item)
                return
        self._failed(item, NotConfirmed(Known.NOT_SENT, "the stream was given up"))

    def _stop(self, error: Exception) -> None:
        self._source = None
        self._stopped_by = self._stopped_by or error

    def _give_up(self, failure: NotConfirmed) -> None:
        self._given_up = True
        self._source = None
        for item in (*self._nacked, *self._again):
            self._failed(item, failure)
        self._nacked.clear()
        self._again.clear()
