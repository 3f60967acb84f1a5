"""Requests in flight: whose are counted, when one is too many, and that each place is free again whatever its request came to."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kitspec.errors import TooManyRequests
from registry.auth.client_address import ClientAddresses
from registry.config import Config, Limits
from registry.requests_in_flight import RequestsInFlight
from tests.registry.auth.logins import basic, written
from tests.registry.conftest import Serve, configured, served
from tests.registry.wire import Reply, Wire, assert_refused, parse_reply

SOON_S = 20
# More than the sockets of both sides hold.
LARGE = bytes(32 * 1024 * 1024)
PROXIED = {"trustedproxies": ["127.0.0.0/8"]}
ONE = {"requestsperaddress": 1, **PROXIED}


def client(address: str) -> dict[str, str]:
    """As a proxy on this machine says whose request it is."""
    return {"X-Forwarded-For": address}


ALICE, BOB = client("192.0.2.1"), client("192.0.2.2")


@asynccontextmanager
async def unfinished(
    wire: Wire, head: str, headers: Mapping[str, str]
) -> AsyncIterator[asyncio.StreamReader]:
    """A request whose header was sent, and what there is of a body, until the end of the block; then the peer is gone."""
    reader, writer = await asyncio.open_connection(wire.host, wire.port)
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    method_and_target, _, body = head.partition("|")
    framing = "Content-Length: 100\r\nExpect: 100-continue\r\n" if body else ""
    try:
        writer.write(f"{method_and_target} HTTP/1.1\r\nHost: x\r\n{framing}{fields}\r\n".encode())
        if body:
            await reader.readuntil(b"100 Continue\r\n\r\n")  # it is being answered
            writer.write(body.encode())
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def until_served(ask: Callable[[], "asyncio.Future[Reply]"]) -> None:
    async with asyncio.timeout(SOON_S):
        while (await ask()).status == 429:
            await asyncio.sleep(0.02)


async def refusals(wire: Wire, reason: str) -> float:
    text = (await wire("GET", "/metrics")).body.decode()
    found = re.findall(
        rf'^modelreg_requests_refused_total{{reason="{reason}"}} ([\d.]+)$', text, re.MULTILINE
    )
    return float(found[0]) if found else 0.0


async def test_one_request_too_many_of_an_address_is_429_with_the_numbers_and_others_are_served(
    serve: Serve,
) -> None:
    async with serve(limits=ONE) as url:
        wire = Wire(url)
        upload = await wire.begin_upload("lib/a")
        before = await refusals(wire, "address")

        async with unfinished(wire, f"PATCH {upload}|half", ALICE):
            refused = await wire("GET", "/v2/", headers=ALICE)
            of_another = await wire("GET", "/v2/", headers=BOB)

        assert_refused(refused, 429, code="TOOMANYREQUESTS")
        assert int(refused.header("Retry-After")) > 0
        error = refused.json()["errors"][0]
        assert "1 requests of the address 192.0.2.1 are being answered, and 1 are allowed" in error["message"]
        assert "limits.requestsperaddress" in error["message"]
        assert error["detail"] == {"in_flight": 1, "allowed": 1}
        assert of_another.status == 200
        assert await refusals(wire, "address") == before + 1


async def test_what_was_invented_before_the_proxy_is_not_whom_it_counts_for(serve: Serve) -> None:
    async with serve(limits=ONE) as url:
        wire = Wire(url)
        upload = await wire.begin_upload("lib/a")

        async with unfinished(wire, f"PATCH {upload}|half", ALICE):
            refused = await wire("GET", "/v2/", headers=client("198.51.100.9, 192.0.2.1"))

        assert_refused(refused, 429, code="TOOMANYREQUESTS")


async def test_without_a_trusted_proxy_the_address_is_the_peer_whatever_it_says(serve: Serve) -> None:
    async with serve(limits={"requestsperaddress": 1}) as url:
        wire = Wire(url)
        upload = await wire.begin_upload("lib/a")

        async with unfinished(wire, f"PATCH {upload}|half", ALICE):
            assert_refused(await wire("GET", "/v2/", headers=BOB), 429, code="TOOMANYREQUESTS")


async def test_a_trusted_proxy_that_names_nobody_and_probes_are_always_answered(serve: Serve) -> None:
    async with serve(limits={"requestsperaddress": 1}) as url:
        wire = Wire(url)
        upload = await wire.begin_upload("lib/a")
        async with unfinished(wire, f"PATCH {upload}|half", {}):
            for probe in ("/livez", "/readyz", "/startupz"):
                assert (await wire("GET", probe)).status == 200, probe

    async with serve(limits=ONE) as url:
        wire = Wire(url)
        upload = await wire.begin_upload("lib/a")
        async with unfinished(wire, f"PATCH {upload}|half", {}):
            assert (await wire("GET", "/v2/")).status == 200


async def test_one_request_too_many_of_a_user_is_429_from_wherever_it_comes(tmp_path: Path) -> None:
    users = written(tmp_path / "htpasswd", {"ann": "a", "bea": "b"})
    policy = {"repositories": {"**": {"defaultPolicy": ["read", "create"]}}}
    config = configured(
        {"inmemory": {}},
        auth={"htpasswd": {"path": str(users)}},
        http={"accessControl": policy},
        limits={"requestsperuser": 1, **PROXIED},
    )
    async with served(config) as url:
        wire, ann = Wire(url), basic("ann", "a")
        begun = await wire("POST", "/v2/lib/a/blobs/uploads/", headers=ann)
        upload = begun.header("Location")

        async with unfinished(wire, f"PATCH {upload}|half", {**ann, **ALICE}):
            refused = await wire("GET", "/v2/", headers={**ann, **BOB})
            of_another = await wire("GET", "/v2/", headers={**basic("bea", "b"), **ALICE})
            of_nobody = await wire("GET", "/v2/", headers=ALICE)

        assert_refused(refused, 429, code="TOOMANYREQUESTS")
        assert int(refused.header("Retry-After")) > 0
        assert "1 requests of the user ann are being answered, and 1 are allowed" in refused.body.decode()
        assert of_another.status == 200
        assert of_nobody.status == 401
        await until_served(lambda: asyncio.ensure_future(wire("GET", "/v2/", headers=ann)))


async def test_a_place_is_free_when_the_client_has_left(serve: Serve) -> None:
    """In the middle of what it sends, and in the middle of what it gets."""
    async with serve(limits=ONE) as url:
        wire = Wire(url)
        upload = await wire.begin_upload("lib/a")
        digest = await wire.push_blob("lib/a", LARGE)

        def ask() -> "asyncio.Future[Reply]":
            return asyncio.ensure_future(wire("GET", "/v2/", headers=ALICE))

        async with unfinished(wire, f"PATCH {upload}|half", ALICE):
            assert (await ask()).status == 429
        await until_served(ask)

        async with unfinished(wire, f"GET /v2/lib/a/blobs/{digest}", ALICE) as reader:
            await reader.readuntil(b"\r\n\r\n")
            assert (await ask()).status == 429
        await until_served(ask)


async def test_a_place_is_free_after_every_kind_of_answer_on_one_connection(serve: Serve) -> None:
    """Kept alive: with one place, an answer that kept it would have the next refused."""
    async with serve(limits=ONE) as url:
        wire = Wire(url)
        await wire.push_image("lib/a")
        digest = await wire.push_blob("lib/a", bytes(2_000_000))
        reader, writer = await asyncio.open_connection(wire.host, wire.port)
        try:
            for target, status in [
                ("/v2/", 200),
                ("/nowhere", 404),
                ("/v2/lib/none/manifests/v1", 404),
                (f"/v2/lib/a/blobs/{digest}", 200),
                ("/v2/lib/a/manifests/v1", 200),
                ("/v2/lib/a/manifests/v1", 200),  # kept
                ("/v2/lib/a/manifests/v1", 200),
                ("/metrics", 200),
                ("/v2/", 200),
            ]:
                writer.write(
                    f"GET {target} HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n".encode()
                )
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                assert length is not None
                await reader.readexactly(int(length[1]))
                assert parse_reply(head, "HEAD").status == status, target
        finally:
            writer.close()


async def test_a_refused_request_takes_no_place(serve: Serve) -> None:
    async with serve(limits={**ONE, "requestsperaddress": 2}) as url:
        wire = Wire(url)
        first, second = [await wire.begin_upload("lib/a") for _ in range(2)]
        async with unfinished(wire, f"PATCH {first}|half", ALICE):
            async with unfinished(wire, f"PATCH {second}|half", ALICE):
                for _ in range(5):
                    assert (await wire("GET", "/v2/", headers=ALICE)).status == 429
            await until_served(lambda: asyncio.ensure_future(wire("GET", "/v2/", headers=ALICE)))


@pytest.mark.parametrize("allowed", [1, 5])
def test_at_the_limit_one_over_it_and_a_hundred_times(allowed: int) -> None:
    refused: list[str] = []
    limits = Limits.model_validate({"requestsperaddress": allowed, "requestsperuser": allowed})
    in_flight = RequestsInFlight(limits, refused.append)
    requests = [in_flight.request() for _ in range(100 * allowed)]

    for request in requests:
        for count in (request.count_for_address, request.count_for_user):
            with contextlib.suppress(TooManyRequests):
                count("somebody")

    assert refused == ["address", "user"] * (99 * allowed)
    for request in requests:
        request.end()
        request.end()
    assert in_flight.addresses.in_flight == in_flight.users.in_flight == {}


def test_no_limit_counts_nobody() -> None:
    in_flight = RequestsInFlight(Limits(requestsperaddress=0, requestsperuser=0), lambda _: None)
    for _ in range(10_000):
        request = in_flight.request()
        request.count_for_address("192.0.2.1")
        request.count_for_user("ann")

    assert in_flight.addresses.in_flight == in_flight.users.in_flight == {}


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "address"),
    [
        ("192.0.2.7", [], "192.0.2.7"),
        ("192.0.2.7", ["198.51.100.1"], "192.0.2.7"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["2001:db8:1:2:3::4"], "2001:db8:1:2::/64"),
        ("10.0.0.1", [], ""),
        ("10.0.0.1", ["nonsense"], ""),
        ("", [], ""),
    ],
)
def test_whom_a_request_counts_for(peer: str, forwarded_for: list[str], address: str) -> None:
    limits = Limits(trustedproxies=("10.0.0.0/8",))

    client = ClientAddresses(limits.trustedproxies).address_of(peer, forwarded_for)

    assert RequestsInFlight(limits, lambda _: None).key_of(client) == address


def test_defaults_let_pass_what_one_address_can_have_connections_for() -> None:
    """A job that pulls many layers at once, or many of them behind one address, meets the connections' limit first."""
    limits = Config().limits

    assert limits.requestsperaddress >= limits.connectionsperaddress
    assert limits.requestsperuser >= limits.requestsperaddress
