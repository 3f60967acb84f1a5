"""What an endpoint is told of a write, and the POST that tells it.

    docker         Distribution's envelope with one event, application/vnd.docker.distribution.events.v2+json
    cloudevents    CloudEvents 1.0 in structured mode, application/cloudevents+json; `data` has what the envelope's event has

The POST is made by hand: of the answer only its status counts, no redirect is followed, and the connection goes to the very address
that was checked (docs/adr/0020-events.md), with the name for TLS and `Host`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import importlib.metadata
import json
import re
import socket
import ssl
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from registry.journal import Change
from registry.notifications_config import Endpoint, is_public

DOCKER_MEDIA_TYPE: Final = "application/vnd.docker.distribution.events.v2+json"
CLOUDEVENTS_MEDIA_TYPE: Final = "application/cloudevents+json"
# What stands before the action in `type` of CloudEvents.
_TYPE_PREFIX: Final = "ml.modelkit-registry."
_BLOB_MEDIA_TYPE: Final = "application/octet-stream"
_AGENT: Final = f"modelkit-registry/{importlib.metadata.version('modelkit-registry')}"
_SECRET_SIZE_MAX: Final = 4096
_ANSWER_LINE_MAX: Final = 8192
_INTERIM_MAX: Final = 8
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the registry is, for who reads an event.

    Attributes:
        base: what its paths stand below, "https://registry.example/"; "" where nobody has said (`http.host`).
        address: host and port.
    """

    base: str
    address: str


@dataclass(frozen=True, slots=True)
class Event:
    """One event of one change.

    Attributes:
        id: the same whenever the same event is sent again.
        media_type: of what was pushed or mounted; "" for what was deleted.
        details: `target`, `request`, `actor` and `source` of the envelope.
    """

    id: str
    time: float
    action: str
    media_type: str
    subject: str
    details: Mapping[str, Mapping[str, Any]]

    def to_docker(self) -> bytes:
        event = {"id": self.id, "timestamp": self._timestamp, "action": self.action, **self.details}
        return json.dumps({"events": [event]}).encode()

    def to_cloudevents(self, place: Place) -> bytes:
        document = {
            "specversion": "1.0",
            "id": self.id,
            "source": place.base or "modelkit-registry",
            "type": f"{_TYPE_PREFIX}{self.action}",
            "subject": self.subject,
            "time": self._timestamp,
            "datacontenttype": "application/json",
            "data": {"action": self.action, **self.details},
        }
        return json.dumps(document).encode()

    @property
    def _timestamp(self) -> str:
        at = datetime.fromtimestamp(self.time, UTC).replace(tzinfo=None)
        return f"{at.isoformat(timespec='milliseconds')}Z"


def events_of(change: Change, *, instance: str, place: Place) -> Sequence[Event]:
    """What Distribution would tell of a change: an event for each tag that was set, or deleted; of deletes by digest one for that first.

    Args:
        instance: the worker that made the change.
    """
    if change.action == "delete" and change.digest is not None:
        tags: tuple[str, ...] = ("", *change.tags)
    else:
        tags = change.tags or ("",)
    return [_event(change, tag, instance, place) for tag in tags]


def _event(change: Change, tag: str, instance: str, place: Place) -> Event:
    is_tag_deleted = change.action == "delete" and bool(tag)
    digest = "" if change.digest is None or is_tag_deleted else str(change.digest)
    media_type = "" if change.action == "delete" else change.media_type
    size = change.size or 0
    target = {
        "mediaType": media_type,
        "digest": digest,
        "size": size,
        **({"length": size} if size else {}),
        "repository": change.repository,
        **({"fromRepository": change.source} if change.source else {}),
        **({"url": _url(change, place)} if place.base and change.action != "delete" else {}),
        **({"tag": tag} if tag else {}),
    }
    request = {
        "id": change.request,
        **({"addr": change.actor.address} if change.actor.address else {}),
        **({"host": place.address} if place.base else {}),
        "method": _METHODS[change.action],
        "useragent": change.actor.agent,
    }
    own = uuid.UUID(hex=change.id)
    return Event(
        # One id for each event, and the same again after a restart.
        id=str(uuid.uuid5(own, tag) if tag else own),
        time=change.time,
        action=change.action,
        media_type=media_type,
        subject=f"{change.repository}:{tag}" if tag else f"{change.repository}@{digest}",
        details={
            "target": target,
            "request": request,
            "actor": {"name": change.actor.name} if change.actor.name else {},
            "source": {"addr": place.address, "instanceID": instance},
        },
    )


# Of the request that ends with the change.
_METHODS: Final = {"push": "PUT", "mount": "POST", "delete": "DELETE"}


def _url(change: Change, place: Place) -> str:
    kind = "blobs" if change.media_type == _BLOB_MEDIA_TYPE else "manifests"
    return f"{place.base}v2/{change.repository}/{kind}/{change.digest}"


class DeliveryFailed(Exception):
    """An endpoint did not take an event; the message has nothing of its URL, which may be a credential.

    Attributes:
        status: of its answer; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Sink(Protocol):
    """Somebody who is told."""

    async def deliver(self, event: Event) -> int:
        """Tell of an event once; the status of the answer.

        Raises:
            DeliveryFailed: it was not taken, or nobody knows.
        """
        ...


class HttpSink:
    """An endpoint that is told by POST."""

    def __init__(self, endpoint: Endpoint, place: Place) -> None:
        self._endpoint = endpoint
        self._place = place
        self._address = endpoint.address
        self._tls: ssl.SSLContext | None = None

    async def deliver(self, event: Event) -> int:
        if self._endpoint.format == "docker":
            body, media_type = event.to_docker(), DOCKER_MEDIA_TYPE
        else:
            body, media_type = event.to_cloudevents(self._place), CLOUDEVENTS_MEDIA_TYPE
        message = self._head(body, media_type, await self._secret()) + body
        try:
            async with asyncio.timeout(self._endpoint.timeout):
                status = await self._post(message)
        except TimeoutError as error:
            raise DeliveryFailed(f"no answer within {self._endpoint.timeout:g} s") from error
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            raise DeliveryFailed(f"no answer: {getattr(error, 'strerror', None) or error}") from error
        if 300 <= status < 400:
            raise DeliveryFailed(f"answered {status}; redirects are not followed", status)
        if not 200 <= status < 300:
            raise DeliveryFailed(f"answered {status}; wanted 2xx", status)
        return status

    async def _secret(self) -> bytes | None:
        """Of the file as it is now: it may be exchanged at any time."""
        if self._endpoint.secret is not None:
            return self._endpoint.secret.get_secret_value().encode()
        if self._endpoint.secret_file is None:
            return None
        try:
            return await asyncio.to_thread(_read_secret, self._endpoint.secret_file)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DeliveryFailed(f"not sent: secret_file: {reason}") from error

    def _head(self, body: bytes, media_type: str, secret: bytes | None) -> bytes:
        parts = self._address
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        fields = [
            ("Host", parts.netloc),
            ("User-Agent", _AGENT),
            *(
                (name, text.get_secret_value())
                for name, texts in self._endpoint.headers.items()
                for text in texts
            ),
            ("Content-Type", media_type),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        if secret is not None:
            fields.append(
                ("X-Hub-Signature-256", f"sha256={hmac.digest(secret, body, hashlib.sha256).hex()}")
            )
        lines = [f"POST {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields)]
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    async def _post(self, message: bytes) -> int:
        reader, writer = await self._connect()
        try:
            writer.write(message)
            await writer.drain()
            return await _read_status(reader)
        finally:
            writer.transport.abort()
            with suppress(OSError, ValueError):
                await writer.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the first address that answers.

        Raises:
            DeliveryFailed: one of them is not to be spoken to: then none is (A-51).
            OSError: none answers.
        """
        host, is_tls = self._address.hostname or "", self._address.scheme == "https"
        port = self._address.port or (443 if is_tls else 80)
        if is_tls and self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        addresses = await self._addresses(host, port)
        for number, address in enumerate(addresses, 1):
            try:
                return await asyncio.open_connection(
                    address,
                    port,
                    ssl=self._tls if is_tls else None,
                    server_hostname=host if is_tls else None,
                    limit=_ANSWER_LINE_MAX,
                )
            except OSError:
                if number == len(addresses):
                    raise
        raise OSError("the name has no address")

    async def _addresses(self, host: str, port: int) -> Sequence[str]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
        if not self._endpoint.allowprivate and not all(map(is_public, addresses)):
            raise DeliveryFailed(
                "not sent: the name leads to this machine or to a private network (notifications.endpoints.allowprivate)"
            )
        return addresses


async def _read_status(reader: asyncio.StreamReader) -> int:
    """The status of an answer, after interim ones.

    Raises:
        DeliveryFailed: it is none.
        ValueError: a line is too long.
    """
    for _ in range(_INTERIM_MAX):
        match = _STATUS_LINE.fullmatch(await reader.readline())
        if match is None:
            break
        if (status := int(match[1])) >= 200:
            return status
        while (await reader.readline()).strip():
            pass
    raise DeliveryFailed("the answer is not HTTP")


def _read_secret(path: Path) -> bytes:
    """Raises: OSError; ValueError: nothing is in it, or too much."""
    with path.open("rb") as file:
        return secret_in(file.read(_SECRET_SIZE_MAX + 1))


def secret_in(content: bytes) -> bytes:
    """The secret that a file with this content holds. Raises: ValueError: nothing is in it, or too much."""
    secret = content.rstrip(b"\r\n")
    if not 0 < len(secret) <= _SECRET_SIZE_MAX:
        raise ValueError(f"should hold 1 to {_SECRET_SIZE_MAX} bytes")
    return secret


_: type[Sink] = HttpSink
