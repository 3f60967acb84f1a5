"""A folder and its Kitfile become a ModelKit in a registry, normally the local store.

Each layer is read, packed, hashed and stored in one pass, the steps beside each other; several layers are under way at
once. The manifest comes last: before it nothing of the kit is visible.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kitclient import __version__
from kitclient.blob_stream import count
from kitclient.compression import Compression, deflater
from kitclient.errors import ClientError
from kitclient.image_layout import LayoutUpload
from kitclient.pipeline import batches, finished, own_threads, pieces_of
from kitclient.progress import Progress, Silence
from kitclient.source_tree import SourceFile, SourceInvalid, SourceTree, ignore_rules
from kitclient.terminal import visible
from kitclient.transfer import Place
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import BlobUnknown
from kitspec.go_json import to_go_json
from kitspec.interface import BlobUpload
from kitspec.kitfile import Entry, Kitfile, Section
from kitspec.kitfile_rules import clean_path
from kitspec.layer_tar import TRAILER, format_member, format_padding
from kitspec.manifest import format_manifest
from kitspec.media_types import (
    CLI_VERSION_ANNOTATION,
    CREATED_ANNOTATION,
    FILE_METADATA_ANNOTATION,
    FILEPATH_ANNOTATION,
    KITFILE_ANNOTATION,
    MODELKIT_CONFIG,
    MODELPACK_CONFIG,
    OCI_MANIFEST,
    LayerType,
)
from kitspec.modelpack import to_modelpack_config
from kitspec.names import Tag
from kitspec.selection import layer_annotations

Form = Literal["current", "1.7", "modelpack"]
"""KitOps as of 1.17, KitOps as kit 1.7 wrote it to the byte, or a CNCF ModelPack artifact."""

# One core reads and packs, one hashes and writes: more layers at once only take memory.
_LAYERS_AT_ONCE = 2
# How long an interruption waits for a registry that is just beginning an upload.
_BEGIN_TIMEOUT_S = 2.0
_UNKNOWN = Digest("sha256:" + 64 * "0")


class PackRefused(ClientError):
    """The Kitfile and the options do not go together, or a layer cannot be made."""


@dataclass(frozen=True, slots=True)
class PackStyle:
    """How a kit is written."""

    form: Form = "current"
    packaging: Literal["tar", "raw"] = "tar"
    compression: Compression = "none"

    def layer_type(self, section: Section) -> LayerType:
        family: Literal["modelpack", "kitops"] = "modelpack" if self.form == "modelpack" else "kitops"
        if section is Section.MCP_SERVERS:
            return LayerType(section.layer_kind, "raw", None, family)
        compression: Literal["gzip", "zstd"] | None = None
        if self.compression != "none":
            compression = "zstd" if self.compression == "zstd" else "gzip"
        return LayerType(section.layer_kind, self.packaging, compression, family)


@dataclass(frozen=True, slots=True)
class Packed:
    """What became of it.

    Attributes:
        layers: each with whether it was in the registry already; in the manifest's order.
    """

    manifest: Descriptor
    config: Descriptor
    layers: tuple[tuple[Descriptor, bool], ...]


async def pack(
    folder: Path,
    kitfile: Kitfile,
    place: Place,
    *,
    tags: tuple[Tag, ...] = (),
    style: PackStyle = PackStyle(),
    parent_paths: Collection[str] = (),
    created: dt.datetime | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Packed:
    """Pack `folder` as `kitfile` says, and tag the result.

    Args:
        place: the registry and the repository that it goes to.
        parent_paths: of the layers of the ModelKit that `model.path` names: they stay out of this one.
        created: the date that the manifest bears; None asks `creation_time`.
        warn: called with a sentence about what was left out, or looks like a mistake.

    Raises:
        SourceInvalid: a file is missing, unreadable, or changed meanwhile.
        PackRefused: the style does not fit the Kitfile.
        OciError, ClientError: the registry failed.
    """
    _check_style(kitfile, style)
    entries = [(section, entry) for section, _, entry in kitfile.entries()]
    paths = [clean_path(entry.path) for _, entry in entries]
    rules = await asyncio.to_thread(ignore_rules, folder)
    tree = SourceTree(
        folder, [*paths, *map(clean_path, parent_paths)], rules, skip_litter=style.form != "1.7", warn=warn
    )
    with own_threads(2 * _LAYERS_AT_ONCE, "pack") as threads:
        packer = _Packer(tree, place, style, threads, progress or Silence(), warn)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(packer.pack(section, entry)) for section, entry in entries]
        except BaseExceptionGroup as errors:
            # The first is what stopped the others.
            raise errors.exceptions[0] from None
    layers = [task.result() for task in tasks]
    content, config = _documents(kitfile, layers, style, created or creation_time())
    await _put_config(place, *config)
    manifest = await place.registry.put_manifest(place.name, content, OCI_MANIFEST, tags=tags)
    return Packed(manifest, config[1], tuple((layer.descriptor, layer.existed) for layer in layers))


def creation_time(environment: Mapping[str, str] = os.environ) -> dt.datetime:
    """Now, or `SOURCE_DATE_EPOCH`, which makes a pack reproducible.

    Raises:
        PackRefused: it is set and no number of seconds.
    """
    epoch = environment.get("SOURCE_DATE_EPOCH", "")
    if not epoch:
        return dt.datetime.now(dt.UTC)
    if not (epoch.isascii() and epoch.isdigit() and len(epoch) <= 11):
        raise PackRefused(f"SOURCE_DATE_EPOCH is {epoch[:40]!a}; wanted seconds since 1970, an integer")
    return dt.datetime.fromtimestamp(int(epoch), dt.UTC)


@dataclass(frozen=True, slots=True)
class _Layer:
    descriptor: Descriptor
    diff_id: Digest
    existed: bool


@dataclass
class _Packer:
    tree: SourceTree
    place: Place
    style: PackStyle
    threads: Executor
    progress: Progress
    warn: Callable[[str], None]

    def __post_init__(self) -> None:
        self._turns = asyncio.Semaphore(_LAYERS_AT_ONCE)

    async def pack(self, section: Section, entry: Entry) -> _Layer:
        async with self._turns:
            loop = asyncio.get_running_loop()
            path = clean_path(entry.path)
            files = await loop.run_in_executor(self.threads, self._files, section, path)
            layer_type = self.style.layer_type(section)
            stream = _Stream(self.tree, files, layer_type, self.style.compression)
            annotations = {} if self.style.form == "1.7" else layer_annotations(section, entry)
            if layer_type.packaging == "raw":
                annotations[FILE_METADATA_ANNOTATION] = _file_metadata(files[0])
            size = sum(file.size for file in files)
            planned = Descriptor(str(layer_type), _UNKNOWN, size, annotations={FILEPATH_ANNOTATION: path})
            digest, existed = await self._store(stream, planned)
            descriptor = Descriptor(str(layer_type), digest, stream.size, annotations=annotations)
            diff_id = Digest(f"sha256:{stream.diff_hasher.hexdigest()}") if stream.diff_hasher else digest
            return _Layer(descriptor, diff_id, existed)

    def _files(self, section: Section, path: str) -> list[SourceFile]:
        what = section.layer_kind
        if path.startswith("/") or path.partition("/")[0] == "..":
            raise SourceInvalid(
                f"error processing {what}: path {visible(path)} is outside the folder that is packed"
            )
        if not os.path.lexists(self.tree.root / path):
            raise SourceInvalid(f"error processing {what}: path {visible(path)} does not exist")
        files = self.tree.files(path)
        regular = [file for file in files if not file.is_folder]
        if section is Section.MCP_SERVERS or self.style.packaging == "raw":
            if len(regular) != 1 or regular[0].name != path:
                raise PackRefused(
                    f"{what} layer with path {visible(path)}: a raw layer is exactly one regular file"
                )
            if section is Section.MCP_SERVERS:
                _check_bundle(self.tree.root / path)
            return regular
        if not any(file.size for file in regular):
            self.warn(f"No files detected in {what} layer with path {visible(path)}")
        return files

    async def _store(self, stream: _Stream, planned: Descriptor) -> tuple[Digest, bool]:
        """Store the stream as a blob; its digest, and whether it was there before."""
        registry, name = self.place.registry, self.place.name
        watch = self.progress.begin(planned)
        upload = await _begin(self.place)
        try:
            if isinstance(upload, LayoutUpload):
                await upload.append_made(batches(stream.blob()), watch.advance)
                digest = await upload.digest()  # the store hashes what it writes
            else:
                stream.hashes = True
                pieces = pieces_of(batches(stream.blob()), self.threads)
                await upload.append(count(pieces, watch, at_most=1 << 62), at=0)
                digest = stream.digest
            try:
                await registry.stat_blob(name, digest)
            except BlobUnknown:
                await upload.commit(digest)
                watch.end("done")
                return digest, False
            watch.end("exists")
            await upload.cancel()
            return digest, True
        except BaseException:
            watch.end("failed")
            await finished(upload.cancel())
            raise


class _Stream:
    """The bytes of a layer's blob, made in a thread."""

    def __init__(
        self, tree: SourceTree, files: list[SourceFile], layer_type: LayerType, compression: Compression
    ) -> None:
        self.size = 0
        self.hashes = False
        self._tree = tree
        self._files = files
        self._is_raw = layer_type.packaging == "raw"
        self._deflater = deflater(compression) if layer_type.compression is not None else None
        self._hasher = hashlib.sha256()
        self.diff_hasher = hashlib.sha256() if self._deflater is not None else None

    @property
    def digest(self) -> Digest:
        return Digest(f"sha256:{self._hasher.hexdigest()}")

    def blob(self) -> Iterator[bytes]:
        for piece in self._deflated():
            self.size += len(piece)
            if self.hashes:
                self._hasher.update(piece)
            yield piece

    def _deflated(self) -> Iterator[bytes]:
        plain = self._raw() if self._is_raw else self._tar()
        if self._deflater is None or self.diff_hasher is None:
            yield from plain
            return
        for piece in batches(plain):
            self.diff_hasher.update(piece)
            if smaller := self._deflater.compress(piece):
                yield smaller
        yield self._deflater.flush()

    def _raw(self) -> Iterator[bytes]:
        for file in self._files:
            yield from self._tree.read(file)

    def _tar(self) -> Iterator[bytes]:
        for file in self._files:
            yield format_member(file.name, size=file.size, mode=file.mode, is_directory=file.is_folder)
            if not file.is_folder:
                yield from self._tree.read(file)
                yield format_padding(file.size)
        yield TRAILER


def _documents(
    kitfile: Kitfile, layers: list[_Layer], style: PackStyle, created: dt.datetime
) -> tuple[bytes, tuple[bytes, Descriptor]]:
    """The manifest, and the config with its descriptor."""
    packed = kitfile.with_digests([(layer.descriptor.digest, layer.diff_id) for layer in layers])
    annotations = {CLI_VERSION_ANNOTATION: "1.7.0" if style.form == "1.7" else f"kitclient-{__version__}"}
    if style.form != "1.7":
        annotations[CREATED_ANNOTATION] = created.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if style.form == "modelpack":
        config = to_modelpack_config(packed, created)
        annotations[KITFILE_ANNOTATION] = packed.to_json().decode()
        config_type = MODELPACK_CONFIG
    else:
        config, config_type = packed.to_json(), MODELKIT_CONFIG
    descriptor = Descriptor(config_type, Digest.of(config), len(config))
    content = format_manifest(
        descriptor,
        [layer.descriptor for layer in layers],
        annotations,
        style="1.7" if style.form == "1.7" else "current",
    )
    return content, (config, descriptor)


async def _begin(place: Place) -> BlobUpload:
    """A new upload; one that begins while we are cancelled is not left behind."""
    beginning = asyncio.ensure_future(place.registry.begin_upload(place.name))
    try:
        return await asyncio.shield(beginning)
    except asyncio.CancelledError:
        await asyncio.wait([beginning], timeout=_BEGIN_TIMEOUT_S)
        if not beginning.cancel() and beginning.exception() is None:
            await beginning.result().cancel()
        raise


async def _put_config(place: Place, content: bytes, descriptor: Descriptor) -> None:
    try:
        await place.registry.stat_blob(place.name, descriptor.digest)
    except BlobUnknown:
        upload = await _begin(place)
        try:
            await upload.append(_once(content), at=0)
            await upload.commit(descriptor.digest)
        except BaseException:
            await finished(upload.cancel())
            raise


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def _file_metadata(file: SourceFile) -> str:
    seconds, nanoseconds = divmod(file.modified_ns, 1_000_000_000)
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f".{nanoseconds:09d}".rstrip("0") if nanoseconds else ""
    metadata = {
        "name": file.name.rpartition("/")[2],
        "mode": file.mode & 0o777,
        "uid": 0,
        "gid": 0,
        "size": file.size,
        "mtime": f"{moment}{fraction}Z",
        "typeflag": 0,
    }
    return to_go_json(metadata).decode()


def _check_style(kitfile: Kitfile, style: PackStyle) -> None:
    if style.form == "modelpack":
        if style.packaging == "raw" and style.compression != "none":
            raise PackRefused("compression for raw layers is not supported for ModelPack")
        if kitfile.mcp_servers:
            raise PackRefused("mcpServers are not supported when packing in modelpack format")
    if style.form == "1.7" and (
        style.packaging == "raw" or style.compression == "zstd" or kitfile.prompts or kitfile.mcp_servers
    ):
        raise PackRefused("kit 1.7 knows no raw layers, zstd, prompts or mcpServers")


def _check_bundle(path: Path) -> None:
    """An MCP bundle is a ZIP with a manifest.json at its root."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as bundle:
            is_bundle = "manifest.json" in bundle.namelist()
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        is_bundle = False
    if not is_bundle:
        raise PackRefused(f"{path} is no MCP bundle: wanted a ZIP with manifest.json at its root")
