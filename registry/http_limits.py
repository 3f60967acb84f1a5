"""What aiohttp's server lacks: letting go of silent peers, and bounds on how many there may be.

    phase       a peer is silent when                                       limit
    header      the header is not whole, whatever trickles in               limits.headertimeout
    body        no byte of a body arrives, though we would take one         limits.bodyidletimeout
    response    bytes wait to be sent and not one of them is acknowledged   limits.writeidletimeout
    keep-alive  nothing was asked for (aiohttp's own clock)                 limits.keepalivetimeout

A transfer that makes progress is never cut, however long it takes. One timer serves all connections of a worker, and a read
costs one look at the clock: connections note when they heard something, and are looked at every few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import socket
import struct
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, Protocol

from aiohttp import web
from aiohttp.http import HttpVersion10
from aiohttp.http_exceptions import BadStatusLine
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler, RequestPayloadError, _ErrInfo

from kitspec.errors import OciError, QueryInvalid, RequestTimeout, TooManyRequests, Unavailable
from registry.config import Config, Limits
from registry.logs import RateGate, log_event, parsers_problem

LOGGER = logging.getLogger(__name__)

_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
# struct tcp_info of linux/tcp.h: u64 tcpi_bytes_acked begins at byte 120.
_TCP_INFO_ACKED: Final = struct.Struct("=120xQ")
_LOGGED_PER_SECOND: Final = 10


class ConnectionCounter(Protocol):
    """Sees connections come and go; `registry.metrics.Metrics` is one."""

    def connection_opened(self) -> None: ...
    def connection_closed(self) -> None: ...
    def connection_refused(self, reason: str) -> None: ...
    def connection_timed_out(self, phase: str) -> None: ...


class Server(web.Server):
    """Makes the connections of one worker and watches over them.

    Args:
        handler: answers requests.
        config: its limits are of all workers together; each allows its share of the connections.
        make_connection: `LimitedConnection` or a subclass, called with this server and aiohttp's keyword arguments.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Any],
        config: Config,
        metrics: ConnectionCounter,
        *,
        make_connection: Callable[..., LimitedConnection] | None = None,
        request_factory: Callable[..., web.BaseRequest] | None = None,
    ) -> None:
        super().__init__(handler, request_factory=request_factory)
        self.limits = limits = config.limits
        self.metrics = metrics
        self.watch = SilenceWatch(self._loop, limits)
        self._make_connection = make_connection or LimitedConnection
        self._arguments: dict[str, Any] = {
            "keepalive_timeout": limits.keepalivetimeout,
            "max_line_size": limits.headersize,
            "max_field_size": limits.headersize,
            "max_headers": limits.headercount,
            "auto_decompress": False,  # a blob is stored as it was sent, and a small body cannot become a large one
            "access_log": None,
        }
        self._total_max = math.ceil(limits.connections / config.worker_count)
        self._per_address_max = math.ceil(limits.connectionsperaddress / config.worker_count)
        self._trusted = [ipaddress.ip_network(text) for text in limits.trustedproxies]
        self._open = 0
        self._open_by_address: Counter[str] = Counter()
        self.log_gate = RateGate(_LOGGED_PER_SECOND)

    def __call__(self) -> RequestHandler:
        return self._make_connection(self, loop=self._loop, **self._arguments)

    def admit(self, address: str) -> str | None:
        """Count a new connection in; or the reason why it must not be."""
        if self._open >= self._total_max:
            return "total"
        if (
            address
            and self._open_by_address[address] >= self._per_address_max
            and not self._is_trusted(address)
        ):
            return "address"
        self._open += 1
        self._open_by_address[address] += 1
        self.metrics.connection_opened()
        return None

    def release(self, address: str) -> None:
        self._open -= 1
        self._open_by_address[address] -= 1
        if not self._open_by_address[address]:
            del self._open_by_address[address]
        self.metrics.connection_closed()

    def _is_trusted(self, address: str) -> bool:
        return any(ipaddress.ip_address(address.partition("/")[0]) in network for network in self._trusted)


class LimitedConnection(RequestHandler):
    """A connection that is closed when its peer is silent, and refused when there are too many.

    A subclass that answers a request by itself, without calling `data_received` of this class, sets `head_since = None`.

    Attributes:
        head_since: when we began to wait for the rest of a header, by the loop's clock; None while we do not.
        is_retired: the next answer is the last one (`retire`).
    """

    __slots__ = (
        "_acked",
        "_address",
        "_connection",
        "_heard",
        "_payload",
        "_server",
        "_unsent_since",
        "head_since",
        "is_retired",
    )

    def __init__(self, server: Server, *, loop: asyncio.AbstractEventLoop, **arguments: Any) -> None:  # noqa: ANN401 - aiohttp's
        super().__init__(server, loop=loop, **arguments)
        self._server = server
        self._address: str | None = None  # None until it is counted in
        self._payload: StreamReader | None = None
        self._heard = 0.0
        self._acked = -1
        self._unsent_since: float | None = None
        self.head_since: float | None = None
        self.is_retired = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._connection = transport
        address = address_group(transport.get_extra_info("peername"))
        if reason := self._server.admit(address):
            self._server.metrics.connection_refused(reason)
            self._log("connection.refused", address, reason)
            self.force_close()
            transport.write(_REFUSALS[reason])
            transport.close()
            return
        self._address = address
        super().connection_made(transport)
        self._heard = self.head_since = self._loop.time()
        self._server.watch.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._address is not None:
            self._server.release(self._address)
            self._address = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        count = self._request_count
        # What ends a body begins no header.
        is_between_requests = self._payload is None or self._payload.is_eof()
        super().data_received(data)
        if data:  # nothing: aiohttp asks itself to go on with what it has kept
            self._heard = self._loop.time()
        if self._request_count != count:
            self._note_request()
        elif self.head_since is None and data and is_between_requests:
            self.head_since = self._heard

    def _note_request(self) -> None:
        # The handler has not taken it yet: that happens in a task of its own.
        message, payload = self._messages[-1]
        self.head_since = None
        if isinstance(message, _ErrInfo):
            if self._payload is not None and not self._payload.is_eof():
                # A body that went wrong: aiohttp would leave its reader waiting.
                self._payload.set_exception(RequestPayloadError(message.message))
        elif (
            message.version < HttpVersion10
        ):  # a bare `GET /`: whoever sends that does not understand the answer
            self._messages[-1] = (_ErrInfo(400, BadStatusLine("no version"), "no version"), payload)
        self._payload = payload

    def retire(self, *, is_patient: bool) -> None:
        """End between two requests: at once where there is none, else behind the answer, which says so.

        aiohttp's `close` would take no more of a body, and leave an idle connection open.

        Args:
            is_patient: whether a request whose head has not arrived yet is one.
        """
        self.is_retired = True
        if (
            self._waiter is not None
            and not self._messages
            and not (is_patient and self.head_since is not None)
        ):
            self.force_close()

    @property
    def is_gone(self) -> bool:
        return self._address is None

    def silent_phase(self, now: float) -> str | None:
        """Which limit the peer has broken, if any."""
        limits = self._server.limits
        if self._unsent_for(now) >= limits.writeidletimeout:
            return "response"
        if self._force_close:
            return None
        if self.head_since is not None:
            return "header" if now - self.head_since >= limits.headertimeout else None
        if self._payload is not None and not self._payload.is_eof():
            if self._reading_paused or self._buffer_paused:  # we are the slow one
                self._heard = now
            return "body" if now - self._heard >= limits.bodyidletimeout else None
        return None

    def let_go(self, phase: str) -> None:
        """Close the connection of a peer that was silent for too long. What arrived of an upload stays."""
        self._server.metrics.connection_timed_out(phase)
        self._log("connection.silent", self._address or "", phase)
        if phase == "header":
            self._connection.write(_HEADER_TOO_SLOW)
            self.force_close()
            return
        # Not transport.close(): that waits until everything is sent, and a sendfile under way would wait for ever.
        # A shut down socket wakes whoever waits for it, and the reset frees what the kernel still holds.
        connection = self._connection.get_extra_info("socket")
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            connection.shutdown(socket.SHUT_RDWR)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is not HTTP: the specification's JSON, nothing of the parser's thoughts."""
        if status != 400:
            return super().handle_error(request, status, exc, message)
        problem = parsers_problem(str(message or exc or ""))
        self._log("request.malformed", self._address or "", problem)
        body = QueryInvalid("this is not a well-formed HTTP/1.1 request within the limits").to_json()
        response = web.Response(status=400, body=body, content_type="application/json")
        response.headers["Server"] = "modelkit-registry"  # not the versions of what it is made of
        response.force_close()
        return response

    def _unsent_for(self, now: float) -> float:
        """Seconds for which bytes have waited and the peer has taken none, as far as looks can tell."""
        waiting, acked = _send_queue(self._connection)
        if waiting == 0:
            self._unsent_since = None
        elif self._unsent_since is None or acked != self._acked:
            self._unsent_since = now
        self._acked = acked
        return 0.0 if self._unsent_since is None else now - self._unsent_since

    def _log(self, event: str, address: str, reason: str) -> None:
        gate = self._server.log_gate
        if gate.admit(self._loop.time()):
            log_event(LOGGER, logging.INFO, event, remote=address, reason=reason, suppressed=gate.take_held())


class SilenceWatch:
    """Looks at each connection every few seconds, by a wheel of slots: work a second is connections / period.

    One look decides; a connection costs nothing between looks. A limit is kept to within a period.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        self._loop = loop
        self._period = min(limits.headertimeout, limits.bodyidletimeout, limits.writeidletimeout) / 2
        self._slot_s = self._period / 8
        self._slots: list[list[LimitedConnection]] = [[] for _ in range(8)]
        self._position = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: LimitedConnection) -> None:
        self._slots[self._position].append(connection)
        if self._timer is None:
            self._timer = self._loop.call_later(self._slot_s, self._turn)

    def _turn(self) -> None:
        self._position = (self._position + 1) % len(self._slots)
        now = self._loop.time()
        still_here = []
        for connection in self._slots[self._position]:
            if connection.is_gone:
                continue
            if phase := connection.silent_phase(now):
                connection.let_go(phase)
            still_here.append(connection)
        self._slots[self._position] = still_here
        self._timer = self._loop.call_later(self._slot_s, self._turn) if any(self._slots) else None


def address_group(peername: object) -> str:
    """Whom connections are counted for: an IPv4 address, an IPv6 /64 (one customer has all of it), "" where there is none."""
    if not isinstance(peername, tuple):
        return ""
    host = str(peername[0]).partition("%")[0]
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))


def _bare_answer(error: OciError) -> bytes:
    """An answer for a connection that aiohttp does not know, or has no request of."""
    body = error.to_json()
    return (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 5\r\nConnection: close\r\n\r\n"
    ).encode() + body


_REFUSALS: Final = {
    "total": _bare_answer(Unavailable("the registry has all the connections that it can serve")),
    "address": _bare_answer(TooManyRequests("too many connections from this address")),
}
_HEADER_TOO_SLOW: Final = _bare_answer(RequestTimeout("the header of the request did not arrive in time"))


def _send_queue(transport: asyncio.Transport) -> tuple[int, int]:
    """Bytes that wait to be sent or acknowledged, and a number that changes when the peer takes some."""
    buffered = transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    try:
        import fcntl
        import termios

        queued = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
        acked = _TCP_INFO_ACKED.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128))[0]
    except (ImportError, AttributeError, OSError, struct.error):  # not Linux
        return buffered, buffered
    return buffered + queued, acked
