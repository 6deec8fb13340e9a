"""Opening a store by URL: any scheme, clear refusals, and one store per process."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from test_lease import in_child, needs_fork

from idempotent_bus.errors import ConfigurationError
from idempotent_bus.stores import open_store, store_source
from idempotent_bus.stores.memory import MemoryStore


def test_memory_by_url() -> None:
    """`memory://` is a store of its own, `memory://name` the same store for the same name."""
    assert isinstance(open_store("memory://"), MemoryStore)
    assert open_store("memory://") is not open_store("memory://")
    assert open_store("memory://one") is open_store("memory://one")
    assert open_store("memory://one") is not open_store("memory://two")
    assert isinstance(open_store("MEMORY://"), MemoryStore)


@pytest.mark.parametrize("url", ["", "dedup.db", "/var/dedup.db", "://x", "1x://", "user s3cret@host"])
def test_not_a_url(url: str) -> None:
    """What has no scheme is refused with an example, without the text, which may have a password in it."""
    with pytest.raises(ConfigurationError, match="sqlite:///") as caught:
        open_store(url)
    assert "s3cret" not in str(caught.value)


def test_unknown_scheme() -> None:
    """An unknown scheme names the known ones, and shows nothing else of the URL."""
    with pytest.raises(ConfigurationError, match=r"'nosuch'.*memory.*sqlite") as caught:
        open_store("nosuch://user:s3cret@host/0")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "module", "extra"),
    [
        ("sqlite:///dedup.db", "sqlalchemy", "idempotent-bus[sql]"),
        ("postgresql://user:s3cret@host/db", "sqlalchemy", "idempotent-bus[postgresql]"),
        ("postgresql+psycopg://user:s3cret@host/db", "sqlalchemy", "idempotent-bus[postgresql]"),
        ("mysql+pymysql://user:s3cret@host/db", "sqlalchemy", "idempotent-bus[mysql]"),
        ("mariadb+pymysql://user:s3cret@host/db", "sqlalchemy", "idempotent-bus[mysql]"),
        ("redis://:s3cret@host/0", "redis", "package 'redis'"),
    ],
)
def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch, url: str, module: str, extra: str) -> None:
    """On a machine without the driver the error says what to install, chained to the import's own."""
    for name in list(sys.modules):
        ours = name.startswith("idempotent_bus.stores.") and name != "idempotent_bus.stores.memory"
        if ours or name == module or name.startswith(f"{module}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError) as caught:
        open_store(url)
    assert extra in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)


PLUGIN = """
from idempotent_bus.stores.memory import MemoryStore

class Theirs(MemoryStore):
    def __init__(self, url, **options):
        super().__init__()
        self.url, self.options = url, options

def nameless(url):
    raise ImportError("no name here")
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution of somebody else's with two stores."""
    (tmp_path / "their_store.py").write_text(PLUGIN)
    info = tmp_path / "their_store-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-store\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[idempotent_bus.stores]\ntheirs = their_store:Theirs\nnameless = their_store:nameless\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("third_party")
def test_a_third_party_adds_a_store() -> None:
    """A package that names a function under the entry point group is opened by its scheme, with URL and options."""
    store: Any = open_store("theirs+driver://host/x", prefix="p:")
    assert type(store).__name__ == "Theirs"
    assert (store.url, store.options) == ("theirs+driver://host/x", {"prefix": "p:"})


@pytest.mark.usefixtures("third_party")
def test_an_import_error_without_a_name() -> None:
    """An import error that names no module still ends in a sentence, not in "install the package None"."""
    with pytest.raises(ConfigurationError, match="no name here") as caught:
        open_store("nameless://")
    assert "None" not in str(caught.value)


# --- one store per process ------------------------------------------------------------------------------


def test_a_store_object_is_used_as_it_is() -> None:
    """Whoever passes a store in has decided which one."""
    store = MemoryStore()
    assert store_source(store)() is store


def test_a_url_is_opened_once_and_late() -> None:
    """Nothing is opened until it is needed, then once."""
    get = store_source("memory://")
    assert get() is get()
    assert store_source("memory://")() is not get()
    store_source("nosuch://host")  # no error yet: a module may be imported where the driver is absent
    with pytest.raises(ConfigurationError):
        store_source("nosuch://host")()


def test_a_callable_is_called_once_by_many_threads() -> None:
    """Racing first users share one store."""
    opened: list[MemoryStore] = []
    barrier = threading.Barrier(8)

    def opener() -> MemoryStore:
        opened.append(MemoryStore())
        return opened[-1]

    get = store_source(opener)
    got: list[object] = []

    def use() -> None:
        barrier.wait(10)
        got.append(get())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(opened) == 1
    assert got == opened * 8


def test_an_opener_that_fails_is_asked_again() -> None:
    """A server that is down at the first message is tried again at the next."""
    answers: list[Any] = [OSError("down"), MemoryStore()]

    def opener() -> MemoryStore:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    get = store_source(opener)
    with pytest.raises(OSError, match="down"):
        get()
    assert get() is get()


@pytest.mark.parametrize("wrong", [None, 5, object(), {"url": "memory://"}])
def test_what_is_no_store_is_refused_at_once(wrong: Any) -> None:
    """An engine, a client or None passed as a store is found when the consumer is set up, not at a message."""
    with pytest.raises(ConfigurationError, match="store"):
        store_source(wrong)


@needs_fork
def test_a_forked_child_opens_its_own() -> None:
    """Connections are not shared across a fork."""
    opened_in: list[int] = []

    def opener() -> MemoryStore:
        opened_in.append(os.getpid())
        return MemoryStore()

    get = store_source(opener)
    mine = get()

    def child() -> int:
        theirs = get()
        return 10 + (theirs is mine) + 2 * (get() is not theirs) + 4 * (opened_in[-1] != os.getpid())

    assert in_child(child) == 10
    assert get() is mine


@needs_fork
def test_a_child_does_not_close_its_parents_store() -> None:
    """Dropping the parent's store would close its connection from the child: a farewell on the parent's own socket."""
    closed: list[int] = []

    class Closing(MemoryStore):
        def __del__(self) -> None:
            closed.append(1)

    get = store_source(Closing)
    get()

    def child() -> int:
        get()
        gc.collect()
        return 10 + len(closed)

    assert in_child(child) == 10


@needs_fork
def test_a_child_does_not_wait_for_a_lock_of_its_parents() -> None:
    """Forked while another thread of the parent was opening the store: the child opens its own, and does not hang."""
    opening, go_on = threading.Event(), threading.Event()
    parent = os.getpid()

    def opener() -> MemoryStore:
        if os.getpid() == parent:
            opening.set()
            go_on.wait(10)
        return MemoryStore()

    get = store_source(opener)
    thread = threading.Thread(target=get)
    thread.start()
    assert opening.wait(10)

    def child() -> int:
        mine = threading.Thread(target=get, daemon=True)
        mine.start()
        mine.join(5)
        return 10 + mine.is_alive()

    try:
        assert in_child(child) == 10
    finally:
        go_on.set()
        thread.join(10)
