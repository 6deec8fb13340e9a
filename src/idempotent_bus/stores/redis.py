"""The Redis store: every verb one Lua script, every record one short string that expires by itself.

**Keys.** A record lies under `{prefix}{<slot>}:<key>`, where the slot is the first byte of the key in two hex digits,
in braces: Redis Cluster hashes only what stands in braces. Beside the records of a slot lies its token counter,
`{prefix}{<slot>}:token`, so a claim touches one cluster slot only and the 256 slots spread over the nodes. A
counter never expires: that is what makes tokens grow past the end of a record. One counter per record would never
vanish, and one for all records would have to be in the same slot as all of them. A token is the larger of counter + 1
and the server's time in microseconds (a 16-digit number: fence with a BIGINT column), so that tokens also grow past a
counter that was lost. They repeat only if the counter is lost *and* the clock has gone back. A quarantined record does
not expire, and its key is in its slot's index as well, the sorted set `{prefix}{<slot>}:quarantine`: listing them reads
256 indexes, one script (in Cluster one per slot), and never scans the keys. An index that is empty is not there.

**What it costs.** A completed record without a result takes 136 bytes (`MEMORY USAGE`; Redis 7.0, default prefix),
plus its result, plus the entry in the table of expiries; all counters together take 18 KiB at most. A quarantined one
takes its note and about 40 bytes for the index more.

**What to know about the server.** A record is as durable as the server makes it. `appendonly yes` with `appendfsync
everysec` survives the death of the process; the loss of the machine can cost the last second. Asynchronous
replication can lose what a failover did not carry over: a completion that is lost lets a duplicate run again. A
`maxmemory-policy` that evicts drops records silently and is refused at the first use. A server that is full refuses
new claims, while what already runs can still be renewed, completed, released, abandoned and quarantined, and a person
can resolve. Leases and retention go by the server's clock: set it by slewing, not by leaps.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, Final

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.cluster import RedisCluster
from redis.exceptions import (
    NoScriptError,
    OutOfMemoryError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from ..errors import ConfigurationError, StoreUnavailable
from ..model import (
    FINGERPRINT_BYTES,
    NONCE_BYTES,
    Busy,
    Claimed,
    ClaimOutcome,
    ClaimRequest,
    Completed,
    Conflict,
    Hold,
    Quarantined,
    Record,
    State,
)

__all__ = ["RedisStore", "open_redis"]

DEFAULT_PREFIX: Final = "idempotent-bus:"

# A stalled server must not hang a consumer: two resends, so some six seconds at worst, then StoreUnavailable.
_TIMEOUT = 2.0
_RESENDS = 2

# RedisClusterException is not a RedisError in redis-py.
_DRIVER_ERRORS = (RedisError, RedisClusterException, OSError)

_HEADER = struct.Struct(">BQ16s8sII")  # as record.lua says
_REQUEST = struct.Struct(">16s8sIQQB")  # as claim.lua says
_CLAIMED = struct.Struct(">QI")
_HAS_FINGERPRINT, _HAS_RESULT = 8, 16
_MAX_COUNT = 2**32 - 1
# Longer durations are cut to 30 years: now + lease + retention must stay exact in Lua's doubles.
_MAX_SECONDS = 30 * 365 * 86400.0
# Quarantined records that one script looks at.
_PAGE = 1000


class Script:
    """A Lua script and the digest that EVALSHA knows it by."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


@cache
def _script(name: str) -> Script:
    """The script of a verb: the helpers over records, then the verb's own file."""
    folder = resources.files(__package__) / "lua"
    return Script("".join((folder / f"{part}.lua").read_text("utf-8") for part in ("record", name)))


def open_redis(
    url: str, *, prefix: str = DEFAULT_PREFIX, allow_eviction: bool = False, **connection: Any
) -> RedisStore:
    """A store on the server that `url` names, `redis://[user:password@]host:port/db` or `rediss://...`.

    prefix, allow_eviction: see `RedisStore`. connection: anything that `redis.Redis.from_url` takes (`ssl_ca_certs`,
    `health_check_interval`, `max_connections`, ...), which the URL's own query wins over. Unless told otherwise a
    server has 2 seconds to accept, 2 to answer, and is asked at most three times: every verb may be repeated.
    """
    settings: dict[str, Any] = {
        "socket_timeout": _TIMEOUT,
        "socket_connect_timeout": _TIMEOUT,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.05), _RESENDS),
        **connection,
    }
    return RedisStore(Redis.from_url(url, **settings), prefix=prefix, allow_eviction=allow_eviction)


class RedisStore:
    """A dedup store over a client of redis-py; safe for threads, and for a fork, as the client is.

    client: a `redis.Redis`, also one that a Sentinel gave, or a `redis.cluster.RedisCluster`; `decode_responses` must
    be off. Its connections, retries and timeouts are its own affair: give it a `socket_timeout`. The store closes it.
    prefix: a namespace; stores with different prefixes share nothing. allow_eviction: use a server although its
    `maxmemory-policy` may drop records, and with them the promise that nothing is done twice.

    Raises ConfigurationError for a client or prefix that cannot work, and at the first use for a server that evicts.
    """

    def __init__(
        self, client: Redis | RedisCluster, *, prefix: str = DEFAULT_PREFIX, allow_eviction: bool = False
    ) -> None:
        if "{" in prefix or "}" in prefix:
            raise ConfigurationError("the prefix must be without braces: they choose the slot in Redis Cluster")
        if client.get_encoder().decode_responses:
            raise ConfigurationError("the store needs bytes: use a Redis client without decode_responses")
        self._client: Any = client  # Any: redis-py types its replies for the sync and the async client at once
        self._clustered = isinstance(client, RedisCluster)
        self._prefix = prefix.encode()
        self._checked = allow_eviction

    # --- the verbs ------------------------------------------------------------------------------------

    def claim(self, request: ClaimRequest, /) -> ClaimOutcome:
        return self._claim([request])[0]

    def claim_many(self, requests: Sequence[ClaimRequest], /) -> list[ClaimOutcome]:
        outcomes: dict[int, ClaimOutcome] = {}
        for numbers in self._together([request.key for request in requests]):
            outcomes.update(zip(numbers, self._claim([requests[number] for number in numbers]), strict=True))
        return [outcomes[number] for number in range(len(requests))]

    def _claim(self, requests: Sequence[ClaimRequest]) -> list[ClaimOutcome]:
        keys: list[bytes] = []
        values: list[bytes] = []
        for request in requests:
            mark = request.fingerprint
            if len(request.nonce) != NONCE_BYTES or (mark is not None and len(mark) != FINGERPRINT_BYTES):
                raise ValueError(f"a nonce has {NONCE_BYTES} bytes, a fingerprint {FINGERPRINT_BYTES}")
            slot = self._slot(request.key)
            keys += (slot + request.key, slot + b"token")
            values.append(
                _REQUEST.pack(
                    request.nonce,
                    mark or b"",
                    _count(request.redrive),
                    _microseconds(request.lease),
                    _milliseconds(request.lease + request.retention),
                    request.reserve + (mark is not None) * _HAS_FINGERPRINT,
                )
            )
        return [_outcome(reply) for reply in self._run("claim", keys, values)]

    def renew(self, hold: Hold, /, *, lease: float, retention: float) -> bool:
        return self._renew([hold], lease, retention)[0]

    def renew_many(self, holds: Sequence[Hold], /, *, lease: float, retention: float) -> list[bool]:
        answers: dict[int, bool] = {}
        for numbers in self._together([hold.key for hold in holds]):
            renewed = self._renew([holds[number] for number in numbers], lease, retention)
            answers.update(zip(numbers, renewed, strict=True))
        return [answers[number] for number in range(len(holds))]

    def _renew(self, holds: Sequence[Hold], lease: float, retention: float) -> list[bool]:
        values = [_microseconds(lease), _milliseconds(lease + retention), *map(_owner, holds)]
        return [digit == ord("1") for digit in self._run("renew", [self._key(hold.key) for hold in holds], values)]

    def complete(self, hold: Hold, /, *, result: bytes | None, retention: float) -> bool:
        values = [_owner(hold), _milliseconds(retention), *(() if result is None else (result,))]
        return bool(self._run("complete", [self._key(hold.key)], values) == 1)

    def release(self, hold: Hold, /, *, attempts: int, retention: float) -> bool:
        values = [_owner(hold), _milliseconds(retention), _count(attempts)]
        return bool(self._run("release", [self._key(hold.key)], values) == 1)

    def abandon(self, hold: Hold, /, *, attempts: int, retention: float) -> bool:
        values = [_owner(hold), _milliseconds(retention), _count(attempts)]
        return bool(self._run("abandon", [self._key(hold.key)], values) == 1)

    def quarantine(self, hold: Hold, /, *, note: bytes) -> bool:
        keys = [self._key(hold.key), self._index(hold.key[0])]
        return bool(self._run("quarantine", keys, [_owner(hold), hold.key, note]) == 1)

    def quarantined(self, *, limit: int = 100, after: bytes = b"") -> list[Record]:
        """As `QuarantineStore.quarantined`; entries of an index without a quarantined record are taken out of it."""
        found: list[Record] = []
        while len(found) < limit:
            keys = self._indexed(min(limit - len(found), _PAGE), after)
            if not keys:
                break
            found += self._still_quarantined(keys)
            after = keys[-1]
        return found

    def _indexed(self, limit: int, after: bytes) -> list[bytes]:
        """The next keys in the indexes: the order of the slots, and of the keys within each, is that of the keys."""
        slots = list(range(after[0] if after else 0, 256))
        keys: list[bytes] = []
        for some in [[slot] for slot in slots] if self._clustered else [slots]:
            if len(keys) < limit:
                keys += self._run("indexed", [self._index(slot) for slot in some], [b"(" + after, limit - len(keys)])
        return keys

    def _still_quarantined(self, keys: list[bytes]) -> list[Record]:
        shown: dict[int, bytes | None] = {}
        for numbers in self._together(keys):
            some = [keys[number] for number in numbers]
            places = [place for key in some for place in (self._key(key), self._index(key[0]))]
            shown.update(zip(numbers, self._run("quarantined", places, some), strict=True))
        return [_record(key, text, -1, 0) for number, key in enumerate(keys) if (text := shown[number]) is not None]

    def resolve(self, key: bytes, /, *, completed: bool, retention: float) -> bool:
        """As `QuarantineStore.resolve`. Sent again by the driver after a lost reply, it knows its own work."""
        values = [key, int(completed), _milliseconds(retention), os.urandom(NONCE_BYTES)]
        return bool(self._run("resolve", [self._key(key), self._index(key[0])], values) == 1)

    def forget(self, key: bytes, /) -> bool:
        return bool(self._run("forget", [self._key(key)], []) == 1)

    def lookup(self, key: bytes, /) -> Record | None:
        reply = self._run("lookup", [self._key(key)], [])
        return None if reply is None else _record(key, *reply)

    def close(self) -> None:
        self._client.close()

    # --- keys and round trips ---------------------------------------------------------------------------

    def _slot(self, key: bytes) -> bytes:
        return b"%s{%02x}:" % (self._prefix, key[0])

    def _key(self, key: bytes) -> bytes:
        return self._slot(key) + key

    def _index(self, slot: int) -> bytes:
        return self._slot(bytes([slot])) + b"quarantine"

    def _together(self, keys: Sequence[bytes]) -> list[list[int]]:
        """The entries of a batch by the scripts that may do them: all in one, or in Cluster one per slot."""
        if not self._clustered:
            return [list(range(len(keys)))] if keys else []
        slots: dict[int, list[int]] = defaultdict(list)
        for number, key in enumerate(keys):
            slots[key[0]].append(number)
        return list(slots.values())

    def _run(self, verb: str, keys: list[bytes], values: Sequence[Any]) -> Any:
        """Run a verb's script. Whatever the driver raises, the outcome is unknown."""
        script = self._scripts(verb)
        try:
            if not self._checked:
                self._refuse_eviction()
            try:
                return self._evaluate(script, keys, values)
            except OutOfMemoryError:
                if verb == "claim":
                    raise
                # Full: nothing new may begin, but what runs must be able to end. Known to Redis from 7.0.
                return self._evaluate(Script("#!lua flags=allow-oom\n" + script.text), keys, values)
        except _DRIVER_ERRORS as error:
            raise StoreUnavailable(
                f"the Redis store could not {verb}: {type(error).__name__}; nothing is known of the outcome, "
                "so ask again with the same arguments"
            ) from error

    def _scripts(self, verb: str) -> Script:
        return _script(verb)

    def _evaluate(self, script: Script, keys: list[bytes], values: Sequence[Any]) -> Any:
        try:
            return self._client.evalsha(script.sha, len(keys), *keys, *values)
        except NoScriptError:  # a new server, or SCRIPT FLUSH: sending the text makes it known again
            return self._client.eval(script.text, len(keys), *keys, *values)

    def _refuse_eviction(self) -> None:
        """Ask once whether the server would drop records. INFO, because CONFIG is forbidden on many a managed one."""
        where = {"target_nodes": RedisCluster.PRIMARIES} if self._clustered else {}
        try:
            answer: dict[str, Any] = self._client.info("memory", **where)
        except ResponseError:  # not allowed to this user, or unknown to a stand-in
            answer = {}
        # A cluster of several nodes answers by node.
        answers = [node for node in answer.values() if isinstance(node, dict)] or [answer]
        for policy in {node.get("maxmemory_policy", "noeviction") for node in answers}:
            if policy != "noeviction":
                raise ConfigurationError(
                    f"the Redis server evicts (maxmemory-policy {policy}): it would drop dedup records silently and "
                    "duplicates would run; set maxmemory-policy noeviction, or take the risk with allow_eviction=True"
                )
        self._checked = True


def _microseconds(seconds: float) -> int:
    return max(0, math.ceil(min(seconds, _MAX_SECONDS) * 1_000_000))


def _milliseconds(seconds: float) -> int:
    """For an expiry: at least one, since Redis refuses 0; rounded up, so that it never ends before its lease."""
    return max(1, math.ceil(min(seconds, 2 * _MAX_SECONDS) * 1_000))


def _count(number: int) -> int:
    return min(max(number, 0), _MAX_COUNT)


def _owner(hold: Hold) -> bytes:
    # Concatenated, not packed: a nonce of another length must never be padded or cut into somebody's hold.
    return hold.token.to_bytes(8, "big") + hold.nonce if 0 <= hold.token < 2**64 else b"nobody's"


def _outcome(reply: bytes) -> ClaimOutcome:
    kind = reply[:1]
    if kind in (b"C", b"T"):
        token, attempt = _CLAIMED.unpack_from(reply, 1)
        return Claimed(token, attempt, kind == b"T")
    if kind == b"B":
        return Busy(int.from_bytes(reply[1:], "big") / 1_000_000)
    if kind == b"X":
        return Conflict(State(reply[1]))
    if kind == b"Q":
        return Quarantined()
    return Completed(reply[1:] if kind == b"R" else None)


def _record(key: bytes, text: bytes, left: int, now: int) -> Record:
    flags, token, _nonce, fingerprint, attempts, redrive = _HEADER.unpack_from(text)
    state = State(flags % 8)
    held = state in (State.RESERVED, State.IN_PROGRESS)
    lease_left = (int.from_bytes(text[_HEADER.size :], "big") - now) / 1_000_000 if held else 0.0
    return Record(
        key=key,
        state=state,
        token=token,
        attempts=attempts,
        redrive=redrive,
        lease_left=max(0.0, lease_left),
        retention_left=left / 1_000 if left >= 0 else math.inf,
        fingerprint=fingerprint if flags & _HAS_FINGERPRINT else None,
        result=text[_HEADER.size :] if flags & _HAS_RESULT else None,
    )
