"""A store that does as it is told: around any other one, it fails, loses replies, or is down altogether."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, Final

from ..errors import StoreUnavailable
from ..model import ClaimOutcome, ClaimRequest, Hold
from ..store import CompletionStream, Store
from ..stores.memory import MemoryStore
from ..stores.streams import DirectStream

__all__ = ["FaultyStore"]

_VERBS: Final = frozenset(
    {
        "abandon",
        "claim",
        "claim_many",
        "complete",
        "lookup",
        "purge",
        "quarantine",
        "quarantined",
        "release",
        "renew",
        "renew_many",
        "resolve",
    }
)


class FaultyStore:
    """Has the verbs of the store it is around, a memory store unless given. Give it wherever a Store is taken.

    down: every verb raises StoreUnavailable, and does nothing. calls: the verbs that were called, in order.
    """

    def __init__(self, store: Store | None = None) -> None:
        self.store: Store = MemoryStore() if store is None else store
        self.down = False
        self.calls: list[str] = []
        self._script: defaultdict[str, deque[str]] = defaultdict(deque)

    def fail(self, verb: str, times: int = 1) -> None:
        """The next calls of this verb raise StoreUnavailable, and do nothing."""
        self._put(verb, "fail", times)

    def lose_reply(self, verb: str, times: int = 1) -> None:
        """The next calls of this verb are done, and raise StoreUnavailable all the same."""
        self._put(verb, "lose", times)

    def _put(self, verb: str, what: str, times: int) -> None:
        if verb not in _VERBS:
            raise ValueError(f"a store has no verb {verb!r}")
        self._script[verb].extend([what] * times)

    def claim(self, request: ClaimRequest, /) -> ClaimOutcome:
        """As `Store.claim`, unless told otherwise."""
        outcome: ClaimOutcome = self._around("claim", self.store.claim)(request)
        return outcome

    def renew(self, hold: Hold, /, *, lease: float, retention: float) -> bool:
        """As `Store.renew`, unless told otherwise."""
        return bool(self._around("renew", self.store.renew)(hold, lease=lease, retention=retention))

    def complete(self, hold: Hold, /, *, result: bytes | None, retention: float) -> bool:
        """As `Store.complete`, unless told otherwise."""
        return bool(self._around("complete", self.store.complete)(hold, result=result, retention=retention))

    def release(self, hold: Hold, /, *, attempts: int, retention: float) -> bool:
        """As `Store.release`, unless told otherwise."""
        return bool(self._around("release", self.store.release)(hold, attempts=attempts, retention=retention))

    def abandon(self, hold: Hold, /, *, attempts: int, retention: float) -> bool:
        """As `Store.abandon`, unless told otherwise."""
        return bool(self._around("abandon", self.store.abandon)(hold, attempts=attempts, retention=retention))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.store, name)  # AttributeError where it lacks a capability, as it should be
        return self._around(name, value) if name in _VERBS else value

    def _around(self, verb: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(verb)
            todo = self._script[verb].popleft() if self._script[verb] else ""
            if self.down or todo == "fail":
                raise StoreUnavailable(f"injected: {verb} got no answer, and was not done")
            result = function(*args, **kwargs)
            if todo == "lose":
                raise StoreUnavailable(f"injected: {verb} was done, and its reply was lost")
            return result

        return call

    def stream(self) -> CompletionStream:
        """A stream whose completions are calls of `complete`, so that what is told of these is true of it."""
        return DirectStream(self)

    def close(self) -> None:
        """Close the store that it is around."""
        self.store.close()
