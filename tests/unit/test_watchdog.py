"""The watchdog that ends waits for SQL servers."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from idempotent_bus.watchdog import Watchdog


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_a_watchdog_that_watches() -> None:
    """A relay or a store that was used before a fork waits for nobody without an end in the child either."""
    watchdog = Watchdog(0.05)
    mine, _other = socket.socketpair()
    ticket = watchdog.start(mine)
    watchdog.stop(ticket)  # its thread runs, in the parent
    watchdog._lock.acquire()  # as another thread of the parent may have, at that moment
    child = os.fork()
    if not child:
        signal.alarm(5)  # rather than wait for ever
        try:
            watchdog.start(mine)
            os._exit(0 if mine.recv(1) == b"" else 1)  # shut down by the watchdog
        except BaseException:  # noqa: BLE001 - no error may go on into the parent's test run
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    watchdog._lock.release()
    watchdog.close()
