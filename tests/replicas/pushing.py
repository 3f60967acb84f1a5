"""A push as a docker or an oras does it, whose requests each go to another replica, and which goes on when one is killed.

A blob is acknowledged by 201, or by the 200 of a HEAD after an answer was lost. Until then its client asks how far the upload
has come and goes on from there, or begins anew where the upload is gone. Whatever else happens is a `Broken`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from yarl import URL

from tests.replicas.fleet import Answer, Client, Lost

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.kitops.modelkit.config.v1+json"
LAYER_TYPE = "application/vnd.kitops.modelkit.model.v1.tar"
# Of a request whose answer was lost, of an upload, of a blob: each try costs a kill, or an effect that came late.
_TRIES_MAX = 12


class Broken(Exception):
    """The registry did what it must not: the message says what, with the last requests."""


class _Gone(Exception):
    """Begin anew; the message says why."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A blob without its bytes."""

    digest: str
    size: int

    @classmethod
    def of(cls, content: bytes) -> Stored:
        return cls(digest_of(content), len(content))


class Way(Enum):
    """How a client sends a blob."""

    POST = "whole, in the POST"
    PUT = "whole, in the PUT"
    PATCHES = "in PATCHes, and a PUT without a body"
    LAST_IN_PUT = "in PATCHes, and the last bytes in the PUT"


@dataclass(frozen=True, slots=True)
class Sending:
    """A blob, and how it is sent.

    Attributes:
        cuts: offsets at which one chunk ends and the next begins, in order.
        is_asked_first: whether it is there already is asked by HEAD, as docker does.
    """

    content: bytes
    way: Way = Way.PATCHES
    cuts: tuple[int, ...] = ()
    is_asked_first: bool = False

    @property
    def blob(self) -> Stored:
        return Stored.of(self.content)

    def chunk_at(self, offset: int) -> bytes:
        stop = next((cut for cut in self.cuts if cut > offset), len(self.content))
        return self.content[offset:stop]


@dataclass(frozen=True, slots=True)
class Mounting:
    """A blob that another repository, `source`, is known to have."""

    blob: Stored
    source: str


@dataclass(frozen=True, slots=True)
class Kit:
    """What has been acknowledged of a push. Its bytes are not kept."""

    name: str
    tag: str
    manifest: bytes
    blobs: tuple[Stored, ...]


@dataclass
class Push:
    """
    Attributes:
        happened: how often what was out of the ordinary.
    """

    client: Client
    name: str
    happened: Counter[str] = field(default_factory=Counter)

    async def kit(self, parts: Sequence[Sending | Mounting], tag: str) -> Kit:
        """Blobs, the first of which is the config, then the manifest under a tag; all acknowledged."""
        for part in parts:
            match part:
                case Sending():
                    await self.blob(part)
                case Mounting():
                    await self.mount(part)
        blobs = tuple(part.blob for part in parts)
        manifest = manifest_of(blobs[0], blobs[1:])
        await self.manifest(manifest, tag)
        return Kit(self.name, tag, manifest, blobs)

    async def manifest(self, content: bytes, tag: str) -> None:
        answer = await self._repeat(
            "PUT", f"/v2/{self.name}/manifests/{tag}", content, {"Content-Type": MANIFEST_TYPE}
        )
        self._expect(answer, 201)

    async def mount(self, mounting: Mounting) -> None:
        path = f"/v2/{self.name}/blobs/uploads/?mount={mounting.blob.digest}&from={mounting.source}"
        self._expect(await self._repeat("POST", path), 201)

    async def blob(self, sending: Sending) -> None:
        """Until it is acknowledged."""
        if sending.is_asked_first and await self._is_there(sending.blob):
            self.happened["blob was there already"] += 1
            return
        for _ in range(_TRIES_MAX):
            try:
                location = await self._begin(sending)
                if location is not None:
                    await self._fill(Upload(self, sending, location))
            except Lost:
                self.happened["begun anew, the answer to a POST was lost"] += 1
            except _Gone as gone:
                if await self._is_there(sending.blob):
                    self.happened["201 was lost, the blob is there"] += 1
                    return
                self.happened[f"begun anew, {gone}"] += 1
            else:
                return
        raise self.broken(f"a blob was begun {_TRIES_MAX} times")

    async def _begin(self, sending: Sending) -> str | None:
        """The path of a new upload; None when the POST was enough. Raises: Lost."""
        path = f"/v2/{self.name}/blobs/uploads/"
        if sending.way is Way.POST:
            answer = await self.client.ask(
                "POST", f"{path}?digest={sending.blob.digest}", body=sending.content
            )
        else:
            answer = await self.client.ask("POST", path)
        if answer.status == 201:
            return None
        self._expect(answer, 202)
        return URL(answer.headers["Location"], encoded=True).raw_path

    async def _fill(self, upload: Upload) -> None:
        for _ in range(_TRIES_MAX):
            try:
                return await upload.go_on()
            except Lost:
                self.happened["went on, an answer was lost"] += 1
                await upload.look()
        raise self.broken(f"an upload was taken up {_TRIES_MAX} times")

    async def _is_there(self, blob: Stored) -> bool:
        answer = await self._repeat("HEAD", f"/v2/{self.name}/blobs/{blob.digest}")
        if answer.status == 404:
            return False
        self._expect(answer, 200)
        if answer.headers["Content-Length"] != str(blob.size):
            raise self.broken(f"HEAD tells of {answer.headers['Content-Length']} bytes, not {blob.size}")
        return True

    async def _repeat(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        """A request that may be sent again."""
        for _ in range(_TRIES_MAX):
            try:
                return await self.client.ask(method, path, body=body, headers=headers)
            except Lost:
                self.happened[f"{method} again, its answer was lost"] += 1
        raise self.broken(f"{method} was lost {_TRIES_MAX} times")

    def _expect(self, answer: Answer, status: int) -> None:
        if answer.status != status:
            raise self.broken(f"{answer.status}, wanted {status}: {answer.body[:500]!r}")

    def broken(self, what: str) -> Broken:
        return Broken("\n  ".join([f"{self.name}: {what}", *self.client.trail]))


class Upload:
    """An upload that has been begun.

    Attributes:
        acknowledged: bytes that an answer has told of; never fewer may be there.
    """

    def __init__(self, push: Push, sending: Sending, path: str) -> None:
        self._push = push
        self._sending = sending
        self._path = path
        self._is_resumed = False
        self.acknowledged = 0
        self._offset = 0
        # Bytes of the blob that have been sent at all.
        self._sent = 0
        self._is_closing = False

    async def go_on(self) -> None:
        """Send what is left, to the 201.

        Raises:
            Lost: an answer; `look` before going on.
            _Gone: begin anew.
        """
        size = len(self._sending.content)
        while self._offset < size and self._sending.way is not Way.PUT:
            chunk = self._sending.chunk_at(self._offset)
            if self._sending.way is Way.LAST_IN_PUT and self._offset + len(chunk) == size:
                break
            await self._patch(chunk)
        await self._put(self._sending.content[self._offset :])

    async def _patch(self, chunk: bytes) -> None:
        stop = self._offset + len(chunk)
        answer = await self._send("PATCH", self._path, chunk)
        self._push._expect(answer, 202)
        self._note(answer, at_least=stop)

    async def _put(self, rest: bytes) -> None:
        self._is_closing = True
        answer = await self._send("PUT", f"{self._path}?digest={self._sending.blob.digest}", rest)
        self._push._expect(answer, 201)

    async def _send(self, method: str, path: str, chunk: bytes) -> Answer:
        headers = {"Content-Type": "application/octet-stream"}
        # A first chunk may come as docker sends it, without saying where it belongs. Later ones say so: an effect that
        # came late must not be taken for what was asked about.
        if chunk and (self._offset or self._is_resumed):
            headers["Content-Range"] = f"{self._offset}-{self._offset + len(chunk) - 1}"
        self._sent = max(self._sent, self._offset + len(chunk))
        answer = await self._push.client.ask(method, path, body=chunk, headers=headers)
        if answer.status == 416:
            # A request of a replica that was killed reached the store after all; its answer is as good as lost.
            self._push.happened[f"{method}: 416, an effect came late"] += 1
            raise Lost(f"416 {answer.body!r}")
        if answer.status == 404:
            raise self._gone()
        return answer

    async def look(self) -> None:
        """How far it has come.

        Raises:
            _Gone: begin anew.
        """
        self._is_resumed = True
        answer = await self._push._repeat("GET", self._path)
        if answer.status == 404:
            raise self._gone()
        self._push._expect(answer, 204)
        self._note(answer, at_least=self.acknowledged)

    def _note(self, answer: Answer, *, at_least: int) -> None:
        """Raises: _Gone: it cannot be told how far the upload has come."""
        stop = int(answer.headers["Range"].partition("-")[2])
        offset = stop + 1 if stop else self._of_zero(at_least)
        if not at_least <= offset <= self._sent:
            raise self._push.broken(
                f"Range: {answer.headers['Range']}, when {at_least} bytes were acknowledged and {self._sent} sent"
            )
        self._offset = self.acknowledged = offset

    def _of_zero(self, at_least: int) -> int:
        """The offset that "0-0" means: it is said of one byte and of none. No chunk ends behind the first byte of more."""
        if len(self._sending.content) > 1 or self._sent == 0:
            return 0
        if at_least == 0:
            raise _Gone("nobody can tell whether its one byte was kept")
        return 1

    def _gone(self) -> Exception:
        """What a 404 means: a PUT whose answer was lost has ended the upload, and nothing else may have."""
        if self._is_closing:
            return _Gone("the upload was gone after its PUT")
        return self._push.broken("the upload is gone, and nobody has closed it")


async def check(client: Client, kit: Kit, *, places: Iterable[int] | None = None) -> None:
    """All of what was acknowledged is there, whoever is asked.

    Args:
        places: only these replicas are asked.

    Raises:
        Broken: it is not.
    """
    for place in client.fleet.places if places is None else places:
        tagged = await _read(client, f"/v2/{kit.name}/manifests/{kit.tag}", place)
        if tagged != kit.manifest:
            raise _wrong(client, f"{kit.name}:{kit.tag} at {place} is not what was pushed")
        for blob in kit.blobs:
            content = await _read(client, f"/v2/{kit.name}/blobs/{blob.digest}", place)
            if digest_of(content) != blob.digest:
                raise _wrong(client, f"{blob} of {kit.name} at {place} has other bytes")


async def _read(client: Client, path: str, place: int) -> bytes:
    for _ in range(_TRIES_MAX):
        try:
            answer = await client.ask("GET", path, headers={"Accept": MANIFEST_TYPE}, place=place)
        except Lost:
            continue
        if answer.status != 200:
            raise _wrong(client, f"GET {path} at {place}: {answer.status} {answer.body[:500]!r}")
        return answer.body
    raise _wrong(client, f"GET {path} was lost {_TRIES_MAX} times")


def _wrong(client: Client, what: str) -> Broken:
    return Broken("\n  ".join([what, *client.trail]))


async def delete(client: Client, kit: Kit) -> None:
    """The manifest, with its tag, and the blobs, whoever has them beside this repository."""
    blobs = dict.fromkeys(kit.blobs)
    for path in (f"manifests/{digest_of(kit.manifest)}", *(f"blobs/{blob.digest}" for blob in blobs)):
        answer = await client.ask("DELETE", f"/v2/{kit.name}/{path}")
        if answer.status != 202:
            raise _wrong(client, f"DELETE {path}: {answer.status} {answer.body[:500]!r}")


def manifest_of(config: Stored, layers: Sequence[Stored]) -> bytes:
    def described(blob: Stored, media_type: str) -> dict[str, object]:
        return {"mediaType": media_type, "digest": blob.digest, "size": blob.size}

    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": described(config, CONFIG_TYPE),
            "layers": [described(layer, LAYER_TYPE) for layer in layers],
        }
    ).encode()


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def random_cuts(chance: random.Random, size: int, count: int) -> tuple[int, ...]:
    """Where chunks end; behind the second byte at the earliest (`Upload._of_zero`)."""
    return tuple(sorted(chance.randrange(2, size) for _ in range(count))) if size > 2 else ()
