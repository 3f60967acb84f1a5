"""The audit log: what was done is in it before it is acknowledged, what was refused soon after; and no secret ever."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kitspec.digest import Digest
from kitspec.errors import Unavailable
from kitspec.media_types import OCI_MANIFEST
from registry import audit as audit_module
from registry import logs
from registry.app import run_worker
from registry.audit import AuditedJournal, AuditFile, AuditLog, open_audit
from registry.config import Config
from registry.journal import Actor, Change
from storage_backends.interface import StorageUnavailable
from storage_backends.memory import MemoryBackend
from tests.contracts.registry_contract import REPOSITORY
from tests.registry.auth.logins import basic, bearer, written
from tests.registry.conftest import Serve
from tests.registry.wire import OCI_CONFIG, OCI_INDEX, Wire

ACCESS: dict[str, Any] = {
    "repositories": {"team/**": {"policies": [{"users": ["ann", "bob"], "actions": ["read", "create"]}]}}
}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def a_change(number: int = 0) -> Change:
    digest = Digest.of(str(number).encode())
    return Change("push", REPOSITORY, digest, OCI_MANIFEST, 7, tags=("v1",), actor=Actor("ann", "192.0.2.7"))


@pytest.fixture
async def backend() -> AsyncIterator[MemoryBackend]:
    backend = MemoryBackend()
    await backend.start()
    yield backend
    await backend.close()


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[AuditLog]:
    async with open_audit(path) as audit:
        assert audit is not None
        yield audit


class TestChanges:
    async def test_a_change_is_in_it_before_it_is_acknowledged_in_the_words_of_the_journal(
        self, backend: MemoryBackend, tmp_path: Path
    ) -> None:
        path = tmp_path / "audit.log"
        async with opened(path) as audit:
            journal = AuditedJournal(backend, audit)
            changes = [a_change(number) for number in range(20)]
            for change in changes[:3]:
                await journal.append(change)
                assert lines_of(path)[-1] == change.to_json()
            await asyncio.gather(*(journal.append(change) for change in changes[3:]))

            assert lines_of(path) == [change.to_json() for change in changes]

    async def test_so_is_one_whose_client_has_left(self, backend: MemoryBackend, tmp_path: Path) -> None:
        path = tmp_path / "audit.log"
        async with opened(path) as audit:
            appending = asyncio.create_task(AuditedJournal(backend, audit).append(a_change()))
            await asyncio.sleep(0)
            appending.cancel()
            await asyncio.gather(appending, return_exceptions=True)
            async with asyncio.timeout(10):
                while not lines_of(path):
                    await asyncio.sleep(0)

    async def test_what_was_done_is_told_also_where_the_journal_cannot_be_written(
        self, backend: MemoryBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail(key: str, content: bytes) -> None:
            raise StorageUnavailable("no answer")

        monkeypatch.setattr(backend, "create", fail)
        path, change = tmp_path / "audit.log", a_change()
        async with opened(path) as audit:
            with pytest.raises(Unavailable):
                await AuditedJournal(backend, audit).append(change)

        assert lines_of(path) == [change.to_json()]

    async def test_what_cannot_be_written_does_not_undo_what_was_done(
        self, backend: MemoryBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        async with opened(folder / "audit.log") as audit:
            (folder / "audit.log").unlink()
            folder.rmdir()
            journal = AuditedJournal(backend, audit)
            await journal.append(a_change())

        assert [key async for key in journal.entries()]
        assert "audit.lost" in caplog.messages

    async def test_a_disk_that_hangs_holds_up_nobody_for_ever(
        self,
        backend: MemoryBackend,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        import threading

        monkeypatch.setattr(audit_module, "_WRITE_WAIT_S", 0.01)
        monkeypatch.setattr(audit_module, "_WAITING_MAX", 2)
        path, hanging = tmp_path / "audit.log", threading.Event()
        append = AuditFile.append

        def hang(file: AuditFile, lines: list[str]) -> None:
            hanging.wait(10)
            append(file, lines)

        monkeypatch.setattr(AuditFile, "append", hang)
        async with opened(path) as audit:
            journal = AuditedJournal(backend, audit)
            for number in range(5):
                await journal.append(a_change(number))
            monkeypatch.setattr(audit_module, "_WRITE_WAIT_S", 10.0)
            hanging.set()
            await audit.written()

        assert [line["digest"] for line in lines_of(path)] == [a_change(n).digest for n in range(3)]
        assert {"audit.late", "audit.lost"} <= set(caplog.messages)


class TestTheFile:
    async def test_it_is_its_owners_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.log"
        async with opened(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600

    async def test_one_that_is_there_is_gone_on_with(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.log"
        for number in range(2):
            async with opened(path) as audit:
                audit.record({"number": number})

        assert lines_of(path) == [{"number": 0}, {"number": 1}]

    async def test_one_that_was_renamed_is_followed_by_a_new_one(self, tmp_path: Path) -> None:
        path, old = tmp_path / "audit.log", tmp_path / "audit.log.1"
        async with opened(path) as audit:
            audit.record({"number": 0})
            await audit.written()
            path.rename(old)
            audit.record({"number": 1})

        assert (lines_of(old), lines_of(path)) == ([{"number": 0}], [{"number": 1}])

    def test_lines_of_several_processes_stay_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "audit.log"
        files = [AuditFile(path), AuditFile(path)]
        for number in range(10):
            files[number % 2].append([json.dumps({"number": number, "x": "y" * 10_000})])
        for file in files:
            file.close()

        assert [line["number"] for line in lines_of(path)] == list(range(10))

    def test_standard_output_is_one(self, capfd: pytest.CaptureFixture[str]) -> None:
        file = AuditFile(Config.model_validate({"log": {"audit": "stdout"}}).log.audit or Path())
        file.append(['{"a": 1}', '{"b": 2}'])
        file.close()
        os.fstat(1)  # it is still open

        assert capfd.readouterr().out == '{"a": 1}\n{"b": 2}\n'

    async def test_one_that_cannot_be_opened_ends_the_start(self, tmp_path: Path) -> None:
        log = {"audit": str(tmp_path / "nowhere" / "audit.log")}
        config = Config.model_validate({"storage": "inmemory", "workers": 1, "log": log})

        with pytest.raises(FileNotFoundError, match="nowhere"):
            await run_worker(config, None, stop=asyncio.Event(), ready=lambda: None)  # type: ignore[arg-type]

    async def test_without_it_nothing_is_recorded(self) -> None:
        async with open_audit(None) as audit:
            assert audit is None


async def test_of_a_flood_some_are_recorded_and_the_others_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now = tmp_path / "audit.log", [100.0]
    monkeypatch.setattr(audit_module.time, "time", lambda: now[0])
    async with opened(path) as audit:
        for _ in range(1000):
            audit.record_refusal({"action": "denied"})
        now[0] += 1
        audit.record_refusal({"action": "denied"})

    assert len(lines_of(path)) == 51
    assert lines_of(path)[-1]["suppressed"] == 950


class Site:
    """A registry with users and an audit log."""

    def __init__(self, url: str, path: Path) -> None:
        self.wire = Wire(url)
        self.path = path

    def lines(self, action: str) -> list[dict[str, Any]]:
        return [line for line in lines_of(self.path) if line["action"] == action]

    async def until(self, action: str, count: int) -> list[dict[str, Any]]:
        async with asyncio.timeout(10):
            while len(self.lines(action)) < count:
                await asyncio.sleep(0.001)
        return self.lines(action)


@pytest.fixture
async def site(serve: Serve, tmp_path: Path) -> AsyncIterator[Site]:
    users = written(tmp_path / "htpasswd", {"ann": "secret-canary", "bob": "b"})
    path = tmp_path / "audit.log"
    auth = {"htpasswd": {"path": str(users)}, "token": {}, "apikeys": {}}
    http = {"host": "http://registry.example", "accessControl": ACCESS}
    log = {"accesslog": {"disabled": True}, "audit": str(path)}
    async with serve(auth=auth, http=http, log=log) as url:
        yield Site(url, path)


ANN = basic("ann", "secret-canary")


class TestRequests:
    async def test_who_pushed_what_where_and_from_where(self, site: Site) -> None:
        digest = await push_blob(site, "team/a")
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": {"mediaType": OCI_CONFIG, "digest": digest, "size": 2},
                "layers": [],
            }
        ).encode()
        headers = ANN | {"Content-Type": OCI_MANIFEST, "X-Request-Id": "mine", "User-Agent": "test/1"}
        reply = await site.wire("PUT", "/v2/team/a/manifests/v1", headers=headers, body=manifest)
        assert reply.status == 201

        pushed = site.lines("push")[-1]
        assert {name: pushed[name] for name in set(pushed) - {"id", "time", "size"}} == {
            "action": "push",
            "repository": "team/a",
            "digest": Digest.of(manifest),
            "mediaType": OCI_MANIFEST,
            "tags": ["v1"],
            "actor": "ann",
            "address": "127.0.0.1",
            "agent": "test/1",
            "request": "mine",
        }

    async def test_what_was_denied(self, site: Site) -> None:
        headers = ANN | {"X-Request-Id": "mine"}
        reply = await site.wire("DELETE", "/v2/team/a/manifests/v1?token=canary", headers=headers)
        assert reply.status == 403

        (denied,) = await site.until("denied", 1)
        assert {name: denied[name] for name in set(denied) - {"time"}} == {
            "action": "denied",
            "actor": "ann",
            "address": "127.0.0.1",
            "request": "mine",
            "method": "DELETE",
            "path": "/v2/team/a/manifests/v1",
        }

    async def test_a_login_once_and_not_each_request(self, site: Site) -> None:
        for _ in range(3):
            assert (await site.wire("GET", "/v2/", headers=ANN)).status == 200
        assert (await site.wire("GET", "/v2/", headers=basic("bob", "b"))).status == 200

        logins = await site.until("login", 2)
        assert [(line["actor"], line["scheme"]) for line in logins] == [("ann", "basic"), ("bob", "basic")]

    async def test_a_token_when_it_is_first_used(self, site: Site) -> None:
        reply = await site.wire("GET", "/v2/token?service=registry.example", headers=ANN)
        token = reply.json()["token"]
        assert (await site.wire("GET", "/v2/", headers=bearer(token))).status == 200

        logins = await site.until("login", 2)
        assert [line.get("actor") for line in logins] == [None, "ann"]
        assert [line["scheme"] for line in logins] == ["basic", "bearer"]
        assert token not in site.path.read_text()

    @pytest.mark.parametrize(
        "headers",
        [basic("ann", "wrong-canary"), basic("canary", "x"), bearer("canary")],
        ids=["password", "user", "token"],
    )
    async def test_a_login_that_is_refused(self, site: Site, headers: dict[str, str]) -> None:
        assert (await site.wire("GET", "/v2/", headers=headers)).status == 401

        (refused,) = await site.until("login.refused", 1)
        assert "actor" not in refused
        assert refused["address"] == "127.0.0.1"

    async def test_and_at_the_token_service(self, site: Site) -> None:
        form = b"grant_type=password&service=registry.example&client_id=x&username=ann&password=wrong-canary"
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        assert (await site.wire("POST", "/v2/token", headers=headers, body=form)).status == 401

        (refused,) = await site.until("login.refused", 1)
        assert refused["path"] == "/v2/token"

    async def test_an_api_key_that_is_made_and_one_that_is_taken_back(self, site: Site) -> None:
        headers = ANN | {"Content-Type": "application/json", "X-Request-Id": "mine", "User-Agent": "test/1"}
        wish = json.dumps({"label": "label-canary", "scope": ["repository:team/a:pull"]}).encode()
        made = (await site.wire("POST", "/v2/_modelkit/apikeys", headers=headers, body=wish)).json()
        target = f"/v2/_modelkit/apikeys/{made['id']}"
        for status in (204, 404):
            assert (await site.wire("DELETE", target, headers=headers)).status == status

        wanted = {"key": made["id"], "actor": "ann", "address": "127.0.0.1", "agent": "test/1"}
        (created,), (revoked,) = site.lines("apikey.created"), site.lines("apikey.revoked")
        assert {name: created[name] for name in set(created) - {"time"}} == wanted | {
            "action": "apikey.created",
            "scope": ["repository:team/a:pull"],
            "request": "mine",
        }
        assert {name: revoked[name] for name in set(revoked) - {"time"}} == wanted | {
            "action": "apikey.revoked",
            "request": "mine",
        }
        assert made["key"] not in site.path.read_text()

    async def test_an_api_key_that_is_not_made_is_not_told(self, site: Site) -> None:
        headers = ANN | {"Content-Type": "application/json"}
        refused = await site.wire("POST", "/v2/_modelkit/apikeys", headers=headers, body=b'{"scope": ["x"]}')
        assert refused.status == 400
        await site.until("login", 1)

        assert [line["action"] for line in lines_of(site.path)] == ["login"]

    async def test_a_request_is_not_taken_for_the_one_before_on_its_connection(self, site: Site) -> None:
        headers = "".join(f"{name}: {value}\r\n" for name, value in ANN.items())
        request = f"GET /v2/ HTTP/1.1\r\nHost: a\r\n{headers}\r\n".encode()
        last = b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        await site.wire.converse([request, last])

        (login,) = await site.until("login", 1)
        assert login["path"] == "/v2/"

    async def test_reads_and_challenges_are_not_in_it(self, site: Site) -> None:
        assert (await site.wire("GET", "/v2/")).status == 401
        assert (await site.wire("GET", "/v2/team/a/tags/list", headers=ANN)).status == 404
        await site.until("login", 1)

        assert [line["action"] for line in lines_of(site.path)] == ["login"]

    async def test_v15_no_secret_is_in_it(self, site: Site) -> None:
        await push_blob(site, "team/a")
        for headers in (ANN, basic("ann", "wrong-canary"), bearer("canary"), basic("canary", "canary")):
            await site.wire("DELETE", "/v2/team/a/manifests/v1?x=canary", headers=headers)
        await site.until("login.refused", 3)

        assert "canary" not in site.path.read_text()


async def push_blob(site: Site, name: str) -> str:
    digest = Digest.of(b"{}")
    target = f"/v2/{name}/blobs/uploads/?digest={digest}"
    reply = await site.wire("POST", target, headers=ANN, body=b"{}")
    assert reply.status == 201
    return digest


async def test_a_read_only_registry_still_tells_of_what_it_denies(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    users = written(tmp_path / "htpasswd", {"ann": "a"})
    async with serve(
        auth={"htpasswd": {"path": str(users)}},
        http={"accessControl": {"repositories": {"team/**": {"defaultPolicy": ["read"]}}}},
        log={"audit": str(path), "accesslog": {"disabled": True}},
        storage={"maintenance": {"readonly": {"enabled": True}}},
    ) as url:
        site = Site(url, path)
        assert (await site.wire("GET", "/v2/other/tags/list", headers=basic("ann", "a"))).status == 403
        await site.until("denied", 1)


class Written(logs.DescriptorHandler):
    """Keeps what would be written: the access log writes in the event loop, which tests forbid."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.texts: list[str] = []

    def write_lines(self, lines: str) -> None:
        self.texts.append(lines)


@pytest.fixture
async def access_lines(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Wire, Callable[[], list[dict[str, Any]]]]]:
    """A registry with users, and a function that gives the lines of its access log."""
    handler = Written()
    log = logs.AccessLog(handler, as_json=True, constant={})
    monkeypatch.setattr(logs, "_access_log", log)

    def lines() -> list[dict[str, Any]]:
        log.flush()
        return [json.loads(line) for text in handler.texts for line in text.splitlines()]

    users = written(tmp_path / "htpasswd", {"ann": "a", "bob": "b"})
    auth = {"htpasswd": {"path": str(users)}}
    async with serve(auth=auth, log={}, http={"accessControl": ACCESS}) as url:
        yield Wire(url), lines


class TestTheAccessLog:
    async def test_it_names_who_had_logged_in_also_where_an_answer_was_kept(
        self, access_lines: tuple[Wire, Callable[[], list[dict[str, Any]]]]
    ) -> None:
        wire, lines = access_lines
        manifest = b'{"schemaVersion": 2, "mediaType": "%s", "manifests": []}' % OCI_INDEX.encode()
        headers = basic("ann", "a") | {"Content-Type": OCI_INDEX}
        assert (await wire("PUT", "/v2/team/a/manifests/v1", headers=headers, body=manifest)).status == 201
        for user in ("ann", "bob"):
            fields = "".join(f"{name}: {value}\r\n" for name, value in basic(user, user[0]).items())
            get = f"GET /v2/team/a/manifests/v1 HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode()
            for _ in range(3):  # the same to the byte: all but the first are answered from memory
                await answered(wire, get)

        gets = [line for line in lines() if line["method"] == "GET"]
        assert [line["user"] for line in gets] == ["ann"] * 3 + ["bob"] * 3
        assert [line["seconds"] for line in gets].count(0) == 4

    async def test_and_nobody_where_nobody_has(
        self, access_lines: tuple[Wire, Callable[[], list[dict[str, Any]]]]
    ) -> None:
        wire, lines = access_lines
        fields = "".join(f"{name}: {value}\r\n" for name, value in basic("ann", "a").items())
        first = f"GET /v2/ HTTP/1.1\r\nHost: a\r\n{fields}\r\n".encode()
        last = b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        await wire.converse([first, last])
        await wire("GET", "/v2/", headers=basic("ann", "wrong"))

        assert [(line["path"], line.get("user")) for line in lines()] == [
            ("/v2/", "ann"),
            ("/livez", None),
            ("/v2/", None),
        ]


async def answered(wire: Wire, request: bytes) -> None:
    reader, writer = await asyncio.open_connection(wire.host, wire.port)
    writer.write(request)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("as_json", [True, False])
def test_a_name_cannot_break_the_line(as_json: bool) -> None:
    handler = Written()
    log = logs.AccessLog(handler, as_json=as_json, constant={})
    log.user = lambda: 'a" b=c\n\x7f'
    log.record(
        remote="r", method="GET", path="/", status=200, seconds=0, received=0, sent=0, agent="", identity="i"
    )
    log.flush()

    (line,) = "".join(handler.texts).splitlines()
    assert line.isprintable()
    assert '"a\\" b=c\\n\\u007f"' in line
