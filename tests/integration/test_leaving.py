"""Taking the library out: `idempotent-bus restore`, on both of our transports, read by plain kombu afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from kombu import Connection, Queue

import servers
from idempotent_bus import ConfigurationError, leaving
from idempotent_bus.cli import main


@pytest.fixture(params=["redis", "sqlite"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        return f"idempotent-{servers.real_redis()}"
    return f"idempotent-sqla+sqlite:///{tmp_path}/broker.db"


def test_what_we_hold_is_read_by_plain_kombu(broker: str, unique: str) -> None:
    """I1: after `restore`, plain kombu finds every message that our transport held: unacked by the dead, delayed."""
    with Connection(broker) as ours:
        queue = Queue(unique)(ours.channel())
        queue.declare()
        with ours.Producer() as producer:
            for number in range(3):
                producer.publish({"n": number}, routing_key=unique, headers={"inner-msg-id": f"{unique}-{number}"})
        held, delayed = queue.get(), queue.get()
        delayed.channel.basic_delay(delayed.delivery_tag, 600)
        live = CliRunner().invoke(main, ["restore", "--broker", broker, "--queue", unique])
        assert live.exit_code == 0, live.output
        assert "1 delayed" in live.output
        assert "left with live consumers: 1" in live.output
        forced = CliRunner().invoke(main, ["restore", "--broker", broker, "--queue", unique, "--force"])
        assert "1 unacked" in forced.output
        with Connection(broker.removeprefix("idempotent-")) as plain:
            found = []
            inbox = Queue(unique)(plain.channel())
            while (message := inbox.get()) is not None:
                found.append(message.payload["n"])
                message.ack()
        assert sorted(found) == [0, 1, 2]
        assert held.payload["n"] in found


@pytest.mark.parametrize("url", ["memory://", "nonsense://"])
def test_another_transport_is_told_so(url: str) -> None:
    """A broker that keeps nothing of ours is refused with the reason, not answered with "0 moved"."""
    run = CliRunner().invoke(main, ["restore", "--broker", url])
    assert run.exit_code == 2
    assert "--broker" in run.output


def test_the_function_refuses_too() -> None:
    """The same from code."""
    with Connection("memory://") as connection, pytest.raises(ConfigurationError, match="nothing to restore"):
        leaving.restore(connection)
