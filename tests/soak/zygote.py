"""Forks the victims: all modules are loaded once, so that a life costs some milliseconds, and no connection is open.

Reads one JSON object a line, a life's settings; prints `started LIFE PID` and `ended LIFE STATUS`. When its input ends,
it kills what is left and ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path

_real_time = time.time
shift = 0.0


def _wall() -> float:
    """The wall clock of this process, which may be wrong."""
    return _real_time() + shift


time.time = _wall  # before the library is loaded: its defaults are bound then

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    global shift
    from soak import victim

    gc.collect()
    gc.freeze()
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    alive: dict[int, int] = {}
    rest = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
        while alive:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            print("ended", alive.pop(pid), status, flush=True)
        if 0 not in ready:
            continue
        data = os.read(0, 1 << 20)
        if not data:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            settings = json.loads(line)
            pid = os.fork()
            if pid == 0:
                status = 70
                try:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for file in (wake, woken):
                        os.close(file)
                    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                    os.dup2(2, 1)
                    shift = settings["shift"]
                    victim.live(settings)
                    status = 0
                except BaseException:  # noqa: BLE001 - whatever it is, the supervisor is told by the exit code
                    with open(settings["errors"], "a") as errors:
                        errors.write(f"life {settings['life']}, {settings['role']}\n{traceback.format_exc()}\n")
                finally:
                    os._exit(status)
            alive[pid] = settings["life"]
            print("started", settings["life"], pid, flush=True)


if __name__ == "__main__":
    main()
