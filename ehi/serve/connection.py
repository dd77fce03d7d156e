"""Sockets: a slow or endless client harms nobody, and SIGTERM ends the service well."""

import logging
import signal
import socket

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ehi.serve.limits import Limits
from ehi.serve.schema import Error

_MOST_HEAD = 2**16  # bytes of a request's head
_KEEP_ALIVE = 20  # seconds that an open connection may wait for its next request
_LINGER = 5.0  # seconds in which a client may read why its body was refused
_REASONS = {
    400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}  # fmt: skip


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP, which has no limits of its own before a request's body.

    - The head of a request has a time and a size.
    - Only so many connections are open at once.
    - After an answer, the rest of a refused body is read for a while and dropped. If
      the socket were closed at once, the client would see a reset, and no answer.
    - A client that reads nothing is cut off.
    """

    limits: Limits

    def connection_made(self, transport):
        super().connection_made(transport)
        self.timers, self.head_bytes = {}, 0
        if len(self.connections) > self.limits.connections:
            self._refuse(503, "too many connections are open: try again soon")
        else:
            self._start("head", self.limits.body_seconds, self._late)

    def connection_lost(self, exc):
        for name in list(self.timers):
            self._stop(name)
        super().connection_lost(exc)

    def data_received(self, data):
        if self.transport.is_closing():
            return
        if "head" not in self.timers and self._idle():  # the next request begins
            self.head_bytes = 0
            self._start("head", self.limits.body_seconds, self._late)
        super().data_received(data)
        if "head" in self.timers:
            self.head_bytes += len(data)
            if self.head_bytes > _MOST_HEAD:
                self._refuse(431, f"a head has at most {_MOST_HEAD:,} bytes")

    def on_headers_complete(self):
        self._stop("head")
        if self.parser.should_upgrade() and self._has_body():
            # httptools would hand over no body, as if the request had an empty one.
            self._refuse(400, "a request with a body can't ask for an Upgrade")
            return
        super().on_headers_complete()

    def on_message_complete(self):
        self._stop("linger")
        super().on_message_complete()

    def on_response_complete(self):
        unread = self.cycle.more_body
        super().on_response_complete()
        if unread and not self.transport.is_closing():
            self._start("linger", _LINGER, self.transport.abort)

    def pause_writing(self):
        super().pause_writing()
        self._start("write", self.limits.body_seconds, self.transport.abort)

    def resume_writing(self):
        self._stop("write")
        super().resume_writing()

    def timeout_keep_alive_handler(self):
        self.transport.abort()  # `close` would wait for a client that reads nothing

    def send_400_response(self, msg):
        self._refuse(400, "this is not HTTP/1.1")

    def _idle(self):
        return self.cycle is None or (
            self.cycle.response_complete and not self.cycle.more_body
        )

    def _has_body(self):
        headers = dict(self.headers)
        size = headers.get(b"content-length", b"0")
        return size != b"0" or b"transfer-encoding" in headers

    def _late(self):
        seconds = self.limits.body_seconds
        self._refuse(408, f"the head did not arrive within {seconds:g} seconds")

    def _refuse(self, status, words):
        body = msgspec.json.encode(Error(words))
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _start(self, name, seconds, action):
        self._stop(name)
        self.timers[name] = self.loop.call_later(seconds, action)

    def _stop(self, name):
        timer = self.timers.pop(name, None)
        if timer is not None:
            timer.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        OSError: the address is taken or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def serve(app, listening: socket.socket, limits: Limits, drain_seconds: float) -> None:
    """Answers until SIGTERM or Ctrl-C, then finishes what has begun.

    Args:
        app: the ASGI application.
        listening: of `listen`.
        limits: of clients.
        drain_seconds: what has begun is given up after that time.

    Raises:
        KeyboardInterrupt: it was Ctrl-C.
    """
    config = uvicorn.Config(
        app,
        http=type("LimitedConnection", (Connection,), {"limits": limits}),
        ws="none",
        log_level=logging.ERROR,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=drain_seconds,
    )
    server = uvicorn.Server(config)

    def end(*_):
        server.should_exit = True

    # uvicorn raises a signal again once all is done: SIGTERM then must not kill.
    before = signal.signal(signal.SIGTERM, end)
    try:
        server.run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
