"""The supervisor's own work, without processes."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Iterator

import pytest

from idempotent_bus.supervisor import Supervisor


@pytest.fixture
def far_pipe() -> Iterator[tuple[int, int]]:
    """A pipe whose reading end has a number beyond those that `select` knows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this system lets a process have no more than 1,024 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    reading, writing = os.pipe()
    far = fcntl.fcntl(reading, fcntl.F_DUPFD, 1500)
    os.set_blocking(far, False)
    yield far, writing
    for number in (reading, far, writing):
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_reports_are_read_where_many_files_are_open(far_pipe: tuple[int, int]) -> None:
    """Beyond 1,024 open files a process's report arrives, instead of a loop that reads nothing and never rests."""
    far, writing = far_pipe
    supervisor = Supervisor(lambda report: True, 1, stop_timeout=1.0, on_report=lambda: None)
    child = supervisor._children[0]
    child.pid, child.pipe = os.getpid(), far
    os.write(writing, b'{"report": {"state": "running"}}\n')
    supervisor._read(10.0)
    assert child.report == {"state": "running"}
