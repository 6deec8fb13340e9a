"""The inner-msg-id of each task message, over every form of canvas: a repeated cause publishes the same ids again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery_wire import Wire, make_wire

from idempotent_bus.celery import ids, stamping
from idempotent_bus.celery.ids import frozen, sent_as
from idempotent_bus.headers import INNER_MSG_ID
from idempotent_bus.msgid import derived_inner_msg_id, is_inner_msg_id, new_inner_msg_id

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated")  # Celery's use of redis-py


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    made = make_wire(monkeypatch)
    declare(made)
    return made


def declare(wire: Wire) -> None:
    """Guarded and plain tasks; each run of a body is counted in wire.runs."""
    app: Celery = wire.app

    @app.task(shared=False, name="add", scope="add", biz_id="pid")
    def add(pid: str, x: int = 1, y: int = 1) -> int:
        wire.runs["add"] += 1
        return x + y

    @app.task(shared=False, name="plain")
    def plain(value: Any = 0) -> Any:
        wire.runs["plain"] += 1
        return value

    @app.task(shared=False, name="total", scope="total", biz_id="pid")
    def total(numbers: list[int], pid: str) -> int:
        wire.runs["total"] += 1
        return sum(numbers)

    @app.task(shared=False, name="fails", scope="fails", biz_id="pid")
    def fails(pid: str) -> None:
        raise ValueError(pid)

    @app.task(shared=False, name="again", bind=True, scope="again", biz_id="pid", max_retries=9)
    def again(self: Any, pid: str) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        wire.runs["again"] += 1
        return 1

    @app.task(
        shared=False, name="auto", scope="auto", biz_id="pid", autoretry_for=(KeyError,), retry_backoff=False, bind=True
    )
    def auto(self: Any, pid: str) -> int:
        if not self.request.retries:
            raise KeyError(pid)
        wire.runs["auto"] += 1
        return 1

    @app.task(shared=False, name="swap", bind=True, scope="swap", biz_id="pid")
    def swap(self: Any, pid: str, kind: str) -> None:
        raise self.replace(CANVAS[kind](app.tasks, f"in-{pid}"))


def s(tasks: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    return tasks[name].si(*args, **kwargs)


#: Every form, as a function of the tasks and of a biz-id.
CANVAS: dict[str, Callable[[Any, str], Any]] = {
    "task": lambda t, p: s(t, "add", p),
    "link": lambda t, p: s(t, "add", p).set(link=s(t, "plain", 1)),
    "link of a link": lambda t, p: s(t, "add", p).set(link=s(t, "plain", 1).set(link=s(t, "plain", 2))),
    "link to a chain": lambda t, p: s(t, "add", p).set(link=chain(s(t, "plain", 1), s(t, "plain", 2))),
    "link to a group": lambda t, p: s(t, "add", p).set(link=group(s(t, "plain", 1), s(t, "plain", 2))),
    "link_error": lambda t, p: s(t, "fails", p).set(link_error=s(t, "plain", 1)),
    "chain": lambda t, p: chain(s(t, "add", p), s(t, "plain", 1), s(t, "plain", 2)),
    "chain of chains": lambda t, p: chain(chain(s(t, "add", p), s(t, "plain", 1)), chain(s(t, "plain", 2))),
    "chain with a link": lambda t, p: chain(s(t, "add", p), s(t, "plain", 1)).set(link=s(t, "plain", 2)),
    "group": lambda t, p: group(s(t, "add", p), s(t, "plain", 1)),
    "chain then group": lambda t, p: chain(s(t, "add", p), group(s(t, "plain", 1), s(t, "plain", 2))),
    "group then task": lambda t, p: chain(group(s(t, "add", p), s(t, "add", p + "2")), t["total"].s(pid=p)),
    "chord": lambda t, p: chord([s(t, "add", p), s(t, "add", p + "2")], t["total"].s(pid=p)),
    "chord of chains": lambda t, p: chord(
        [chain(s(t, "plain", 1), s(t, "add", p)), s(t, "add", p + "2")], t["total"].s(pid=p)
    ),
    "chord then task": lambda t, p: chain(chord([s(t, "add", p)], t["total"].s(pid=p)), s(t, "plain", 1)),
    "chord to a chord": lambda t, p: chord(
        [s(t, "add", p)], chord([s(t, "plain", 1), s(t, "plain", 2)], s(t, "plain", 3))
    ),
    "three deep": lambda t, p: chain(
        s(t, "add", p),
        chord([chain(s(t, "plain", 1), group(s(t, "plain", 2), s(t, "plain", 3)))], s(t, "plain", 4)),
        s(t, "plain", 5).set(link=s(t, "plain", 6)),
    ),
    "map": lambda t, p: t["plain"].map([1, 2]),
    "chunks": lambda t, p: t["plain"].chunks([(1,), (2,), (3,)], 2).group(),
    "retry": lambda t, p: chain(s(t, "again", p), s(t, "plain", 1)),
    "autoretry": lambda t, p: chain(s(t, "auto", p), s(t, "plain", 1)),
}
#: Nothing follows, or (of a chord's part) only from the delivery that is the last to be counted.
SENT_ONCE = ("task", "group", "map", "chunks", "chord", "group then task", "chord to a chord")
REPLACED = ("task", "chain", "group", "chord", "chord of chains", "three deep", "group then task")


def run(wire: Wire, make: Callable[[Any, str], Any], copies: int) -> tuple[Any, ...]:
    make(wire.app.tasks, "p").apply_async()
    wire.flow(copies)
    assert all(map(is_inner_msg_id, wire.ids))
    assert len(set(wire.ids)) == len(wire.ids)
    return tuple(sorted(wire.tasks.items())), wire.runs["add"], wire.runs["total"], wire.runs["again"]


@pytest.mark.parametrize("kind", CANVAS)
def test_what_follows_lands_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message delivered three times: the same messages land as with one delivery, in every form of canvas."""
    outcomes = []
    for copies in (1, 3):
        wire = make_wire(monkeypatch)
        declare(wire)
        outcomes.append(run(wire, CANVAS[kind], copies))
    assert outcomes[0] == outcomes[1]
    if kind not in SENT_ONCE:
        assert wire.refused, "nothing was published again: the test proves nothing"


@pytest.mark.parametrize("kind", REPLACED)
def test_what_a_task_is_replaced_by_lands_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replacement made again by a second delivery has the same ids, in every part of it."""
    outcomes = []
    for copies in (1, 3):
        wire = make_wire(monkeypatch)
        declare(wire)
        outcomes.append(run(wire, lambda t, p: chain(t["swap"].si(p, kind), t["plain"].si(9)), copies))
    assert outcomes[0] == outcomes[1]


def test_without_derived_ids_messages_multiply(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with fresh ids each delivery of a chain's first task lands its second task again."""
    monkeypatch.setattr(stamping, "id_of", lambda *_: new_inner_msg_id())
    CANVAS["chain"](wire.app.tasks, "p").apply_async()
    wire.flow(3)
    assert wire.tasks["plain"] > 2


def test_calls_from_outside_are_always_other_messages(wire: Wire) -> None:
    """Each call from outside has a fresh id, also with a task id of the caller's, every night the same."""
    for _ in range(3):
        wire.app.tasks["plain"].apply_async((1,), task_id="nightly")
    assert len(set(wire.ids)) == 3
    assert all(one[14] == "7" for one in wire.ids)


def test_calls_from_inside_a_task_are_other_messages_too(wire: Wire) -> None:
    """What a task calls by itself is not known to be the same call again: each gets a fresh id, unless it is named."""

    @wire.app.task(shared=False, name="caller", scope="caller", biz_id="pid")
    def caller(pid: str) -> None:
        wire.app.tasks["plain"].delay(1)
        wire.app.tasks["add"].apply_async((pid,), once="add")
        raise ValueError(pid)

    caller.delay("p")
    for _ in range(3):
        wire.deliver(wire.sent[0])
    assert wire.tasks == {"caller": 1, "plain": 3, "add": 1}


def test_a_retry_has_an_id_of_its_own_and_inherits_none(wire: Wire) -> None:
    """A retry copies the headers of the message that it repeats: none of ours that are true of one message go along."""
    wire.app.tasks["again"].apply_async(("p",), headers={"mine": 1, INNER_MSG_ID: "x", "idempotent-bus-redrive": 3})
    first = wire.sent[0][1]["headers"]
    assert is_inner_msg_id(first[INNER_MSG_ID])
    assert "idempotent-bus-redrive" not in first
    first["idempotent-bus-redrive"], first["x-death"], first["x-delivery-count"] = 1, [{}], 2
    wire.deliver(wire.sent[0])
    second = wire.sent[1][1]["headers"]
    assert second["mine"] == 1
    assert second["retries"] == 1
    assert second[INNER_MSG_ID] not in (first[INNER_MSG_ID], "x")
    assert not {"idempotent-bus-redrive", "x-death", "x-delivery-count"} & second.keys()


def test_two_causes_have_other_follow_ups(wire: Wire) -> None:
    """The same signature sent twice: each chain goes on by itself, although a shared link has one task id."""
    link = wire.app.tasks["plain"].si(1)
    link.freeze()
    for pid in ("a", "b"):
        wire.app.tasks["add"].apply_async((pid,), link=link)
    wire.flow(2)
    assert wire.tasks == {"add": 2, "plain": 2}


def test_freezing_keeps_ids(wire: Wire) -> None:
    """A frozen signature, as it is in a message, has ids everywhere; those that were there stay."""
    tasks = wire.app.tasks
    for kind, make in CANVAS.items():
        signature = json.loads(json.dumps(make(tasks, "p")))
        before = json.dumps(signature)
        once = frozen(signature)
        assert json.dumps(signature) == before, kind
        assert frozen(once) == once, f"{kind}: a part had no id"


def test_a_chosen_id_is_for_one_message(wire: Wire) -> None:
    """`sent_as` names the next message only."""
    chosen = derived_inner_msg_id(b"beat", "entry")
    with sent_as(chosen):
        for _ in range(2):
            wire.app.tasks["plain"].delay(1)
    assert wire.ids[0] == chosen
    assert wire.ids[1] != chosen
    assert ids._chosen.get() is None


def test_protocol_1_is_stamped_too(wire: Wire) -> None:
    """With task_protocol = 1 the task id is in the body; its message gets an id all the same."""
    wire.app.conf.task_protocol = 1
    wire.app.amqp.task_protocol = 1
    wire.app.amqp.__dict__.pop("create_task_message", None)
    wire.app.tasks["plain"].delay(1)
    assert is_inner_msg_id(wire.ids[0])


def test_a_chord_whose_sender_died_goes_on(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """I1: the last part is killed after Celery's claim to send the chord's body: its copy waits for that, and sends it.

    Without the wait the copy would be done, and the chord stand still for ever.
    """
    backend = wire.app.backend
    extend = backend._chord_claim_extend_script
    monkeypatch.setattr(backend, "_chord_claim_extend_script", _die)
    CANVAS["chord"](wire.app.tasks, "p").apply_async()
    wire.deliver(wire.sent[0])
    with pytest.raises(SystemExit):
        wire.deliver(wire.sent[1])
    monkeypatch.setattr(backend, "_chord_claim_extend_script", extend)
    delay = wire.deliver(wire.sent[1])
    assert delay is not None
    assert delay > 0
    assert wire.tasks == {"add": 2}
    for key in backend.client.scan_iter("*.c"):
        backend.client.delete(key)  # its time is over
    assert wire.deliver(wire.sent[1]) is None
    assert wire.tasks == {"add": 2, "total": 1}


def _die(**_: Any) -> None:
    raise SystemExit
