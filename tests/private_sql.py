"""A PostgreSQL and a MariaDB of a test's own, to be killed and started again. Each takes one to two seconds to start.

Neither runs as root: where the tests do, the servers run as the user that their packages made for them.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from private_redis import free_port

import servers

__all__ = ["PrivateMariaDB", "PrivatePostgreSQL"]


def _command(name: str, *folders: Path) -> str:
    for folder in folders:
        if (folder / name).exists():
            return str(folder / name)
    found = shutil.which(name)
    if found is None:
        if servers.IN_CI:
            pytest.fail(f"no {name}: in CI it must be there", pytrace=False)
        servers.left_out.add(f"{name} (private)")
        pytest.skip(f"no {name}")
    return found


def _runs_as(name: str, directory: Path) -> str | None:
    """The user that the server runs as, who is given the directory; None: whoever runs the tests."""
    if os.getuid() != 0:
        return None
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        user = pwd.getpwnam("nobody")
    os.chown(directory, user.pw_uid, user.pw_gid)
    for folder in directory.parents:  # it must be able to get there
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    return user.pw_name


class _Server:
    """url: with the driver that the library's extra brings. The port and the data stay the same over restarts."""

    url: str

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.directory = directory
        self.log = directory / "log"
        self.log.touch()

    def _start(self, command: list[str], user: str | None, probe: Callable[[], None]) -> None:
        deadline = time.monotonic() + 90
        self._spawn(command, user)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                probe()
            except (OSError, sa.exc.SQLAlchemyError):
                if time.monotonic() > deadline:
                    self.kill()
                    pytest.fail(f"the private server did not come up:\n{self.log.read_text()[-3000:]}", pytrace=False)
                if self._process.poll() is not None:  # something of the killed one was still there
                    time.sleep(0.2)
                    self._spawn(command, user)
                time.sleep(0.02)
            else:
                return

    def _spawn(self, command: list[str], user: str | None) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, user=user, group=user, extra_groups=[] if user else None,
                cwd=self.directory, start_new_session=True,
            )  # fmt: skip

    def _probe(self, statement: str, url: str | None = None) -> None:
        engine = sa.create_engine(self.url if url is None else url, isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql(statement)
        finally:
            engine.dispose()

    def kill(self) -> None:
        """SIGKILL to all its processes, as a power cut would have it but for what the kernel has yet to write."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        self.kill()


class PrivatePostgreSQL(_Server):
    """Starts in the constructor; `stop` ends it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
        self._postgres = _command("postgres", *reversed(installed))
        initdb = _command("initdb", *reversed(installed))
        self._user = _runs_as("postgres", directory)
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"
        subprocess.run(
            [initdb, "-D", str(directory / "data"), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync"],
            check=True, stdout=subprocess.DEVNULL, user=self._user, group=self._user,
            extra_groups=[] if self._user else None, cwd=directory,
        )  # fmt: skip
        self.start()

    def start(self) -> None:
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": "200"}
        arguments = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        (self.directory / "data" / "postmaster.pid").unlink(missing_ok=True)  # of the one that was killed
        self._start(
            [self._postgres, "-D", str(self.directory / "data"), "-p", str(self.port), *arguments],
            self._user, lambda: self._probe("SELECT 1"),
        )  # fmt: skip

    def kill(self) -> None:
        """SIGQUIT to the postmaster, as `pg_ctl stop -m immediate`: its backends end at once, nothing is written."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGQUIT)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            super().kill()


class PrivateMariaDB(_Server):
    """Starts in the constructor; `stop` ends it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._mariadbd = _command("mariadbd", Path("/usr/sbin"))
        install = _command("mariadb-install-db", Path("/usr/bin"))
        self._user = _runs_as("mysql", directory)
        self.url = f"mysql+pymysql://root@127.0.0.1:{self.port}/test"
        user = [] if self._user is None else [f"--user={self._user}"]
        subprocess.run(
            [install, "--no-defaults", *user, f"--datadir={directory / 'data'}", "--skip-test-db",
             "--auth-root-authentication-method=normal"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=directory,
        )  # fmt: skip
        self.start()
        self._probe("CREATE DATABASE test", self.url.removesuffix("test"))

    def start(self) -> None:
        command = [
            self._mariadbd, "--no-defaults", f"--datadir={self.directory / 'data'}", f"--port={self.port}",
            "--bind-address=127.0.0.1", f"--socket={self.directory / 'socket'}", "--skip-log-bin",
            f"--pid-file={self.directory / 'pid'}", "--max-connections=200", "--innodb-buffer-pool-size=64M",
        ]  # fmt: skip
        self._start(command, self._user, lambda: self._probe("SELECT 1", self.url.removesuffix("test")))
