"""`idempotent-azureservicebus://` at its boundary: a stand-in for the SDK whose queues detect duplicates as told."""

from __future__ import annotations

import datetime
import inspect
import logging
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from kombu import Connection, Producer, Queue
from sdk_stubs import StubModule, loaded, stub

from idempotent_bus.errors import PublishUnknown, Rejected, Unroutable
from idempotent_bus.headers import INNER_MSG_ID, REDRIVE
from idempotent_bus.model import Edge, Landing
from idempotent_bus.msgid import new_inner_msg_id
from idempotent_bus.producer import IdempotentProducer, ResendPolicy

ONCE = ResendPolicy(max_sends=1)
NAMES = (
    "azure",
    "azure.core",
    "azure.core.exceptions",
    "azure.servicebus",
    "azure.servicebus.exceptions",
    "azure.servicebus.management",
    "azure.servicebus._pyamqp",
    "azure.servicebus._pyamqp.error",
    "azure.identity",
    "isodate",
)


class Message:
    def __init__(self, body: str, *, message_id: str | None = None, scheduled_enqueue_time_utc: Any = None) -> None:
        self.body, self.message_id, self.scheduled = body.encode(), message_id, scheduled_enqueue_time_utc
        self.delivery_count = 0
        self.sequence_number = 0


class Namespace:
    """Queues, each with its properties and messages; how the next sends and settlements end."""

    def __init__(self) -> None:
        self.queues: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, list[Message]] = {}
        self.failures: list[Exception] = []
        self.settled: list[tuple[str, int]] = []
        self.timeouts: list[float | None] = []
        self.renewed: list[int] = []
        self.settle_failure: Exception | None = None
        self.forbidden: Exception | None = None

    def make(self, name: str, **properties: Any) -> None:
        self.queues[name] = properties
        self.stored[name] = []


def make_sdk(namespace: Namespace) -> dict[str, ModuleType]:
    modules = stub(*NAMES)
    core, errors = modules["azure.core.exceptions"], modules["azure.servicebus.exceptions"]
    azure_error = core.AzureError
    core.ResourceExistsError = type("ResourceExistsError", (azure_error,), {})  # type: ignore[attr-defined]
    for name in (
        "ServiceBusConnectionError",
        "ServiceBusCommunicationError",
        "OperationTimeoutError",
        "ServiceBusServerBusyError",
        "MessageSizeExceededError",
        "MessagingEntityDisabledError",
        "ServiceBusAuthenticationError",
        "ServiceBusAuthorizationError",
        "ServiceBusQuotaExceededError",
        "MessagingEntityNotFoundError",
        "MessageLockLostError",
        "MessageAlreadySettled",
    ):
        setattr(errors, name, type(name, (azure_error,), {}))

    class Sender:
        def __init__(self, queue: str) -> None:
            self.queue = queue

        def send_messages(self, message: Message, *, timeout: float | None = None) -> None:
            namespace.timeouts.append(timeout)
            if namespace.failures:
                raise namespace.failures.pop(0)
            if self.queue not in namespace.queues:
                raise errors.MessagingEntityNotFoundError
            messages = namespace.stored[self.queue]
            known = [held.message_id for held in messages]
            if not namespace.queues[self.queue].get("requires_duplicate_detection") or message.message_id not in known:
                messages.append(message)
                message.sequence_number = len(messages)

        def close(self) -> None: ...

    class Receiver:
        def __init__(self, queue_name: str, **_: Any) -> None:
            self.queue = queue_name

        def receive_messages(self, **_: Any) -> list[Message]:
            settled = {number for _, number in namespace.settled}
            waiting = [m for m in namespace.stored[self.queue] if not m.scheduled and m.sequence_number not in settled]
            return waiting[:1]

        def _settle(self, how: str, message: Message) -> None:
            if namespace.settle_failure is not None:
                raise namespace.settle_failure
            namespace.settled.append((how, message.sequence_number))

        def complete_message(self, message: Message) -> None:
            self._settle("complete", message)

        def abandon_message(self, message: Message) -> None:
            self._settle("abandon", message)

        def dead_letter_message(self, message: Message, reason: str) -> None:
            self._settle("dead letter", message)

        def __enter__(self) -> Receiver:
            return self

        def close(self) -> None: ...

    class Client:
        @classmethod
        def from_connection_string(cls, *_: Any, **__: Any) -> Client:
            return cls()

        def get_queue_sender(self, queue: str, **_: Any) -> Sender:
            return Sender(queue)

        def get_queue_receiver(self, **options: Any) -> Receiver:
            return Receiver(**options)

    class Administration(Client):
        def create_queue(self, queue_name: str, **properties: Any) -> None:
            if queue_name in namespace.queues:
                raise core.ResourceExistsError
            namespace.make(queue_name, **properties)

        def get_queue(self, name: str) -> Any:
            if namespace.forbidden is not None:
                raise namespace.forbidden
            return SimpleNamespace(**{"requires_duplicate_detection": False, **namespace.queues[name]})

        def get_queue_runtime_properties(self, name: str) -> Any:
            return SimpleNamespace(total_message_count=len(namespace.stored[name]))

    class Renewer:
        def __init__(self, **_: Any) -> None: ...

        def register(self, receiver: Any, message: Message, **_: Any) -> None:
            namespace.renewed.append(message.sequence_number)

        def close(self) -> None: ...

    bus = modules["azure.servicebus"]
    bus.ServiceBusClient, bus.AutoLockRenewer = Client, Renewer  # type: ignore[attr-defined]
    bus.ServiceBusMessage = Message  # type: ignore[attr-defined]
    bus.ServiceBusReceiveMode = SimpleNamespace(  # type: ignore[attr-defined]
        PEEK_LOCK=SimpleNamespace(name="PEEK_LOCK"), RECEIVE_AND_DELETE=SimpleNamespace(name="RECEIVE_AND_DELETE")
    )
    modules["azure.servicebus.management"].ServiceBusAdministrationClient = Administration  # type: ignore[attr-defined]
    modules["isodate"].Duration = dict  # type: ignore[attr-defined]
    modules["isodate"].duration_isoformat = str  # type: ignore[attr-defined]
    return modules


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    namespace = Namespace()
    with loaded("azureservicebus", "azureservicebus", make_sdk(namespace)) as module:
        namespace.errors = module.bus_errors  # type: ignore[attr-defined]
        yield namespace


def connect(scheme: str = "idempotent-azureservicebus", **options: Any) -> Connection:
    return Connection(f"{scheme}://policy:key/with+signs@namespace", transport_options=options)


# --- publishing -------------------------------------------------------------------------------------


def test_a_resend_lands_once(namespace: Namespace) -> None:
    """The inner-msg-id is the message id of a queue that was made to detect duplicates, for as long as was asked."""
    connection = connect(edge_window=7200)
    with IdempotentProducer(connection, declare=[Queue("q")], confirm_timeout=3.0, retry=ONCE) as producer:
        first = producer.publish({}, routing_key="q")
        producer.publish({}, routing_key="q", inner_msg_id=first.inner_msg_id)
    assert (first.landing, first.edge) == (Landing.LANDED, Edge.BROKER)
    assert [message.message_id for message in namespace.stored["q"]] == [first.inner_msg_id]
    assert namespace.queues["q"]["requires_duplicate_detection"] is True
    assert namespace.queues["q"]["duplicate_detection_history_time_window"] == datetime.timedelta(seconds=7200)
    assert namespace.timeouts == [3.0, 3.0]


def test_kombu_s_own_lands_twice(namespace: Namespace) -> None:
    """The control: the same message twice through kombu's transport, whose queues and messages know no duplicates."""
    with connect("azureservicebus") as connection:
        for _ in range(2):
            headers = {INNER_MSG_ID: "0198c0de-0000-7000-8000-000000000000"}
            Producer(connection).publish({}, routing_key="q", declare=[Queue("q")], headers=headers)
    assert [message.message_id for message in namespace.stored["q"]] == [None, None]


def test_a_queue_that_detects_nothing_is_said_to(namespace: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    """An older queue cannot be changed: one warning, and receipts that leave the edge to the consumer."""
    namespace.make("old")
    with caplog.at_level(logging.WARNING), IdempotentProducer(connect(), retry=ONCE) as producer:
        receipts = [producer.publish({}, routing_key="old", declare=[Queue("old")]) for _ in range(2)]
    assert {receipt.edge for receipt in receipts} == {Edge.CONSUMER}
    assert caplog.text.count("without duplicate detection") == 1


def test_who_may_not_ask_promises_nothing(namespace: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    """A connection without the right to read the queue's settings publishes, and says that the consumer is the edge."""
    namespace.make("q", requires_duplicate_detection=True)
    namespace.forbidden = namespace.errors.ServiceBusAuthorizationError()  # type: ignore[attr-defined]
    with IdempotentProducer(connect(), retry=ONCE) as producer:
        assert producer.publish({}, routing_key="q").edge is Edge.CONSUMER
    assert "may not ask" in caplog.text


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("MessageSizeExceededError", Rejected),
        ("ServiceBusAuthorizationError", Rejected),
        ("ServiceBusQuotaExceededError", Rejected),
        ("MessagingEntityNotFoundError", Unroutable),
        ("OperationTimeoutError", PublishUnknown),
        ("ServiceBusConnectionError", PublishUnknown),
        ("ServiceBusServerBusyError", PublishUnknown),
    ],
)
def test_each_failure_claims_what_is_known(namespace: Namespace, name: str, error: type[Exception]) -> None:
    """Only what the service refused is called refused; a lost connection or no answer is unknown."""
    namespace.make("q", requires_duplicate_detection=True)
    namespace.failures = [getattr(namespace.errors, name)()]  # type: ignore[attr-defined]
    with IdempotentProducer(connect(), retry=ONCE) as producer:
        with pytest.raises(error):
            producer.publish({}, routing_key="q")
        assert producer.publish({}, routing_key="q").landed


def test_a_redriven_message_passes_the_edge(namespace: Namespace) -> None:
    """The redrive's number makes another message id of the same inner-msg-id."""
    namespace.make("q", requires_duplicate_detection=True)
    ident = new_inner_msg_id()
    with connect() as connection:
        for redrive in (0, 1, 1):
            Producer(connection).publish({}, routing_key="q", headers={INNER_MSG_ID: ident, REDRIVE: redrive})
    assert [message.message_id for message in namespace.stored["q"]] == [ident, f"{ident}:1"]


def test_a_url_of_ours_is_shown_without_its_key() -> None:
    """The password never reaches a log."""
    with loaded("azureservicebus", "azureservicebus", make_sdk(Namespace())):
        shown = connect().as_uri()
    assert shown.startswith("idempotent-azureservicebus://policy:**@namespace")


# --- consuming --------------------------------------------------------------------------------------


@pytest.fixture
def delivered(namespace: Namespace) -> Iterator[Any]:
    """One message, fetched and not settled."""
    namespace.make("q", requires_duplicate_detection=True)
    with connect() as connection:
        Producer(connection).publish({"n": 1}, routing_key="q", headers={INNER_MSG_ID: new_inner_msg_id()})
        yield Queue("q")(connection.default_channel).get()


def test_what_is_held_is_kept_locked(namespace: Namespace, delivered: Any) -> None:
    """Lock renewal is on without being asked for (kombu's is off), and the message says where it came from."""
    assert namespace.renewed == [1]
    assert (delivered.delivery_info["queue"], delivered.delivery_info["redelivered"]) == ("q", False)


@pytest.mark.parametrize(("settle", "how"), [("ack", "complete"), ("requeue", "abandon"), ("reject", "dead letter")])
def test_each_settlement_reaches_the_service(namespace: Namespace, delivered: Any, settle: str, how: str) -> None:
    """An ack completes, a requeue gives back at once, a reject goes to the queue's own dead letters."""
    getattr(delivered, settle)()
    assert namespace.settled == [(how, 1)]
    assert not delivered.channel.qos._delivered.keys() - delivered.channel.qos._dirty


def test_kombu_s_own_keeps_what_is_requeued(namespace: Namespace) -> None:
    """The control: a requeue over kombu's transport tells the service nothing."""
    namespace.make("q")
    with connect("azureservicebus") as connection:
        Producer(connection).publish({}, routing_key="q")
        Queue("q")(connection.default_channel).get().requeue()
    assert namespace.settled == []


def test_an_ack_that_fails_is_raised(namespace: Namespace, delivered: Any) -> None:
    """A lost connection at the ack is the caller's to see; a lost lock is logged, for the message is not ours then."""
    namespace.settle_failure = namespace.errors.ServiceBusConnectionError()  # type: ignore[attr-defined]
    with pytest.raises(type(namespace.settle_failure)):
        delivered.channel.basic_ack(delivered.delivery_tag)
    namespace.settle_failure = namespace.errors.MessageLockLostError()  # type: ignore[attr-defined]
    delivered.ack()
    assert namespace.settled == []


def test_a_delay_is_a_scheduled_copy_and_then_the_completion(namespace: Namespace, delivered: Any) -> None:
    """The copy has the same id inside and an id of its own outside; asked for again, it does not come twice."""
    channel, tag = delivered.channel, delivered.delivery_tag
    namespace.settle_failure = namespace.errors.ServiceBusConnectionError()  # type: ignore[attr-defined]
    with pytest.raises(type(namespace.settle_failure)):
        channel.basic_delay(tag, 60)  # dies between the copy and the completion
    namespace.settle_failure = None
    assert channel.basic_delay(tag, 60) is True
    assert channel.basic_delay(tag, 60) is False
    _, copy = namespace.stored["q"]
    assert namespace.settled == [("complete", 1)]
    assert copy.message_id == "idempotent-bus-delay-1"
    left = copy.scheduled - datetime.datetime.now(datetime.timezone.utc)
    assert 55 < left.total_seconds() <= 60
    copy.scheduled = None
    back = Queue("q")(channel).get()
    assert back.payload == {"n": 1}
    assert back.headers == delivered.headers
    assert back.delivery_info["redelivered"] is True


def test_the_copy_fails_and_the_original_stays(namespace: Namespace, delivered: Any) -> None:
    """No completion without a confirmed copy: the message is held, and comes back when its lock lapses."""
    namespace.failures = [namespace.errors.OperationTimeoutError()]  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="no answer"):
        delivered.channel.basic_delay(delivered.delivery_tag, 60)
    assert namespace.settled == []
    assert delivered.delivery_tag in delivered.channel.qos._delivered


def test_the_stand_in_has_the_sdk_s_names() -> None:
    """Where the SDK is installed: what the transport asks of it is there, under these names."""
    bus = pytest.importorskip("azure.servicebus")
    from azure.servicebus import exceptions, management

    assert not isinstance(bus, StubModule)
    message = bus.ServiceBusMessage("x", message_id="m", scheduled_enqueue_time_utc=datetime.datetime.now())
    assert message.message_id == "m"
    assert "timeout" in inspect.signature(bus.ServiceBusSender.send_messages).parameters
    create = inspect.signature(management.ServiceBusAdministrationClient.create_queue).parameters
    assert {"lock_duration", "requires_duplicate_detection", "duplicate_detection_history_time_window"} <= set(create)
    assert "reason" in inspect.signature(bus.ServiceBusReceiver.dead_letter_message).parameters
    assert {"abandon_message", "complete_message"} <= set(dir(bus.ServiceBusReceiver))
    assert {"delivery_count", "sequence_number"} <= set(dir(bus.ServiceBusReceivedMessage))
    for error in (
        "MessageSizeExceededError",
        "MessagingEntityDisabledError",
        "MessagingEntityNotFoundError",
        "ServiceBusQuotaExceededError",
        "MessageLockLostError",
        "MessageAlreadySettled",
    ):
        assert issubclass(getattr(exceptions, error), (exceptions.ServiceBusError, ValueError))
