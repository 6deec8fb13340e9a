"""A user-space TCP proxy between a client and a server: the network's faults, injected on purpose.

A fault is armed for requests that contain some bytes (a header's name, say), so that handshakes pass untouched:

    with Proxy("127.0.0.1", 5672) as proxy:
        proxy.lose_reply(b"inner-msg-id", times=3)      # forwarded, answered, the answer is swallowed
        connect(f"amqp://127.0.0.1:{proxy.port}//")

Every fault counts what it did in `proxy.done`. Nothing here knows any protocol: a "request" is what arrives in one
read, and what the server sends after it is its reply.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

__all__ = ["Proxy", "through"]


def through(proxy: Proxy, url: str) -> str:
    """The same URL, by way of the proxy."""
    parts = urlsplit(url)
    login, at, _ = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{login}{at}127.0.0.1:{proxy.port}"))


@dataclass
class _Fault:
    kind: str
    request: bytes
    times: int
    seconds: float = 0.0
    cut: bool = True


class Proxy:
    """Listens on a free port of the loopback and forwards to one server. Use as a context manager."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, url: str | None = None) -> None:
        if url is not None:
            parts = urlsplit(url)
            host, port = parts.hostname or "127.0.0.1", parts.port or 0
        self._server = (host, port)
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._links: list[_Link] = []
        self._going = threading.Event()
        self._going.set()
        self._closed = False
        self.done: Counter[str] = Counter()
        self._listener: socket.socket | None = None
        self.port = 0
        self.accept_again()

    # --- faults ---------------------------------------------------------------------------------------

    def lose_reply(self, request: bytes, *, times: int = 1, cut: bool = True) -> None:
        """Forward the request, swallow the reply. cut: then close the connection; otherwise stay silent for ever."""
        self._arm(_Fault("lose_reply", request, times, cut=cut))

    def delay_reply(self, request: bytes, seconds: float, *, times: int = 1) -> None:
        """Forward the request, hold back everything that the server sends on that connection for a while."""
        self._arm(_Fault("delay_reply", request, times, seconds=seconds))

    def lose_request(self, request: bytes, *, times: int = 1) -> None:
        """Close the connection instead of forwarding the request."""
        self._arm(_Fault("lose_request", request, times))

    def cut_request(self, request: bytes, *, times: int = 1) -> None:
        """Forward the first half of the request, then close the connection."""
        self._arm(_Fault("cut_request", request, times))

    def hold_request(self, request: bytes, *, times: int = 1) -> None:
        """Neither forward the request nor close: it stays on its way, for ever; replies still pass."""
        self._arm(_Fault("hold_request", request, times))

    def cut(self) -> None:
        """Close all connections that are open now."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close()
        self.done["cut"] += len(links)

    def stall(self) -> None:
        """Forward nothing any more in either direction, without closing anything: as a stopped server does."""
        self._going.clear()

    def resume(self) -> None:
        """Go on after `stall`: what was held back is forwarded."""
        self._going.set()

    def refuse(self) -> None:
        """Accept no new connection, as a server that is down."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
            listener.close()

    def accept_again(self) -> None:
        """Undo `refuse`, on the same port."""
        self._listener = listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def forward_to(self, host: str, port: int) -> None:
        """New connections go to another server, as after a failover. Those that are open stay where they are."""
        self._server = (host, port)

    # --- life -----------------------------------------------------------------------------------------

    def close(self) -> None:
        self._closed = True
        self.refuse()
        self.cut()
        self._going.set()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _arm(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _match(self, data: bytes) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.request in data:
                    fault.times -= 1
                    self.done[fault.kind] += 1
                    return fault
        return None

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._server, timeout=5)
            except OSError:
                client.close()
                continue
            link = _Link(self, client, server)
            with self._lock:
                self._links.append(link)
            link.start()

    def _forget(self, link: _Link) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._links.remove(link)


class _Link:
    """One connection through the proxy: two threads, one for each direction."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._reply_fault: _Fault | None = None
        for end in (client, server):
            end.settimeout(None)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        for target in (self._requests, self._replies):
            threading.Thread(target=target, daemon=True).start()

    def close(self) -> None:
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._proxy._forget(self)

    def _requests(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._client.recv(65536):
                self._proxy._going.wait()
                fault = self._proxy._match(data)
                if fault is not None and fault.kind in ("lose_request", "cut_request"):
                    if fault.kind == "cut_request":
                        self._server.sendall(data[: len(data) // 2])
                    break
                if fault is not None and fault.kind == "hold_request":
                    continue
                if fault is not None:
                    self._reply_fault = fault  # before forwarding: the reply may come at once
                self._server.sendall(data)
        self.close()

    def _replies(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._server.recv(65536):
                self._proxy._going.wait()
                fault = self._reply_fault
                if fault is not None and fault.kind == "lose_reply":
                    if fault.cut:
                        break
                    continue  # silent from now on: half of an answer would be another fault
                if fault is not None and fault.kind == "delay_reply":
                    self._reply_fault = None
                    time.sleep(fault.seconds)
                self._client.sendall(data)
        self.close()
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.close()
