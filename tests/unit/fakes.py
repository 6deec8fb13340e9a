"""Stand-ins for the unit tests: scripted steps, a settlement that remembers, and a bench that puts them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.executor import Executor
from idempotent_bus.hooks import ABANDON, CLAIM, CLAIMED, COMPLETE, DURABLE, QUARANTINE, RELEASE, RENEW
from idempotent_bus.identity import record_key
from idempotent_bus.lease import LeaseKeeper
from idempotent_bus.model import Completion, Hold, Reason, Record, Settled
from idempotent_bus.policy import Backoff, Policy
from idempotent_bus.store import Store
from idempotent_bus.stores.memory import MemoryStore
from idempotent_bus.testing import ManualClock
from idempotent_bus.work import Ending, Work

SCOPE = "cards.issue"
STORE_STEPS = (CLAIM, RENEW, COMPLETE, DURABLE, CLAIMED, RELEASE, ABANDON, QUARANTINE)

#: What a script does at a step, given the call that the step would make.
Action = Callable[[Callable[[], Any]], Any]


class Killed(BaseException):
    """The process is gone: no `except Exception` may see it."""


def trouble(name: str) -> Exception:
    """The error that this step's outside would give."""
    return StoreUnavailable("scripted") if name in STORE_STEPS else ConnectionError("scripted")


class Steps:
    """The named steps, remembered in order, with a script of what goes wrong at which of them."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self._script: dict[str, list[Action | None]] = {}

    def at(self, name: str, *actions: Action | None) -> None:
        """At the next steps of this name do these, one each; None: as usual. After the last: as usual."""
        self._script.setdefault(name, []).extend(actions)

    def error(self, name: str, times: int = 1) -> None:
        """The next steps of this name fail, and nothing was done."""

        def fail(call: Callable[[], Any]) -> Any:
            raise trouble(name)

        self.at(name, *[fail] * times)

    def reply_lost(self, name: str, times: int = 1) -> None:
        """The next steps of this name are done, but look as if they failed."""

        def lose(call: Callable[[], Any]) -> Any:
            call()
            raise trouble(name)

        self.at(name, *[lose] * times)

    def __call__(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.passed.append(name)
        actions = self._script.get(name)
        action = actions.pop(0) if actions else None
        if action is None:
            return function(*args, **kwargs)
        return action(lambda: function(*args, **kwargs))


@dataclass
class Delivery:
    """A settlement that remembers how it was answered. check: called before each answer. moves: to the dead letter."""

    answers: list[tuple[Any, ...]] = field(default_factory=list)
    check: Callable[[], None] = lambda: None
    moves: bool = True

    def ack(self) -> None:
        self._answer("ack")

    def wait(self, delay: float) -> None:
        self._answer("wait", delay)

    def dead_letter(self, reason: Reason, error: str, attempts: int) -> bool:
        self._answer("dead", reason, error, attempts)
        return self.moves

    def _answer(self, *answer: Any) -> None:
        self.check()
        assert not self.answers, f"answered twice: {self.answers} and {answer}"
        self.answers.append(answer)

    @property
    def answer(self) -> tuple[Any, ...]:
        assert len(self.answers) == 1, self.answers
        return self.answers[0]


class LateStream:
    """A stream that has done nothing until it is settled. says: what it tells; only with True it completes."""

    survives = True

    def __init__(self, store: Store, says: bool | None) -> None:
        self._store = store
        self._says = says
        self._begun: list[Completion] = []
        self._told = 0

    @property
    def pending(self) -> int:
        return len(self._begun)

    def begin(self, completion: Completion) -> int:
        self._begun.append(completion)
        return self._told + len(self._begun)

    def poll(self, timeout: float = 0.0) -> list[Settled]:
        return []

    def settle(self) -> list[Settled]:
        begun, self._begun = self._begun, []
        settled = []
        for completion in begun:
            self._told += 1
            says = self._says
            if says:
                says = self._store.complete(completion.hold, result=completion.result, retention=completion.retention)
            settled.append(Settled(self._told, says))
        return settled

    def close(self) -> None: ...


class SingleStore:
    """A store without batches: the four verbs of another, and nothing else."""

    def __init__(self, store: Store) -> None:
        self.claim, self.renew, self.complete, self.release = store.claim, store.renew, store.complete, store.release
        self.abandon = store.abandon
        self.close = store.close


class Bench:
    """An executor over the memory store, with a manual clock and scripted steps."""

    def __init__(self, **policy: Any) -> None:
        self.clock = ManualClock()
        self.memory = MemoryStore(self.clock)
        self.store: Any = self.memory
        self.steps = Steps()
        self.policy = Policy(**({"lease": 60.0, "max_attempts": 3, "backoff": Backoff(8.0, 300.0)} | policy))
        self.draw = 0.5

    def executor(self, **options: Any) -> Executor:
        self.keeper = LeaseKeeper(lambda: self.store, clock=self.clock, step=self.steps, threaded=False)
        return Executor(
            lambda: self.store,
            self.policy,
            keeper=self.keeper,
            clock=self.clock,
            wall=self.clock,
            sleep=self.clock.sleep,
            draw=lambda: self.draw,
            step=self.steps,
            **options,
        )

    def stream_late(self, says: bool | None = True) -> LateStream:
        """From now on the store's completions are done when they are settled, and not before."""
        late = LateStream(self.memory, says)
        self.memory.stream = lambda: late  # type: ignore[method-assign,assignment]  # for this bench only
        return late

    def work(self, run: Callable[[], Any] = lambda: None, biz_id: str = "b-1", **changes: Any) -> Work:
        values = {"settle": Delivery(), "key": record_key(SCOPE, biz_id), **changes}
        return Work(scope=SCOPE, biz_id=biz_id, run=run, **values)

    def record(self, biz_id: str = "b-1") -> Record | None:
        return self.memory.lookup(record_key(SCOPE, biz_id))

    def take(self, biz_id: str = "b-1", lease: float = 60.0, reserve: bool = False) -> Hold:
        """Claim as somebody else would."""
        from idempotent_bus.model import Claimed, ClaimRequest

        nonce = b"somebody else's."
        request = ClaimRequest(record_key(SCOPE, biz_id), nonce, lease, self.policy.retention, reserve=reserve)
        outcome = self.memory.claim(request)
        assert isinstance(outcome, Claimed)
        return Hold(request.key, outcome.token, nonce)


def answers(works: Sequence[Work]) -> list[str]:
    """The first word of each work's answers, joined: 'ack', 'wait', or '' for none."""
    return [" ".join(answer[0] for answer in work.settle.answers) for work in works]  # type: ignore[attr-defined]


def hows(endings: Sequence[Ending]) -> list[str]:
    return [ending.how.value for ending in endings]
