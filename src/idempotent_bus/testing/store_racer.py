"""One process among many that claim the same keys; run by `store_capabilities.SharedContract`.

Takes one JSON object as its argument, says `ready`, waits for a line, works, and prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main(task: dict[str, Any]) -> None:
    """Do what the task says."""
    if shift := task.get("shift"):
        # Before anything else is imported, so that `from time import time` gets the wrong clock as well.
        real = {name: getattr(time, name) for name in ("time", "monotonic", "time_ns", "monotonic_ns")}
        time.time = lambda: real["time"]() + shift
        time.monotonic = lambda: real["monotonic"]() + shift
        time.time_ns = lambda: real["time_ns"]() + int(shift * 1e9)
        time.monotonic_ns = lambda: real["monotonic_ns"]() + int(shift * 1e9)

    from idempotent_bus.model import Claimed, ClaimRequest, Hold
    from idempotent_bus.stores import open_store

    def ask(key: str, lease: float = 600.0) -> ClaimRequest:
        return ClaimRequest(bytes.fromhex(key), nonce=os.urandom(16), lease=lease, retention=600.0)

    store = open_store(task["url"], **task["options"])
    store.claim(ask(os.urandom(16).hex()))  # connected before the race begins
    print("ready", flush=True)
    sys.stdin.readline()

    won = [key for key in task.get("claim", []) if isinstance(store.claim(ask(key)), Claimed)]
    for key, lease in task.get("leases", {}).items():
        assert isinstance(store.claim(ask(key, lease)), Claimed)
    for key, retention in task.get("complete", {}).items():
        request = ask(key)
        outcome = store.claim(request)
        assert isinstance(outcome, Claimed)
        assert store.complete(Hold(request.key, outcome.token, request.nonce), result=None, retention=retention)
    if task.get("purge") and hasattr(store, "purge"):
        store.purge()
    rounds = []
    for _ in range(task.get("count", 0)):
        for key in task["rounds"]:
            while True:
                request = ask(key)
                outcome = store.claim(request)
                if isinstance(outcome, Claimed):
                    break
                time.sleep(0.001)
            rounds.append((key, outcome.token, outcome.attempt))
            hold = Hold(request.key, outcome.token, request.nonce)
            assert store.release(hold, attempts=outcome.attempt, retention=600.0)
    print(json.dumps({"won": won, "rounds": rounds}))
    store.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
