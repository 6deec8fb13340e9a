"""The poller: kombu's, with sleeping on news of changes in the place of BRPOP.

Without an event loop `get` hands out one message a call, as kombu's does. With one (a Celery worker) the loop calls
`on_poll_start` before each wait, and messages are handed out there.
"""

from __future__ import annotations

import contextlib
import os
import socket
from queue import Empty
from time import monotonic
from typing import TYPE_CHECKING, Any

from kombu.transport.redis import MultiChannelPoller
from kombu.utils.eventio import ERR, READ

if TYPE_CHECKING:
    from .transport import Channel

#: One turn in an event loop hands out messages for at most this long (seconds), then the loop's other work is done.
_TURN = 0.01
#: Fanout sockets are looked at this often (seconds) while messages flow without a pause.
_LOOK_ASIDE = 0.02
_LONGEST_WAIT = 1.0


class Bell:
    """A socket that makes a poller return: rung by an ack from another thread, or for a turn that did not finish."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def fileno(self) -> int:
        return self._receiver.fileno()

    def ring(self) -> None:
        try:
            self._sender.send(b"!")
        except (BlockingIOError, OSError):
            return  # full: it rings already; closed: nobody waits

    def silence(self) -> None:
        try:
            while self._receiver.recv(4096):
                pass
        except (BlockingIOError, OSError):
            return

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()


class Poller(MultiChannelPoller):
    """Waits for all channels of one connection."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0
        self._loop: Any = None
        self._wakes_at = 0.0
        self._looked_aside = 0.0
        self._bell: Bell | None = None
        self._bell_pid = 0

    # --- sockets ------------------------------------------------------------------------------------

    def _watch(self, channel: Channel) -> None:
        """Have the poller wait for news of a channel's queues."""
        sock = channel.line.wire.sock
        ident = (channel, channel.line, "NEWS")
        if sock is None or self._chan_to_sock.get(ident) is sock:
            return
        self.forget(channel)
        self._fd_to_chan[sock.fileno()] = (channel, "NEWS")
        self._chan_to_sock[ident] = sock
        self.poller.register(sock, self.eventflags)

    def forget(self, channel: Channel) -> None:
        """The channel's connection is closed or closing."""
        for ident, sock in list(self._chan_to_sock.items()):
            if ident[0] is not channel or ident[2] != "NEWS":
                continue
            del self._chan_to_sock[ident]
            for fd, owner in list(self._fd_to_chan.items()):
                if owner == (channel, "NEWS"):
                    del self._fd_to_chan[fd]
                    self._drop_fd(fd, sock)

    def _drop_fd(self, fd: int, sock: Any) -> None:
        if sock.fileno() != fd:
            return  # closed already, and the number may be somebody else's by now
        try:
            self._unregister_from_poll(fd)
        except (KeyError, ValueError, OSError):
            return

    def _hang_bell(self) -> None:
        if self._bell is None or self._bell_pid != os.getpid():
            self._bell, self._bell_pid = Bell(), os.getpid()
            self._fd_to_chan[self._bell.fileno()] = (None, "BELL")
            self.poller.register(self._bell, READ | ERR)

    def ring(self) -> None:
        """Any thread: look at the channels again."""
        bell = self._bell
        if bell is not None:
            bell.ring()

    def close(self) -> None:
        bell, self._bell = self._bell, None
        if bell is not None:
            with contextlib.suppress(KeyError, ValueError, OSError):
                self._unregister_from_poll(bell.fileno())
            bell.close()
        super().close()

    def discard(self, channel: Channel) -> None:
        self.forget(channel)
        super().discard(channel)

    # --- kombu's hooks ------------------------------------------------------------------------------

    def on_poll_init(self, poller: Any) -> None:
        self.poller = poller

    def join_loop(self, loop: Any) -> None:
        """From now on messages are handed out by an event loop's turns (kombu's Hub)."""
        self._loop = loop

    def maybe_restore_messages(self) -> None:
        """Restoring is part of fetching."""

    def maybe_check_brpop_health(self) -> None:
        """There is no BRPOP: a sleeping channel asks again every few seconds, with a time limit."""

    def on_poll_start(self) -> None:
        for channel in list(self._channels):
            if channel.active_fanout_queues:
                self._register_LISTEN(channel)
        # A lost connection's poller may stay on the loop's list for a while, and has nothing to do there any more.
        if self._loop is not None and (channels := self._in_turn()):
            self._hang_bell()
            self._take_turn(channels)

    def on_readable(self, fileno: int) -> Any:
        channel, kind = self._fd_to_chan.get(fileno, (None, None))
        if kind == "BELL":
            if self._bell is not None:
                self._bell.silence()
            return None
        if kind == "NEWS":
            assert channel is not None
            return channel.line.heard()
        return super().on_readable(fileno)

    def handle_event(self, fileno: int, event: int) -> Any:
        kind = self._fd_to_chan.get(fileno, (None, None))[1]
        if kind in ("BELL", "NEWS"):
            self.on_readable(fileno)
            return None
        return super().handle_event(fileno, event)

    # --- without an event loop ----------------------------------------------------------------------

    def _in_turn(self) -> list[Channel]:
        channels = [channel for channel in self._channels if channel.active_queues or channel.again]
        if len(channels) > 1:
            self._turn = (self._turn + 1) % len(channels)
            channels.sort(key=lambda channel: channel.channel_id)
            channels = channels[self._turn :] + channels[: self._turn]
        return channels

    def get(self, callback: Any, timeout: float | None = None) -> None:
        """Hand out one message, or wait for at most `timeout` seconds and raise Empty."""
        if self._aside():
            return
        channels = self._in_turn()
        for channel in channels:
            if channel.next_message():
                return
        self.on_poll_start()
        self._hang_bell()
        self.maybe_refresh_binding_expiry()
        wait = _LONGEST_WAIT if timeout is None else min(timeout, _LONGEST_WAIT)
        for channel in channels:
            channel.qos.flush()
            wait = min(wait, self._prepare(channel))
        if self._events(wait):
            return
        for channel in channels:
            if channel.next_message():
                return
        raise Empty

    def _prepare(self, channel: Channel) -> float:
        """Have the poller wait for the channel; how long it may sleep."""
        if not channel.qos.can_consume():
            channel.qos.starved = True
            # Asked again after saying so: an ack in between would have rung no bell.
            return 0.0 if channel.qos.can_consume() else _LONGEST_WAIT
        self._watch(channel)
        return float(channel.line.sleep)

    def _aside(self) -> bool:
        """While messages flow: whether a fanout message was handed out in between."""
        now = monotonic()
        if now - self._looked_aside < _LOOK_ASIDE:
            return False
        self._looked_aside = now
        listening = [channel for channel in self._channels if channel.active_fanout_queues]
        for channel in listening:
            self._register_LISTEN(channel)
        return bool(listening) and self._events(0)

    def _events(self, wait: float) -> bool:
        self._in_protected_read = True
        try:
            return any(self.handle_event(fileno, event) for fileno, event in self.poller.poll(wait) or ())
        except Empty:
            return False
        finally:
            self._in_protected_read = False
            while self.after_read:
                self.after_read.pop()()

    # --- in an event loop -----------------------------------------------------------------------------

    def _take_turn(self, channels: list[Channel]) -> None:
        """Hand out what there is, for a short time; then let the loop wait on the sockets."""
        until = monotonic() + _TURN
        wait = _LONGEST_WAIT
        for channel in channels:
            while channel.next_message():
                if monotonic() > until:
                    wait = 0.0
                    break
            channel.qos.flush()
            wait = min(wait, self._prepare(channel))
        if wait <= 0.0:
            self.ring()
        elif wait < _LONGEST_WAIT:
            self._wake_in(wait)

    def _wake_in(self, wait: float) -> None:
        """The loop has chosen how long to sleep before this turn: set a timer and have it choose again."""
        now = monotonic()
        if now < self._wakes_at <= now + wait + 0.001:
            return
        self._wakes_at = now + wait
        self._loop.call_later(wait, self.ring)
        self.ring()
