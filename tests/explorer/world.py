"""One run of the real code: a broker that redelivers, a store, workers that die and are started again, and a history.

The history is append-only: what was really done, whether or not anybody heard of it. When the run is quiet, it is
checked against the invariants; the checker knows how many effects a fault may excuse, and excuses no other.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from places import InDatabase, Place

from idempotent_bus.abandoned import AbandonedRecord
from idempotent_bus.errors import InDoubt, Permanent
from idempotent_bus.execution import current_execution
from idempotent_bus.executor import Executor
from idempotent_bus.hooks import CLAIM, CLAIMED, COMPLETE, DEAD_LETTER, DURABLE, HANDLER, WAIT
from idempotent_bus.identity import fingerprint, record_key
from idempotent_bus.inbox.running import Transactions
from idempotent_bus.lease import LeaseKeeper
from idempotent_bus.model import Claimed, ClaimRequest, Completed, Completion, Hold, Reason, State
from idempotent_bus.policy import Policy
from idempotent_bus.testing.broker import Delivery, MemoryBroker
from idempotent_bus.testing.driving import Driver
from idempotent_bus.testing.faults import Action, FaultyStep, Killed, Plan, Script, Watch
from idempotent_bus.testing.interleaving import Turns
from idempotent_bus.work import Ended, Ending, Work

LEASE = 60.0
MAX_ATTEMPTS = 3
VISIBILITY = 100.0


class Violation(BaseException):
    """An invariant does not hold. Not an Exception: raised in a handler, it must not pass for the handler's failure."""


@dataclass(frozen=True)
class Scenario:
    """What is published and how it is worked on.

    copies: one letter for each message, its biz-id; a capital is the same biz-id with another body. workers: how many
    take turns. window: how many messages a worker takes at once; 0: one, through `handle`. fails: how many runs of a
    biz-id raise, before any effect. forbidden: biz-ids that raise Permanent. slow: biz-ids whose handler takes most of
    a lease, and is renewed meanwhile. stale: biz-ids older than the retention. redrive: the dead letters are moved back
    once. streaming: completions are not waited for one by one. policy: changes to the policy, whose values are the
    defaults but for three attempts instead of eight.
    """

    copies: str
    window: int = 0
    workers: int = 1
    manual: bool = False
    fails: Mapping[str, int] = field(default_factory=dict)
    doubts: Mapping[str, int] = field(default_factory=dict)
    forbidden: str = ""
    slow: str = ""
    stale: str = ""
    redrive: bool = False
    streaming: bool = False
    on_abandoned: str = "rerun"
    policy: Mapping[str, Any] = field(default_factory=dict)

    @property
    def biz_ids(self) -> set[str]:
        return set(self.copies.lower())


@dataclass(frozen=True)
class Variant:
    """The code under test, or one with a protection taken out, of which only the damage in the end is looked at.

    executor, transactions: what runs the work. store: changes what the workers have of the store. outside: the effect
    is not in the inbox's transaction.
    """

    executor: type[Executor] = Executor
    transactions: type[Transactions] = Transactions
    store: Callable[[Any], Any] = lambda store: store
    outside: bool = False


AS_IT_IS = Variant()


@dataclass(slots=True)
class Run:
    """One execution of a handler: its token, its worker, and how far it came."""

    biz_id: str
    token: int
    worker: int
    effect: bool = False
    completed: bool = False
    over: bool = False
    excuse: str = ""


@cache
def _keeping_time() -> Policy:
    return Policy(max_attempts=MAX_ATTEMPTS)


class World(Watch):
    """One run of one scenario. `play` runs it and raises AssertionError for what it finds; then look at `history`."""

    _numbers = itertools.count(1)
    _turns: ClassVar[dict[int, Turns]] = {}

    def __init__(self, scenario: Scenario, plan: Plan, place: Place, variant: Variant = AS_IT_IS) -> None:
        self.scenario = scenario
        self.variant = variant
        self.is_real = variant is AS_IT_IS
        self.place = place
        place.begin()
        self.scope = f"s{next(self._numbers)}"
        self.keys = {biz_id: record_key(self.scope, biz_id) for biz_id in scenario.biz_ids}
        self.names = {key: biz_id for biz_id, key in self.keys.items()}
        #: Completions that are under way: by worker and ticket.
        self.begun: dict[tuple[int, Any], Hold] = {}
        self.left_under_way: list[tuple[int, Hold]] = []
        self.broker = MemoryBroker(self._now, on_answer=self._answered)
        self.script = Script(plan, error=place.error, watch=self)
        self.history: list[tuple[Any, ...]] = []
        self.runs: list[Run] = []
        self.tries: Counter[str] = Counter()
        self.tokens: dict[str, int] = {}
        self.nonces: dict[tuple[str, int], bytes] = {}
        self.completions: dict[str, int] = {}
        self.fence: dict[str, int] = {}
        self.last_fault = 0.0
        self.steps: list[FaultyStep] = [self.script.worker(number) for number in range(scenario.workers)]
        self.executors: list[Any] = [self._start(number) for number in range(scenario.workers)]
        self.turns: Turns | None = None
        self.stalled: set[int] = set()

    def _now(self) -> float:
        return self.place.clock()

    # --- the workers ------------------------------------------------------------------------------------

    def _start(self, number: int) -> Any:
        """A worker with nothing in its head."""
        scenario, place = self.scenario, self.place
        step = self.steps[number] = self.script.worker(number)
        if place.transactional:
            assert isinstance(place, InDatabase)
            policy = Policy(max_attempts=MAX_ATTEMPTS, **scenario.policy) if scenario.policy else _keeping_time()
            return self.variant.transactions(
                place.inbox,
                policy,
                wall=self._now,
                sleep=lambda seconds: None,
                draw=lambda: 0.5,
                step=step,
            )
        on_abandoned: Any = self._probe if scenario.on_abandoned == "probe" else scenario.on_abandoned
        if scenario.policy or on_abandoned != "rerun":
            policy = Policy(**{"max_attempts": MAX_ATTEMPTS, "on_abandoned": on_abandoned, **scenario.policy})
        else:
            policy = _keeping_time()
        store = self.variant.store(place.store)
        keeper = LeaseKeeper(lambda: store, clock=self._now, step=step, threaded=False)
        return self.variant.executor(
            lambda: store,
            policy,
            keeper=keeper,
            manual=scenario.manual,
            streaming=scenario.streaming,
            clock=self._now,
            wall=self._now,
            sleep=self._pass,
            draw=lambda: 0.5,
            step=step,
        )

    def _pass(self, seconds: float) -> None:
        self.place.advance(seconds, list(self.keys.values()))

    def _work(self, delivery: Delivery, number: int) -> Work:
        message = delivery.message
        body = message.body
        biz_id = body["id"]
        return Work(
            scope=self.scope,
            biz_id=biz_id,
            key=self.keys[biz_id],
            run=lambda *handed: self._handle(biz_id, number, *handed),
            settle=delivery,
            fingerprint=fingerprint(body),
            inner_msg_id=message.inner_msg_id,
            redelivered=message.redelivered,
            redrive=message.redrive,
            published_at=message.published_at,
        )

    def _handle(self, biz_id: str, number: int, *handed: Any) -> str:
        scenario = self.scenario
        self.tries[biz_id] += 1
        execution = current_execution()
        most = (MAX_ATTEMPTS + scenario.copies.lower().count(biz_id)) * (1 + scenario.redrive)
        if self.place.transactional:
            most *= 4  # a transaction whose COMMIT is in doubt is repeated, which is one attempt
        if self.tries[biz_id] > most or execution.attempt > MAX_ATTEMPTS + 1:
            raise Violation(f"I12: run {self.tries[biz_id]} of {biz_id}, attempt {execution.attempt}")
        if biz_id in scenario.stale:
            raise Violation(f"I11: {biz_id} is older than the retention and runs")
        token = 0 if self.place.transactional else execution.token
        run = Run(biz_id, token, number)
        self.runs.append(run)
        self.history.append(("attempt", biz_id, number, token))
        if biz_id in scenario.slow:
            for _ in range(3):
                self._pass(LEASE * 0.4)
                self.executors[number]._keeper.tick()
        if biz_id in scenario.forbidden:
            raise Permanent("never")
        if self.tries[biz_id] <= scenario.fails.get(biz_id, 0):
            raise ValueError("fails")
        if isinstance(self.place, InDatabase) and not self.variant.outside:
            self.place.apply(handed[0], self.scope, biz_id)
        elif token >= self.fence.get(biz_id, 0):  # the resource compares tokens
            self.fence[biz_id] = token
            run.effect = True
        self.history.append(("effect", biz_id, number, token, run.effect))
        if self.tries[biz_id] <= scenario.doubts.get(biz_id, 0):
            run.excuse = "in doubt"
            raise InDoubt("timed out")
        if scenario.manual:
            execution.complete("done")  # type: ignore[attr-defined]
        return "done"

    def _probe(self, record: AbandonedRecord) -> bool:
        return any(run.effect for run in self.runs if run.biz_id == record.biz_id)

    def _settle(self, number: int, deliveries: Sequence[Delivery]) -> None:
        """One batch through one worker."""
        works = [self._work(delivery, number) for delivery in deliveries]
        executor = self.executors[number]
        try:
            endings = executor.handle_window(works) if self.scenario.window else [executor.handle(works[0])]
        except Killed:
            self.broker.close_channel(number)
            self.executors[number] = self._start(number)
            return
        except ConnectionError:
            self.broker.close_channel(number)
            return
        for work, ending in zip(works, endings, strict=True):
            self._check_ending(work, ending)
        # A settlement whose last half was lost leaves the delivery with a connection that is gone.
        if any(delivery.consumer == number for delivery in self.broker.unacked):
            raise Violation("I13: a delivery was neither answered nor given back")

    # --- what the steps did -------------------------------------------------------------------------------

    def done(self, worker: int, step: str, arguments: Sequence[Any], result: Any) -> None:
        if step == CLAIM and not self.place.transactional:
            if isinstance(arguments[0], ClaimRequest):
                self._claimed(arguments[0], result)
            else:
                for request, outcome in zip(arguments[0], result, strict=True):
                    self._claimed(request, outcome)
        elif step == CLAIMED:
            last = self.tokens.get(self.names[arguments[0].key], 0)
            if not (isinstance(result, Claimed) and result.token < last):
                # Else it was claimed with the completion before, is looked at late, and somebody has taken over.
                self._claimed(arguments[0], result)
        elif step == COMPLETE and isinstance(arguments[0], Completion):
            self.begun[worker, result] = arguments[0].hold  # it is under way: whether it is done, DURABLE tells
        elif step == COMPLETE and result:
            self._completed(arguments[0], worker)
        elif step == DURABLE:
            for one in result:
                hold = self.begun.pop((worker, one.ticket), None)
                if hold is not None and one.durable:
                    self._completed(hold, worker)
        self.broker.lose_acks = False

    def _completed(self, hold: Hold, worker: int) -> None:
        biz_id = self.names[hold.key]
        self.history.append(("completion", biz_id, worker, hold.token))
        first = self.completions.setdefault(biz_id, hold.token)
        if self.is_real and (first != hold.token or self.tokens[biz_id] != hold.token):
            raise Violation(f"I6: token {hold.token} completed {biz_id}, which token {self.tokens[biz_id]} held")
        for run in self.runs:
            if run.biz_id == biz_id and run.token == hold.token:
                run.completed = True

    def _claimed(self, request: ClaimRequest, outcome: Any) -> None:
        if isinstance(outcome, Completed):
            # One that was under way, its worker dead or not yet told: by this the store tells that it arrived.
            under_way = [(worker, hold) for (worker, _), hold in self.begun.items()]
            for worker, hold in self.left_under_way + under_way:
                if hold.key == request.key and self.names[hold.key] not in self.completions:
                    self._completed(hold, worker)
        if not isinstance(outcome, Claimed):
            return
        biz_id = self.names[request.key]
        if biz_id in self.completions and self.is_real:
            raise Violation(f"I6: {biz_id} was claimed after it was completed")
        self.history.append(("claim", biz_id, outcome.token, outcome.attempt))
        last = self.tokens.get(biz_id, 0)
        holder = self.nonces.setdefault((biz_id, outcome.token), request.nonce)
        if self.is_real and (holder != request.nonce or outcome.token < last):
            raise Violation(f"I6: token {outcome.token} of {biz_id} was given after {last}")
        self.tokens[biz_id] = outcome.token

    def crashed(self, worker: int) -> None:
        self.history.append(("crash", worker))
        mine = [ticket for ticket in self.begun if ticket[0] == worker]  # the next one's begin with 1 again
        self.left_under_way += [(worker, self.begun.pop(ticket)) for ticket in mine]
        self._excuse(worker, "killed")

    def losing(self, worker: int, step: str) -> None:
        # A move whose reply is lost is one whose second half, the ack, did not happen.
        self.broker.lose_acks = step in (WAIT, DEAD_LETTER)

    def raised(self, worker: int, step: str) -> None:
        self.history.append(("reply lost", worker, step))
        if step == HANDLER:  # the handler raised after its effect: its own doing
            self._excuse(worker, "the handler raised after its effect")

    def _excuse(self, worker: int, why: str) -> None:
        self.last_fault = self._now()
        for run in self.runs:
            if run.worker == worker and not run.over:
                run.over = True
                if run.effect and not run.completed:
                    superseded = run.token < self.tokens.get(run.biz_id, 0)
                    run.excuse = "stalled" if superseded and self._has_stalled(run.worker) else why

    def hand_over(self, worker: int, action: Action) -> None:
        self.history.append((action.value, worker))
        if action is Action.STALL:
            self.last_fault = self._now()
        if self.turns is not None:
            self.turns.pause(worker, action)
        elif action is Action.STALL:  # alone: it stands still for so long that its lease is over
            self._pass(2 * LEASE)

    # --- what the broker was told ---------------------------------------------------------------------------

    def _answered(self, delivery: Delivery, answer: str) -> None:
        biz_id = delivery.message.body["id"]
        self.history.append((answer, biz_id, delivery.consumer))
        if answer == "ack" and self.is_real and not self._is_completed(biz_id):
            raise Violation(f"I4: {biz_id} is acked before it is completed")
        assert isinstance(delivery.consumer, int)
        for run in self.runs:
            if run.biz_id == biz_id and run.worker == delivery.consumer:
                run.over = True

    def _is_completed(self, biz_id: str) -> bool:
        if isinstance(self.place, InDatabase):
            return self.place.is_completed(self.keys[biz_id])
        return biz_id in self.completions

    def _check_ending(self, work: Work, ending: Ending) -> None:
        if ending.how is Ended.REPLAYED and self.scenario.on_abandoned == "rerun" and ending.value != "done":
            raise Violation(f"I8: a duplicate of {work.biz_id} got {ending.value!r}")

    # --- one run --------------------------------------------------------------------------------------------

    def play(self) -> World:
        """Publish, work until all is quiet, check. Raises AssertionError for what does not hold."""
        scenario = self.scenario
        try:
            for letter in scenario.copies:
                body = {"id": letter.lower(), "amount": 2 if letter.isupper() else 1}
                self.broker.publish(body)
                if letter in scenario.stale:
                    self.broker.queue[-1].published_at -= 10 * 86_400
            self._drain()
            if scenario.on_abandoned == "quarantine":
                self._resolve()
            if scenario.redrive or scenario.on_abandoned == "quarantine":
                self.broker.redrive()
                self._drain()
                if scenario.on_abandoned == "quarantine" and self._resolve():
                    self.broker.redrive()
                    self._drain()
            self.check()
        except Violation as found:
            raise AssertionError(str(found)) from found
        finally:
            if self.turns is not None:
                self.turns.abandon()
        return self

    def _resolve(self) -> int:
        """A person looks whether the effect is there, and says so."""
        resolved = 0
        for biz_id, key in self.keys.items():
            record = self.place.store.lookup(key)
            if record is not None and record.state is State.QUARANTINED:
                done = any(run.effect for run in self.runs if run.biz_id == biz_id)
                resolved += self.place.store.resolve(key, completed=done, retention=86_400.0)
                if done:
                    self.completions.setdefault(biz_id, record.token)
        return resolved

    def _drain(self) -> None:
        workers = self.scenario.workers
        if workers > 1:
            if workers not in self._turns:
                self._turns[workers] = Turns(workers)
            self.turns = self._turns[workers]
        most = max(self.scenario.window, 1)
        driver = Driver(self.broker, self._settle, self._pass, turns=self.turns, most=most, visibility=VISIBILITY)
        driver.drain()

    # --- what must hold in the end --------------------------------------------------------------------------

    def effects(self) -> Counter[str]:
        if isinstance(self.place, InDatabase) and not self.variant.outside:
            return Counter(self.place.applied(self.scope))
        return Counter(run.biz_id for run in self.runs if run.effect)

    def excuses(self, biz_id: str) -> int:
        """How many executions were cut off between their effect and their completion."""
        return sum(1 for run in self.runs if run.biz_id == biz_id and run.excuse and not run.completed)

    def check(self) -> None:
        scenario, faults = self.scenario, len(self.script.applied)
        effects = self.effects()
        dead = Counter(letter.message.body["id"] for letter in self.broker.dead)
        conflicts = Counter(
            letter.message.body["id"] for letter in self.broker.dead if letter.reason is Reason.CONFLICT
        )
        if self.broker.unacked or self.broker.queue:
            raise Violation("I13: messages are left")
        self._excuse_superseded()
        for biz_id in sorted(scenario.biz_ids):
            completed = self._is_completed(biz_id)
            if not completed and not dead[biz_id]:
                raise Violation(f"I1: {biz_id} is lost")
            if completed and not effects[biz_id]:
                raise Violation(f"I1: {biz_id} is completed without an effect")
            excused = 0 if self.place.transactional else self.excuses(biz_id)
            if scenario.on_abandoned != "rerun":
                # A person or a probe looks before anything runs again; what raised after its effect is not looked at.
                excused = sum(
                    1
                    for run in self.runs
                    if run.biz_id == biz_id
                    and not run.completed
                    and run.excuse
                    and run.excuse not in ("killed", "in doubt")
                )
            if effects[biz_id] > 1 + excused:
                raise Violation(f"I2: {effects[biz_id]} effects of {biz_id}, {excused} excused")
            fails, doubts = scenario.fails.get(biz_id, 0), scenario.doubts.get(biz_id, 0)
            hopeless = biz_id in scenario.forbidden or biz_id in scenario.stale
            expected = int(fails < MAX_ATTEMPTS or scenario.redrive)
            if scenario.on_abandoned == "rerun":
                expected += doubts
            if not faults and not hopeless and effects[biz_id] != expected:
                raise Violation(f"I2: {effects[biz_id]} effects of {biz_id} without any fault")
            given_up = dead[biz_id] - conflicts[biz_id]
            if (
                given_up
                and not hopeless
                and fails + doubts + faults < MAX_ATTEMPTS
                and scenario.on_abandoned == "rerun"
            ):
                raise Violation(f"I12: {biz_id} was given up after {fails} failures and {faults} faults")
            two_bodies = any(letter.isupper() and letter.lower() == biz_id for letter in scenario.copies)
            if two_bodies and completed and not conflicts[biz_id]:
                raise Violation(f"I8: two bodies of {biz_id}, and no conflict")

    def _excuse_superseded(self) -> None:
        """An execution whose lease lapsed while it stood still, and that somebody took over from, is told so."""
        for run in self.runs:
            if run.effect and not run.completed and not run.excuse and self._has_stalled(run.worker):
                run.excuse = "stalled"

    def _has_stalled(self, worker: int) -> bool:
        return any(entry[:2] == ("stall", worker) for entry in self.history)
