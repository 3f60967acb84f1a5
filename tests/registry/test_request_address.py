"""From where a request is said to have come: the same in the access log, the audit log and the journal; and nothing a client can choose."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kitspec.digest import Digest
from registry import logs
from registry.event_sinks import Place, events_of
from registry.journal import Change
from tests.registry.auth.logins import basic, written
from tests.registry.conftest import configured, served
from tests.registry.test_audit import ACCESS, Site, Written, answered
from tests.registry.wire import OCI_INDEX

ANN = basic("ann", "a")
FORWARDED = {"X-Forwarded-For": "203.0.113.9, 198.51.100.1"}


class Told:
    """A registry, and what it tells of its requests."""

    def __init__(self, site: Site, access: Callable[[], list[dict[str, Any]]], folder: Path) -> None:
        self.site = site
        self.lines = access
        self._folder = folder

    async def push(self, headers: dict[str, str]) -> None:
        target = f"/v2/team/a/blobs/uploads/?digest={Digest.of(b'{}')}"
        assert (await self.site.wire("POST", target, headers=ANN | headers, body=b"{}")).status == 201

    async def be_denied(self, headers: dict[str, str]) -> None:
        assert (
            await self.site.wire("DELETE", "/v2/team/a/manifests/v1", headers=ANN | headers)
        ).status == 403

    def access(self) -> set[str]:
        return {line["remote"] for line in self.lines()}

    def audit(self, action: str) -> set[str]:
        return {line["address"] for line in self.site.lines(action)}

    def journal(self) -> list[Change]:
        entries = [path for path in (self._folder / "journal").rglob("*") if path.is_file()]
        lines = [line for path in entries for line in path.read_text(encoding="ascii").splitlines()]
        return [Change.from_json(json.loads(line)) for line in lines]


Open = Callable[..., AbstractAsyncContextManager[Told]]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    handler = Written()
    log = logs.AccessLog(handler, as_json=True, constant={})
    monkeypatch.setattr(logs, "_access_log", log)

    def access() -> list[dict[str, Any]]:
        log.flush()
        return [json.loads(line) for text in handler.texts for line in text.splitlines()]

    @asynccontextmanager
    async def opening(*trusted: str) -> AsyncIterator[Told]:
        users = written(tmp_path / "htpasswd", {"ann": "a"})
        folder, path = tmp_path / "registry", tmp_path / "audit.log"
        config = configured(
            {"filesystem": {"rootdirectory": str(folder)}},
            auth={"htpasswd": {"path": str(users)}},
            http={"accessControl": ACCESS},
            log={"audit": str(path)},
            limits={"trustedproxies": list(trusted)},
        )
        async with served(config) as url:
            yield Told(Site(url, path), access, folder)

    return opening


async def told_of(told: Told, headers: dict[str, str]) -> Sequence[set[str]]:
    """The addresses that each record has, after one request of each kind."""
    await told.push(headers)
    await told.be_denied(headers)
    await told.site.until("denied", 1)
    changes = told.journal()
    events = [event for change in changes for event in events_of(change, instance="i", place=Place("", "a"))]
    return (
        told.access(),
        told.audit("push"),
        told.audit("denied"),
        told.audit("login"),
        {change.actor.address for change in changes},
        {event.details["request"]["addr"] for event in events},
    )


async def test_behind_a_proxy_that_is_trusted_every_record_names_the_client(opened: Open) -> None:
    async with opened("127.0.0.0/8") as told:
        assert await told_of(told, FORWARDED) == ({"198.51.100.1"},) * 6


@pytest.mark.parametrize("trusted", [(), ("192.0.2.1",)], ids=["nobody", "somebody else"])
@pytest.mark.parametrize(
    "headers",
    [
        FORWARDED,
        {"X-Real-IP": "198.51.100.1", "Forwarded": "for=198.51.100.1", "True-Client-IP": "198.51.100.1"},
        {"X-Forwarded-For": "127.0.0.1, 192.0.2.1"},
    ],
    ids=["forwarded-for", "others", "as a proxy"],
)
async def test_what_a_client_that_is_no_proxy_of_ours_says_changes_no_record(
    opened: Open, trusted: tuple[str, ...], headers: dict[str, str]
) -> None:
    async with opened(*trusted) as told:
        assert await told_of(told, headers) == ({"127.0.0.1"},) * 6


async def test_what_a_client_wrote_before_the_proxy_added_its_address_changes_no_record(opened: Open) -> None:
    forged = {"X-Forwarded-For": "127.0.0.1, 127.0.0.2, 203.0.113.9, fe80::1%\t, nonsense, 198.51.100.1"}
    async with opened("127.0.0.0/8") as told:
        assert await told_of(told, forged) == ({"198.51.100.1"},) * 6


async def test_a_proxy_that_names_nobody_is_named_itself(opened: Open) -> None:
    async with opened("127.0.0.0/8") as told:
        assert await told_of(told, {"X-Forwarded-For": "198.51.100.1, unknown"}) == ({"127.0.0.1"},) * 6


@pytest.mark.parametrize(("trusted", "address"), [((), "127.0.0.1"), (("127.0.0.1",), "198.51.100.1")])
async def test_answers_that_are_kept_are_no_exception(
    opened: Open, trusted: tuple[str, ...], address: str
) -> None:
    manifest = b'{"schemaVersion": 2, "mediaType": "%s", "manifests": []}' % OCI_INDEX.encode()
    fields = "".join(f"{name}: {value}\r\n" for name, value in (ANN | FORWARDED).items())
    get = f"GET /v2/team/a/manifests/v1 HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode()
    async with opened(*trusted) as told:
        headers = ANN | {"Content-Type": OCI_INDEX}
        reply = await told.site.wire("PUT", "/v2/team/a/manifests/v1", headers=headers, body=manifest)
        assert reply.status == 201
        for _ in range(3):
            await answered(told.site.wire, get)

        gets = [line for line in told.lines() if line["method"] == "GET"]
        assert [(line["remote"], line["user"]) for line in gets] == [(address, "ann")] * 3
        assert [line["seconds"] for line in gets].count(0) == 2
