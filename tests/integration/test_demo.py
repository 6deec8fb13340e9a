"""The main job, as a user runs it: the command, its table and its exit code, on each broker."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from kombu import Connection

import servers


def _demo(*arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "idempotent_bus.cli", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def _row(output: str, title: str) -> list[int]:
    match = re.search(rf"│ {re.escape(title)} *│(.*)│", output)
    assert match, output
    return [int(value) for value in match.group(1).split("│")]


def test_embedded_default() -> None:
    """The unprotected run is damaged, the store run within its bound, the inbox exact (I1, I2)."""
    run = _demo("--payments", "300", "--kills", "8")
    assert run.returncode == 0, run.stdout + run.stderr
    naive, store, inbox = zip(
        *(_row(run.stdout, title) for title in ("payments", "cards too many", "cards missing")), strict=True
    )
    assert naive[1] + naive[2] > 0
    assert (store[0], store[2]) == (300, 0)
    assert store[1] <= _row(run.stdout, "  of these after the effect")[1]
    assert inbox == (300, 0, 0)
    killed = _row(run.stdout, "consumers killed (SIGKILL)")  # the last may come too late, when all is done
    assert min(killed) >= 5, killed
    edge = _row(run.stdout, "duplicates refused at edge")
    assert edge[0] == 0
    assert min(edge[1:]) > 0


def test_rabbitmq_with_a_redis_store(tmp_path: Path) -> None:
    """The demo runs unchanged elsewhere, on a user's own payments, and leaves no queue behind."""
    broker = servers.rabbitmq()
    file = tmp_path / "orders.csv"
    file.write_text("order,amount\n" + "".join(f"o-{number},{number}.00\n" for number in range(150)))
    before = _queues()
    run = _demo(
        *("--broker", broker, "--store", servers.redis(), "--mode", "store,inbox", "--kills", "4"),
        *("--input", str(file), "--biz-id", "order"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert _row(run.stdout, "payments") == [150, 150]
    assert _row(run.stdout, "cards missing") == [0, 0]
    with Connection(broker) as connection:
        connection.ensure_connection(max_retries=1)
    if before is not None:
        assert {name for name in _queues() or () if name.startswith("demo.")} <= before


def _queues() -> set[str] | None:
    try:
        run = subprocess.run(["rabbitmqctl", "-q", "list_queues", "name"], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a broker on another machine
        return None
    return set(run.stdout.split()) if run.returncode == 0 else None


def test_a_run_without_trouble_proves_nothing() -> None:
    """The control of the control: where the unprotected run shows no damage the demo fails. The seed loses nothing."""
    run = _demo("--payments", "3", "--kills", "0", "--mode", "naive", "--consumers", "1", "--seed", "3")
    assert "proves nothing" in " ".join(run.stdout.split())
    assert run.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--mode", "exactly-once"), "naive, store and inbox"),
        (("--input", __file__), "no usable id"),
        (("--payments", "0"), "--payments"),
    ],
)
def test_bad_arguments_are_told(arguments: tuple[str, ...], says: str) -> None:
    """A wrong argument is answered with what to say instead, and exit code 2."""
    run = _demo(*arguments)
    assert run.returncode == 2
    assert says in run.stderr
