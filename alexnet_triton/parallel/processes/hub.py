"""The line over which the processes of a run say that they live, and the hub where all lines meet; see `watch`."""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any

PERIOD = 1.0
"""Seconds from one sign of life to the next."""

BACKLOG = 1024
"""Processes that may come at once."""


class Link:
    """One end of a connection, over which messages go as lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PERIOD)
        self.socket = connection
        self._sending = threading.Lock()
        self.rank = -1  # not known yet
        self.where = self.device = self.complaint = ""
        self.done = False
        self.silent = 0.0
        self._begun = b""

    def send(self, *message: Any) -> None:
        """Send a message, if the other end is there."""
        with self._sending, suppress(OSError):  # where nobody hears, the silence is noticed
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[list[Any]] | None:
        """Messages that have come whole; None where the other end has hung up, or does not speak as this one does."""
        try:
            data = self.socket.recv(1 << 16)
            *lines, self._begun = (self._begun + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except TimeoutError:
            return []
        except (OSError, ValueError):
            return None
        self.silent = 0.0
        return messages if data and all(isinstance(message, list) for message in messages) else None


class Listener(ABC):
    """A thread that hears what comes over links, sends a sign of life over each, and notices one that is silent.

    Args:
        silence: seconds without a sign of life after which the other end is given up.
    """

    def __init__(self, silence: float) -> None:
        self.silence = silence
        self._links: list[Link] = []
        self._selector = selectors.DefaultSelector()
        self._closing = False
        self._waker, woken = socket.socketpair()
        self._sockets = [self._waker, woken]
        self._selector.register(woken, selectors.EVENT_READ, lambda: None)
        self._thread = threading.Thread(target=self._listen, name=type(self).__name__, daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def close(self) -> None:
        """End the thread, once it has begun, and the connections."""
        self._closing = True
        self._waker.send(b"!")
        if self._thread.ident is not None:
            self._thread.join()
        for link in [*self._links]:
            self._drop(link)
        self._selector.close()
        for one in self._sockets:
            one.close()

    def _add(self, link: Link) -> None:
        self._links.append(link)
        self._selector.register(link.socket, selectors.EVENT_READ, lambda: self._read(link))

    def _drop(self, link: Link) -> None:
        if link in self._links:
            self._links.remove(link)
            self._selector.unregister(link.socket)
            link.socket.close()

    @abstractmethod
    def _heard(self, link: Link, kind: str, *words: Any) -> None:
        """Take a message."""

    @abstractmethod
    def _gone(self, link: Link, silent: bool) -> None:
        """Take it that the other end has hung up, or is silent."""

    @abstractmethod
    def _turn(self, now: float) -> None:
        """Do what the time asks for."""

    def _ended(self, silent: bool) -> str:
        if silent:
            how = f"has given no sign of life for {self.silence:g} s: it hangs, was stopped, or its machine is gone"
        else:
            how = "has ended without a word, killed or by a crash"
        return f"{how}; start the run again with --resume, which goes on from the newest checkpoint"

    def _listen(self) -> None:
        before = told = time.monotonic()
        while not self._closing:
            for key, _ in self._selector.select(PERIOD):
                key.data()
            now = time.monotonic()
            if now >= told + PERIOD:
                told = now
                for link in self._links:
                    link.send("alive")
            # This process may have been stopped itself, with all the others: a long turn is no sign of their silence.
            for link in [*self._links]:
                link.silent += min(now - before, 2 * PERIOD)
                if link.silent > self.silence:
                    self._hang_up(link, silent=True)
            before = now
            self._turn(now)

    def _read(self, link: Link) -> None:
        messages = link.receive()
        for message in messages or ():
            self._heard(link, *message)
        if messages is None:
            self._hang_up(link, silent=False)

    def _hang_up(self, link: Link, silent: bool) -> None:
        self._drop(link)
        self._gone(link, silent)


class Hub(Listener):
    """Hears all processes, and tells all of the first that is lost.

    Args:
        size: how many they are.
        host: the name that they know this machine by.
        seconds: in which all must have come.
        silence: seconds after which a process is given up.
    """

    def __init__(self, size: int, host: str, seconds: float, silence: float) -> None:
        super().__init__(silence)
        self.size = size
        self.token = secrets.token_hex()
        self.seconds, self._until = seconds, time.monotonic() + seconds
        self._came: dict[int, Link] = {}
        self._last: tuple[Any, ...] = ()
        """What was told when the processes were lost, or had come to the end."""
        server = _server(host)
        self.port = server.getsockname()[1]
        self._sockets.append(server)
        self._selector.register(server, selectors.EVENT_READ, lambda: self._accept(server))

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):
            self._add(Link(server.accept()[0]))

    def _heard(self, link: Link, kind: str, *words: Any) -> None:
        if link.rank < 0 and (kind, *words[:1]) != ("hello", self.token):
            self._drop(link)  # some other program's
        elif kind == "hello":
            self._welcome(link, *words[1:])
        elif kind == "done":
            link.done = True
            if len(self._came) == self.size and all(link.done for link in self._came.values()):
                self._tell("over")
        elif kind == "failed":
            text, hurry = words
            self._lose(link, f"has failed, and the others end with it: {text}", hurry)

    def _welcome(self, link: Link, rank: int, where: str, device: str, complaint: str) -> None:
        if self._last or len(self._came) == self.size:  # too late: the others are not to suffer for it
            twice = f"rank {rank} of {self.size} is there already: give each run a MASTER_PORT of its own"
            link.send(*(self._last or ("lost", rank, twice, True)))
            return
        link.rank, link.where, link.device, link.complaint = rank, where, device, complaint
        if rank in self._came:
            self._lose(link, "is there twice: give each process a RANK of its own")
        self._came[rank] = link
        if len(self._came) < self.size:
            return
        links = [self._came[rank] for rank in range(self.size)]
        for link in links:
            if link.complaint:
                self._lose(link, f"cannot take part: {link.complaint}")
            elif link.device != links[0].device:
                self._lose(
                    link, f"computes on {link.device}, and rank 0 on {links[0].device}: give all the same --device"
                )
        if not self._last:
            self._tell("met")

    def _gone(self, link: Link, silent: bool) -> None:
        if link.rank >= 0:
            self._lose(link, self._ended(silent))

    def _turn(self, now: float) -> None:
        missing = sorted(set(range(self.size)) - self._came.keys())
        if missing and now > self._until:
            self._until = float("inf")
            self._tell(
                "lost",
                missing[0],
                f"{len(self._came)} of {self.size} processes have come in {self.seconds:g} s, and not rank "
                f"{', '.join(map(str, missing))}: start as many as WORLD_SIZE says, and look at what those said",
                True,
            )

    def _lose(self, link: Link, how: str, hurry: bool = True) -> None:
        self._tell("lost", link.rank, f"rank {link.rank} of {self.size} ({link.where}) {how}", hurry)

    def _tell(self, *message: Any) -> None:
        """Tell all; of one end alone."""
        if self._last:
            return
        if message[0] != "met":
            self._last = message
        for link in self._links:
            link.send(*message)


def _server(host: str) -> socket.socket:
    """A socket that listens for all who know this machine by a name, which here may mean a loopback address."""
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server((host, 0), backlog=BACKLOG)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=BACKLOG)
