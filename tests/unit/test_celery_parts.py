"""The small parts of the Celery integration, without a worker and without a server."""

from __future__ import annotations

import json
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, Task
from celery.app.task import Context
from celery.backends.base import BaseBackend
from celery.exceptions import Reject
from kombu import Connection
from kombu.utils import json as kombu_json

from idempotent_bus import (
    INNER_MSG_ID,
    ConfigurationError,
    InvalidBizId,
    InvalidBody,
    InvalidScope,
    NoExecution,
    Reason,
    Rejected,
    Unroutable,
    open_store,
)
from idempotent_bus.celery import IdempotentTask, PutOff, Refused, ResultNotStored, confirming, setup
from idempotent_bus.celery import guard as celery_guard
from idempotent_bus.celery.arguments import Arguments
from idempotent_bus.celery.call import restored
from idempotent_bus.celery.request import GuardedRequest
from idempotent_bus.celery.settings import OPTIONS, option
from idempotent_bus.celery.stamping import StampingAMQP, install
from idempotent_bus.celery.task import guard_of
from idempotent_bus.headers import INNER_MSG_ID as INNER_MSG_ID_HEADER
from idempotent_bus.identity import fingerprint
from idempotent_bus.model import Claimed, ClaimRequest
from idempotent_bus.msgid import new_inner_msg_id, published_at
from idempotent_bus.sending.resend import Known, NotConfirmed


def make_app(broker: Any = "memory://", **conf: Any) -> Celery:
    app = Celery("parts", broker=broker, backend="cache+memory://", set_as_current=False)
    app.conf.update(conf)
    return app


# --- arguments ----------------------------------------------------------------------------------------------


def mixed(first: int, /, second: int, third: int = 3, *more: int, named: int, other: int = 5, **rest: int) -> None: ...


def plain(first: int, second: int = 2) -> None: ...


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "body"),
    [
        (plain, (1,), {}, {"first": 1}),
        (plain, (), {"second": 5, "first": 1}, {"first": 1, "second": 5}),
        (plain, (1, 5), {}, {"first": 1, "second": 5}),
        (mixed, (1, 2), {"named": 4}, {"first": 1, "second": 2, "named": 4}),
        (
            mixed,
            (1, 2, 3, 4, 5),
            {"named": 4, "x": 6},
            {"first": 1, "second": 2, "third": 3, "more": (4, 5), "named": 4, "rest": {"x": 6}},
        ),
    ],
)
def test_arguments_are_named_however_they_were_given(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], body: dict[str, Any]
) -> None:
    """A body is the same for every way of giving the same arguments; defaults are left out."""
    assert Arguments(function, bound=False, transactional=False).named(args, kwargs) == body


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"first": 1}), ((1,), {"nonsense": 1}), ((), {"second": 1})]
)
def test_a_call_that_the_function_would_refuse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Too few, too many, twice, unknown: InvalidBody, for the sender and in the worker."""
    with pytest.raises(InvalidBody):
        Arguments(plain, bound=False, transactional=False).named(args, kwargs)


def test_self_and_the_transaction_are_no_arguments() -> None:
    """A bound task's first parameter and the transaction's are not the caller's; only an inbox's task has one."""

    def task(self: Any, pid: str, connection: Any) -> None: ...

    arguments = Arguments(task, bound=True, transactional=True)
    assert arguments.transaction == "connection"
    assert arguments.named(("p",), {}) == {"pid": "p"}
    with pytest.raises(TypeError):
        arguments.check("p", connection=1)
    assert Arguments(task, bound=True, transactional=False).named(("p", 1), {}) == {"pid": "p", "connection": 1}

    def both(connection: Any, session: Any) -> None: ...

    with pytest.raises(ConfigurationError, match="not as both"):
        Arguments(both, bound=False, transactional=True)


# --- what a child tells -------------------------------------------------------------------------------------


def test_outcomes_survive_the_pipe_to_the_parent() -> None:
    """pickle: of the same class, with the delay, the reason and the attempts."""
    off = pickle.loads(pickle.dumps(PutOff("why", 1.5)))
    assert (type(off), off.reason, off.requeue, off.delay) == (PutOff, "why", True, 1.5)
    assert isinstance(off, Reject)
    refused = pickle.loads(pickle.dumps(Refused("text", Reason.CONFLICT, 3)))
    assert (str(refused), refused.reason, refused.attempts) == ("text", Reason.CONFLICT, 3)
    assert str(pickle.loads(pickle.dumps(ResultNotStored("text")))) == "text"


@pytest.mark.parametrize("error", [Refused("text", Reason.ATTEMPTS, 3), ResultNotStored("text")])
def test_outcomes_survive_a_json_backend(error: Exception) -> None:
    """A caller gets an exception of the same class, with the same words, from a result backend."""
    backend = BaseBackend(make_app(), serializer="json")
    stored = kombu_json.loads(kombu_json.dumps(backend.prepare_exception(error)))
    back = backend.exception_to_python(stored)
    assert (type(back), str(back)) == (type(error), str(error))
    assert getattr(back, "reason", None) == getattr(error, "reason", None)


def test_a_stored_result_comes_back_as_a_message_would_bring_it() -> None:
    """None is a result; what could not be stored is none."""
    assert restored(None) is None
    assert restored(kombu_json.dumps({"a": [1, "x"]})) == {"a": [1, "x"]}
    for nothing in ("", 7):
        with pytest.raises(ResultNotStored):
            restored(nothing)


# --- settings -----------------------------------------------------------------------------------------------


def test_options_of_the_task_come_before_those_of_setup() -> None:
    """The decorator, then setup, then the default; False and 0 in the decorator are said."""
    app = make_app()
    setup(app, store=lambda: open_store("memory://"), lease=7.0, dead_letter=False, busy_delay=3.0)

    @app.task(shared=False, scope="a", biz_id="pid", busy_delay=2.0, fingerprint=False)
    def task(pid: str) -> None: ...

    guard = guard_of(task._get_current_object())
    assert guard is not None
    assert (guard.policy.lease, guard.policy.busy_delay, guard.dead_letter) == (7.0, 2.0, None)
    assert option(task._get_current_object(), "fingerprint") is False
    assert option(task._get_current_object(), "max_attempts") == OPTIONS["max_attempts"]


def test_setup_refuses_what_it_does_not_know() -> None:
    """A misspelt option is no option."""
    with pytest.raises(ConfigurationError, match="leese"):
        setup(make_app(), store="memory://", leese=1)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"scope": "a"}, ConfigurationError, "needs biz_id"),
        ({"scope": "a", "biz_id": 5}, ConfigurationError, "needs biz_id"),
        ({"scope": "", "biz_id": "pid"}, InvalidScope, "scope"),
        ({"scope": "a", "biz_id": "pid", "lease": -1}, ConfigurationError, "lease"),
        ({"scope": "a", "biz_id": "pid", "max_attempts": 0}, ConfigurationError, "max_attempts"),
        ({"scope": "a", "biz_id": "pid", "on_abandoned": "pray"}, ConfigurationError, "on_abandoned"),
        ({"scope": "a", "biz_id": "pid", "inbox": "flask"}, ConfigurationError, "django"),
        ({"scope": "a", "biz_id": "pid", "inbox": object()}, ConfigurationError, "must be an Inbox"),
        ({"scope": "a", "biz_id": "pid", "retention": 1.0}, ConfigurationError, "retention"),
    ],
)
def test_wrong_options_end_the_start(options: dict[str, Any], error: type[Exception], match: str) -> None:
    """They are found when the app is finalized, before any message."""
    app = make_app()
    setup(app, store="memory://")

    @app.task(shared=False, **options)
    def task(pid: str) -> None: ...

    with pytest.raises(error, match=match):
        app.finalize()


def test_a_scope_without_a_store() -> None:
    """Without a store and without an inbox nothing could be remembered."""
    app = make_app()
    setup(app)

    @app.task(shared=False, scope="a", biz_id="pid")
    def task(pid: str) -> None: ...

    with pytest.raises(ConfigurationError, match="needs a dedup store or an inbox"):
        app.finalize()


def test_an_async_task_is_refused() -> None:
    """A coroutine would be called done when it has not begun."""
    app = make_app()
    setup(app, store="memory://")

    @app.task(shared=False, scope="a", biz_id="pid")
    async def task(pid: str) -> None: ...

    with pytest.raises(ConfigurationError, match="coroutine"):
        app.finalize()


# --- setup --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("redis://h/0", "idempotent-redis://h/0"),
        ("rediss://h/0", "idempotent-rediss://h/0"),
        ("sentinel://a;sentinel://b", "idempotent-sentinel://a;idempotent-sentinel://b"),
        ("sqla+sqlite:///x.db", "idempotent-sqla+sqlite:///x.db"),
        (["redis://a", "redis://b"], ["idempotent-redis://a", "idempotent-redis://b"]),
        ("idempotent-redis://h", "idempotent-redis://h"),
        ("amqp://redis://h", "amqp://redis://h"),
        ("pyamqp://", "pyamqp://"),
        ("sqs://", "sqs://"),
    ],
)
def test_setup_puts_our_transport_in_the_place_of_kombus(given: Any, made: Any) -> None:
    """Whole lists and failover strings too; what it set, it says; edge=False leaves all as it is."""
    app = make_app(given)
    said = setup(app, store="memory://")
    assert app.conf.broker_url == made
    assert ("uses the transport" in str(said)) == (made != given)
    left = make_app(given)
    setup(left, store="memory://", edge=False)
    assert left.conf.broker_url == given


def test_setup_takes_read_and_write_urls_and_the_transport() -> None:
    """broker_transport would be believed before the URL's scheme."""
    app = make_app("redis://h", broker_read_url="redis://r", broker_write_url="redis://w", broker_transport="redis")
    setup(app, store="memory://")
    assert (app.conf.broker_read_url, app.conf.broker_write_url) == ("idempotent-redis://r", "idempotent-redis://w")
    assert app.connection_for_write().transport_cls == "idempotent-redis"


def test_what_the_user_has_decided_stays() -> None:
    """acks_late and reject_on_worker_lost of a guarded task are on, unless its decorator says otherwise."""
    app = make_app()
    setup(app, store="memory://")

    @app.task(shared=False, scope="a", biz_id="pid")
    def late(pid: str) -> None: ...

    @app.task(shared=False, scope="b", biz_id="pid", acks_late=False, reject_on_worker_lost=False)
    def early(pid: str) -> None: ...

    @app.task(shared=False)
    def other(pid: str) -> None: ...

    assert (late.acks_late, late.reject_on_worker_lost) == (True, True)
    assert (early.acks_late, early.reject_on_worker_lost) == (False, False)
    assert not isinstance(other._get_current_object(), IdempotentTask)
    assert (other.Request, other.acks_late) == (Task.Request, False)


def test_setup_twice_adds() -> None:
    """Called again it adds options, and wraps nothing twice."""
    app = make_app()
    setup(app, store="memory://")
    amqp, make = type(app.amqp), app._task_from_fun
    setup(app, lease=9.0)
    assert type(app.amqp) is amqp
    assert app._task_from_fun is make

    @app.task(shared=False, scope="a", biz_id="pid")
    def task(pid: str) -> None: ...

    guard = guard_of(task._get_current_object())
    assert guard is not None
    assert guard.policy.lease == 9.0


def test_a_task_that_would_run_unguarded_ends_the_start() -> None:
    """Declared with a scope before setup and without the base class: ConfigurationError, finalized or not."""

    def early(pid: str) -> None: ...

    finalized = make_app()
    finalized.task(early, scope="a", biz_id="pid", shared=False)
    finalized.finalize()
    with pytest.raises(ConfigurationError, match="unguarded"):
        setup(finalized, store="memory://")
    app = make_app()
    app.task(early, scope="a", biz_id="pid", shared=False)
    setup(app, store="memory://")
    for _ in range(2):  # nobody gets at its tasks
        with pytest.raises(ConfigurationError, match="unguarded"):
            app.tasks  # noqa: B018
    app = make_app()
    setup(app, store="memory://")
    app.finalize()
    with pytest.raises(ConfigurationError, match="unguarded"):
        app.task(early, scope="a", biz_id="pid", base=Task, shared=False)


def test_a_task_declared_before_setup_is_guarded_where_celery_makes_it_later() -> None:
    """Celery makes most tasks when the app is finalized: then setup was in time."""

    def early(pid: str) -> None: ...

    app = make_app()
    task = app.task(early, scope="a", biz_id="pid")
    setup(app, store="memory://")
    assert isinstance(app.tasks[task.name], IdempotentTask)


def test_the_apps_own_base_class_is_kept() -> None:
    """An app with a task class of its own gets ours on top of it."""

    class Own(Task):
        abstract = True
        mine = 1

    app = Celery("parts", broker="memory://", task_cls=Own, set_as_current=False)
    setup(app, store="memory://")

    @app.task(shared=False, scope="a", biz_id="pid")
    def task(pid: str) -> int:
        return 1

    assert isinstance(task._get_current_object(), IdempotentTask)
    assert isinstance(task._get_current_object(), Own)
    assert task.mine == 1


def test_the_apps_own_amqp_is_kept() -> None:
    """An AMQP class of the user's is stamped on top, and what was set on its object stays."""
    from celery.app.amqp import AMQP

    class Own(AMQP):
        mine = 1

    app = Celery("parts", broker="memory://", amqp=Own, set_as_current=False)
    queues = app.amqp.queues
    install(app)
    assert isinstance(app.amqp, StampingAMQP)
    assert app.amqp.mine == 1
    assert app.amqp.queues is queues


# --- the task -----------------------------------------------------------------------------------------------


def guarded(app: Celery, **options: Any) -> Any:
    setup(app, store=lambda: open_store("memory://"))
    runs: list[str] = []

    @app.task(shared=False, name="guarded", scope="a", **{"biz_id": "pid", **options})
    def task(pid: str, amount: int = 0) -> int:
        runs.append(pid)
        return amount

    task.runs = runs
    return task


def test_eager_mode_is_guarded_too() -> None:
    """task_always_eager and `apply`: the second call has the first one's result, and another body is a conflict."""
    task = guarded(make_app(task_always_eager=True))
    assert [task.delay("p", 5).get() for _ in range(2)] == [5, 5]
    assert task.apply(("p", 5)).get() == 5
    assert len(task.runs) == 1
    with pytest.raises(Refused, match="another body"):
        task.delay("p", 6).get()
    assert len(task.runs) == 1


def test_a_direct_call_is_a_function_call() -> None:
    """`task(...)` in a unit test runs the function, as with Celery, without a store."""
    task = guarded(make_app())
    assert [task("p", 5) for _ in range(2)] == [5, 5]
    assert len(task.runs) == 2


@pytest.mark.parametrize("wrong", ["", None, True, 1.5, "x" * 600, "a\n", ["p"]])
def test_the_sender_refuses_an_invalid_biz_id(wrong: Any) -> None:
    """Nothing is sent that no worker would run."""
    with pytest.raises(InvalidBizId):
        guarded(make_app()).delay(wrong)


def test_paths_and_functions_name_the_biz_id() -> None:
    """A path into an argument, a function of the arguments by their names, or the inner-msg-id."""
    app = make_app(task_always_eager=True)
    task = guarded(app, biz_id=lambda given: f"{given['pid']}-{given.get('amount', 0)}")
    assert [task.delay("p", 1).get(), task.delay("p", 2).get(), task.delay("p", 1).get()] == [1, 2, 1]
    assert len(task.runs) == 2
    guard = guard_of(guarded(make_app(), biz_id="pid.inner.id")._get_current_object())
    assert guard is not None
    guard.check(({"inner": {"id": "x"}},), {})
    with pytest.raises(InvalidBizId):
        guard.check(({"inner": {}},), {})
    by_message = guard_of(guarded(make_app(), biz_id=INNER_MSG_ID)._get_current_object())
    assert by_message is not None
    by_message.check(("anything",), {})


def test_once_needs_an_execution_and_no_task_id() -> None:
    """Outside of a guarded task there is no cause to derive an id from."""
    task = guarded(make_app())
    with pytest.raises(NoExecution):
        task.apply_async(("p",), once="name")
    with pytest.raises(ConfigurationError, match="not both"):
        task.apply_async(("p",), task_id="x", once="name")


def test_an_errback_is_never_called_on_the_spot() -> None:
    """Celery calls an errback with several parameters in the failing process, unguarded; a guarded one it must send."""
    import functools

    task = guarded(make_app())
    assert isinstance(task.__header__, functools.partial)


# --- the parent ---------------------------------------------------------------------------------------------


def test_an_old_result_of_the_task_id_is_no_reason_to_forget_a_message() -> None:
    """With a task id given every night anew, a lost child's message would be acked because of yesterday's success."""
    request = object.__new__(GuardedRequest)
    request._guard, request._task = object(), types.SimpleNamespace(acks_late=True, reject_on_worker_lost=True)
    assert request._success_was_stored() is False


def test_a_held_message_gives_its_place_back_where_it_took_it() -> None:
    """After a reconnect the consumer has another prefetch window, which never counted the held message."""
    window, other = _Window(), _Window()
    timer: list[Any] = []
    consumer = types.SimpleNamespace(
        qos=window, timer=types.SimpleNamespace(call_after=lambda delay, f, args: timer.append((f, args)))
    )
    request = object.__new__(GuardedRequest)
    request._app, request._guard = make_app(), object()
    request._message = types.SimpleNamespace(channel=types.SimpleNamespace(connection=None))
    from idempotent_bus.celery import request as module

    module._consumers[request._app] = consumer
    request._hold(1.0)
    consumer.qos = other
    function, arguments = timer[0]
    function(*arguments)
    assert (window.value, other.value) == (0, 0)


class _Window:
    value = 0

    def increment_eventually(self) -> None:
        self.value += 1

    def decrement_eventually(self) -> None:
        self.value -= 1


# --- confirms -----------------------------------------------------------------------------------------------


class _Confirms:
    """A confirm channel that answers as it is told."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.sent = answer, 0

    def send(self, *_: Any) -> Any:
        self.sent += 1
        if isinstance(self.answer, OSError):
            raise self.answer
        return types.SimpleNamespace(failure=self.answer if isinstance(self.answer, NotConfirmed) else None)

    def wait(self, ticket: Any) -> None:
        if self.answer == "silence":
            raise NotConfirmed(Known.UNKNOWN, "no confirm")


@pytest.mark.parametrize(
    ("answer", "error", "thrown"),
    [
        (None, None, 0),
        (NotConfirmed(Known.UNROUTABLE, "none"), Unroutable, 0),
        (NotConfirmed(Known.REFUSED, "full"), Rejected, 0),
        ("silence", ConnectionResetError, 1),
        (OSError("gone"), OSError, 1),
    ],
)
def test_a_publish_returns_when_its_own_confirm_has_come(
    monkeypatch: pytest.MonkeyPatch, answer: Any, error: type[Exception] | None, thrown: int
) -> None:
    """I15: yes returns; no is final; silence and a lost connection throw the connection away before any resend."""
    connection = Connection("memory://")
    monkeypatch.setattr(type(connection.transport), "driver_type", "amqp")
    collapsed: list[int] = []
    monkeypatch.setattr(connection, "collect", lambda *_: collapsed.append(1))
    confirms = _Confirms(answer)
    monkeypatch.setattr(confirming, "_confirms_of", lambda _: confirms)
    producer = confirming.ConfirmingProducer(connection)

    def publish() -> None:
        producer.publish(json.dumps({}), routing_key="q", headers={"inner-msg-id": "i"}, content_type="text/plain")

    if error is None:
        publish()
    else:
        with pytest.raises(error):
            publish()
    assert (confirms.sent, len(collapsed)) == (1, thrown)


def test_what_has_no_inner_msg_id_is_kombus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broadcast to nobody must not fail because it has no queue."""
    connection = Connection("memory://")
    monkeypatch.setattr(type(connection.transport), "driver_type", "amqp")
    monkeypatch.setattr(confirming, "_confirms_of", lambda _: pytest.fail("confirmed"))
    confirming.ConfirmingProducer(connection).publish("{}", routing_key="q", content_type="text/plain")


# --- waiting for a busy record ---------------------------------------------------------------------------------


def test_a_busy_copy_looks_again_soon_at_first_then_later_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """I12: a copy of a task that runs elsewhere comes back after busy_delay, then after half of its own age, and never
    later than the lease of the one that runs lasts, spread by half; one whose age nobody knows after busy_delay."""
    app, store = make_app(), open_store("memory://")
    setup(app, store=lambda: store, lease=600.0, busy_delay=1.5)

    @app.task(shared=False, scope="cards", biz_id="pid")
    def task(pid: str) -> None:
        raise AssertionError("it runs elsewhere")

    guard = guard_of(task._get_current_object())
    assert guard is not None
    key = guard.key_of((), {"pid": "p"}, None)
    mine = fingerprint({"pid": "p"}, True)
    assert isinstance(store.claim(ClaimRequest(key, bytes(16), 600.0, 604_800.0, mine)), Claimed)
    inner_msg_id = new_inner_msg_id()
    published = published_at(inner_msg_id)

    def wait(age: float, **headers: Any) -> float:
        monkeypatch.setattr(celery_guard, "time", types.SimpleNamespace(time=lambda: published + age))
        with pytest.raises(PutOff) as off:
            guard.run(Context(properties={}, delivery_info={}, **headers), ("p",), {})
        return float(off.value.delay)

    waits = [wait(age, **{INNER_MSG_ID_HEADER: inner_msg_id}) for age in (-5, 0, 2, 4, 20, 200, 1000)]
    assert waits == pytest.approx([1.5, 1.5, 1.5, 2, 10, 100, 500], abs=0.01)
    assert 590 < wait(10_000, **{INNER_MSG_ID_HEADER: inner_msg_id}) <= 900
    assert wait(10_000) == 1.5


# --- listeners -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["setup", "task"])
def test_what_is_no_listener_ends_the_start(where: str) -> None:
    """A function in the place of a listener would be told nothing, for ever: ConfigurationError before any message."""
    app = make_app()
    setup(app, store="memory://", **({"listener": print} if where == "setup" else {}))

    def task(pid: str) -> None: ...

    app.task(task, scope="a", biz_id="pid", shared=False, **({"listener": print} if where == "task" else {}))
    with pytest.raises(ConfigurationError, match="listener"):
        app.finalize()
