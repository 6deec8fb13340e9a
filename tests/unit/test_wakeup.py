"""How the relay sleeps, without a server."""

from __future__ import annotations

import socket
import time

import pytest
import sqlalchemy as sa

from idempotent_bus.relaying.wakeup import Wakeup
from idempotent_bus.watchdog import Watchdog


def test_it_sleeps_and_is_woken_however_many_files_are_open() -> None:
    """Its bell may have a number that `select` does not know, from 1,024 on: no error ends the relay."""
    fcntl = pytest.importorskip("fcntl")
    wakeup = Wakeup(sa.create_engine("sqlite://"), sa.MetaData(info={"prefix": ""}), watchdog=Watchdog(1.0))
    try:
        number = fcntl.fcntl(wakeup._bell, fcntl.F_DUPFD, 1024)
    except OSError:
        pytest.skip("the process may not open so many files")
    wakeup._bell.close()
    wakeup._bell = socket.socket(fileno=number)
    wakeup.wait(0.01)
    wakeup.stop()
    began = time.monotonic()
    wakeup.wait(30.0)
    assert time.monotonic() - began < 10
    wakeup.close()
