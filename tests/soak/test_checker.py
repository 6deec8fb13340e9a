"""The checker itself: it must see each thing that must not be, and excuse only what a death explains."""

from __future__ import annotations

from typing import Any

import pytest

from .cells import CELLS
from .checker import Life, check
from .storm import damaged_queues, verdict

ATTEMPT, AGAIN = "attempt m1 k 1 r1 1 0.0", "attempt m1 k 2 r2 2 5.0"
DONE, DONE_AGAIN = "completed k 1 1 0.1", "completed k 2 2 5.1"
ONE, TWO = ("m1", "r1", 1), ("m1", "r2", 2)


def look(lines: list[str], effects: list[tuple[str, str, int]], **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"mode": "store", "lease": 4.0, "forgets": False, "left": [], **options}
    lives = settings.pop("lives", {1: Life("consumer"), 2: Life("consumer")})
    dead, wanted = settings.pop("dead", {}), settings.pop("wanted", {"m1": "good"})
    return check([line.split(" ") for line in lines], effects, dead, lives, wanted, **settings)


def test_what_is_done_once_is_well() -> None:
    """Nothing is said of a message that was handled, completed and acked."""
    found = look([ATTEMPT, DONE, "acking k 1 0.2"], [ONE])
    assert found["wrong"] == []
    assert (found["effects"], found["doubled"], found["lost"]) == (1, 0, 0)


def test_a_death_before_the_completion_excuses_one_double() -> None:
    """I2: one effect more for each execution that was killed between its effect and its completion, and no two."""
    killed = {1: Life("consumer", killed=True), 2: Life("consumer")}
    found = look([ATTEMPT, AGAIN, DONE_AGAIN, "acking k 2 5.2"], [ONE, TWO], lives=killed)
    assert (found["doubled"], found["doubled_by"], found["unexcused"]) == (1, {"killed": 1}, 0)
    found = look([ATTEMPT, AGAIN, DONE_AGAIN], [ONE, ONE, TWO, TWO], lives=killed)
    assert found["unexcused"] == 2


UNCLEAR = [f"unclear k 1 {asked} StoreUnavailable 1 {asked + 1.5}" for asked in (0.1, 1.7, 3.3)]


def test_a_completion_given_up_in_doubt_excuses_one_double() -> None:
    """I2, I15: a store that answers nobody for a lease's time leaves no way to tell. The next one runs after it."""
    found = look([ATTEMPT, *UNCLEAR, AGAIN, DONE_AGAIN, "acking k 2 5.2"], [ONE, TWO])
    assert (found["doubled"], found["doubled_by"], found["unexcused"]) == (1, {"in doubt": 1}, 0)
    asked = look([ATTEMPT, *UNCLEAR, AGAIN, DONE_AGAIN], [ONE, TWO], wanted={"m1": "asked"})
    assert asked["unexcused"] == 1, "a probe sees the effect"


@pytest.mark.parametrize(
    "lines",
    [
        [ATTEMPT, *UNCLEAR[:2], AGAIN, DONE_AGAIN],
        [ATTEMPT, *UNCLEAR, *(f"completed j{n} 9 3 {n}" for n in range(1, 5)), AGAIN, DONE_AGAIN],
        [ATTEMPT, *UNCLEAR, "attempt m1 k 2 r2 2 1.9", DONE_AGAIN],
        [ATTEMPT, UNCLEAR[0], "refused k 1 1 3.2", AGAIN, DONE_AGAIN],
    ],
    ids=["given up too early", "others were answered", "taken over while it was leased", "it had an answer"],
)
def test_a_doubt_that_need_not_be_excuses_nothing(lines: list[str]) -> None:
    """Only a silence that lasts for as good as the lease is an excuse."""
    assert look(lines, [ONE, TWO])["unexcused"] == 1


@pytest.mark.parametrize(
    ("lines", "effects", "options", "broken"),
    [
        ([ATTEMPT, DONE, AGAIN, DONE_AGAIN], [ONE, TWO], {}, "superseded"),
        ([ATTEMPT, AGAIN, DONE_AGAIN], [ONE, TWO], {}, "unexcused"),
        ([ATTEMPT, DONE, AGAIN], [ONE, TWO], {"lives": {1: Life("", killed=True), 2: Life("")}}, "unexcused"),
        ([ATTEMPT, AGAIN], [ONE, TWO], {"mode": "inbox", "lives": {1: Life("", killed=True)}}, "unexcused"),
        ([ATTEMPT, AGAIN], [ONE, TWO], {"wanted": {"m1": "asked"}, "lives": {1: Life("", True), 2: Life("", True)}},
         "unexcused"),
        ([ATTEMPT, "acking k 1 0.1"], [ONE], {}, "acked_early"),
        ([ATTEMPT], [], {}, "lost"),
        ([], [], {"wanted": {"m1": "never"}}, "lost"),
        ([ATTEMPT, DONE], [ONE], {"wanted": {}}, "unexpected"),
        ([ATTEMPT, DONE], [ONE], {"left": ["m1"]}, "unexpected"),
        ([ATTEMPT, DONE], [ONE], {"lives": {1: Life("consumer", status=70)}}, "unexpected"),
        ([ATTEMPT, ATTEMPT.replace("r1 1", "r2 2"), DONE], [ONE], {}, "unexpected"),
    ],
)  # fmt: skip
def test_what_must_not_be_is_told(
    lines: list[str], effects: list[tuple[str, str, int]], options: dict[str, Any], broken: str
) -> None:
    """I1, I2, I4, I6: each is counted where it belongs, and said in words."""
    found = look(lines, effects, **options)
    assert found[broken] == 1
    assert any(text.startswith(broken.replace("_", " ")) for text in found["wrong"])


@pytest.mark.parametrize(
    ("found", "damaged", "told"),
    [
        ({}, 0, "held"),
        ({}, 1, "held"),
        ({"lost": 8, "unexpected": 1}, 0, "BROKEN: lost, unexpected"),
        ({"lost": 8, "unexpected": 1}, 1, "RABBITMQ DAMAGED: lost, unexpected"),
        ({"lost": 8, "unexcused": 1}, 1, "BROKEN: lost, unexcused"),
        ({"acked_early": 1}, 1, "BROKEN: acked_early"),
    ],
)
def test_a_damaged_queue_excuses_no_more_than_what_does_not_come(
    found: dict[str, int], damaged: int, told: str
) -> None:
    """By RabbitMQ's own log a queue is damaged: what does not come is RabbitMQ's, a double or an early ack is not."""
    nothing = dict.fromkeys(("lost", "acked_early", "unexpected", "superseded", "unexcused", "doubled"), 0)
    cell = next(cell for cell in CELLS if cell.name == "store:redis+rabbitmq")
    assert verdict(cell, {**nothing, **found, "damaged_queues": damaged}) == told


LED = "[notice] queue 'k1.{}' in vhost '/': candidate -> leader in term: 2 machine version: 2"
UNLED = "[info] {{'%2F_k1.{}','node@localhost'}}: leader call - leader not known. Command will be forwarded once"
STARTED = "[info] Starting RabbitMQ 3.10.8 on Erlang"


def test_a_log_tells_which_queues_are_damaged() -> None:
    """A crashed process, and a queue without a leader since the last start; not one that had to wait for its leader."""
    log = [STARTED, LED.format("a"), LED.format("b"), STARTED, UNLED.format("a"), UNLED.format("b"), LED.format("a")]
    assert damaged_queues("\n".join(log), "k1") == ["k1.b"]
    assert damaged_queues("\n".join([*log, STARTED, LED.format("b")]), "k1") == []
    assert damaged_queues("[error] ** State machine '%2F_k1.c' terminating", "k1") == ["k1.c"]
    assert damaged_queues("\n".join(log), "k2") == []
