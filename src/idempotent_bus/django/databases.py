"""What SQLAlchemy must know of a Django database: its dialect, and an engine for connections of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import sqlalchemy as sa
from django.db import connections
from sqlalchemy.engine import URL, Dialect

from ..errors import ConfigurationError
from ..watchdog import patient_engine

__all__ = ["VENDORS", "check_atomic", "dialect_of", "engine_of", "known", "unsupported"]

#: Seconds: as long as a claim may wait.
ANSWER_TIMEOUT: Final = 60.0
#: Django's names of the databases that we know.
VENDORS: Final = ("postgresql", "mysql", "sqlite")
#: Oldest versions, as Django's connection tells them.
_SQLITE: Final = (3, 35)

#: OPTIONS that concern only Django's own cursors, pools and transactions.
_DJANGOS: Final = {
    "postgresql": {"isolation_level", "pool", "server_side_binding", "cursor_factory", "context", "prepare_threshold"},
    "mysql": {"isolation_level", "conv", "cursorclass", "use_unicode"},
    "sqlite": {"transaction_mode", "detect_types", "check_same_thread"},
}
#: OPTIONS that the drivers of MySQL and SQLite take alike, from Django and from us; libpq checks its own.
_PASSED_ON: Final = {
    "mysql": {
        "charset", "collation", "connect_timeout", "init_command", "read_default_file", "read_default_group",
        "read_timeout", "sql_mode", "ssl", "unix_socket", "write_timeout", "local_infile", "auth_plugin",
        # PyMySQL's and mysqlclient's own ways to say TLS; the same driver is used
        "ssl_ca", "ssl_cert", "ssl_disabled", "ssl_key", "ssl_mode", "ssl_verify_cert", "ssl_verify_identity",
    },
    "sqlite": {"timeout", "uri", "cached_statements"},
}  # fmt: skip


def check_atomic(connection: Any, what: str) -> None:
    """Raise ConfigurationError unless an atomic block of the user's is open.

    That which Django's TestCase puts around a test is none: what would fail in production fails in a test, too.
    """
    if connection.in_atomic_block:
        blocks = getattr(connection, "atomic_blocks", ())
        if not blocks or not all(getattr(block, "_from_testcase", False) for block in blocks):
            return
    elif not connection.get_autocommit():
        return  # you have switched it off, and commit yourself
    raise ConfigurationError(
        f"{what} outside of transaction.atomic() would be durable without the effect that it belongs to, or the effect "
        f"without it: do both within one `with transaction.atomic(using={connection.alias!r})`"
    )


def known(alias: str) -> Any:
    """This thread's Django connection. Raises ConfigurationError if there is none of that alias, or it is no use."""
    if alias not in connections:
        raise ConfigurationError(f"DATABASES has no {alias!r}")
    connection = connections[alias]
    wrong = unsupported(connection)
    if wrong:
        raise ConfigurationError(wrong)
    return connection


def unsupported(connection: Any) -> str:
    """Why this Django connection's database cannot be used; empty if it can. Does not connect."""
    if connection.vendor not in VENDORS:
        return (
            f"the database {connection.alias!r} is a {connection.vendor}; PostgreSQL, MariaDB, MySQL, SQLite are known"
        )
    if connection.vendor == "sqlite" and connection.Database.sqlite_version_info < _SQLITE:
        return "SQLite 3.35 or newer is needed; update Python or the system's SQLite"
    return ""


def dialect_of(connection: Any) -> Dialect:
    """The dialect of a Django connection, as an engine's that has connected knows it. Connects.

    Raises ConfigurationError, or Django's error if the database cannot be reached.
    """
    wrong = unsupported(connection)
    if wrong:
        raise ConfigurationError(wrong)
    connection.ensure_connection()
    kind: Any = URL.create(_drivername(connection)).get_dialect()
    made = kind(dbapi=connection.Database)
    if connection.vendor == "mysql":
        made.is_mariadb = bool(connection.mysql_is_mariadb)
        made.server_version_info = tuple(connection.mysql_version)
    dialect: Dialect = made
    return dialect


def engine_of(alias: str, *, answer_timeout: float = ANSWER_TIMEOUT, **engine_options: Any) -> sa.Engine:
    """An engine for the database that Django knows as `alias`, with connections of its own.

    From its entry in DATABASES; options that concern only Django's way of using it are left out. answer_timeout:
    seconds that a server's answer is waited for, where OPTIONS say nothing else. engine_options: for SQLAlchemy's
    `create_engine`. Raises ConfigurationError for what cannot be carried over, without any value in it.
    """
    connection = known(alias)
    settings = connection.settings_dict
    kind = connection.vendor
    options = {name: value for name, value in (settings.get("OPTIONS") or {}).items() if name not in _DJANGOS[kind]}
    prepare: Callable[[Any], None] | None
    url, arguments, prepare = _CARRIERS[kind](connection, settings, options)
    options = {"hide_parameters": True, "connect_args": arguments, **engine_options}
    engine = patient_engine(url, answer_timeout, **options)
    if prepare is not None:
        run = prepare

        def on_connect(driver: Any, _: Any) -> None:
            run(driver)

        sa.event.listen(engine, "connect", on_connect)
    return engine


def _drivername(connection: Any) -> str:
    """SQLAlchemy's name of the driver that Django uses."""
    package = connection.Database.__name__.partition(".")[0]
    if connection.vendor == "sqlite":
        return "sqlite"
    return {
        "psycopg": "postgresql+psycopg",
        "psycopg2": "postgresql+psycopg2",
        "MySQLdb": "mysql+mysqldb",
        "pymysql": "mysql+pymysql",  # installed as MySQLdb
    }.get(package, connection.vendor)


def _for_postgresql(connection: Any, settings: Any, options: dict[str, Any]) -> Any:
    role = options.pop("assume_role", None)

    def prepare(driver: Any) -> None:
        cursor = driver.cursor()
        cursor.execute(f"SET ROLE {connection.ops.quote_name(role)}")
        cursor.close()
        driver.commit()

    return _url(connection, settings), options, prepare if role else None


def _for_mysql(connection: Any, settings: Any, options: dict[str, Any]) -> Any:
    _refuse_unknown(connection, options)
    host = str(settings.get("HOST") or "")
    if host.startswith("/"):
        options["unix_socket"] = host
        settings = {**settings, "HOST": "", "PORT": ""}
    return _url(connection, settings, {"charset": "utf8mb4"} if "charset" not in options else {}), options, None


def _for_sqlite(connection: Any, settings: Any, options: dict[str, Any]) -> Any:
    name = str(settings["NAME"])
    if name == ":memory:" or "mode=memory" in name or name.startswith("file:memorydb"):
        raise ConfigurationError(
            f"the database {connection.alias!r} is in memory, where only its own connection can see it: name a file"
        )
    first = options.pop("init_command", None)  # Django 5.1
    _refuse_unknown(connection, options)
    if name.startswith("file:"):
        options["uri"] = True

    def prepare(driver: Any) -> None:
        for statement in str(first).split(";"):
            driver.execute(statement.strip())

    url = URL.create("sqlite", database=name, query={"uri": "true"} if name.startswith("file:") else {})
    return url, options, prepare if first else None


_CARRIERS: Final = {"postgresql": _for_postgresql, "mysql": _for_mysql, "sqlite": _for_sqlite}


def _url(connection: Any, settings: Any, query: dict[str, str] | None = None) -> URL:
    port = settings.get("PORT")
    return URL.create(
        _drivername(connection),
        username=settings.get("USER") or None,
        password=settings.get("PASSWORD") or None,
        host=settings.get("HOST") or None,
        port=int(port) if port else None,
        database=settings.get("NAME") or None,
        query=query or {},
    )


def _refuse_unknown(connection: Any, options: dict[str, Any]) -> None:
    unknown = sorted(set(options) - _PASSED_ON[connection.vendor])
    if unknown:
        raise ConfigurationError(
            f"DATABASES[{connection.alias!r}]['OPTIONS'] has {', '.join(map(repr, unknown))}, which cannot be "
            "carried over to a connection of our own: leave it out in an entry of its own, and name that one"
        )
