"""A RabbitMQ node of a test's own, to be configured, killed and started again. Takes about 5 seconds to start.

Its node name, ports, data, log, cookie and configuration are its own; only epmd, Erlang's directory of node names, is
shared with other nodes of the machine.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

import pytest

import servers

#: Debian's commands in the PATH change to the user rabbitmq; these run as whoever calls them.
_FOLDER = Path("/usr/lib/rabbitmq/bin")


def _command(name: str) -> str:
    if (_FOLDER / name).exists():
        return str(_FOLDER / name)
    found = shutil.which(name)
    if found is None:
        if servers.IN_CI:
            pytest.fail(f"no {name}: in CI it must be there", pytrace=False)
        servers.left_out.add("RabbitMQ (private)")
        pytest.skip(f"no {name}")
    return found


def _free_port() -> int:
    while True:
        port = random.randrange(30_000, 40_000)
        try:
            for candidate in (port, port + 20_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", candidate))
        except OSError:
            continue
        return port


class PrivateRabbitMQ:
    """Starts in the constructor; `stop` ends it. The port and the data stay the same over restarts.

    settings: of the application `rabbit`, as Erlang's configuration takes them, such as `consumer_timeout=4000`.
    """

    def __init__(self, directory: Path, **settings: int) -> None:
        self._server, self._ctl = _command("rabbitmq-server"), _command("rabbitmqctl")
        self.port = _free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self.directory = directory
        self.log = directory / "console.log"
        home = directory / "home"
        home.mkdir()
        (directory / "rabbitmq.conf").write_text(
            f"listeners.tcp.default = 127.0.0.1:{self.port}\ndisk_free_limit.absolute = 10MB\n"
        )
        terms = ", ".join(f"{{{name}, {value}}}" for name, value in settings.items())
        (directory / "advanced.config").write_text(f"[{{rabbit, [{terms}]}}].\n")
        (directory / "enabled_plugins").write_text("[].\n")
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),  # with a cookie of its own
            "RABBITMQ_NODENAME": f"test-{uuid.uuid4().hex[:12]}@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.port + 20_000),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "no-such-file"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 -kernel inet_dist_use_interface {127,0,0,1}",
        }
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            # A session of its own: the shell script and the Erlang machine under it are ended together.
            self._process = subprocess.Popen(
                [self._server],
                env=self._environment,
                cwd=self.directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while not self._greets():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"the private RabbitMQ did not come up:\n{self.log.read_text()[-3000:]}", pytrace=False)
            time.sleep(0.1)

    def _greets(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                probe.sendall(b"AMQP\x00\x00\x09\x01")
                return bool(probe.recv(1))
        except OSError:
            return False

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on this node; what it prints. About a second."""
        done = subprocess.run(
            [self._ctl, "-q", *arguments], env=self._environment, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    def kill(self) -> None:
        """SIGKILL, as a power cut would have it but for what the kernel has yet to write."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        self.kill()
