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

**The short form.** A record that is completed without a result moves, in the script that completes it, out of the key
of its own into a small hash of its slot, a *bucket* `{prefix}{<slot>}:#<number>`, with what is still needed of it: the
rest of its key, its fingerprint, the end of its retention, and a digest of the hold that completed it, so that the
repeat of a lost reply is known again. The token is not kept: it has no more use, since completed is final, and the
counter makes sure that the next one is larger. Buckets split and merge one at a time as they fill, so that nothing has
to be planned and nothing is ever swept; how many there are is under `{prefix}{<slot>}:buckets`. A client names the
bucket by what it last heard, and is told when that is not so any more. `lua/buckets.lua` says the rest. Whatever does
not fit (a result, a redrive number, more than 31 attempts, a retention below a minute, a bucket that is full) keeps a
key of its own, and so does everything with `short=False`; records of earlier versions are of that kind.

**What it costs.** In the short form a completed record takes 42 to 46 bytes, all of the server's memory counted (with
its fingerprint, Redis 7.0, default prefix; for which sizes: `tests/benchmarks/reports/redis_store.md`). For that the
server must pack hashes of 128 short fields, as it does by default (`hash-max-listpack-entries`, before 7.0
`hash-max-ziplist-entries`). With a key of its own it takes 136 bytes (`MEMORY USAGE`), plus its result, plus the entry
in the table of expiries; all counters together take 36 KiB at most. A quarantined one takes its note and about 40 bytes
for the index more.

**What to know about the server.** A record is as durable as the server makes it. `appendonly yes` with `appendfsync
everysec` survives the death of the process; the loss of the machine can cost the last second. Asynchronous
replication can lose what a failover did not carry over: a completion that is lost lets a duplicate run again. A
`maxmemory-policy` that evicts drops records silently and is refused at the first use. A server that is full refuses
new claims, while what already runs can still be renewed, completed, released, abandoned and quarantined, and a person
can resolve. Leases and retention go by the server's clock: set it by slewing, not by leaps.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.cluster import RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import (
    NoScriptError,
    OutOfMemoryError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from ..errors import ConfigurationError, StoreUnavailable
from ..model import (
    NONCE_BYTES,
    ClaimOutcome,
    ClaimRequest,
    Completion,
    Hold,
    Record,
)
from ..store import CompletionStream
from . import redis_forms as forms
from .redis_lean import Lean, pack
from .redis_places import Places
from .redis_scripts import Script, script
from .redis_stream import RedisStream, Share
from .streams import DirectStream

__all__ = ["RedisStore", "open_redis"]

DEFAULT_PREFIX: Final = "idempotent-bus:"

# A stalled server must not hang a consumer: two resends, one of them the driver's, so some six seconds at worst, then
# StoreUnavailable.
_TIMEOUT = 2.0
_RESENDS = 1

# RedisClusterException is not a RedisError in redis-py.
_DRIVER_ERRORS = (RedisError, RedisClusterException, OSError)
_BROKEN = (RedisConnectionError, RedisTimeoutError, OSError)
_UNSETTLED = "the buckets of the Redis store move at every look; nothing is known of the outcome, so ask again"

# Quarantined records that one script looks at.
_PAGE = 1000
# Seconds of retention from which a completed record is worth the short form, which rounds up to 4 seconds.
_SHORT_FROM = 60.0
# How often a bucket may turn out to have moved before nobody knows where anything is.
_MOVES = 100
# Replies of complete.lua from here on ask for a bucket more, and this one for one less.
_SPARSE = 3


def open_redis(
    url: str, *, prefix: str = DEFAULT_PREFIX, allow_eviction: bool = False, short: bool = True, **connection: Any
) -> RedisStore:
    """A store on the server that `url` names, `redis://[user:password@]host:port/db` or `rediss://...`.

    Over a Unix socket: `unix:///path?db=0`, or as kombu writes it `redis+socket:///path?virtual_host=0`.

    prefix, allow_eviction, short: see `RedisStore`. connection: anything that `redis.Redis.from_url` takes
    (`ssl_ca_certs`, `health_check_interval`, `max_connections`, ...), which the URL's own query wins over. Unless told
    otherwise a server has 2 seconds to accept, 2 to answer, and is asked at most three times: any verb may be repeated.
    """
    settings: dict[str, Any] = {
        "socket_timeout": _TIMEOUT,
        "socket_connect_timeout": _TIMEOUT,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.05), _RESENDS),
        **connection,
    }
    if url.startswith("redis+socket:"):
        url = url.replace("redis+socket", "unix", 1).replace("virtual_host=", "db=")
    return RedisStore(Redis.from_url(url, **settings), prefix=prefix, allow_eviction=allow_eviction, short=short)


class RedisStore:
    """A dedup store over a client of redis-py; safe for threads, and for a fork, as the client is.

    client: a `redis.Redis`, also one that a Sentinel gave, or a `redis.cluster.RedisCluster`; `decode_responses` must
    be off. Its connections, retries and timeouts are its own affair: give it a `socket_timeout`. The store closes it.
    prefix: a namespace; stores with different prefixes share nothing. allow_eviction: use a server although its
    `maxmemory-policy` may drop records, and with them the promise that nothing is done twice. short: False keeps every
    record under a key of its own, as versions before the short form did: say so in the new processes for as long as old
    ones, which do not know it, are still at work. Records in either form are honoured whatever it says.

    Raises ConfigurationError for a client or prefix that cannot work, and at the first use for a server that evicts.
    """

    def __init__(
        self,
        client: Redis | RedisCluster,
        *,
        prefix: str = DEFAULT_PREFIX,
        allow_eviction: bool = False,
        short: bool = True,
    ) -> None:
        if "{" in prefix or "}" in prefix:
            raise ConfigurationError("the prefix must be without braces: they choose the slot in Redis Cluster")
        if client.get_encoder().decode_responses:
            raise ConfigurationError("the store needs bytes: use a Redis client without decode_responses")
        self._client: Any = client  # Any: redis-py types its replies for the sync and the async client at once
        self._clustered = isinstance(client, RedisCluster)
        self._lean = _lean(client)
        self._share = None if self._lean is None else Share(self._lean.pool)
        self._prefix = prefix.encode()
        self._places = Places(self._prefix)
        self._checked = allow_eviction
        self._short_from = _SHORT_FROM if short else math.inf

    # --- the verbs ------------------------------------------------------------------------------------

    def claim(self, request: ClaimRequest, /) -> ClaimOutcome:
        return self._claim([request])[0]

    def claim_many(self, requests: Sequence[ClaimRequest], /) -> list[ClaimOutcome]:
        outcomes: dict[int, ClaimOutcome] = {}
        for numbers in self._together([request.key for request in requests]):
            outcomes.update(zip(numbers, self._claim([requests[number] for number in numbers]), strict=True))
        return [outcomes[number] for number in range(len(requests))]

    def _claim(self, requests: Sequence[ClaimRequest]) -> list[ClaimOutcome]:
        replies: list[bytes] = self._claim_once(requests)
        for _ in range(_MOVES):
            moved = [number for number, reply in enumerate(replies) if reply[:1] == b"M"]
            if not moved:
                return [forms.outcome(reply) for reply in replies]
            for number in moved:
                self._places.learn(requests[number].key[0], int.from_bytes(replies[number][1:], "big"))
            for number, reply in zip(moved, self._claim_once([requests[number] for number in moved]), strict=True):
                replies[number] = reply
        raise StoreUnavailable(_UNSETTLED)

    def _claim_once(self, requests: Sequence[ClaimRequest]) -> list[bytes]:
        keys: list[bytes] = []
        values: list[bytes] = []
        for request in requests:
            places, value = self._asking(request)
            keys += places
            values.append(value)
        replies: Any = self._run("claim", keys, values)
        return [replies] if len(requests) == 1 else replies

    def _asking(self, request: ClaimRequest) -> tuple[tuple[bytes, bytes, bytes, bytes], bytes]:
        """Keys and value for claim.lua."""
        record, layout, bucket, buckets = self._places.of(request.key)
        return (record, self._places.counters[request.key[0]], layout, bucket), forms.request(request, buckets)

    def renew(self, hold: Hold, /, *, lease: float, retention: float) -> bool:
        return self._renew([hold], lease, retention)[0]

    def renew_many(self, holds: Sequence[Hold], /, *, lease: float, retention: float) -> list[bool]:
        answers: dict[int, bool] = {}
        for numbers in self._together([hold.key for hold in holds]):
            renewed = self._renew([holds[number] for number in numbers], lease, retention)
            answers.update(zip(numbers, renewed, strict=True))
        return [answers[number] for number in range(len(holds))]

    def _renew(self, holds: Sequence[Hold], lease: float, retention: float) -> list[bool]:
        values = [forms.microseconds(lease), forms.milliseconds(lease + retention), *map(forms.owner, holds)]
        keys = [self._places.record(hold.key) for hold in holds]
        return [digit == ord("1") for digit in self._run("renew", keys, values)]

    def complete(self, hold: Hold, /, *, result: bytes | None, retention: float) -> bool:
        for _ in range(_MOVES):
            reply: int = self._run("complete", *self._completion(hold, result, retention))
            done = self._done(hold, reply)
            if done is not None:
                return done
        raise StoreUnavailable(_UNSETTLED)

    def _done(self, hold: Hold, reply: int) -> bool | None:
        """What a reply of complete.lua says; None: nothing yet, and where the record is has been learnt."""
        if reply < 0:
            self._places.learn(hold.key[0], -reply)
            return None
        if reply > 1:
            self._make_room(hold.key[0], fewer=reply == _SPARSE)
        return reply > 0

    def complete_many(self, completions: Sequence[Completion], /) -> list[bool]:
        """As `BatchCompletionStore.complete_many`: sent together, waited for once."""
        stream = self.stream()
        try:
            for one in completions:
                stream.begin(one)
            settled = stream.settle()
        finally:
            stream.close()
        # In doubt: asked singly, which tells, or raises.
        return [
            self.complete(one.hold, result=one.result, retention=one.retention) if how.durable is None else how.durable
            for one, how in zip(completions, settled, strict=True)
        ]

    def stream(self) -> CompletionStream:
        """As `StreamStore.stream`. In Redis Cluster, which has no one connection, each is done while `begin` waits."""
        if self._share is None:
            return DirectStream(self)

        complete, claim = self._scripts("complete"), self._scripts("claim")

        def packed(completion: Completion) -> bytes:
            if not self._checked:
                self._refuse_eviction()
            return pack(complete.name, *self._completion(completion.hold, completion.result, completion.retention))

        def claiming(request: ClaimRequest) -> bytes:
            if not self._checked:
                self._refuse_eviction()
            places, value = self._asking(request)
            return pack(claim.name, places, (value,))

        def outcome(request: ClaimRequest, reply: bytes) -> ClaimOutcome | None:
            if reply[:1] != b"M":
                return forms.outcome(reply)
            self._places.learn(request.key[0], int.from_bytes(reply[1:], "big"))
            return None

        return RedisStream(
            self._client.connection_pool,
            self._share,
            complete.text,
            packed,
            lambda completion, reply: self._done(completion.hold, reply),
            lambda completion: self.complete(completion.hold, result=completion.result, retention=completion.retention),
            claiming,
            outcome,
        )

    def _completion(self, hold: Hold, result: bytes | None, retention: float) -> tuple[list[bytes], list[bytes]]:
        """Keys and values for complete.lua."""
        *keys, buckets = self._places.of(hold.key)
        packed = forms.completion(hold, retention, buckets, short=result is None and retention >= self._short_from)
        return keys, [packed] if result is None else [packed, result]

    def _make_room(self, slot: int, *, fewer: bool) -> None:
        """Give a slot a bucket more, or take one away. It can wait: what does not fit keeps a key of its own."""
        turn = self._places.turn(slot, fewer=fewer)
        if turn is None:
            return  # of several completions that were under way an earlier one has done it
        keys, buckets = turn
        with suppress(StoreUnavailable):
            self._places.learn(slot, self._run("merge" if fewer else "split", keys, [buckets]))

    def release(self, hold: Hold, /, *, attempts: int, retention: float) -> bool:
        values = [forms.owner(hold), forms.milliseconds(retention), forms.count(attempts)]
        return bool(self._run("release", [self._places.record(hold.key)], values) == 1)

    def abandon(self, hold: Hold, /, *, attempts: int, retention: float) -> bool:
        values = [forms.owner(hold), forms.milliseconds(retention), forms.count(attempts)]
        return bool(self._run("abandon", [self._places.record(hold.key)], values) == 1)

    def quarantine(self, hold: Hold, /, *, note: bytes) -> bool:
        keys = [self._places.record(hold.key), self._places.index(hold.key[0])]
        return bool(self._run("quarantine", keys, [forms.owner(hold), hold.key, note]) == 1)

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
                indexes = [self._places.index(slot) for slot in some]
                keys += self._run("indexed", indexes, [b"(" + after, limit - len(keys)])
        return keys

    def _still_quarantined(self, keys: list[bytes]) -> list[Record]:
        shown: dict[bytes, bytes | None] = {}
        for numbers in self._together(keys):
            some = [keys[number] for number in numbers]
            places = [place for key in some for place in (self._places.record(key), self._places.index(key[0]))]
            shown.update(zip(some, self._run("quarantined", places, some), strict=True))
        return [forms.record(key, text, -1, 0) for key in keys if (text := shown[key]) is not None]

    def resolve(self, key: bytes, /, *, completed: bool, retention: float) -> bool:
        """As `QuarantineStore.resolve`. Sent again by the driver after a lost reply, it knows its own work."""
        values = [key, int(completed), forms.milliseconds(retention), os.urandom(NONCE_BYTES)]
        return bool(self._run("resolve", [self._places.record(key), self._places.index(key[0])], values) == 1)

    def forget(self, key: bytes, /) -> bool:
        for _ in range(_MOVES):
            *places, buckets = self._places.of(key)
            reply: int = self._run("forget", places, [buckets])
            if reply >= 0:
                return reply == 1
            self._places.learn(key[0], -reply)
        raise StoreUnavailable(_UNSETTLED)

    def lookup(self, key: bytes, /) -> Record | None:
        """As `LookupStore.lookup`. Of a completed record in the short form the token is not kept: 0."""
        for _ in range(_MOVES):
            *places, buckets = self._places.of(key)
            reply = self._run("lookup", places, [buckets])
            if not isinstance(reply, int):
                return None if reply is None else forms.record(key, *reply)
            self._places.learn(key[0], reply)
        raise StoreUnavailable(_UNSETTLED)

    def close(self) -> None:
        if self._lean is not None:
            self._lean.close()
        self._client.close()

    # --- keys and round trips ---------------------------------------------------------------------------

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
        return script(verb)

    def _evaluate(self, script: Script, keys: list[bytes], values: Sequence[Any]) -> Any:
        if self._lean is not None:
            plain = [value if isinstance(value, bytes) else b"%d" % value for value in values]
            # A connection that breaks leaves the outcome unknown, and every verb may be repeated: the second time it is
            # the client's affair, with its own retries.
            with suppress(NoScriptError, *_BROKEN):
                return self._lean.ask(pack(script.name, keys, plain))
            self._lean.close()  # or the client's bounded pool might miss what lies idle here
        try:
            return self._client.evalsha(script.sha, len(keys), *keys, *values)
        except NoScriptError:  # a new server, or SCRIPT FLUSH: sending the text makes it known again
            return self._client.eval(script.text, len(keys), *keys, *values)

    def _refuse_eviction(self) -> None:
        """Ask once whether the server would drop records. INFO, because CONFIG is forbidden on many a managed one."""
        if self._lean is not None:
            self._lean.close()
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


def _lean(client: Redis | RedisCluster) -> Lean | None:
    """The lean way over a client's connections, where it has one: not in a cluster, which moves its slots."""
    if isinstance(client, RedisCluster) or client.connection is not None:  # or a client of one connection
        return None
    return Lean(client.connection_pool) if getattr(client.connection_pool, "cache", None) is None else None
