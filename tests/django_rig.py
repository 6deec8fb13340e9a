"""A tiny Django project: one app with charges and cards, in SQLite, PostgreSQL and MariaDB at once.

Importing it configures Django for this process, once, under names that no other process has. Run as a program it is the
project's manage.py: `python django_rig.py relay --once`, with DJANGO_RIG naming the same names.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.modules["django_rig"] = sys.modules["__main__"]

import django
import pymysql
import pytest
from django.conf import settings
from sqlalchemy import create_engine, make_url, text

import servers

#: Django's alias of each database. SQLite is the default, the others are as their servers say.
ALIASES = ("default", "postgresql", "mariadb")
#: What is handed on to processes of our own: where the files are, the names' prefix, the settings of the library.
GIVEN: dict[str, Any] = json.loads(os.environ.get("DJANGO_RIG", "{}"))
PREFIX: str = GIVEN.get("prefix") or f"dj{uuid.uuid4().hex[:10]}_"
FOLDER = Path(GIVEN.get("folder") or f"{tempfile.gettempdir()}/idempotent-bus-django-{PREFIX}")
SPACE = PREFIX.rstrip("_")

# Django wants mysqlclient, which has to be compiled; PyMySQL says that it is one.
pymysql.version_info = (2, 2, 7, "final", 0)
pymysql.install_as_MySQLdb()


class OnlyOurs:
    """The servers hold the library's tables and the shop's; Django's own are in SQLite."""

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return app_label == "idempotent_bus" if db != "default" else None


def _database(alias: str) -> dict[str, Any]:
    if alias == "default":
        # Django 4.2 knows no transaction_mode.
        options: dict[str, Any] = {"timeout": 20}
        if django.VERSION >= (5, 1):
            options["transaction_mode"] = "IMMEDIATE"
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": str(FOLDER / "project.db"),
            "OPTIONS": options,
            "ATOMIC_REQUESTS": True,
        }
    url = make_url(
        GIVEN.get("urls", {}).get(alias) or (servers.POSTGRESQL if alias == "postgresql" else servers.MARIADB)
    )
    entry: dict[str, Any] = {
        "USER": url.username or "",
        "PASSWORD": url.password or "",
        "HOST": url.host or "",
        "PORT": url.port or "",
        # Not ATOMIC_REQUESTS: each request would open a block here too, also where no test has made this database.
        "CONN_MAX_AGE": 60,
    }
    if alias == "postgresql":
        options = {"options": f"-c search_path={SPACE}"}
        return {**entry, "ENGINE": "django.db.backends.postgresql", "NAME": url.database, "OPTIONS": options}
    return {**entry, "ENGINE": "django.db.backends.mysql", "NAME": SPACE}


if not settings.configured:
    settings.configure(
        SECRET_KEY="for tests only",
        USE_TZ=True,
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF="django_rig",
        INSTALLED_APPS=[
            "django.contrib.admin",
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.sessions",
            "django.contrib.messages",
            "idempotent_bus.django",
        ],
        MIDDLEWARE=[
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.middleware.csrf.CsrfViewMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
            "django.contrib.messages.middleware.MessageMiddleware",
        ],
        TEMPLATES=[
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "APP_DIRS": True,
                "OPTIONS": {
                    "context_processors": [
                        "django.template.context_processors.request",
                        "django.contrib.auth.context_processors.auth",
                        "django.contrib.messages.context_processors.messages",
                    ]
                },
            }
        ],
        PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
        DATABASES={alias: _database(alias) for alias in ALIASES},
        DATABASE_ROUTERS=["django_rig.OnlyOurs"],
        IDEMPOTENT_BUS={"TABLE_PREFIX": PREFIX, **GIVEN.get("bus", {})},
    )
    django.setup()

from django.contrib import admin  # noqa: E402
from django.db import connections, models, transaction  # noqa: E402
from django.http import HttpRequest, HttpResponse  # noqa: E402
from django.urls import path  # noqa: E402

from idempotent_bus.django import outbox  # noqa: E402
from idempotent_bus.django.models import InboxRecord, OutboxMessage, StoreRecord  # noqa: E402


class Charge(models.Model):
    """What was paid. Twice is an error."""

    payment_id = models.CharField(max_length=40, unique=True)

    class Meta:
        app_label = "shop"
        db_table = f"{PREFIX}charge"


class Card(models.Model):
    """What was issued. No unique constraint, so that a double shows."""

    payment_id = models.CharField(max_length=40)

    class Meta:
        app_label = "shop"
        db_table = f"{PREFIX}card"


def charge(request: HttpRequest, payment_id: str) -> HttpResponse:
    """A view under ATOMIC_REQUESTS."""
    Charge.objects.create(payment_id=payment_id)
    outbox.add({"payment_id": payment_id}, routing_key=request.GET["queue"])
    if "fail" in request.GET:
        raise ZeroDivisionError
    return HttpResponse("charged")


@transaction.non_atomic_requests
def careless(request: HttpRequest) -> HttpResponse:
    """A view that forgets the atomic block."""
    outbox.add({"payment_id": "p"}, routing_key="q")
    return HttpResponse("never")


urlpatterns = [
    path("charge/<str:payment_id>/", charge),
    path("careless/", careless),
    path("admin/", admin.site.urls),
]


@functools.cache
def make(alias: str) -> None:
    """Make the tables of one database, by the migrations; once in this process."""
    from django.core.management import call_command

    if alias == "default":
        FOLDER.mkdir(mode=0o700)  # not before: each process of pytest imports this
    elif alias == "postgresql":
        _on_server(servers.postgresql(), f"CREATE SCHEMA {SPACE}")
    elif alias == "mariadb":
        _on_server(servers.mariadb(), f"CREATE DATABASE {SPACE}")
    call_command("migrate", database=alias, verbosity=0, skip_checks=True)
    with connections[alias].schema_editor() as editor:
        editor.create_model(Charge)
        editor.create_model(Card)
    _made.append(alias)


_made: list[str] = []


def drop() -> None:
    """Remove all that was made."""
    for alias in _made:
        connections[alias].close()
    with contextlib.suppress(Exception):
        if "postgresql" in _made:
            _on_server(servers.POSTGRESQL, f"DROP SCHEMA {SPACE} CASCADE")
        if "mariadb" in _made:
            _on_server(servers.MARIADB, f"DROP DATABASE {SPACE}")
    _made.clear()
    make.cache_clear()
    shutil.rmtree(FOLDER, ignore_errors=True)


def _on_server(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def project() -> Iterator[None]:
    """A session's fixture: what the tests made is removed in the end."""
    yield
    drop()


def place_of(request: pytest.FixtureRequest, project: None) -> Iterator[str]:
    """A fixture's body: the alias of a database whose tables are empty."""
    alias: str = request.param
    make(alias)
    for model in (Charge, Card, InboxRecord, OutboxMessage, StoreRecord):
        model.objects.using(alias).all().delete()
    yield alias
    connections[alias].close()


def within(*aliases: str) -> pytest.MarkDecorator:
    """Run the test in these databases."""
    return pytest.mark.parametrize("place", aliases or ALIASES, indirect=True)


def environment(**bus: Any) -> dict[str, str]:
    """For a process of ours, so that it is the same project. bus: settings of the library there; `urls`: servers."""
    urls = bus.pop("urls", {})
    given = {"prefix": PREFIX, "folder": str(FOLDER), "bus": bus, "urls": urls}
    where = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "DJANGO_RIG": json.dumps(given), "PYTHONPATH": where}


if __name__ == "__main__":
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
