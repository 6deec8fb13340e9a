"""Compressed messages that are a thousand times as long inside: measured before kombu decompresses them.

kombu decompresses a message while it is made, whatever comes of it: 100 KB of bzip2 can be 100 GB of zeros, which end
the process, and then the next one that gets the message. On a channel of our own its length is measured first, piece
by piece, and what is too long stays compressed and goes to the dead letter as it came.
"""

from __future__ import annotations

import bz2
import functools
import lzma
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from kombu import compression

from .errors import InvalidBody

__all__ = ["limit_inflation"]

#: Compressed messages are often small, and zlib cannot make one more than so many times shorter.
_MOST_OF_ZLIB: Final = 1040
#: What lzma may take for its dictionary; a header of a few bytes can ask for 4 GB.
_LZMA_MEMORY: Final = 256 * 2**20
#: A file of several streams is allowed, but each costs a copy of what follows it.
_MOST_STREAMS: Final = 100

_GZIP: Final = "application/x-gzip"
#: Makes a decompressor that can stop, for each of kombu's content types where there is one.
_DECOMPRESSORS: Final[dict[str, Callable[[], Any]]] = {
    _GZIP: zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": functools.partial(lzma.LZMADecompressor, memlimit=_LZMA_MEMORY),
}
if (zstd := getattr(compression, "zstd", None)) is not None:  # Python 3.14, or kombu's extra
    _DECOMPRESSORS["application/zstd"] = zstd.ZstdDecompressor


def limit_inflation(channel: Any, limit: int | None) -> None:
    """Let a channel that is ours alone leave compressed what would be longer than `limit` bytes; None: no limit.

    Such a message has InvalidBody among its `errors`. A compression of which only kombu knows (brotli) is left to it.
    """
    if limit is not None:
        channel.Message = _limited(channel.Message, limit)


def _limited(message_class: Any, limit: int) -> Any:
    class Limited(message_class):  # type: ignore[misc]  # kombu has no types
        def __init__(self, raw: Any, channel: Any = None, **kwargs: Any) -> None:
            name = _headers_of(raw).get("compression")
            if name and is_longer(name, _body_of(raw, channel), limit):
                # kombu leaves a message with errors as it is.
                error = InvalidBody(f"the body is too large: more than {limit} bytes once it is decompressed")
                self.errors = [(InvalidBody, error, None)]
            super().__init__(raw, channel=channel, **kwargs)

    Limited.__name__ = Limited.__qualname__ = message_class.__name__
    return Limited


def is_longer(name: Any, data: Any, limit: int) -> bool:
    """True if `data` is more than `limit` bytes long once it is decompressed. False too where that cannot be told."""
    name = compression._aliases.get(name, name) if isinstance(name, str) else None
    make = _DECOMPRESSORS.get(name) if name is not None else None
    if make is None or not isinstance(data, bytes) or (name == _GZIP and len(data) * _MOST_OF_ZLIB <= limit):
        return False
    left, streams = limit, 0
    try:
        while data:
            streams += 1
            if streams > _MOST_STREAMS:
                return True
            stream = make()
            left -= len(stream.decompress(data, left + 1))
            if left < 0:
                return True
            if not stream.eof:
                return False
            data = stream.unused_data
    except MemoryError:
        return True
    except Exception:  # noqa: BLE001 - broken: kombu will say so too
        return False
    return False


def _headers_of(raw: Any) -> Mapping[str, Any]:
    found = raw.get("headers") if isinstance(raw, dict) else raw.properties.get("application_headers")
    return found if isinstance(found, dict) else {}


def _body_of(raw: Any, channel: Any) -> Any:
    if not isinstance(raw, dict):
        return raw.body
    try:
        return channel.decode_body(raw.get("body"), raw["properties"].get("body_encoding"))
    except Exception:  # noqa: BLE001 - what kombu cannot read either
        return None
