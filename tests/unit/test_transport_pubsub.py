"""`idempotent-gcpubsub://` at its boundary: a stand-in for the SDK with topics, filtered subscriptions and futures."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from concurrent.futures import TimeoutError as NoAnswer
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from kombu import Connection, Exchange, Producer, Queue
from sdk_stubs import loaded, stub

from idempotent_bus.errors import ConfigurationError, PublishUnknown, Rejected, Unroutable
from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.model import Edge, Landing
from idempotent_bus.producer import IdempotentProducer, ResendPolicy

ONCE = ResendPolicy(max_sends=1)
NAMES = (
    "google.api_core",
    "google.api_core.exceptions",
    "google.api_core.retry",
    "google.cloud",
    "google.cloud.monitoring_v3",
    "google.cloud.pubsub_v1",
    "google.cloud.pubsub_v1.exceptions",
    "google.cloud.pubsub_v1.publisher",
    "google.cloud.pubsub_v1.publisher.exceptions",
    "google.cloud.pubsub_v1.subscriber",
    "google.cloud.pubsub_v1.subscriber.exceptions",
    "google.cloud.pubsub_v1.types",
    "google.protobuf",
    "google.protobuf.field_mask_pb2",
    "google.pubsub_v1",
    "google",
)


class Project:
    """Topics, subscriptions with a filter, and what each subscription was given."""

    def __init__(self) -> None:
        self.topics: set[str] = set()
        self.filters: dict[str, tuple[str, str]] = {}
        self.given: dict[str, list[tuple[bytes, dict[str, str]]]] = {}
        self.published: list[str] = []
        self.failures: list[BaseException] = []
        self.deadlines: list[tuple[str, int]] = []
        self.acked: list[str] = []
        self.waits: list[float] = []


def make_sdk(project: Project) -> dict[str, ModuleType]:
    modules = stub(*NAMES)
    errors = modules["google.api_core.exceptions"]
    base = errors.GoogleAPICallError
    for name in ("InvalidArgument", "PermissionDenied", "Unauthenticated", "FailedPrecondition", "NotFound"):
        setattr(errors, name, type(name, (base,), {}))
    errors.ServiceUnavailable = type("ServiceUnavailable", (base,), {})  # type: ignore[attr-defined]

    class Future:
        """The answer comes only to who waits for it."""

        def result(self, timeout: float) -> str:
            project.waits.append(timeout)
            if project.failures:
                raise project.failures.pop(0)
            return "id"

    class Publisher:
        def topic_path(self, name: str, topic: str) -> str:
            return f"projects/{name}/topics/{topic}"

        def get_topic(self, request: dict[str, Any]) -> None:
            if request["topic"] not in project.topics:
                raise errors.NotFound

        def create_topic(self, request: dict[str, Any]) -> None:
            project.topics.add(request["name"])

        def publish(self, topic: str, data: bytes, retry: Any = None, timeout: float = 0, **attributes: str) -> Future:
            project.published.append(topic)
            if not project.failures:
                for subscription, (of, expression) in project.filters.items():
                    if of == topic and expression == f'attributes.routing_key="{attributes.get("routing_key")}"':
                        project.given[subscription].append((data, attributes))
            return Future()

    class Subscriber:
        def subscription_path(self, name: str, subscription: str) -> str:
            return f"projects/{name}/subscriptions/{subscription}"

        def create_subscription(self, request: dict[str, Any]) -> None:
            project.filters[request["name"]] = (request["topic"], request.get("filter", ""))
            project.given.setdefault(request["name"], [])

        def pull(self, request: dict[str, Any], **_: Any) -> Any:
            given = project.given[request["subscription"]]
            messages = []
            for _ in range(min(len(given), request["max_messages"])):
                data, _attributes = given.pop(0)
                message = SimpleNamespace(data=data, message_id="m")
                messages.append(SimpleNamespace(ack_id=f"ack-{len(project.acked)}", message=message))
            return SimpleNamespace(received_messages=messages)

        def modify_ack_deadline(self, request: dict[str, Any]) -> None:
            project.deadlines += [(ack_id, request["ack_deadline_seconds"]) for ack_id in request["ack_ids"]]

        def acknowledge(self, request: dict[str, Any], **_: Any) -> None:
            project.acked += request["ack_ids"]

    sdk = modules["google.cloud.pubsub_v1"]
    sdk.PublisherClient, sdk.SubscriberClient = Publisher, Subscriber  # type: ignore[attr-defined]
    modules["google.api_core.retry"].Retry = lambda **_: None  # type: ignore[attr-defined]
    return modules


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", "stand-in")  # kombu then asks no monitoring service for queue lengths
    project = Project()
    with loaded("gcpubsub", "gcpubsub", make_sdk(project)) as module:
        project.errors = module.api_errors  # type: ignore[attr-defined]
        yield project


def connect(scheme: str = "idempotent-gcpubsub") -> Connection:
    return Connection(f"{scheme}://projects/p")


PAID = Exchange("paid", type="direct")
CARDS, MAILS = Queue("cards", PAID, "paid"), Queue("mails", PAID, "paid")


def given(project: Project, queue: str) -> int:
    return len(project.given[f"projects/p/subscriptions/kombu-{queue}"])


# --- publishing -------------------------------------------------------------------------------------


def test_a_published_message_is_landed(project: Project) -> None:
    """The receipt follows the future, which is awaited for the confirm's time, and leaves the edge to the consumer."""
    with IdempotentProducer(connect(), declare=[CARDS], confirm_timeout=3.0, retry=ONCE) as producer:
        receipt = producer.publish({"n": 1}, exchange=PAID, routing_key="paid")
    [(data, attributes)] = project.given["projects/p/subscriptions/kombu-cards"]
    assert (receipt.landing, receipt.edge) == (Landing.LANDED, Edge.CONSUMER)
    assert json.loads(data)["headers"][INNER_MSG_ID] == attributes[INNER_MSG_ID] == receipt.inner_msg_id
    assert project.waits == [3.0]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("InvalidArgument", Rejected),
        ("PermissionDenied", Rejected),
        ("NotFound", Unroutable),
        ("ServiceUnavailable", PublishUnknown),
        ("", PublishUnknown),
    ],
)
def test_a_failed_publish_raises(project: Project, name: str, error: type[Exception]) -> None:
    """What the future says is raised as what it allows; no answer in time, or another error, is unknown."""
    with IdempotentProducer(connect(), declare=[CARDS], retry=ONCE) as producer:
        project.failures = [getattr(project.errors, name)() if name else NoAnswer()]  # type: ignore[attr-defined]
        with pytest.raises(error):
            producer.publish({}, exchange=PAID, routing_key="paid")
        assert producer.publish({}, exchange=PAID, routing_key="paid").landed


def test_kombu_s_own_calls_a_failed_publish_done(project: Project) -> None:
    """The control: kombu's transport never looks at the future, and so the producer refuses to work over it."""
    with connect("gcpubsub") as connection:
        project.failures = [project.errors.InvalidArgument()]  # type: ignore[attr-defined]
        Producer(connection).publish({}, exchange=PAID, routing_key="paid", declare=[CARDS])
    assert (given(project, "cards"), project.waits) == (0, [])
    with pytest.raises(ConfigurationError, match="idempotent-gcpubsub"):
        IdempotentProducer(connect("gcpubsub"))


@pytest.mark.parametrize(("scheme", "copies"), [("idempotent-gcpubsub", 1), ("gcpubsub", 2)])
def test_two_queues_of_a_topic_get_one_copy_each(project: Project, scheme: str, copies: int) -> None:
    """One publish to the topic serves all of its queues; kombu publishes once a queue, and each gets all of them."""
    with connect(scheme) as connection:
        Producer(connection).publish({}, exchange=PAID, routing_key="paid", declare=[CARDS, MAILS])
    assert (given(project, "cards"), given(project, "mails")) == (copies, copies)


def test_what_no_subscription_would_get_is_unroutable(project: Project) -> None:
    """A queue that was not declared, a key that is not bound, a key that the filter drops: errors, and nothing sent."""
    with IdempotentProducer(connect(), declare=[CARDS], retry=ONCE) as producer:
        producer.publish({}, exchange=PAID, routing_key="paid")
        sent = len(project.published)
        for exchange, key in (("", "nobody"), ("paid", "unbound"), ("unknown", "paid"), ("", "cards")):
            with pytest.raises(Unroutable):
                producer.publish({}, exchange=exchange, routing_key=key)
    assert len(project.published) == sent


def test_a_dead_letter_with_an_exchange_of_its_own_name(project: Project) -> None:
    """Declared as the documentation says, it can be reached through the default exchange, as the lower half does."""
    dead = Queue("cards.dead", Exchange("cards.dead"), "cards.dead")
    with connect() as connection:
        dead(connection.default_channel).declare()
        with IdempotentProducer(connection, retry=ONCE) as producer:
            producer.publish({}, routing_key="cards.dead")
    assert given(project, "cards-dead") == 1


# --- consuming --------------------------------------------------------------------------------------


def fetch(connection: Connection) -> Any:
    CARDS(connection.default_channel).declare()
    Producer(connection).publish({"n": 1}, exchange=PAID, routing_key="paid")
    return CARDS(connection.default_channel).get()


def prolonged(connection: Connection) -> int:
    """How many messages kombu's thread keeps from everybody else."""
    return sum(len(queue.unacked_ids) for queue in connection.default_channel._queue_cache.values())


@pytest.mark.parametrize(("delay", "deadline"), [(-1, 0), (0, 0), (1.2, 2), (86400, 600)])
def test_a_delay_is_the_ack_deadline(project: Project, delay: float, deadline: int) -> None:
    """Pub/Sub keeps the delay, at most its longest; nothing prolongs it, and it is settled once."""
    with connect() as connection:
        message = fetch(connection)
        assert prolonged(connection) == 1
        assert message.channel.basic_delay(message.delivery_tag, delay) is True
        assert message.channel.basic_delay(message.delivery_tag, delay) is False
        assert prolonged(connection) == 0
    assert project.deadlines == [("ack-0", deadline)]


@pytest.mark.parametrize(
    ("scheme", "settle", "deadlines", "acked", "published", "kept"),
    [
        ("idempotent-gcpubsub", "requeue", [("ack-0", 0)], [], 1, 0),
        ("gcpubsub", "requeue", [], [], 2, 1),
        ("idempotent-gcpubsub", "reject", [], ["ack-0"], 1, 0),
        ("gcpubsub", "reject", [], [], 1, 1),
        ("idempotent-gcpubsub", "ack", [], ["ack-0"], 1, 0),
    ],
)
def test_each_settlement_reaches_the_service(
    project: Project, scheme: str, settle: str, deadlines: Any, acked: Any, published: int, kept: int
) -> None:
    """A requeue gives back, a reject drops. kombu's own publishes anew, and keeps the old one hidden for ever."""
    with connect(scheme) as connection:
        getattr(fetch(connection), settle)()
        assert (project.deadlines, project.acked) == (deadlines, acked)
        assert (len(project.published), prolonged(connection)) == (published, kept)


def test_a_delivery_says_where_it_came_from(project: Project) -> None:
    """Its queue, for the dead letter; and that it may have been delivered before, which Pub/Sub does not tell."""
    with connect() as connection:
        info = fetch(connection).delivery_info
    assert (info["queue"], info["redelivered"]) == ("cards", True)


def test_without_acks_a_message_is_done_at_once(project: Project) -> None:
    """`get` with no_ack acknowledges; kombu's own keeps the message from everybody."""
    with connect() as connection:
        fetch(connection).ack()
        Producer(connection).publish({}, exchange=PAID, routing_key="paid")
        assert CARDS(connection.default_channel).get(no_ack=True) is not None
        assert (len(project.acked), prolonged(connection)) == (2, 0)


def test_the_stand_in_has_the_sdk_s_names() -> None:
    """Where the SDK is installed: what the transport asks of it is there, under these names."""
    sdk = pytest.importorskip("google.cloud.pubsub_v1")
    from google.api_core import exceptions

    publish = inspect.signature(sdk.PublisherClient.publish).parameters
    assert {"topic", "data", "retry", "timeout", "attrs"} <= set(publish)
    assert {"modify_ack_deadline", "acknowledge", "pull"} <= set(dir(sdk.SubscriberClient))
    for name in ("InvalidArgument", "PermissionDenied", "Unauthenticated", "FailedPrecondition", "NotFound"):
        assert issubclass(getattr(exceptions, name), exceptions.GoogleAPICallError)
