"""Silent peers, floods of connections and what is not HTTP, over raw sockets."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from registry.config import Config
from registry.http_limits import Server, address_group
from registry.metrics import Metrics

# Short enough for a test, long enough for a busy machine to keep apart what is silent from what is slow.
LIMIT_S = 0.3
QUICK = {"headertimeout": LIMIT_S, "bodyidletimeout": LIMIT_S, "writeidletimeout": LIMIT_S}
# A peer is looked at twice within a limit; the rest is for the machine.
SOON_S = 10 * LIMIT_S
GET = b"GET / HTTP/1.1\r\nHost: r\r\n\r\n"


class Seen:
    """What the test application saw."""

    def __init__(self, big_file: Path) -> None:
        self.bodies: list[bytes | BaseException] = []
        self.downloads: list[BaseException | None] = []
        self.big_file = big_file

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "PUT":
            try:
                self.bodies.append(await request.read())
            except Exception as error:
                self.bodies.append(error)
                raise
            if request.path == "/slow":
                await asyncio.sleep(3 * LIMIT_S)
            return web.Response(status=201)
        if request.path in {"/written", "/file"}:
            try:
                response = (
                    web.FileResponse(self.big_file) if request.path == "/file" else web.StreamResponse()
                )
                await response.prepare(request)
                if request.path == "/written":
                    for _ in range(1000):
                        await response.write(bytes(1 << 16))
            except BaseException as error:
                self.downloads.append(error)
                raise
            self.downloads.append(None)
            return response
        return web.Response(text="served")


class Served:
    def __init__(self, server: Server, seen: Seen, port: int, metrics: Metrics) -> None:
        self.server, self.seen, self.port, self.metrics = server, seen, port, metrics
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0))
        self.writers.append(writer)
        return reader, writer

    async def hang_up(self) -> None:
        for writer in self.writers:
            writer.close()
        for writer in self.writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def counted(self, series: str) -> float:
        for line in (await asyncio.to_thread(self.metrics.render)).decode().splitlines():
            if line.startswith(series + " "):
                return float(line.split()[-1])
        return 0.0


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    @asynccontextmanager
    async def serving(**limits: object) -> AsyncIterator[Served]:
        big_file = tmp_path / "big"
        with big_file.open("wb") as file:
            file.truncate(1 << 26)
        config = Config.model_validate({"workers": 1, "limits": {**QUICK, **limits}})
        seen, metrics = Seen(big_file), Metrics()
        server = Server(seen, config, metrics)
        listener = socket.create_server(("127.0.0.1", 0))
        acceptor = await asyncio.get_running_loop().create_server(server, sock=listener)
        served = Served(server, seen, listener.getsockname()[1], metrics)
        try:
            yield served
        finally:
            acceptor.close()
            await served.hang_up()
            await server.shutdown(0.1)

    return serving


async def reading_all(reader: asyncio.StreamReader) -> bytes:
    """Until the server closes; fails when it does not do so soon."""
    async with asyncio.timeout(SOON_S):
        try:
            return await reader.read(-1)
        except ConnectionError:
            return b""


async def stays_open(reader: asyncio.StreamReader, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def test_B_124_L_01_a_connection_that_says_nothing_is_closed(serve: Serve) -> None:
    async with serve() as served:
        reader, _ = await served.connect()

        answer = await reading_all(reader)

        assert answer.startswith(b"HTTP/1.1 408 ")
        assert await served.counted('modelreg_connections_timed_out_total{phase="header"}') == 1


@pytest.mark.parametrize("part", [b"G", b"GET / HTTP/1.1\r\nHost:", b"GET / HTTP/1.1\r\nHost: r\r\n"])
async def test_B_124_L_01_half_a_header_is_closed(serve: Serve, part: bytes) -> None:
    async with serve() as served:
        reader, writer = await served.connect()

        writer.write(part)

        assert (await reading_all(reader)).startswith(b"HTTP/1.1 408 ")


async def test_B_125_L_01_a_header_that_drips_gains_no_time(serve: Serve) -> None:
    async with serve() as served:
        reader, writer = await served.connect()
        dripping = asyncio.create_task(drip(writer, b"GET / HTTP/1.1\r\nHost: r\r\n" + b"X-Y: z\r\n" * 500))

        assert (await reading_all(reader)).startswith(b"HTTP/1.1 408 ")
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)


async def drip(writer: asyncio.StreamWriter, content: bytes) -> None:
    for byte in content:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(LIMIT_S / 10)


async def test_L_01_half_a_second_header_on_a_kept_connection_is_closed(serve: Serve) -> None:
    async with serve() as served:
        reader, writer = await served.connect()
        writer.write(GET)
        await reader.readuntil(b"served")

        writer.write(b"GET / HT")

        assert (await reading_all(reader)).startswith(b"HTTP/1.1 408 ")


async def test_L_01_the_header_limit_does_not_end_a_connection_that_is_kept(serve: Serve) -> None:
    async with serve() as served:
        reader, writer = await served.connect()
        writer.write(GET)
        await reader.readuntil(b"served")

        assert await stays_open(reader, 3 * LIMIT_S)
        writer.write(GET)
        await reader.readuntil(b"served")


@pytest.mark.parametrize("path", ["/", "/slow"])
async def test_L_01_the_end_of_a_body_that_came_in_pieces_is_no_beginning_of_a_header(
    serve: Serve, path: str
) -> None:
    """However long the answer takes, and however long the client then waits."""
    async with serve() as served:
        reader, writer = await served.connect()
        writer.write(f"PUT {path} HTTP/1.1\r\nHost: r\r\nContent-Length: 8\r\n\r\n".encode())
        for piece in (b"half", b"rest"):
            # The server has read what came before.
            await asyncio.sleep(LIMIT_S / 3)
            writer.write(piece)

        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 201 ")
        assert await stays_open(reader, 3 * LIMIT_S)


async def test_B_124_L_02_a_stalled_body_is_closed_and_its_handler_told(serve: Serve) -> None:
    async with serve() as served:
        reader, writer = await served.connect()

        writer.write(b"PUT / HTTP/1.1\r\nHost: r\r\nContent-Length: 10\r\n\r\nhalf")

        await reading_all(reader)
        async with asyncio.timeout(SOON_S):
            while not served.seen.bodies:
                await asyncio.sleep(0.01)
        assert isinstance(served.seen.bodies[0], Exception)
        assert await served.counted('modelreg_connections_timed_out_total{phase="body"}') == 1


async def test_L_02_a_slow_body_that_moves_is_never_cut(serve: Serve) -> None:
    async with serve() as served:
        reader, writer = await served.connect()

        writer.write(b"PUT / HTTP/1.1\r\nHost: r\r\nContent-Length: 12\r\n\r\n")
        for _ in range(12):  # four times the limit, all in all
            await asyncio.sleep(LIMIT_S / 3)
            writer.write(b"x")

        assert (await reader.readline()).startswith(b"HTTP/1.1 201")
        assert served.seen.bodies == [b"x" * 12]


@pytest.mark.parametrize("path", ["/written", "/file"])
async def test_B_124_L_02_a_reader_that_never_reads_is_closed_and_its_handler_told(
    serve: Serve, path: str
) -> None:
    async with serve() as served:
        peer = socket.create_connection(("127.0.0.1", served.port))
        peer.sendall(f"GET {path} HTTP/1.1\r\nHost: r\r\n\r\n".encode())

        async with asyncio.timeout(SOON_S):
            while not served.seen.downloads or served.server.connections:
                await asyncio.sleep(0.02)

        assert served.seen.downloads[0] is not None
        assert await served.counted('modelreg_connections_timed_out_total{phase="response"}') == 1
        peer.close()


async def test_L_02_a_slow_reader_that_reads_is_never_cut(serve: Serve) -> None:
    async with serve() as served:
        reader, writer = await served.connect()
        writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)

        writer.write(b"GET /file HTTP/1.1\r\nHost: r\r\nConnection: close\r\n\r\n")
        received = 0
        for _ in range(12):
            await asyncio.sleep(LIMIT_S / 3)
            received += len(await reader.readexactly(1 << 20))
        received += len(await reading_all(reader))

        assert received > 1 << 26


async def test_L_02_a_peer_that_leaves_its_last_answer_unread_is_closed(serve: Serve) -> None:
    async with serve() as served:
        peer = socket.create_connection(("127.0.0.1", served.port))
        peer.sendall(b"GET /file HTTP/1.1\r\nHost: r\r\nConnection: close\r\n\r\n")

        async with asyncio.timeout(SOON_S):
            while not served.server.requests_count or await served.counted("modelreg_connections"):
                await asyncio.sleep(0.02)
        peer.close()


async def test_L_04_one_connection_over_the_total_is_answered_503_and_a_place_that_is_left_is_free(
    serve: Serve,
) -> None:
    async with serve(connections=3, headertimeout=60) as served:
        held = [await served.connect() for _ in range(3)]

        reader, writer = await served.connect()
        assert (await reading_all(reader)).startswith(b"HTTP/1.1 503 ")

        held[0][1].close()
        await held[0][1].wait_closed()
        async with asyncio.timeout(SOON_S):
            while await served.counted("modelreg_connections") == 3:
                await asyncio.sleep(0.01)
        reader, writer = await served.connect()
        writer.write(GET)
        await reader.readuntil(b"served")


async def test_L_04_one_connection_over_its_address_is_answered_429_and_others_are_served(
    serve: Serve,
) -> None:
    async with serve(connectionsperaddress=2, headertimeout=60) as served:
        for _ in range(2):
            await served.connect()

        reader, _ = await served.connect()
        refusal = await reading_all(reader)
        other_reader, other_writer = await served.connect(source="127.0.0.2")
        other_writer.write(GET)

        assert refusal.startswith(b"HTTP/1.1 429 ")
        assert b'"TOOMANYREQUESTS"' in refusal
        await other_reader.readuntil(b"served")
        assert await served.counted('modelreg_connections_refused_total{reason="address"}') == 1


async def test_L_04_a_trusted_proxy_has_no_limit_of_its_own(serve: Serve) -> None:
    async with serve(connectionsperaddress=1, trustedproxies=["127.0.0.0/8"]) as served:
        for _ in range(3):
            reader, writer = await served.connect()
            writer.write(GET)
            await reader.readuntil(b"served")
            writer.close()


async def test_L_05_an_idle_kept_connection_is_closed(serve: Serve) -> None:
    async with serve(keepalivetimeout=LIMIT_S) as served:
        reader, writer = await served.connect()
        writer.write(GET)
        await reader.readuntil(b"served")

        assert await reading_all(reader) == b""


async def test_B_124_many_silent_connections_keep_nobody_waiting(serve: Serve) -> None:
    async with serve() as served:
        silent = [await served.connect() for _ in range(100)]

        reader, writer = await served.connect()
        writer.write(GET)
        await reader.readuntil(b"served")

        await asyncio.gather(*[reading_all(reader) for reader, _ in silent])
        assert await served.counted('modelreg_connections_timed_out_total{phase="header"}') == 100


MALFORMED = {
    "two lengths": b"PUT / HTTP/1.1\r\nHost: r\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    "length and chunked": b"PUT / HTTP/1.1\r\nHost: r\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "signed length": b"PUT / HTTP/1.1\r\nHost: r\r\nContent-Length: +3\r\n\r\nabc",
    "list of lengths": b"PUT / HTTP/1.1\r\nHost: r\r\nContent-Length: 3, 3\r\n\r\nabc",
    "unknown coding": b"PUT / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "folded header": b"GET / HTTP/1.1\r\nHost: r\r\nX: a\r\n b\r\n\r\n",
    "space before colon": b"GET / HTTP/1.1\r\nHost : r\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "endless line": b"GET /" + b"a" * 20_000,
    "large header": b"GET / HTTP/1.1\r\nHost: r\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: r\r\n" + b"X: y\r\n" * 500 + b"\r\n",
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED.keys())
async def test_B_120_V_62_what_is_not_http_is_answered_400_as_json_and_closed(
    serve: Serve, request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(headertimeout=60) as served:
        reader, writer = await served.connect()
        writer.write(request_bytes)

        head, _, body = (await reading_all(reader)).partition(b"\r\n\r\n")

        assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
        assert body.startswith(b'{"errors": [{"code": "UNSUPPORTED"')
        assert b"ython" not in head
        assert "Traceback" not in caplog.text
        assert served.seen.bodies == []


async def test_V_61_endless_trailers_are_refused(serve: Serve) -> None:
    async with serve() as served:
        reader, writer = await served.connect()
        writer.write(b"PUT / HTTP/1.1\r\nHost: r\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                writer.write(b"X-Trailer: " + b"y" * 1000 + b"\r\n")
                await writer.drain()

        await reading_all(reader)
        assert not any(isinstance(body, bytes) for body in served.seen.bodies)


async def test_V_60_a_compressed_body_arrives_as_it_was_sent(serve: Serve) -> None:
    async with serve() as served:
        reader, writer = await served.connect()
        content = bytes.fromhex("1f8b08000000000002034b04000043beb7e801000000")

        writer.write(
            b"PUT / HTTP/1.1\r\nHost: r\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b"
            % (len(content), content)
        )

        assert (await reader.readline()).startswith(b"HTTP/1.1 201")
        assert served.seen.bodies == [content]


async def test_B_125_pipelined_requests_are_answered_in_bounded_memory(serve: Serve) -> None:
    async with serve() as served:
        reader, writer = await served.connect()
        count = 2000

        writer.write(GET * count)
        answers = 0
        async with asyncio.timeout(20):
            while answers < count:
                await reader.readuntil(b"served")
                answers += 1


@pytest.mark.parametrize(
    ("peername", "group"),
    [
        (("192.0.2.7", 1), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 1, 0, 0), "2001:db8:1:2::/64"),
        (("::ffff:192.0.2.7", 1, 0, 0), "192.0.2.7"),
        (("fe80::1%eth0", 1, 0, 3), "fe80::/64"),
        ("", ""),
        (None, ""),
    ],
)
def test_L_04_an_ipv6_customer_is_one_address(peername: object, group: str) -> None:
    assert address_group(peername) == group
