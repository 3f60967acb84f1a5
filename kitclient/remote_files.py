"""The files of a kit as our registry lists and serves them: docs/extension.md. Found by discovery, never required.

What the registry says of a file is believed only as far as it can be checked: the file is in a layer that the manifest
has and that was asked for, inside its bounds, at a path that a layer may bring. Its content is checked by whoever reads
it, against the digest that stands in the list; that this digest is the layer's only the whole layer could prove.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Self
from urllib.parse import quote

from kitclient.errors import ClientError, ServerMisbehaved
from kitclient.kit_files import KitFile, KitPart, PathChoice, entry_name, raw_file
from kitclient.remote import RemoteRegistry
from kitclient.remote_body import open_body
from kitclient.transfer import Place
from kitclient.transport import read_bounded
from kitspec.digest import Digest
from kitspec.errors import ContentInvalid, DigestInvalid, ManifestUnknown, NameUnknown, OciError, SizeInvalid
from kitspec.interface import BlobBody
from kitspec.layer_tar import MEMBER_COUNT_MAX, clean_member_path
from kitspec.names import RepositoryName
from kitspec.selection import EntryLayer, place_of
from kitspec.strict_json import parse_json

_EXTENSION = "_modelkit"
_FILES = f"{_EXTENSION}/files"
_DISCOVERY_SIZE_MAX = 1024 * 1024
# A page of entries whose paths are of usual length is some 300 KiB.
_PAGE_COUNT = "1000"
_MODE = re.compile(r"[0-7]{3,5}", re.ASCII)


class RemoteFiles:
    """The files of one repository's kits, in a registry that has the extension."""

    def __init__(self, registry: RemoteRegistry, name: RepositoryName) -> None:
        self._registry = registry
        self._name = name

    @classmethod
    async def discover(cls, place: Place) -> Self | None:
        """Ask the registry whether it serves single files; None when it does not, or is none that could.

        What else it may answer (other registries answer 404, 401 and worse) means no.
        """
        registry = place.registry
        if not isinstance(registry, RemoteRegistry):
            return None
        url = registry.transport.url("/v2/_oci/ext/discover")
        try:
            async with registry.transport.request("GET", url, scope="") as answer:
                content = await read_bounded(answer, _DISCOVERY_SIZE_MAX, what="the list of extensions")
            document = parse_json(content)
        except (OciError, ClientError, ContentInvalid):
            return None
        return cls(registry, place.name) if _serves_files(document) else None

    async def read_list(self, part: KitPart, choice: PathChoice) -> list[KitFile]:
        """The files and folders of the kit's chosen layers that `choice` wants, each once.

        Raises:
            ServerMisbehaved: the list says what cannot be.
            OciError: the registry cannot list this kit, and says why.
        """
        layers: dict[str, list[EntryLayer]] = defaultdict(list)
        for pair in part.pairs:
            layers[pair.layer.digest].append(pair)
        found: dict[KitFile, None] = {}
        # A query for each pattern: a list is short, and the registry need not know how several go together.
        for pattern in choice.patterns or (None,):
            async for entry in self._entries(part, pattern):
                file = self._checked(entry, layers)
                if file.path in choice:
                    found[file] = None
                if len(found) > MEMBER_COUNT_MAX:
                    raise ServerMisbehaved(
                        f"{self._registry.host} lists more than {MEMBER_COUNT_MAX} files of a kit"
                    )
        return list(found)

    @asynccontextmanager
    async def open_file(self, kit: Digest, file: KitFile) -> AsyncIterator[BlobBody]:
        """The content of one file, cut out by the registry: for layers that are compressed.

        Raises:
            SizeInvalid: it is not as large as the list says.
            BlobUnknown: the registry lists the file and does not have it.
        """
        path = "/".join(quote(component, safe="") for component in file.path.split("/"))
        url = self._registry.transport.url(f"/v2/{self._name}/{_FILES}/{kit}/{path}")
        body: AbstractAsyncContextManager[BlobBody] = open_body(
            self._registry.transport, url, self._scope, None
        )
        async with body as content:
            if content.size != file.size:
                raise SizeInvalid(f"a file of {content.size} bytes came; the list says {file.size}")
            yield content

    @property
    def _scope(self) -> str:
        return f"repository:{self._name}:pull"

    async def _entries(self, part: KitPart, pattern: str | None) -> AsyncIterator[object]:
        query = [("n", _PAGE_COUNT), *(("filter", str(filter_)) for filter_ in part.filters)]
        if pattern is not None:
            query.append(("path", pattern))
        digest = part.kit.digest
        url = self._registry.transport.url(f"/v2/{self._name}/{_FILES}/{digest}").with_query(query)
        async for page in self._registry.pages(
            url, scope=self._scope, missing=(ManifestUnknown, NameUnknown)
        ):
            try:
                document = parse_json(page.content)
            except ContentInvalid as error:
                raise self._misbehaved(str(error)) from error
            if not isinstance(document, dict) or not isinstance(document.get("files"), list):
                raise self._misbehaved("there are no files in it")
            if document.get("digest") != digest:
                raise self._misbehaved(f"it is about another kit than {digest}")
            for entry in document["files"]:
                yield entry

    def _checked(self, entry: object, layers: Mapping[str, Sequence[EntryLayer]]) -> KitFile:
        try:
            return _kit_file(entry, layers)
        except (_EntryWrong, ContentInvalid, DigestInvalid) as error:
            raise self._misbehaved(str(error)) from error

    def _misbehaved(self, what: str) -> ServerMisbehaved:
        return ServerMisbehaved(f"{self._registry.host} sent a list of files that cannot be used: {what}")


class _EntryWrong(ValueError):
    """An entry of the list says what cannot be."""


def _serves_files(document: object) -> bool:
    """Whether a discovery document names our extension, and files among what it has."""
    extensions = document.get("extensions") if isinstance(document, dict) else None
    for extension in extensions if isinstance(extensions, list) else ():
        if isinstance(extension, dict) and extension.get("name") == _EXTENSION:
            endpoints = extension.get("endpoints")
            return isinstance(endpoints, list) and _FILES in endpoints
    return False


def _kit_file(entry: object, layers: Mapping[str, Sequence[EntryLayer]]) -> KitFile:
    if not isinstance(entry, dict):
        raise _EntryWrong("an entry is not an object")
    path = _path(entry)
    kind = entry.get("type")
    if kind not in {"file", "directory"}:
        raise _EntryWrong(f"{path!a} is of the type {str(kind)[:40]!a}")
    pair = _pair(path, layers.get(str(entry.get("layer")), ()))
    is_folder = kind == "directory"
    file = KitFile(
        path,
        0 if is_folder else _number(entry, "size"),
        _mode(entry),
        None if is_folder else Digest(str(entry.get("digest"))),
        pair.layer.digest,
        _offset(entry, pair) if not is_folder else None,
        pair.section,
        entry_name(pair),
    )
    known = raw_file(pair)
    if known is not None and known.digest != file.digest:
        raise _EntryWrong(f"{path!a} is the layer {pair.layer.digest}, and is said to have another digest")
    return known or file


def _path(entry: Mapping[str, Any]) -> str:
    text = entry.get("path")
    if not isinstance(text, str) or not text or clean_member_path(text.encode()) != text:
        raise _EntryWrong(f"{str(text)[:200]!a} is no path in a kit")
    return text


def _pair(path: str, pairs: Sequence[EntryLayer]) -> EntryLayer:
    """The layer's entry that the path can belong to."""
    for pair in pairs:
        goes_to = place_of(pair).path
        is_archive = pair.layer_type.packaging == "tar"
        if path == goes_to or (is_archive and (not goes_to or path.startswith(f"{goes_to}/"))):
            return pair
    raise _EntryWrong(f"{path!a} is in no layer that was asked for")


def _number(entry: Mapping[str, Any], key: str) -> int:
    number = entry.get(key)
    if type(number) is not int or number < 0:
        raise _EntryWrong(f"{key} of {entry.get('path')!a} is {str(number)[:40]!a}; wanted a number")
    return number


def _mode(entry: Mapping[str, Any]) -> int:
    mode = entry.get("mode")
    if not isinstance(mode, str) or _MODE.fullmatch(mode) is None:
        raise _EntryWrong(f"mode of {entry.get('path')!a} is {str(mode)[:40]!a}; wanted octal digits")
    return int(mode, 8) & 0o7777


def _offset(entry: Mapping[str, Any], pair: EntryLayer) -> int | None:
    """Where the content begins in the blob; of a compressed one it would mean something else, and is not looked at."""
    if pair.layer_type.compression is not None or entry.get("offset") is None:
        return None
    offset = _number(entry, "offset")
    if offset + _number(entry, "size") > pair.layer.size:
        raise _EntryWrong(f"{entry.get('path')!a} reaches beyond the end of its layer")
    return offset
