"""Notifications: every write is told, at least once, in order, after crashes too; and nobody is told who must not be."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import socket
import ssl
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tenacity import RetryCallState

from kitspec.digest import Digest
from kitspec.media_types import OCI_MANIFEST
from kitspec.names import RepositoryName
from registry import layout, notifications
from registry.config import Config
from registry.config_sources import ConfigInvalid, load_config
from registry.event_sinks import DeliveryFailed, Event, HttpSink, Place, Sink, events_of
from registry.journal import SETTLED_S, Actor, Change, Journal
from registry.notifications import Cursor, Deliverer, make_deliverers, place_of
from registry.notifications_config import Endpoint, is_public
from storage_backends.interface import ObjectInfo, StorageUnavailable
from storage_backends.memory import MemoryBackend
from tests.authority import Authority
from tests.contracts.registry_contract import REPOSITORY
from tests.registry.conftest import Serve
from tests.registry.wire import OCI_CONFIG, Wire

OTHER = RepositoryName("other/repository")
PLACE = Place("https://registry.example/", "registry.example")
DAY_S = 24 * 3600.0


def a_change(number: int = 0, **changed: Any) -> Change:
    values: dict[str, Any] = {
        "action": "push",
        "repository": REPOSITORY,
        "digest": Digest.of(str(number).encode()),
        "media_type": OCI_MANIFEST,
        "size": 7,
        "tags": (f"v{number}",),
        "actor": Actor("ann", "192.0.2.7", "oras/1.3"),
        "request": "r1",
    }
    return Change(**(values | changed))


def endpoint(**keys: Any) -> Endpoint:
    return Endpoint.model_validate({"name": "ci", "url": "http://127.0.0.1:9/", "allowprivate": True} | keys)


def only_event(change: Change) -> Event:
    (event,) = events_of(change, instance="0123456789abcdef", place=PLACE)
    return event


class TestWhatIsTold:
    def test_the_envelope_is_distributions(self) -> None:
        change = a_change(id="0f" * 16, time=1795622400.25)

        assert json.loads(only_event(change).to_docker()) == {
            "events": [
                {
                    "id": str(uuid.uuid5(uuid.UUID("0f" * 16), "v0")),
                    "timestamp": "2026-11-25T16:00:00.250Z",
                    "action": "push",
                    "target": {
                        "mediaType": OCI_MANIFEST,
                        "digest": change.digest,
                        "size": 7,
                        "length": 7,
                        "repository": REPOSITORY,
                        "url": f"https://registry.example/v2/{REPOSITORY}/manifests/{change.digest}",
                        "tag": "v0",
                    },
                    "request": {
                        "id": "r1",
                        "addr": "192.0.2.7",
                        "host": "registry.example",
                        "method": "PUT",
                        "useragent": "oras/1.3",
                    },
                    "actor": {"name": "ann"},
                    "source": {"addr": "registry.example", "instanceID": "0123456789abcdef"},
                }
            ]
        }

    def test_a_cloud_event_has_all_that_the_specification_requires_and_the_same_facts(self) -> None:
        event = only_event(a_change())
        told = json.loads(event.to_cloudevents(PLACE))
        docker = json.loads(event.to_docker())["events"][0]

        assert told == {
            "specversion": "1.0",
            "id": docker["id"],
            "source": "https://registry.example/",
            "type": "ml.modelkit-registry.push",
            "subject": f"{REPOSITORY}:v0",
            "time": docker["timestamp"],
            "datacontenttype": "application/json",
            "data": {key: docker[key] for key in ("action", "target", "request", "actor", "source")},
        }

    def test_a_mount_names_where_it_came_from(self) -> None:
        change = a_change(action="mount", source=OTHER, tags=(), media_type="application/octet-stream")

        details = only_event(change).details

        assert details["target"]["fromRepository"] == OTHER
        assert details["target"]["url"] == f"https://registry.example/v2/{REPOSITORY}/blobs/{change.digest}"
        assert details["request"]["method"] == "POST"

    def test_each_tag_of_a_push_is_an_event(self) -> None:
        events = events_of(a_change(tags=("a", "b")), instance="", place=PLACE)

        assert [event.details["target"]["tag"] for event in events] == ["a", "b"]
        assert len({event.details["target"]["digest"] for event in events}) == 1

    def test_a_manifest_that_is_deleted_with_its_tags_is_told_first_and_then_each_tag(self) -> None:
        change = a_change(action="delete", tags=("a", "b"), media_type="", size=None)

        targets = [event.details["target"] for event in events_of(change, instance="", place=PLACE)]

        nothing = {"mediaType": "", "size": 0, "repository": REPOSITORY}
        assert targets == [
            nothing | {"digest": change.digest},
            nothing | {"digest": "", "tag": "a"},
            nothing | {"digest": "", "tag": "b"},
        ]

    def test_a_tag_that_is_deleted_is_one_event(self) -> None:
        event = only_event(a_change(action="delete", digest=None, tags=("a",), media_type="", size=None))

        assert event.details["target"]["tag"] == "a"
        assert event.subject == f"{REPOSITORY}:a"

    def test_nothing_is_said_of_where_we_are_unless_the_operator_has(self) -> None:
        (event,) = events_of(a_change(), instance="i", place=place_of(Config()))

        assert "url" not in event.details["target"]
        assert "host" not in event.details["request"]
        assert json.loads(event.to_cloudevents(place_of(Config())))["source"] == "modelkit-registry"

    def test_the_url_has_the_prefix(self) -> None:
        config = Config.model_validate({"http": {"host": "https://a.example:8443", "prefix": "/r/"}})

        assert place_of(config) == Place("https://a.example:8443/r/", "a.example:8443")

    @given(st.sets(st.sampled_from(["a", "b", "c", "d"])), st.booleans())
    def test_an_event_has_an_id_of_its_own_and_has_it_again(self, tags: set[str], is_deleted: bool) -> None:
        change = a_change(tags=tuple(sorted(tags)), action="delete" if is_deleted else "push")

        ids = [event.id for event in events_of(change, instance="", place=PLACE)]

        assert len(set(ids)) == len(ids)
        assert ids == [event.id for event in events_of(change, instance="x", place=PLACE)]
        assert all(str(uuid.UUID(each)) == each for each in ids)


class Receiver:
    """An endpoint on a socket. Attributes: answers: to come, and 204 from then on; None: the connection is closed."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/hook?key=1"
        self.received: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[bytes | None] = []
        self._came = asyncio.Condition()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
        first, *lines = head.strip().split("\r\n")
        fields = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in fields}
        body = await reader.readexactly(int(headers["content-length"]))
        answer = self.answers.pop(0) if self.answers else b"HTTP/1.1 204 No Content\r\n\r\n"
        if answer is not None:
            writer.write(answer)
        writer.close()
        async with self._came:
            self.received.append((first, headers, body))
            self._came.notify_all()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10), self._came:
            await self._came.wait_for(lambda: len(self.received) >= count)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body)["events"][0] for _, _, body in self.received]

    @property
    def tags(self) -> list[str]:
        return [event["target"]["tag"] for event in self.events]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = Receiver(listener.getsockname()[1])
        server = await asyncio.start_server(receiver.serve, sock=listener)
        yield receiver
        server.close()
        await server.wait_closed()


async def delivered(receiver: Receiver, change: Change | None = None, **keys: Any) -> int:
    sink = HttpSink(endpoint(url=receiver.url, **keys), PLACE)
    return await sink.deliver(only_event(change or a_change()))


class TestThePost:
    async def test_it_carries_the_event_and_what_is_configured(self, receiver: Receiver) -> None:
        status = await delivered(receiver, headers={"Authorization": "Bearer t", "X-A": ["1", "2"]})

        (first, headers, body) = receiver.received[0]
        assert status == 204
        assert first == "POST /hook?key=1 HTTP/1.1"
        assert headers["host"] == receiver.url.split("/")[2]
        assert headers["content-type"] == "application/vnd.docker.distribution.events.v2+json"
        assert headers["authorization"] == "Bearer t"
        assert headers["user-agent"].startswith("modelkit-registry/")
        assert "x-hub-signature-256" not in headers
        assert json.loads(body)["events"][0]["target"]["tag"] == "v0"

    async def test_cloud_events_have_their_media_type(self, receiver: Receiver) -> None:
        await delivered(receiver, format="cloudevents")

        (_, headers, body) = receiver.received[0]
        assert headers["content-type"] == "application/cloudevents+json"
        assert json.loads(body)["specversion"] == "1.0"

    async def test_it_is_signed(self, receiver: Receiver) -> None:
        await delivered(receiver, secret="key")

        (_, headers, body) = receiver.received[0]
        wanted = hmac.new(b"key", body, hashlib.sha256).hexdigest()
        assert headers["x-hub-signature-256"] == f"sha256={wanted}"

    async def test_the_secret_of_a_file_is_the_one_that_is_there_now(
        self, receiver: Receiver, tmp_path: Path
    ) -> None:
        path = tmp_path / "secret"
        for secret in (b"one", b"two\n"):
            path.write_bytes(secret)
            await delivered(receiver, secret_file=str(path))

        for (_, headers, body), key in zip(receiver.received, (b"one", b"two"), strict=True):
            wanted = hmac.new(key, body, hashlib.sha256).hexdigest()
            assert headers["x-hub-signature-256"] == f"sha256={wanted}"

    @pytest.mark.parametrize(
        "content", [None, b"", b"\n", b"x" * 5000], ids=["none", "empty", "line", "long"]
    )
    async def test_without_the_secret_nothing_is_sent(
        self, receiver: Receiver, tmp_path: Path, content: bytes | None
    ) -> None:
        path = tmp_path / "secret"
        if content is not None:
            path.write_bytes(content)

        with pytest.raises(DeliveryFailed, match="not sent: secret_file"):
            await delivered(receiver, secret_file=str(path))
        assert not receiver.received

    async def test_an_interim_answer_is_not_the_answer(self, receiver: Receiver) -> None:
        receiver.answers = [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 202 Accepted\r\n\r\n"]

        assert await delivered(receiver) == 202

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            (b"HTTP/1.1 500 Oh no\r\n\r\n", "answered 500; wanted 2xx"),
            (b"HTTP/1.1 404\r\n\r\n", "answered 404"),
            (b"HTTP/1.1 307 There\r\nLocation: http://127.0.0.1:1/\r\n\r\n", "redirects are not followed"),
            (b"SSH-2.0-x\r\n", "not HTTP"),
            (b"HTTP/2 200 OK\r\n\r\n", "not HTTP"),
            (b"x" * 100_000, "no answer"),
            (b"HTTP/1.1 100 Go on\r\n\r\n" * 20, "not HTTP"),
            (None, "not HTTP|no answer"),
        ],
        ids=["500", "404", "redirect", "ssh", "http2", "endless", "interim", "nothing"],
    )
    async def test_everything_else_is_a_failure(
        self, receiver: Receiver, answer: bytes | None, said: str
    ) -> None:
        receiver.answers = [answer]

        with pytest.raises(DeliveryFailed, match=said):
            await delivered(receiver)
        assert len(receiver.received) == 1

    async def test_so_is_silence(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sink = HttpSink(
                endpoint(url=f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.05), PLACE
            )
            with pytest.raises(DeliveryFailed, match=r"no answer within 0\.05 s"):
                await sink.deliver(only_event(a_change()))

    async def test_and_a_port_where_nobody_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]

        with pytest.raises(DeliveryFailed) as caught:
            await HttpSink(endpoint(url=f"http://127.0.0.1:{port}/?key=canary"), PLACE).deliver(
                only_event(a_change())
            )
        assert "canary" not in str(caught.value)
        assert caught.value.status is None


class TestOverTls:
    """The certificate must be one that the machine trusts, and of the name in the URL."""

    async def deliver(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str) -> int:
        authority = Authority(tmp_path, "ca")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*authority.issue("localhost"))
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            receiver = Receiver(listener.getsockname()[1])
            server = await asyncio.start_server(receiver.serve, sock=listener, ssl=context)
            url = receiver.url.replace("http://127.0.0.1", f"https://{host}")
            resolve_to(monkeypatch, ["127.0.0.1"])
            try:
                return await HttpSink(endpoint(url=url), PLACE).deliver(only_event(a_change()))
            finally:
                server.close()
                await server.wait_closed()

    async def test_a_certificate_of_the_name_will_do(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        assert await self.deliver(monkeypatch, tmp_path, "localhost") == 204

    async def test_and_one_of_another_name_will_not(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with pytest.raises(DeliveryFailed, match=r"no answer: .*certificate"):
            await self.deliver(monkeypatch, tmp_path, "ci.example")


PUBLIC = ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
NOT_PUBLIC = [
    "127.0.0.1",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fe80::1%eth0",
    "fd00::1",
    "fec0::1",
    "ff0e::1",
    "::127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::a00:1",
    "64:ff9b:1::a00:1",
    "2002:a00:1::1",
    "2001:0:7f00:1::1",
]


class TestWhereItMayLead:
    """Rows A-51, A-52 and A-55 of our threat model."""

    @pytest.mark.parametrize("address", PUBLIC)
    def test_public_addresses_are(self, address: str) -> None:
        assert is_public(address)

    @pytest.mark.parametrize("address", NOT_PUBLIC)
    def test_others_are_not_also_when_they_stand_for_one(self, address: str) -> None:
        assert not is_public(address)

    @pytest.mark.parametrize(
        "addresses",
        [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:127.0.0.1"], ["8.8.8.8", "::1"]],
        ids=str,
    )
    async def test_a51_a_name_with_one_private_address_is_not_spoken_to(
        self, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
    ) -> None:
        resolve_to(monkeypatch, addresses)
        sink = HttpSink(
            endpoint(url=receiver.url.replace("127.0.0.1", "ci.example"), allowprivate=False), PLACE
        )

        with pytest.raises(DeliveryFailed, match="private network"):
            await sink.deliver(only_event(a_change()))
        assert not receiver.received

    async def test_a51_a_name_that_was_public_is_looked_at_again(
        self, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sink = HttpSink(
            endpoint(url=receiver.url.replace("127.0.0.1", "ci.example"), allowprivate=False, timeout=0.01),
            PLACE,
        )
        connected: list[str] = []

        async def connect(host: str, port: int, **_: Any) -> Any:
            connected.append(host)
            raise OSError("refused by the test")

        monkeypatch.setattr(asyncio, "open_connection", connect)
        resolve_to(monkeypatch, ["8.8.8.8"])
        with pytest.raises(DeliveryFailed, match="refused by the test"):
            await sink.deliver(only_event(a_change()))
        resolve_to(monkeypatch, ["127.0.0.1"])
        with pytest.raises(DeliveryFailed, match="private network"):
            await sink.deliver(only_event(a_change()))
        assert connected == ["8.8.8.8"]

    @pytest.mark.parametrize("host", ["2130706433", "127.1", "0x7f.1"])
    async def test_an_address_in_another_spelling_is_still_that_address(
        self, receiver: Receiver, host: str
    ) -> None:
        sink = HttpSink(endpoint(url=receiver.url.replace("127.0.0.1", host), allowprivate=False), PLACE)

        with pytest.raises(DeliveryFailed, match="private network"):
            await sink.deliver(only_event(a_change()))

    async def test_the_next_address_is_tried_where_one_does_not_answer(
        self, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resolve_to(monkeypatch, ["127.0.0.2", "127.0.0.1"])

        sink = HttpSink(endpoint(url=receiver.url.replace("127.0.0.1", "ci.example")), PLACE)
        assert await sink.deliver(only_event(a_change())) == 204
        assert receiver.received[0][1]["host"].startswith("ci.example:")


def resolve_to(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


class TestConfiguration:
    def test_distributions_keys_carry_over(self) -> None:
        config = Config.model_validate(
            {
                "notifications": {
                    "endpoints": [
                        {
                            "name": "alistener",
                            "disabled": False,
                            "url": "https://my.listener.example/event",
                            "headers": {"Authorization": ["Bearer x"]},
                            "timeout": "1s",
                            "threshold": 10,
                            "backoff": "1s",
                            "ignoredmediatypes": ["application/octet-stream"],
                            "ignore": {"mediatypes": ["a/b"], "actions": ["pull"]},
                        }
                    ]
                }
            }
        )

        (listener,) = config.notifications.endpoints
        assert listener.ignored_media_types == {"application/octet-stream", "a/b"}
        assert "Bearer x" not in repr(config)

    @pytest.mark.parametrize(
        ("keys", "said"),
        [
            ({"name": "a/b"}, "letters, digits"),
            ({"name": ""}, "letters, digits"),
            ({"url": "ftp://a.example/"}, "url should be an address"),
            ({"url": "https://user:pass@a.example/"}, "url should be an address"),
            ({"url": "https://a.example/#f"}, "url should be an address"),
            ({"url": "https:///x"}, "url should be an address"),
            ({"url": "https://a.example:99999/"}, "url should be an address"),
            ({"url": "https://a.example/\r\nX: y"}, "url should be an address"),
            ({"url": "http://[::1/"}, "url should be an address"),
            ({"url": "http://10.0.0.1/", "allowprivate": False}, "allowprivate"),
            ({"url": "http://[::ffff:127.0.0.1]/", "allowprivate": False}, "allowprivate"),
            ({"url": "http://localhost:8080/", "allowprivate": False}, "allowprivate"),
            ({"timeout": "1m"}, "less than or equal to 30"),
            ({"threshold": 0}, "greater than 0"),
            ({"headers": {"X": "a\r\nY: b"}}, "printable"),
            ({"headers": {"X": [1]}}, "printable"),
            ({"headers": {"a b": "c"}}, "names of headers"),
            ({"headers": {"content-type": "c"}}, "delivery's own"),
            ({"headers": {"X-Hub-Signature-256": "c"}}, "delivery's own"),
            ({"secret": "a", "secret_file": "/b"}, "not both"),
            ({"secret": ""}, "should not be empty"),
            ({"format": "xml"}, "docker"),
            ({"ignore": {"actions": ["pulls"]}}, "pull"),
            ({"ignored": []}, "Extra inputs"),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_refused(self, keys: dict[str, Any], said: str) -> None:
        with pytest.raises(ValidationError, match=said):
            endpoint(**keys)

    def test_names_are_different(self) -> None:
        two = [{"name": "a", "url": "https://a.example/"}] * 2

        with pytest.raises(ValidationError, match="different names"):
            Config.model_validate({"notifications": {"endpoints": two}})

    @pytest.mark.parametrize(
        "keys",
        [
            "url: 'http://127.0.0.1/?canary'",
            "url: 'https://a:canary@b.example/'",
            "url: 'https://b.example/', headers: {A: \"canary\\n\"}",
            "url: 'https://b.example/', headers: {A: [canary, 1]}",
            "url: 'https://b.example/', secret: canary, secret_file: /x",
        ],
    )
    def test_a_message_shows_no_secret_and_names_the_place(self, tmp_path: Path, keys: str) -> None:
        path = tmp_path / "config.yml"
        path.write_text(f"notifications: {{endpoints: [{{name: a, {keys}}}]}}")

        with pytest.raises(ConfigInvalid) as caught:
            load_config(path)
        (problem,) = caught.value.problems
        assert problem.startswith("notifications.endpoints.0")
        assert "canary" not in problem

    def test_every_key_is_in_the_manual_and_the_example(self) -> None:
        root = Path(__file__).parents[2]
        manual = (root / "docs" / "operations.md").read_text()
        example = (root / "deploy" / "config.example.yml").read_text()

        keys = (set(Endpoint.model_fields) - {"ignore"}) | {"ignore.mediatypes", "ignore.actions"}
        assert not {key for key in keys if f"| `{key}` |" not in manual}
        assert not {key for key in Endpoint.model_fields if f"{key}:" not in example}

    async def test_a_disabled_endpoint_is_not_told(self) -> None:
        keys = {"name": "a", "url": "https://a.example/", "disabled": True}
        config = Config.model_validate({"notifications": {"endpoints": [keys]}})

        assert make_deliverers(config, MemoryBackend(), Journal(MemoryBackend())) == []


class Store(MemoryBackend):
    """A store whose clock and whose answers are the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0.0
        self.fails: StorageUnavailable | None = None

    def now(self) -> float:
        return super().now() + self.passed

    async def write(self, key: str, content: bytes, *, expect: str | None = None) -> ObjectInfo:
        if self.fails is not None:
            raise self.fails
        return await super().write(key, content, expect=expect)

    def _put(self, key: str, content: bytes) -> ObjectInfo:
        info = replace(super()._put(key, content), modified=self.now())
        self._objects[key] = replace(self._objects[key], info=info)
        return info


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    store = Store()
    await store.start()
    yield store
    await store.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifications, "_ACQUIRE_INTERVAL_S", 0.01)


class Counted:
    """What an observer was told."""

    def __init__(self) -> None:
        self.waiting: dict[str, int] = {}
        self.sent: list[int] = []
        self.failed: list[int | None] = []

    def events_waiting(self, endpoint: str, entries: int) -> None:
        self.waiting[endpoint] = entries

    def event_sent(self, endpoint: str, status: int) -> None:
        self.sent.append(status)

    def event_failed(self, endpoint: str, status: int | None) -> None:
        self.failed.append(status)


class Heard:
    """A sink that says yes, unless it is told not to. Attributes: refusals: so many attempts fail from now on."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.attempts: list[Event] = []
        self.refusals = 0.0
        self._came = asyncio.Condition()

    async def deliver(self, event: Event) -> int:
        async with self._came:
            self.attempts.append(event)
            self._came.notify_all()
            await asyncio.sleep(0)
            if self.refusals > 0:
                self.refusals -= 1
                raise DeliveryFailed("not now", 503)
            self.events.append(event)
        return 200

    async def until(self, count: int) -> None:
        await self._until(lambda: len(self.events) >= count)

    async def until_attempts(self, count: int) -> None:
        await self._until(lambda: len(self.attempts) >= count)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(10), self._came:
            await self._came.wait_for(is_so)

    @property
    def tags(self) -> list[str]:
        return [event.details["target"]["tag"] for event in self.events]


def deliverer(store: Store, sink: Sink, **keys: Any) -> Deliverer:
    """Of a replica of its own."""
    observer = keys.pop("observer", None) or Counted()
    keys = {"backoff": 0.01} | keys
    return Deliverer(
        store, Journal(store), endpoint(**keys), sink, place=PLACE, observer=observer, interval_s=0.01
    )


@asynccontextmanager
async def running(*deliverers: Deliverer) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(each.run()) for each in deliverers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def begun(store: Store, sink: Sink, **keys: Any) -> None:
    """An endpoint has been there before what the test is about."""
    one = deliverer(store, sink, **keys)
    async with running(one):
        async with asyncio.timeout(10):
            while await Journal(store).marked(f"notifications-{one.name}") is None:
                await asyncio.sleep(0)


def tags_to(count: int, start: int = 0) -> list[str]:
    return [f"v{number}" for number in range(start, count)]


class TestDelivery:
    async def test_every_write_is_told_in_order(self, store: Store, receiver: Receiver) -> None:
        observer = Counted()
        replicas = [Journal(store), Journal(store)]
        one = deliverer(store, HttpSink(endpoint(url=receiver.url), PLACE), observer=observer)
        await begun(store, Heard())
        async with running(one):
            for number in range(20):
                await replicas[number % 2].append(a_change(number))
            await receiver.until(20)

        assert receiver.tags == tags_to(20)
        assert set(observer.sent) == {204}
        assert observer.waiting == {"ci": 0}
        assert {event["source"]["instanceID"] for event in receiver.events} == {
            journal._origin for journal in replicas
        }

    async def test_what_was_there_before_the_endpoint_is_not_told(self, store: Store) -> None:
        heard, journal = Heard(), Journal(store)
        await journal.append(a_change(0))
        await begun(store, heard)
        await journal.append(a_change(1))
        async with running(deliverer(store, heard)):
            await heard.until(1)

        assert heard.tags == ["v1"]

    async def test_what_an_endpoint_does_not_take_is_sent_again_before_anything_else(
        self, store: Store
    ) -> None:
        heard, journal, observer = Heard(), Journal(store), Counted()
        await begun(store, heard)
        heard.refusals = 7
        async with running(deliverer(store, heard, threshold=3, observer=observer)):
            for number in range(3):
                await journal.append(a_change(number))
            await heard.until(3)

        assert heard.tags == tags_to(3)
        assert len({event.id for event in heard.attempts[:8]}) == 1
        assert observer.failed == [503] * 7

    async def test_an_endpoint_that_is_away_holds_up_no_other(self, store: Store) -> None:
        away, heard, journal = Heard(), Heard(), Journal(store)
        await begun(store, away, name="away")
        await begun(store, heard, name="here")
        away.refusals = float("inf")
        async with running(
            deliverer(store, away, name="away"),
            deliverer(store, heard, name="here"),
        ):
            for number in range(10):
                await journal.append(a_change(number))
            await heard.until(10)
            await away.until_attempts(3)

        assert heard.tags == tags_to(10)
        assert {event.details["target"]["tag"] for event in away.attempts} == {"v0"}

    async def test_what_it_does_not_want_it_is_not_told(self, store: Store) -> None:
        heard, journal = Heard(), Journal(store)
        await begun(store, heard)
        keys = {"ignoredmediatypes": ["application/octet-stream"], "ignore": {"actions": ["mount"]}}
        async with running(deliverer(store, heard, **keys)):
            await journal.append(a_change(0, media_type="application/octet-stream"))
            await journal.append(a_change(1, action="mount", source=OTHER))
            await journal.append(a_change(2))
            await heard.until(1)

        assert heard.tags == ["v2"]

    async def test_a_restart_misses_nothing_and_repeats_nothing(self, store: Store) -> None:
        heard, journal = Heard(), Journal(store)
        await begun(store, heard)
        for start in range(0, 30, 10):
            for number in range(start, start + 10):
                await journal.append(a_change(number))
            async with running(deliverer(store, heard)):
                await heard.until(start + 10)

        assert heard.tags == tags_to(30)

    async def test_a_crash_repeats_something_at_most_and_misses_nothing(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        heard, journal = Heard(), Journal(store)
        await begun(store, heard)
        crashing = deliverer(store, heard)

        async def die() -> None:
            pass

        monkeypatch.setattr(crashing._lease, "give_up", die)
        for number in range(10):
            await journal.append(a_change(number))
        async with running(crashing):
            await heard.until(5)
        store.passed = 100.0  # its lease has run out
        for number in range(10, 15):
            await journal.append(a_change(number))
        async with running(deliverer(store, heard)):
            async with asyncio.timeout(10):
                while "v14" not in heard.tags:
                    await asyncio.sleep(0)

        assert list(dict.fromkeys(heard.tags)) == tags_to(15)

    async def test_of_all_replicas_one_delivers_and_when_it_ends_another(self, store: Store) -> None:
        first, second, journal = Heard(), Heard(), Journal(store)
        await begun(store, Heard())
        async with running(deliverer(store, second)):
            await asyncio.sleep(0)  # it holds the lease from here
            async with running(deliverer(store, first)):
                await journal.append(a_change(0))
                await second.until(1)
        async with running(deliverer(store, first)):
            await journal.append(a_change(1))
            await first.until(1)

        assert (first.tags, second.tags) == (["v1"], ["v0"])

    async def test_who_was_held_up_for_too_long_stops(self, store: Store) -> None:
        slow, heard, journal = Heard(), Heard(), Journal(store)
        await begun(store, slow)
        slow.refusals = float("inf")
        await journal.append(a_change(0))
        one = deliverer(store, slow, backoff=0.001)
        async with running(one):
            await slow.until_attempts(2)
            store.passed = 100.0
            async with running(deliverer(store, heard)):
                await heard.until(1)
                one._lease._renewed = float("-inf")  # it has come to again
                attempts = len(slow.attempts)
                await journal.append(a_change(1))
                await heard.until(2)
            assert len(slow.attempts) <= attempts + 1

        assert heard.tags == ["v0", "v1"]

    async def test_a_store_that_fails_is_asked_again(self, store: Store) -> None:
        heard, journal = Heard(), Journal(store)
        await begun(store, heard)
        async with running(deliverer(store, heard)):
            await journal.append(a_change(0))
            await heard.until(1)
            store.fails = StorageUnavailable("no answer")
            await asyncio.sleep(0.05)
            store.fails = None
            await journal.append(a_change(1))
            await heard.until(2)

        assert heard.tags == ["v0", "v1"]

    async def test_a_backlog_of_many_looks_is_told_in_order(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(notifications, "_ENTRIES_MAX", 7)
        heard, journal = Heard(), Journal(store)
        await begun(store, heard)
        for number in range(20):
            await journal.append(a_change(number))
        store.passed = 2 * SETTLED_S
        for number in range(20, 40):
            await journal.append(a_change(number))
        async with running(deliverer(store, heard)):
            await heard.until(40)

        assert heard.tags == tags_to(40)

    async def test_an_entry_that_nobody_can_read_stops_nothing(self, store: Store) -> None:
        heard, journal = Heard(), Journal(store)
        await begun(store, heard)
        await store.write(f"{layout.JOURNAL}99990101/00/0000.000000-x", b"no entry")
        await journal.append(a_change(0))
        async with running(deliverer(store, heard)):
            await heard.until(1)

        assert heard.tags == ["v0"]


class TestOrder:
    async def test_what_was_acknowledged_first_is_told_first_also_where_a_listing_passed_it_over(
        self, store: Store
    ) -> None:
        heard = Heard()
        one = deliverer(store, heard)
        keys = [f"{layout.JOURNAL}29990101/00/0000.00000{number}-a" for number in range(3)]
        await store.write(keys[1], entry(1))
        await one._look()
        assert heard.tags == []  # it cannot be known what the listing passed over

        await store.write(keys[0], entry(0))
        await store.write(keys[2], entry(2))
        await one._look()
        assert heard.tags == ["v0", "v1"]

        await one._look()
        await one._look()
        assert heard.tags == tags_to(3)

    async def test_an_entry_that_comes_late_is_told(self, store: Store) -> None:
        """Its writer began before others that were done first: its key stands before theirs."""
        heard = Heard()
        one = deliverer(store, heard)
        one._cursor = Cursor(one._journal.settled())
        store.passed = SETTLED_S / 2
        await Journal(store).append(a_change(1))
        for _ in range(3):
            await one._look()
        assert heard.tags == ["v1"]

        store.passed = 1.0
        await Journal(store).append(a_change(2))
        store.passed = SETTLED_S / 2
        await one._look()
        assert heard.tags == ["v1", "v2"]


def entry(number: int) -> bytes:
    return json.dumps(a_change(number).to_json()).encode()


class TestTrimming:
    async def test_the_journal_keeps_what_an_endpoint_was_not_told_of_for_thirty_days(
        self, store: Store
    ) -> None:
        heard, journal = Heard(), Journal(store)
        await begun(store, heard)
        heard.refusals = float("inf")
        for number in range(3):
            await journal.append(a_change(number))
        store.passed = 29 * DAY_S
        async with running(deliverer(store, heard)):
            await heard.until_attempts(2)
        assert await journal.trim(keep_s=600) == 0

        store.passed = 31 * DAY_S
        assert await journal.trim(keep_s=600) == 3

    async def test_what_was_told_is_trimmed(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(notifications, "_MARK_INTERVAL_S", 0.0)
        heard, journal = Heard(), Journal(store)
        await begun(store, heard)
        await journal.append(a_change(0))
        store.passed = DAY_S
        async with running(deliverer(store, heard)):
            await heard.until(1)
            while await journal.trim(keep_s=600, dry_run=True) == 0:
                await asyncio.sleep(0)

        assert await journal.trim(keep_s=600) == 1

    @given(st.lists(st.integers(0, 10**6 - 1), unique=True, max_size=400))
    def test_what_is_remembered_fits_the_record(self, numbers: list[int]) -> None:
        cursor = Cursor("journal/20261125/16/0000.000000-")
        keys = [f"journal/20261125/16/0001.{number:06}-{'ab' * 8}{number:x}" for number in sorted(numbers)]
        for key in keys:
            cursor.note(key)

        document = json.dumps(cursor.to_json())
        back = Cursor.from_json(json.loads(document))

        assert len(document) < 3500
        assert all(back.has(key) for key in keys[-200:])
        if keys:
            back.move(keys[-1])
            assert back._noted == {}


@pytest.mark.parametrize(
    ("attempt", "wanted"), [(1, 0), (2, 0), (3, 2), (4, 4), (5, 8), (10, 256), (11, 300), (10**6, 300)]
)
def test_attempts_come_at_once_until_the_threshold_and_then_more_and_more_slowly(
    attempt: int, wanted: float
) -> None:
    one = deliverer(Store(), Heard(), threshold=3, backoff=2)
    state = RetryCallState(retry_object=None, fn=None, args=(), kwargs={})  # type: ignore[arg-type]
    state.attempt_number = attempt

    assert one._wait_s(state) == wanted


async def test_a_push_to_a_registry_is_told_with_its_request(serve: Serve, receiver: Receiver) -> None:
    endpoints = [{"name": "ci", "url": receiver.url, "allowprivate": True}]
    async with serve(notifications={"endpoints": endpoints}, journal={"poll": 0.02}) as url:
        wire = Wire(url)
        await asyncio.sleep(0.2)  # the endpoint begins with what comes after it
        digest = await wire.push_blob("a", b"{}")
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": {"mediaType": OCI_CONFIG, "digest": digest, "size": 2},
                "layers": [],
            }
        ).encode()
        headers = {"Content-Type": OCI_MANIFEST, "X-Request-Id": "mine", "User-Agent": "test/1"}
        assert (await wire("PUT", "/v2/a/manifests/v1", headers=headers, body=manifest)).status == 201
        await receiver.until(2)

    blob, pushed = receiver.events
    assert (blob["target"]["digest"], blob["target"]["mediaType"]) == (digest, "application/octet-stream")
    assert pushed["target"]["tag"] == "v1"
    assert pushed["request"] == {
        "id": "mine",
        "addr": "127.0.0.1",
        "method": "PUT",
        "useragent": "test/1",
    }
