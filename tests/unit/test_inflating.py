"""Bodies that are long only once they are decompressed are told by their beginning."""

from __future__ import annotations

import bz2
import lzma
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from idempotent_bus.inflating import is_longer

SQUEEZERS: dict[str, Callable[[bytes], bytes]] = {"gzip": zlib.compress, "bzip2": bz2.compress, "lzma": lzma.compress}


@pytest.mark.parametrize("name", SQUEEZERS)
@pytest.mark.parametrize(("size", "longer"), [(0, False), (1, False), (5000, False), (5001, True), (90_000, True)])
def test_the_limit_is_exact(name: str, size: int, longer: bool) -> None:
    """A body of exactly the limit passes, one byte more does not; of whichever compression."""
    assert is_longer(name, SQUEEZERS[name](b"x" * size), 5000) is longer


@pytest.mark.parametrize("name", SQUEEZERS)
def test_a_bomb_is_not_let_off(name: str) -> None:
    """64 MiB of zeros are found out with about as much memory as the limit. The control is what they take otherwise."""
    bomb = SQUEEZERS[name](bytes(64 * 2**20))
    assert len(bomb) < 70_000
    tracemalloc.start()
    assert is_longer(name, bomb, 2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * 2**20


@pytest.mark.parametrize("name", ["bzip2", "lzma"])
def test_streams_in_a_row_count_together(name: str) -> None:
    """kombu takes several streams in a row for one body; and very many of them are a bomb of their own kind."""
    one = SQUEEZERS[name](b"x" * 3000)
    assert not is_longer(name, one, 5000)
    assert is_longer(name, one * 2, 5000)
    assert is_longer(name, SQUEEZERS[name](b"") * 1000, 5000)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("no-such", b"x"),
        (5, b"x"),
        (["gzip"], b"x"),
        (None, b"x"),
        ("gzip", None),
        ("gzip", "text"),
        ("gzip", b""),
        ("gzip", b"x" * 90_000),
        ("bzip2", bz2.compress(b"x" * 90)[:-5]),
        ("bzip2", b"BZh9" + b"\0" * 99),
        ("lzma", lzma.compress(b"x" * 90)[:-5]),
    ],
)
def test_what_cannot_be_told_is_left_to_kombu(name: Any, data: Any) -> None:
    """Unknown, broken, cut short: kombu's own error is the one that counts."""
    assert not is_longer(name, data, 500)
