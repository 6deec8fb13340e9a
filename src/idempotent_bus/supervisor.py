"""A supervisor of forked processes: starts again what died, forwards stop, kills what outlives its time."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Final, NoReturn

from .errors import ConfigurationError

__all__ = ["Supervisor", "report"]

log = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
#: A process that lived for so many seconds had started well: its death is not one of a row.
_STARTED_WELL: Final = 10.0
#: On top of the stop_timeout: for saying goodbye to the broker.
_GOODBYE: Final = 10.0
_TURN: Final = 0.1
_REPORT: Final = 1.0
#: What a process exits with: all has ended in its time; something had to be left behind; its settings are wrong.
_WELL: Final = 0
_LEFT_BEHIND: Final = 75
_MISCONFIGURED: Final = 78


@dataclass
class _Child:
    """One process. pid 0: it has died, and is started again at `start_at`."""

    pid: int = 0
    pipe: int = -1
    started: float = 0.0
    start_at: float = 0.0
    pause: float = _FIRST_PAUSE
    unread: bytes = b""
    fatal: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    reported: float = 0.0


class Supervisor:
    """Runs `target` in `number` forked processes until `stop`.

    target: called in each with a function that reports a JSON object (it says False once the supervisor is gone);
        returns whether all ended well. on_report: called about every second, in the supervisor.

    `run` belongs to one thread; the others may be called from a signal handler.
    """

    def __init__(
        self,
        target: Callable[[Callable[[dict[str, Any]], bool]], bool],
        number: int,
        *,
        stop_timeout: float,
        on_report: Callable[[], None],
    ) -> None:
        self._target = target
        self._children = [_Child() for _ in range(number)]
        self._stop_timeout = stop_timeout
        self._on_report = on_report
        self._stopping = self._killing = self._told = False
        self._restarts = 0
        self._clean = True
        self._parent = os.getpid()

    def stop(self) -> None:
        """Let every process end what it is doing, and start none again."""
        self._stopping = True

    def kill(self) -> None:
        """End every process at once."""
        self._stopping = self._killing = True

    def health(self, state: str) -> dict[str, Any]:
        """The last reports of the processes, in one object."""
        processes = [
            {**child.report, "reported": child.reported}
            if child.pid and child.report
            else {"state": "starting" if child.pid else "dead", "pid": child.pid or None, "connected": False}
            for child in self._children
        ]
        return report(state, processes, self._restarts)

    def run(self) -> bool:
        """Until stopped. True if every process ended well. Raises ConfigurationError if one refuses its settings."""
        next_report = 0.0
        kill_at = float("inf")
        try:
            while True:
                now = time.monotonic()
                self._reap(now)
                if self._stopping:
                    if not self._told:
                        self._told = True
                        kill_at = now + self._stop_timeout + _GOODBYE
                        self._signal(signal.SIGTERM)
                    if not any(child.pid for child in self._children):
                        break
                    if self._killing or now >= kill_at:
                        self._kill_all()
                        break
                else:
                    for child in self._children:
                        if not child.pid and now >= child.start_at:
                            self._start(child)
                if now >= next_report:
                    next_report = now + _REPORT
                    self._on_report()
                self._read(_TURN)
        finally:
            self._kill_all()
        self._on_report()
        fatal = next((child.fatal for child in self._children if child.fatal), "")
        if fatal:
            raise ConfigurationError(fatal)
        return self._clean

    # --- children -------------------------------------------------------------------------------------

    def _start(self, child: _Child) -> None:
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        # Blocked, so that a signal meets the new process only with handlers of its own.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        try:
            pid = os.fork()
            if pid == 0:
                self._be_child(reading, writing, blocked)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(writing)
        os.set_blocking(reading, False)
        child.pid, child.pipe, child.started = pid, reading, time.monotonic()
        child.unread, child.report = b"", {}
        log.info("started process %d", pid)

    def _be_child(self, reading: int, writing: int, blocked: Any) -> NoReturn:
        code = 1
        try:
            os.close(reading)
            for other in self._children:
                if other.pipe >= 0:
                    os.close(other.pipe)
            os.set_blocking(writing, False)
            # A terminal's Ctrl-C goes to all: the supervisor says what is to be done about it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, lambda *_: os._exit(_WELL))  # until there is something to stop
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            try:
                code = _WELL if self._target(lambda told: self._report(writing, told)) else _LEFT_BEHIND
            except ConfigurationError as error:
                _write(writing, {"fatal": str(error)[:1000]})
                log.error("%s", error)
                code = _MISCONFIGURED
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            log.exception("process %d ends with an error", os.getpid())
        finally:
            with contextlib.suppress(Exception):
                logging.shutdown()
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)  # nothing of the parent's that is registered for its end is this process's to do

    def _report(self, writing: int, told: dict[str, Any]) -> bool:
        return os.getppid() == self._parent and _write(writing, {"report": told})

    def _reap(self, now: float) -> None:
        for child in self._children:
            if not child.pid:
                continue
            pid = child.pid
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status)
            except ChildProcessError:  # somebody else in this process has waited for it
                ended, code = pid, 1
            if not ended:
                continue
            self._drain(child)
            os.close(child.pipe)
            child.pid, child.pipe = 0, -1
            if code == _MISCONFIGURED:
                child.fatal = child.fatal or "a worker process refused its settings, see the log"
                self._stopping = True
            elif self._stopping:
                self._clean = self._clean and code == _WELL
            else:
                if now - child.started >= _STARTED_WELL:
                    child.pause = _FIRST_PAUSE
                child.start_at = now + child.pause
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                log.error("process %d %s, starting another in %.1f s", pid, how, child.pause)
                child.pause = min(child.pause * 2, _LONGEST_PAUSE)
                self._restarts += 1

    def _signal(self, number: int) -> None:
        for child in self._children:
            if child.pid:
                os.kill(child.pid, number)  # not yet waited for, so the number is still its own

    def _kill_all(self) -> None:
        for child in self._children:
            if child.pid:
                self._clean = False
                log.warning("killing process %d", child.pid)
                os.kill(child.pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child.pid, 0)
                os.close(child.pipe)
                child.pid, child.pipe = 0, -1

    # --- reports --------------------------------------------------------------------------------------

    def _read(self, timeout: float) -> None:
        """Wait for reports, for so long at most."""
        pipes = {child.pipe: child for child in self._children if child.pid}
        with contextlib.suppress(ValueError):
            ready = wait(list(pipes), timeout)  # not `select`, which knows of 1,024 open files only
            for pipe, child in pipes.items():
                if pipe in ready and not self._drain(child):
                    time.sleep(0.01)  # it has ended: do not spin until it can be waited for

    def _drain(self, child: _Child) -> bool:
        while True:
            try:
                data = os.read(child.pipe, 65536)
            except BlockingIOError:
                return True
            if not data:
                return False
            *lines, child.unread = (child.unread + data).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    told = json.loads(line)
                    child.fatal = told.get("fatal", child.fatal)
                    if "report" in told:
                        child.report, child.reported = told["report"], time.time()


def report(state: str, processes: list[dict[str, Any]], restarts: int = 0) -> dict[str, Any]:
    """What a worker with these processes says of itself."""
    return {"state": state, "pid": os.getpid(), "time": time.time(), "restarts": restarts, "processes": processes}


def _write(pipe: int, told: dict[str, Any]) -> bool:
    """Write one line, or nothing: a pipe takes up to 4096 bytes in one step. False if nobody reads any more."""
    line = json.dumps(told).encode() + b"\n"
    try:
        os.write(pipe, line)
    except BlockingIOError:
        return True  # the supervisor is slow, not gone
    except OSError:
        return False
    return True
