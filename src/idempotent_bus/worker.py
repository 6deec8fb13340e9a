"""`IdempotentWorker`: a ready consumer process for plain kombu: threads, processes, signals, health.

It is built on `IdempotentConsumer` and not on kombu's ConsumerMixin: the mixin's loop has no place for what threads
hand home or for messages that wait here, answers heartbeats only when it is idle, acks what it cannot decode, and
takes a queue that is declared otherwise for an outage; one loop, with one way to reconnect, serves both.

With several processes a supervisor forks them before anything is opened, starts again what died, and ends what outlives
its time. It does nothing else: no connection, no store and no thread is ever open in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

from kombu import Connection, Queue

from .consumer import IdempotentConsumer
from .errors import ConfigurationError
from .handler import IdempotentHandler
from .supervisor import Supervisor, report

__all__ = ["IdempotentWorker"]

log = logging.getLogger(__name__)

#: A loop that has not turned for so many seconds, without a handler that holds it up, is not called alive any more.
_STUCK_AFTER: Final = 30.0
_SECONDS_BETWEEN_REPORTS: Final = 1.0


class IdempotentWorker:
    """Consumes queues with a pool of threads, in one process or several, until it is told to stop.

    connection: a kombu Connection, a pool of them, or a URL; each process opens its own.
    handlers: which guarded handler takes which queue. The queues are declared.
    threads: how many handlers run at once in each process; 0 runs them one after another in the consuming thread, with
        a window of messages at a time, which is fastest for short ones.
    processes: how many processes consume. More than 1 needs a system that can fork.
    prefetch: how many messages the broker may have on their way to each process; by default 4 for each thread, 100
        without threads.
    accept: content types, as kombu's Consumer takes them.
    stop_timeout: seconds that running handlers have to end after a signal. What runs longer is cut off: the broker
        delivers its message again, and the record's lease has to lapse before it is run again.
    health_file: is given `health()` as JSON about every second, while the worker's loops turn: a liveness probe looks
        at the time of its last change. None: no file.

    `run` blocks, in the main thread. `stop` may be called from any thread of the process that runs it, or from a signal
    handler.
    """

    def __init__(
        self,
        connection: Connection | str | Any,
        handlers: Mapping[Queue, IdempotentHandler],
        *,
        threads: int = 8,
        processes: int = 1,
        prefetch: int | None = None,
        accept: Sequence[str] | None = None,
        stop_timeout: float = 30.0,
        health_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self._connection = connection
        self._handlers = dict(handlers)
        self._prefetch = prefetch
        self._accept = accept
        self._state = "stopped"
        self._signals = 0
        self._stopping = False
        self._consumer: IdempotentConsumer | None = None
        self._supervisor: Supervisor | None = None
        self.configure(threads=threads, processes=processes, stop_timeout=stop_timeout, health_file=health_file)

    def configure(
        self,
        *,
        threads: int | None = None,
        processes: int | None = None,
        stop_timeout: float | None = None,
        health_file: str | os.PathLike[str] | None = None,
    ) -> None:
        """Change some settings before `run`, as a command line does; None leaves one as it is.

        Raises ConfigurationError for settings that cannot be right.
        """
        if self._state != "stopped":
            raise ConfigurationError("a worker that runs cannot be configured")
        if threads is not None:
            if type(threads) is not int or threads < 0:
                raise ConfigurationError("threads must be a whole number, 0 for none")
            self._threads = threads
        if processes is not None:
            if type(processes) is not int or processes < 1:
                raise ConfigurationError("processes must be a whole number of at least 1")
            if processes > 1 and not hasattr(os, "fork"):
                raise ConfigurationError("this system cannot fork: start several workers with processes=1 instead")
            self._processes = processes
        if stop_timeout is not None:
            if not 0 <= stop_timeout < float("inf"):
                raise ConfigurationError("stop_timeout must be a number of seconds, and finite")
            self._stop_timeout = float(stop_timeout)
        if health_file is not None:
            self._health_file: Path | None = Path(health_file)
        elif not hasattr(self, "_health_file"):
            self._health_file = None
        self._make_consumer()  # says now what cannot be right; nothing is opened

    def run(self) -> bool:
        """Consume until SIGTERM, SIGINT or `stop`. True if all that was running has ended in its time.

        The first signal lets the running handlers end; a second one ends the process at once (exit code 128 + the
        signal's number) or kills the processes. In other threads than the main one no signal handlers are installed.

        Raises what cannot be ridden out: wrong settings, a queue that is declared otherwise.
        """
        if self._state != "stopped":
            raise ConfigurationError("this worker runs already")
        self._signals, self._state = 0, "running"
        try:
            with self._handling_signals():
                return self._run_alone() if self._processes == 1 else self._run_many()
        finally:
            self._state, self._stopping = "stopped", False
            self._consumer = self._supervisor = None
            self._write_health()

    def stop(self) -> None:
        """As the first signal does. Before `run`, the next one returns at once."""
        self._stopping = True
        if self._state == "running":
            self._state = "stopping"
        for running in (self._consumer, self._supervisor):
            if running is not None:
                running.stop()

    def health(self) -> dict[str, Any]:
        """What the worker does, in plain values: `state`, `pid`, `restarts`, and a list of `processes`.

        Each process is as `IdempotentConsumer.health` tells, as it was about a second ago at most if it is another one.
        """
        if self._supervisor is not None:
            return self._supervisor.health(self._state)
        consumer = self._consumer
        return report(self._state, [] if consumer is None else [consumer.health()])

    # --- one process ----------------------------------------------------------------------------------

    def _make_consumer(self) -> IdempotentConsumer:
        prefetch = self._prefetch
        if prefetch is None:
            prefetch = max(1, 4 * self._threads, len(self._handlers)) if self._threads else 100
        return IdempotentConsumer(
            self._connection,
            self._handlers,
            prefetch=prefetch,
            accept=self._accept,
            threads=self._threads,
            stop_timeout=self._stop_timeout,
        )

    def _run_alone(self) -> bool:
        consumer = self._consumer = self._make_consumer()
        if self._stopping:
            return True
        with _repeating(self._write_health):
            return _consume(consumer)

    def _write_health(self) -> None:
        health = self.health()
        if self._health_file is not None and is_alive(health):
            write_atomically(self._health_file, health)

    # --- several --------------------------------------------------------------------------------------

    def _run_many(self) -> bool:
        supervisor = self._supervisor = Supervisor(
            self._run_child, self._processes, stop_timeout=self._stop_timeout, on_report=self._write_health
        )
        if self._stopping:
            supervisor.stop()
        return supervisor.run()

    def _run_child(self, send: Callable[[dict[str, Any]], bool]) -> bool:
        """In a process of its own. send: sends what health says; False if the supervisor is gone."""
        consumer = self._make_consumer()
        # However often: a whole group of processes may get the signal that the supervisor sends on as well. It is the
        # supervisor that loses patience, and kills.
        signal.signal(signal.SIGTERM, lambda *_: consumer.stop())

        def tell() -> None:
            health = consumer.health()
            if is_alive(report("running", [health])) and not send(health):
                log.warning("the supervisor is gone: stopping")
                consumer.stop()

        with _repeating(tell):
            return _consume(consumer)

    # --- signals --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _handling_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            self.stop()
        elif self._supervisor is not None:
            self._supervisor.kill()
        else:
            os._exit(128 + number)  # not an exception: a handler that hangs must not hold it up


def _consume(consumer: IdempotentConsumer) -> bool:
    consumer.run()
    return consumer.left_behind == 0


def is_alive(health: Mapping[str, Any]) -> bool:
    """False if a process says nothing any more, or its loop has stopped turning although no handler holds it up."""
    now = time.time()
    for process in health["processes"]:
        looped_at = process.get("last_loop")
        if now - process.get("reported", now) > _STUCK_AFTER:
            return False
        if looped_at is not None and now - looped_at > _STUCK_AFTER and not process["oldest_running"]:
            return False
    return True


def write_atomically(path: Path, health: Mapping[str, Any]) -> None:
    """Replace the file's content in one step; a failure is logged, and does not stop the work."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(health) + "\n")
        os.replace(beside, path)
    except OSError as error:
        log.warning("cannot write the health file: %s", error)
        with contextlib.suppress(OSError):
            beside.unlink()


@contextlib.contextmanager
def _repeating(task: Callable[[], None]) -> Iterator[None]:
    """Do something in a background thread about every second, and once more at the end."""
    over = threading.Event()

    def loop() -> None:
        last = False
        while not last:
            last = over.wait(_SECONDS_BETWEEN_REPORTS)
            try:
                task()
            except Exception:  # whatever it is, a worker that works must not be taken for a dead one for it
                log.exception("the worker could not tell how it is")

    thread = threading.Thread(target=loop, name="idempotent-bus-health", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_SECONDS_BETWEEN_REPORTS)
