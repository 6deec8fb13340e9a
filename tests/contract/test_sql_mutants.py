"""Does the contract notice, on each database? The SQL store with one protection taken out of its SQL.

The same rules as in `test_mutants.py`: a replacement that no longer applies is an error, and only an AssertionError
kills. MySQL's way (no sequence, no RETURNING) runs on MariaDB, which understands it too.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from stores import drop_tables
from test_mutants import Mutant, check, replaced, survivors

import servers
from idempotent_bus import dialects
from idempotent_bus.errors import StoreUnavailable
from idempotent_bus.model import Claimed, ClaimRequest, Hold
from idempotent_bus.stores import sql, sql_flavours
from idempotent_bus.testing.store_contract import Subject

STALE = ("test_a_stale_hold_can_do_nothing", "test_a_nonce_used_again_does_not_revive_an_old_token")
RACE = ("test_one_of_100_racing_threads_wins", "test_busy_says_when_and_changes_nothing")
EVERYTHING = os.environ.get("IDEMPOTENT_BUS_LONG") == "1"
MAIN = {
    "token not compared",
    "nonce not compared",
    "attempts not counted",
    "lease not looked at",
    "completed not final for claims",
    "an abandoned record does not conflict",
    "tokens end with the record",
    "the verdict is not obeyed",
    "the doubt ends with a reservation",
    "abandon releases",
    "a quarantine expires",
    "a claim runs over a quarantined record",
    "resolve does not look at the state",
    "what is held is forgotten",
}
FILES = {"sqlite": "sqlite", "postgresql": "postgresql", "mariadb": "mysql"}


BOTH = [
    Mutant("token not compared", "", "token = :token", ":token = :token", STALE),
    Mutant("nonce not compared", "", " AND nonce = {NONCE}", "", STALE[:1]),
    Mutant("results are not kept", "", "state = 3, result = {RESULT}", "state = 3, result = NULL",
           ("test_results_come_back_as_they_were", "test_an_empty_result_is_not_none")),
    Mutant("completed not final for its holder", "", "state IN (1, 2, 4)", "state IN (1, 2, 3, 4)",
           ("test_completed_is_final",)),
    Mutant("a repeated release fails", "", "state IN (1, 2, 4)", "state IN (1, 2)", ("test_repeats_return_true",)),
    Mutant("a repeated completion fails", "", "AND state = 3", "AND state = 9", ("test_repeats_return_true",)),
    Mutant("a look-up shows what is forgotten", "", "kept_until > {LOOKUP}", "kept_until > 0",
           ("test_it_changes_nothing",)),
    Mutant("a purge takes what is live", "", "purge_after <= {PURGE} AND kept_until <= {PURGE}", "{PURGE} > 0",
           ("test_it_deletes_what_is_over_and_nothing_else",)),
    Mutant("what is held is forgotten", "", "state IN (3, 4) OR (state IN (1, 2) AND lease_ends <= {now})", "state < 5",
           ("test_what_is_held_is_not_forgotten",)),
    Mutant("nothing is forgotten on demand", "", "SET kept_until = 0, result", "SET result",
           ("test_what_is_over_is_forgotten", "test_who_held_what_was_forgotten_has_no_say")),
    Mutant("abandon releases", "", "SET state = 2, attempts", "SET state = 4, attempts",
           ("test_an_abandoned_claim_is_taken_over_at_once", "test_an_abandoned_reservation_is_in_doubt")),
    Mutant("abandon for anybody", "", "-- name: abandon\n",
           "-- name: abandon\nUPDATE {records} SET state = 2, attempts = {ATTEMPTS}, lease_ends = 0 WHERE {KEY};\n"
           "-- name: as it was\n",
           ("test_a_stale_hold_can_do_nothing", "test_abandon_repeated_returns_true", "test_completed_is_final")),
    Mutant("abandon waits for the lease", "", "SET state = 2, attempts = {ATTEMPTS}, lease_ends = {CLOCK},",
           "SET state = 2, attempts = {ATTEMPTS},",
           ("test_an_abandoned_claim_is_taken_over_at_once",)),
    Mutant("abandon does not write the count", "", "SET state = 2, attempts = {ATTEMPTS},", "SET state = 2,",
           ("test_abandoning_writes_the_count",)),
    Mutant("a quarantine expires", "", "kept_until = {far},{GAP}purge_after = {far}",
           "kept_until = kept_until, purge_after = {far}", ("test_it_is_kept_until_it_is_resolved",)),
    Mutant("a purge takes what is quarantined", "", "purge_after <= {PURGE} AND kept_until <= {PURGE}",
           "(state = 5 OR (purge_after <= {PURGE} AND kept_until <= {PURGE}))",
           ("test_it_is_kept_until_it_is_resolved",)),
    Mutant("a quarantined record is not listed", "", "kept_until = {far},{GAP}purge_after = {far}",
           "kept_until = {far}", ("test_the_list_is_in_order_and_in_pages",)),
    Mutant("what is over is quarantined", "", "state IN (1, 2, 5)", "state < 6", ("test_who_may_quarantine",)),
    Mutant("a repeated quarantine fails", "", "state IN (1, 2, 5)", "state IN (1, 2)", ("test_who_may_quarantine",)),
    Mutant("a repeat writes the note again", "", "{KEEP_NOTE}", "result = {NOTE}", ("test_who_may_quarantine",)),
    Mutant("resolve does not look at the state", "", "(state = 5 OR", "(state < 6 OR",
           ("test_only_what_is_quarantined_is_resolved",)),
    Mutant("resolve leaves the old holder its hold", "", "nonce = {NONCE}, result", "result",
           ("test_after_a_person_decided_the_old_holder_has_no_say",)),
    Mutant("resolve keeps the attempts", "", "attempts = {KEEP_ATTEMPTS}", "attempts = attempts",
           ("test_resolved_as_not_done",)),
    Mutant("resolve keeps for ever", "",
           "kept_until = {NOW} + {RETENTION},{GAP}purge_after = {NOW} + {RETENTION}\nWHERE {KEY} AND (",
           "purge_after = purge_after\nWHERE {KEY} AND (",
           ("test_resolved_as_done", "test_what_was_resolved_is_purged_in_time")),
    Mutant("what was resolved is not purged", "",
           ",{GAP}purge_after = {NOW} + {RETENTION}\nWHERE {KEY} AND (", "\nWHERE {KEY} AND (",
           ("test_what_was_resolved_is_purged_in_time",)),
]  # fmt: skip

# What a file writes where BOTH has a word in capitals.
SPELLING = {
    "sqlite": {
        "NONCE": ":nonce",
        "RESULT": ":result",
        "LOOKUP": "clock.now",
        "PURGE": "{now}",
        "CLOCK": "{now}",
        "ATTEMPTS": ":attempts",
        "KEEP_NOTE": "result = CASE WHEN state = 5 THEN result ELSE :note END",
        "NOTE": ":note",
        "KEEP_ATTEMPTS": "CASE WHEN :state = 3 THEN attempts ELSE 0 END",
        "NOW": "{now}",
        "RETENTION": ":retention",
        "GAP": " ",
        "KEY": "record_key = :key",
    },
    "postgresql": {
        "NONCE": "CAST(:nonce AS uuid)",
        "RESULT": "CAST(:result AS bytea)",
        "LOOKUP": "clock.now",
        "PURGE": "(SELECT {now})",
        "CLOCK": "clock.now",
        "ATTEMPTS": "CAST(:attempts AS integer)",
        "KEEP_NOTE": "result = CASE WHEN state = 5 THEN result ELSE CAST(:note AS bytea) END",
        "NOTE": "CAST(:note AS bytea)",
        "KEEP_ATTEMPTS": "CASE WHEN CAST(:state AS smallint) = 3 THEN attempts ELSE 0 END",
        "NOW": "{now}",
        "RETENTION": "CAST(:retention AS bigint)",
        "GAP": "\n    ",
        "KEY": "record_key = CAST(:key AS uuid)",
    },
    "mysql": {
        "NONCE": ":nonce",
        "RESULT": ":result",
        "LOOKUP": "{now}",
        "PURGE": "{start}",
        "CLOCK": "{now}",
        "ATTEMPTS": ":attempts",
        "KEEP_NOTE": "result = IF(state = 5, result, :note)",
        "NOTE": ":note",
        "KEEP_ATTEMPTS": "IF(:state = 3, attempts, 0)",
        "NOW": "{now}",
        "RETENTION": ":retention",
        "GAP": " ",
        "KEY": "record_key = :key",
    },
}

UPSERT = [
    Mutant("a repeat gets a new token", "", "{OURS} THEN r.token", "false THEN r.token",
           ("test_the_same_nonce_is_recognised",)),
    Mutant("a repeat counts again", "", "{OURS} THEN r.attempts", "false THEN r.attempts",
           ("test_the_same_nonce_is_recognised",)),
    Mutant("a repeat forgets the takeover", "", "{OURS} THEN r.flags", "{OURS} THEN 0",
           ("test_a_takeover_asked_again_is_still_a_takeover",)),
    Mutant("attempts not counted", "", "ELSE r.attempts + {EXCLUDED}.attempts", "ELSE r.attempts",
           ("test_attempts_are_counted_by_the_claim", "test_a_lapsed_lease_is_taken_over")),
    Mutant("lease not looked at", "", "r.lease_ends <= {MOMENT} AND", "", RACE),
    Mutant("completed not final for claims", "", "OR r.state = 4", "OR r.state IN (3, 4)",
           ("test_completed_is_final", "test_results_come_back_as_they_were")),
    Mutant("an abandoned record does not conflict", "", "(r.fingerprint <> {EXCLUDED}.fingerprint) IS NOT TRUE", "true",
           ("test_an_abandoned_record_still_conflicts",)),
    Mutant("redrive not looked at", "", "OR {EXCLUDED}.redrive > r.redrive", "",
           ("test_a_larger_redrive_starts_afresh",)),
    Mutant("redrive shrinks", "", "{MAX}(r.redrive, {EXCLUDED}.redrive)", "{EXCLUDED}.redrive",
           ("test_the_redrive_number_only_grows",)),
    Mutant("takeover not told", "", "WHEN r.state = 2 THEN 1", "WHEN r.state = 2 THEN 0",
           ("test_a_lapsed_lease_is_taken_over", "test_a_reservation_of_an_abandoned_record_says_so")),
    Mutant("reservation taken over", "", "WHEN r.state = 2 THEN 1", "WHEN r.state < 3 THEN 1",
           ("test_a_lapsed_reservation_is_not_taken_over",)),
    Mutant("tokens end with the record", "", "{next_token}", "1",
           ("test_tokens_only_grow", "test_a_completed_record_is_forgotten_after_its_retention")),
    Mutant("the doubt ends with a reservation", "", "WHEN r.state = 1 THEN r.flags ELSE 0", "ELSE 0",
           ("test_a_reservation_that_lapsed_passes_the_doubt_on",)),
    Mutant("a release does not end the doubt", "", "WHEN r.state = 1 THEN r.flags ELSE 0", "ELSE r.flags",
           ("test_the_doubt_ends_with_a_release_or_with_the_record",)),
    Mutant("a forgotten record leaves its doubt", "", "WHEN {FORGOTTEN} THEN 0 WHEN r.state = 2", "WHEN r.state = 2",
           ("test_the_doubt_ends_with_a_release_or_with_the_record",)),
    Mutant("a claim runs over a quarantined record", "", "OR r.state = 4", "OR r.state IN (4, 5)",
           ("test_nothing_runs_over_a_quarantined_record", "test_it_is_kept_until_it_is_resolved")),
    Mutant("a redrive runs over a quarantined record", "", "OR r.state = 4",
           "OR r.state = 4 OR (r.state = 5 AND {EXCLUDED}.redrive > r.redrive)",
           ("test_nothing_runs_over_a_quarantined_record",)),
]  # fmt: skip
for one, more in (
    (
        "sqlite",
        {
            "EXCLUDED": "excluded",
            "MOMENT": "{moment}",
            "OURS": "{ours}",
            "FORGOTTEN": "{forgotten}",
            "MAX": "max",
        },
    ),
    (
        "postgresql",
        {
            "EXCLUDED": "EXCLUDED",
            "MOMENT": "{now}",
            "OURS": "was.ours",
            "FORGOTTEN": "was.forgotten",
            "MAX": "greatest",
        },
    ),
):
    SPELLING[one] |= more

MYSQL = [
    Mutant("nonce not recognised", "", "AND nonce = VALUES(nonce) THEN", "AND false THEN",
           ("test_the_same_nonce_is_recognised", "test_the_same_nonce_keeps_a_lapsed_lease")),
    Mutant("a repeat forgets the takeover", "", "2 + flags % 2", "2",
           ("test_a_takeover_asked_again_is_still_a_takeover",)),
    Mutant("attempts not counted", "", "ELSE attempts + VALUES(attempts)", "ELSE attempts",
           ("test_attempts_are_counted_by_the_claim", "test_a_lapsed_lease_is_taken_over")),
    Mutant("lease not looked at", "", "AND lease_ends <= {now} THEN", "THEN", RACE),
    Mutant("lease never lapses", "", "AND lease_ends <= {now} THEN", "AND false THEN",
           ("test_a_lapsed_lease_is_taken_over",)),
    Mutant("completed not final for claims", "", "WHEN state = 4 THEN 6", "WHEN state > 2 THEN 6",
           ("test_completed_is_final", "test_results_come_back_as_they_were")),
    Mutant("an abandoned record does not conflict", "", "AND fingerprint <> VALUES(fingerprint) THEN", "AND false THEN",
           ("test_an_abandoned_record_still_conflicts",)),
    Mutant("None conflicts", "", "AND fingerprint <> VALUES(fingerprint) THEN",
           "AND NOT fingerprint <=> VALUES(fingerprint) THEN",
           ("test_a_takeover_takes_the_new_fingerprint",)),
    Mutant("redrive not looked at", "", "OR VALUES(redrive) > redrive", "", ("test_a_larger_redrive_starts_afresh",)),
    Mutant("redrive shrinks", "", "ELSE GREATEST(redrive, VALUES(redrive))", "ELSE VALUES(redrive)",
           ("test_the_redrive_number_only_grows",)),
    Mutant("takeover not told", "", "6 + (state = 2 OR flags % 2 = 1)", "6",
           ("test_a_lapsed_lease_is_taken_over", "test_a_reservation_of_an_abandoned_record_says_so")),
    Mutant("reservation taken over", "", "6 + (state = 2 OR flags % 2 = 1)", "7",
           ("test_a_lapsed_reservation_is_not_taken_over",)),
    Mutant("the doubt ends with a reservation", "", "(state = 2 OR flags % 2 = 1)", "(state = 2)",
           ("test_a_reservation_that_lapsed_passes_the_doubt_on",)),
    Mutant("a release does not end the doubt", "", "WHEN state = 4 THEN 6", "WHEN state = 4 THEN 6 + flags % 2",
           ("test_the_doubt_ends_with_a_release_or_with_the_record",)),
    Mutant("a claim runs over a quarantined record", "", "WHEN state = 4 THEN 6", "WHEN state IN (4, 5) THEN 6",
           ("test_nothing_runs_over_a_quarantined_record", "test_it_is_kept_until_it_is_resolved")),
    Mutant("a redrive runs over a quarantined record", "", "WHEN state = 4 THEN 6",
           "WHEN state = 4 OR (state = 5 AND VALUES(redrive) > redrive) THEN 6",
           ("test_nothing_runs_over_a_quarantined_record",)),
    Mutant("tokens end with the record", "", "{next_token}", "1",
           ("test_tokens_only_grow", "test_a_completed_record_is_forgotten_after_its_retention")),
    Mutant("the verdict is not obeyed", "", "nonce = IF(flags >= 4, VALUES(nonce), nonce)", "nonce = VALUES(nonce)",
           ("test_busy_says_when_and_changes_nothing",)),
]  # fmt: skip

# The claim says no, the look at the record says yes: a store that contradicts itself must say that it does not know.
CLOSED = [
    Mutant("nonce not recognised", "", "(r.nonce = {EXCLUDED}.nonce", "(false",
           ("test_the_same_nonce_is_recognised",)),
    Mutant("lease never lapses", "", "r.lease_ends <= {MOMENT} AND", "false AND",
           ("test_a_lapsed_lease_is_taken_over",)),
    Mutant("released not claimable", "", "OR r.state = 4", "OR false", ("test_a_released_record_takes_the_newest",)),
    Mutant("None conflicts", "", "(r.fingerprint <> {EXCLUDED}.fingerprint) IS NOT TRUE",
           "r.fingerprint = {EXCLUDED}.fingerprint", ("test_a_takeover_takes_the_new_fingerprint",)),
]  # fmt: skip
CLOSED_MYSQL = [
    Mutant("a released record conflicts", "", "WHEN state <> 4 AND fingerprint", "WHEN fingerprint",
           ("test_a_released_record_takes_the_newest",)),
]  # fmt: skip


def spelt(mutant: Mutant, file: str) -> Mutant:
    old, new = mutant.old, mutant.new
    for word, text in SPELLING[file].items():
        old, new = (part.replace("{" + word + "}", text) for part in (old, new))
    return Mutant(mutant.name, file, old, new, mutant.killers)


def cases(upsert: list[Mutant], mysql: list[Mutant]) -> list[Any]:
    """Each mutant on each database whose SQL it is of; in the short form servers get only the main protections."""
    return [
        pytest.param(database, spelt(mutant, file), id=f"{database}-{mutant.name}")
        for database, file in FILES.items()
        for mutant in (mysql if file == "mysql" else upsert)
        if EVERYTHING or database == "sqlite" or mutant.name in MAIN
    ]


# Many completions are one statement on the servers, and a loop over the single one on SQLite.
TOGETHER = ("test_completions_together_agree_with_single_ones",)
MANY = [
    Mutant("together, the hold is not compared", "postgresql",
           "AND r.token = a.token AND r.nonce = a.nonce\n  WHERE", "\n  WHERE", TOGETHER),
    Mutant("together, what is over is completed again", "postgresql",
           "(SELECT now FROM clock) AND r.state IN (1, 2)", "(SELECT now FROM clock)", TOGETHER),
    Mutant("together, each has the first one's retention", "postgresql",
           "clock.now + ours.retention,\n", "clock.now + (SELECT min(retention) FROM ours),\n",
           ("test_completions_together_keep_their_retention",)),
    Mutant("together, the hold is not compared", "mysql",
           "AND r.token = a.token AND r.nonce = a.nonce", "", TOGETHER),
    Mutant("together, what is over is completed again", "mysql",
           "WHERE r.kept_until > {now} AND r.state IN (1, 2)", "WHERE r.kept_until > {now}", TOGETHER),
    Mutant("together, nobody looks whose it is", "mysql", "AND (record_key, token, nonce) IN ({holds})", "", TOGETHER),
]  # fmt: skip
KILLED = cases(BOTH + UPSERT, BOTH + MYSQL) + [
    pytest.param(database, mutant, id=f"{database}-{mutant.name}")
    for mutant in MANY
    for database, file in FILES.items()
    if file == mutant.where
]


class Mutated:
    """Stands where the package's files are, and gives one of them changed."""

    def __init__(self, path: Any, mutant: Mutant) -> None:
        self._path = path
        self._mutant = mutant

    def joinpath(self, name: str) -> Mutated:
        return Mutated(self._path.joinpath(name), self._mutant)

    def read_text(self, encoding: str) -> str:
        return replaced(self._path.read_text(encoding), self._mutant.old, self._mutant.new)


def drop_all(url: str, prefix: str) -> None:
    """The tables, and the sequence that outlives them on purpose."""
    drop_tables(url, prefix)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP SEQUENCE IF EXISTS {prefix}tokens")
    engine.dispose()


@contextlib.contextmanager
def place(database: str, directory: Path, kind: type[sql.SQLStore] = sql.SQLStore) -> Iterator[Subject]:
    prefix = f"t{uuid.uuid4().hex[:12]}_"
    if database == "sqlite":
        url = f"sqlite:///{directory / 'mutant.db'}"
    else:
        url = servers.postgresql() if database == "postgresql" else servers.mariadb()
    engine, timeout = sql.open_engine(url, timeout=10, options={"pool_size": 20, "max_overflow": 0})
    store = kind(engine, table_prefix=prefix, timeout=timeout, _own=True)
    try:
        yield Subject(lambda: store)
    finally:
        store.close()
        if database != "sqlite":
            drop_all(url, prefix)


@pytest.mark.parametrize(("database", "mutant"), KILLED)
def test_sql_mutants_are_killed(database: str, mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check named for a mutant of a SQL file fails on it."""
    monkeypatch.setattr(dialects, "files", lambda package: Mutated(resources.files(package), mutant))
    with place(database, tmp_path) as subject:
        assert survivors(subject, mutant.killers) == []


@pytest.mark.parametrize(("database", "mutant"), cases(CLOSED, CLOSED_MYSQL))
def test_a_store_that_contradicts_itself_gives_no_answer(
    database: str, mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I9: refused by the claim, yet nothing in the record refuses it: StoreUnavailable, and never a guess."""
    monkeypatch.setattr(dialects, "files", lambda package: Mutated(resources.files(package), mutant))
    with place(database, tmp_path) as subject:
        for name in mutant.killers:
            with pytest.raises(StoreUnavailable):
                check(name)(subject)


class ReadThenWrite(sql.SQLStore):
    """A claim in two transactions, as guards with a SELECT before their INSERT have it."""

    def claim(self, request: ClaimRequest, /) -> Any:
        if self.lookup(request.key) is None:
            time.sleep(0.02)
            with self._engine.begin() as connection:
                table = self._tables.tables[f"{self._tables.info['prefix']}records"]
                connection.execute(table.delete().where(table.c.record_key == request.key))
        return super().claim(request)


class RenewsByKey(sql.SQLStore):
    """`renew_many` that answers by key alone."""

    def renew_many(self, holds: Sequence[Hold], /, *, lease: float, retention: float) -> list[bool]:
        renewed = super().renew_many(holds, lease=lease, retention=retention)
        good = {hold.key for hold, answer in zip(holds, renewed, strict=True) if answer}
        return [hold.key in good for hold in holds]


@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mariadb"])
@pytest.mark.parametrize(
    ("kind", "killers"),
    [
        (ReadThenWrite, ("test_one_of_100_racing_threads_wins",)),
        (RenewsByKey, ("test_renewals_stand_alone",)),
    ],
)
def test_sql_mutants_in_python_are_killed(
    database: str, kind: type[sql.SQLStore], killers: tuple[str, ...], tmp_path: Path
) -> None:
    """A claim in two steps is won by several; answers for one key are told apart by token and nonce."""
    with place(database, tmp_path, kind) as subject:
        assert survivors(subject, killers) == []


def test_a_refusal_that_does_not_compare_bodies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I8: the reading of a refused claim must tell a conflict from a duplicate."""
    refusal = sql_flavours._refusal

    def blind(request: ClaimRequest, state: int, fingerprint: Any, *rest: Any) -> Any:
        return refusal(request, state, None, *rest)

    monkeypatch.setattr(sql_flavours, "_refusal", blind)
    with place("sqlite", tmp_path) as subject:
        assert survivors(subject, ("test_another_fingerprint_conflicts",)) == []


def test_a_counter_outside_the_transaction_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's counter must be raised with each claim: without it, a key that was forgotten gets an old token."""
    raised = "SET value = :token WHERE value < :token"
    still = Mutant("counter stands still", "", raised, "SET value = value WHERE value > :token", ())
    monkeypatch.setattr(dialects, "files", lambda package: Mutated(resources.files(package), still))
    with place("sqlite", tmp_path) as subject:
        killers = ("test_tokens_only_grow", "test_a_completed_record_is_forgotten_after_its_retention")
        assert survivors(subject, killers) == []


# On the others `test_stores.py` is the control; in the long form they are run through this machinery too.
@pytest.mark.parametrize("database", ["sqlite", "mysql", *(["postgresql", "mariadb"] if EVERYTHING else [])])
def test_an_unmutated_copy_survives(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: through the same machinery, with nothing replaced, every killer named above passes."""
    nothing = Mutant("nothing", "", "INSERT INTO", "INSERT INTO", ())
    monkeypatch.setattr(dialects, "files", lambda package: Mutated(resources.files(package), nothing))
    if database == "mysql":
        monkeypatch.setattr(sql, "choose", sql_flavours.MySQL)
        monkeypatch.setattr("idempotent_bus.schema.has_sequences", lambda dialect: False)
    killers = tuple(sorted({name for case in KILLED for name in case.values[1].killers}))
    with place(database, tmp_path) as subject:
        assert survivors(subject, killers) == list(killers)
        assert isinstance(subject.store.claim(ClaimRequest(b"k" * 16, b"n" * 16, 1, 1)), Claimed)


def test_a_replacement_that_does_not_apply_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A protection that moved must not leave its mutant behind, unnoticed."""
    gone = Mutant("gone", "", "no such line", "", ())
    monkeypatch.setattr(dialects, "files", lambda package: Mutated(resources.files(package), gone))
    with place("sqlite", tmp_path) as subject, pytest.raises(LookupError):
        subject.store.claim(ClaimRequest(b"k" * 16, b"n" * 16, 1, 1))
