"""The contract over the SQL store's other ways: MySQL's claim (run on MariaDB), and engines that the user brings."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from test_mutants import check
from test_sql_mutants import drop_all

import servers
from idempotent_bus import schema
from idempotent_bus.stores import sql, sql_flavours
from idempotent_bus.testing import store_capabilities as capabilities
from idempotent_bus.testing import store_contract as suite
from idempotent_bus.testing.store_contract import Subject

# All of the contract in the long form; else what a wrong transaction or a wrong type would break.
MAIN = (
    "test_one_of_100_racing_threads_wins",
    "test_one_racer_takes_over_a_lapsed_lease",
    "test_late_completion_and_takeover_exclude_each_other",
    "test_several_stores_share_the_records",
    "test_completed_is_final",
    "test_repeats_return_true",
    "test_tokens_only_grow",
    "test_results_come_back_as_they_were",
    "test_a_batch_agrees_with_the_single_verbs",
    "test_one_racer_wins_each_key_of_overlapping_batches",
    "test_renewals_stand_alone",
    "test_it_shows_each_state",
    "test_it_deletes_what_is_over_and_nothing_else",
    "test_a_reservation_that_lapsed_passes_the_doubt_on",
    "test_the_doubt_ends_with_a_release_or_with_the_record",
    "test_abandon_repeated_returns_true",
    "test_nothing_runs_over_a_quarantined_record",
    "test_who_may_quarantine",
    "test_a_quarantine_and_a_takeover_exclude_each_other",
    "test_the_list_is_in_order_and_in_pages",
    "test_resolved_as_not_done",
    "test_only_what_is_quarantined_is_resolved",
    "test_what_is_over_is_forgotten",
    "test_completions_together_agree_with_single_ones",
    "test_completions_together_race_with_takeovers",
    "test_what_is_told_is_durable",
)

USERS = (
    "test_late_completion_and_takeover_exclude_each_other",
    "test_one_racer_takes_over_a_lapsed_lease",
    "test_tokens_only_grow",
    "test_one_racer_wins_each_key_of_overlapping_batches",
    "test_it_shows_each_state",
    "test_it_deletes_what_is_over_and_nothing_else",
    "test_abandon_repeated_returns_true",
    "test_who_may_quarantine",
    "test_a_quarantine_and_a_takeover_exclude_each_other",
    "test_only_what_is_quarantined_is_resolved",
    "test_completions_together_agree_with_single_ones",
)


def all_checks() -> tuple[str, ...]:
    owners: Any = (
        suite.StoreContract,
        capabilities.BatchContract,
        capabilities.CompletionsContract,
        capabilities.LookupContract,
        capabilities.PurgeContract,
        capabilities.ForgetContract,
        capabilities.QuarantineContract,
    )
    return tuple(name for owner in owners for name in dir(owner) if name.startswith("test_"))


EVERYTHING = os.environ.get("IDEMPOTENT_BUS_LONG") == "1"
CHECKS = all_checks() if EVERYTHING else MAIN


@pytest.fixture(scope="module")
def mysql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """MySQL's statements, on MariaDB: no sequence, no RETURNING."""
    url, prefix = servers.mariadb(), f"t{uuid.uuid4().hex[:12]}_"

    def open_as_mysql() -> sql.SQLStore:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sql, "choose", sql_flavours.MySQL)
            patch.setattr(schema, "has_sequences", lambda dialect: False)
            store = sql.open_sql(url, table_prefix=prefix)
            store.purge()  # so that the tables are made while the patch holds
        assert isinstance(store._flavour, sql_flavours.MySQL)
        return store

    subject = Subject(open_as_mysql)
    yield subject
    subject.close()
    drop_all(url, prefix)


@pytest.mark.parametrize("name", CHECKS)
def test_mysql_keeps_the_contract(mysql: Subject, name: str) -> None:
    """MySQL's claim, a transaction with a counter row, passes the contract's check."""
    check(name)(mysql)


ENGINES: dict[str, tuple[Callable[[], str], dict[str, Any]]] = {
    "sqlite": (lambda: "sqlite:///{directory}/mine.db", {"connect_args": {"timeout": 20}}),
    "sqlite autocommit": (lambda: "sqlite:///{directory}/mine.db", {"isolation_level": "AUTOCOMMIT"}),
    "postgresql": (servers.postgresql, {}),
    "postgresql autocommit": (servers.postgresql, {"isolation_level": "AUTOCOMMIT"}),
    "postgresql serializable": (servers.postgresql, {"isolation_level": "SERIALIZABLE"}),
    "mariadb": (servers.mariadb, {}),
    "mariadb autocommit": (servers.mariadb, {"isolation_level": "AUTOCOMMIT"}),
    "mariadb in another zone": (servers.mariadb, {"connect_args": {"init_command": "SET time_zone = '-07:00'"}}),
    # Without SQLAlchemy's FOUND_ROWS an UPDATE counts only the rows that it has changed.
    "mariadb with a creator": (servers.mariadb, {"creator": lambda: _by_hand(servers.mariadb())}),
}


def _by_hand(url: str) -> Any:
    import pymysql

    parts = sa.make_url(url).translate_connect_args(username="user")
    return pymysql.connect(**parts)


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Subject]]:
    made: dict[str, tuple[Subject, sa.Engine, str]] = {}

    class Subjects(dict[str, Subject]):
        def __missing__(self, name: str) -> Subject:
            url, options = ENGINES[name]
            there = url().format(directory=tmp_path_factory.mktemp("users"))
            engine = sa.create_engine(there, pool_size=20, **options)
            prefix = f"t{uuid.uuid4().hex[:12]}_"
            subject = Subject(lambda: sql.SQLStore(engine, table_prefix=prefix, timeout=20))
            made[name] = (subject, engine, prefix)
            return self.setdefault(name, subject)

    yield Subjects()
    for subject, engine, prefix in made.values():
        subject.close()
        if engine.dialect.name != "sqlite":
            drop_all(engine.url.render_as_string(hide_password=False), prefix)
        engine.dispose()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CHECKS if EVERYTHING else USERS)
def test_a_users_engine_keeps_the_contract(users: dict[str, Subject], engine: str, name: str) -> None:
    """Over an engine that the user brings, as it is configured, the store passes the contract's check."""
    check(name)(users[engine])
