"""`idempotent-sqs://` without a server: what answers mean, what is compared at the edge, what keeps messages held."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from botocore.exceptions import ClientError
from kombu import Connection
from kombu.exceptions import ChannelError, OperationalError

from idempotent_bus.errors import Unroutable
from idempotent_bus.headers import INNER_MSG_ID, REDRIVE
from idempotent_bus.msgid import new_inner_msg_id
from idempotent_bus.producer import IdempotentProducer
from idempotent_bus.transports.confirmed import edge_id_of
from idempotent_bus.transports.sqs import Channel, Transport
from idempotent_bus.transports.sqs_keeper import Held, Keeper


def test_what_the_edge_compares() -> None:
    """Our own id as it is, others hashed to what brokers take; the redrive's number makes another one; no id, none."""
    ident = new_inner_msg_id()
    assert edge_id_of({INNER_MSG_ID: ident}) == ident
    assert edge_id_of({INNER_MSG_ID: ident, REDRIVE: 2}) == f"{ident}:2"
    strange = [edge_id_of({INNER_MSG_ID: text}) for text in ("a b", "a  b", "ä" * 500, "\ud800")]
    assert len(set(strange)) == 4
    assert all(text is not None and text.isalnum() and len(text) == 64 for text in strange)
    assert [edge_id_of(headers) for headers in ({}, {INNER_MSG_ID: ""}, {INNER_MSG_ID: 7})] == [None] * 3


@pytest.mark.parametrize(
    ("code", "status", "kind", "final"),
    [
        ("AWS.SimpleQueueService.NonExistentQueue", 400, Unroutable, None),
        ("InvalidParameterValue", 400, ChannelError, True),
        ("AccessDenied", 403, ChannelError, True),
        ("RequestThrottled", 400, ChannelError, False),
        ("ThrottlingException", 400, ChannelError, False),
        ("InternalError", 500, OperationalError, None),
        ("ServiceUnavailable", 503, OperationalError, None),
    ],
)
def test_what_an_answer_means(code: str, status: int, kind: type[Exception], final: bool | None) -> None:
    """A no is a refusal, final unless SQS is only busy; an error of the server's own leaves open what it did."""
    channel = Channel.__new__(Channel)
    channel.connection = type("T", (), {"_queue_cache": {}, "client": Connection("memory://")})()
    error = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "SendMessage")
    judged = channel._judged("q", error)
    assert type(judged) is kind
    if final is not None:
        assert bool(judged.reply_code) is final  # type: ignore[attr-defined]


def test_errors_of_the_connection_are_no_refusals() -> None:
    """No class counts as both: botocore's timeouts are in kombu's list of what the broker refused."""
    assert not any(issubclass(error, Transport.channel_errors) for error in Transport.connection_errors)


def test_the_producer_bounds_the_wait() -> None:
    """The confirm's time limits each request, resending is left to the producer, and the user's options stay his."""
    options = {"client-config": {"read_timeout": 9}, "is_secure": False}
    connection = Connection("idempotent-sqs://key:secret@127.0.0.1:1", transport_options=options)
    producer = IdempotentProducer(connection, confirm_timeout=3.0)
    assert producer._lane._connection.transport_options["client-config"] == {
        "read_timeout": 9,
        "connect_timeout": 3.0,
        "retries": {"total_max_attempts": 1},
    }
    assert options == {"client-config": {"read_timeout": 9}, "is_secure": False}


class Renewals:
    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.fail = False

    def renew(self, batch: list[Held]) -> None:
        self.batches.append([held.tag for held in batch])
        if self.fail:
            raise OSError("down")


def keeper_of(renewals: Renewals, held: dict[str, int]) -> Keeper:
    """A keeper whose thread sleeps for good; held: how many messages of which queue."""
    keeper = Keeper(weakref.WeakMethod(renewals.renew))
    for queue, count in held.items():
        for n in range(count):
            keeper.add(Held(queue, f"url/{queue}", f"{queue}{n}", 3600))
    return keeper


def test_a_round_renews_everything_in_tens() -> None:
    """At most ten in a request, never of two queues, and not what was settled."""
    renewals = Renewals()
    keeper = keeper_of(renewals, {"a": 12, "b": 1})
    keeper.remove("a0")
    keeper.renew_all()
    assert [len(batch) for batch in renewals.batches] == [10, 1, 1]
    assert {tag for batch in renewals.batches for tag in batch} == {*(f"a{n}" for n in range(1, 12)), "b0"}
    keeper.stop()


def test_a_failed_round_is_tried_again() -> None:
    """One queue's error neither stops the other queue's renewal nor the next round."""
    renewals = Renewals()
    keeper = keeper_of(renewals, {"a": 1, "b": 1})
    renewals.fail = True
    keeper.renew_all()
    keeper.renew_all()
    assert renewals.batches == [["a0"], ["b0"]] * 2
    keeper.stop()


def test_a_stopped_keeper_renews_nothing() -> None:
    """After the stop what is held lapses; it can still be looked up, to be given back."""
    renewals = Renewals()
    keeper = keeper_of(renewals, {"a": 1})
    keeper.stop()
    keeper.renew_all()
    assert renewals.batches == []
    assert keeper.get("a0") is not None


def test_the_keeper_keeps_no_channel_alive() -> None:
    """A channel that nobody refers to any more is collected, and its messages are not renewed."""
    renewals: Any = Renewals()
    keeper = keeper_of(renewals, {"a": 1})
    gone = weakref.ref(renewals)
    del renewals
    assert gone() is None
    keeper.renew_all()
    keeper.stop()
