"""What a kit holds, file by file, and the content of one file; nothing is written to disk.

Where the registry lists files (kitclient/remote_files.py) its list is taken and a file's bytes are all that is fetched.
From any other registry, and from the local store, whole layers are read and verified against the manifest: those only
that may hold what is wanted.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial as bind

from kitclient.compression import LayerBroken, UnpackLimit
from kitclient.errors import ClientError
from kitclient.fetches import is_hardly_more, layer_plan, say_what_whole_layers_cost
from kitclient.kit_files import (
    KitFile,
    KitPart,
    PathAmbiguous,
    PathChoice,
    PathIsFolder,
    PathMissing,
    entry_name,
    kit_chain,
    raw_file,
)
from kitclient.layer_reading import FileRun, FileSink, OpenSpan, read_layer, read_run
from kitclient.modelkit import read_modelkit
from kitclient.pipeline import own_threads
from kitclient.progress import Outcome, Progress, Silence
from kitclient.references import Find
from kitclient.remote_files import RemoteFiles
from kitclient.terminal import visible
from kitclient.transfer import Place
from kitspec.digest import Digest
from kitspec.errors import ContentInvalid, OciError
from kitspec.names import Tag
from kitspec.selection import EntryLayer, Filter

HELD_SIZE_MAX = 16 * 1024 * 1024
"""A file of at most so many bytes is verified before its first byte is passed on."""
# As for unpack: no packer reaches this by honest means. How much there is in all is no matter where nothing is kept.
_RATIO_MAX = 1000
_SIZE_MAX = 2**63 - 1

Notice = Callable[[str], None]


class OutputSpoiled(ClientError):
    """What was passed on of a large file is not what it ought to be."""


@dataclass(frozen=True, slots=True)
class FileList:
    """What a kit holds, with what belongs to it in the kits that it builds on.

    Attributes:
        digest: of the kit's manifest.
        files: sorted by path, in the order of its UTF-8 bytes; a file stands there once for each layer that has it.
    """

    digest: Digest
    files: tuple[KitFile, ...]


async def list_files(
    place: Place,
    reference: Tag | Digest,
    *,
    filters: Sequence[Filter] = (),
    paths: Sequence[str] = (),
    verify_layers: bool = False,
    find: Find | None = None,
    progress: Progress | None = None,
    notice: Notice = lambda _: None,
) -> FileList:
    """The files and folders of the layers that `filters` choose, of them those that one of the patterns `paths` matches.

    Args:
        verify_layers: read whole layers, also where the registry lists their files.
        find: needed when the kit's model is another kit's.
        notice: told how many bytes are fetched for the list, if any.

    Raises:
        FilterInvalid: something in `paths` is no pattern.
        ServerMisbehaved: the registry's list says what cannot be.
        DigestInvalid, SizeInvalid, LayerBroken, LayerTarInvalid: a layer is not what the kit says, or none that may be.
    """
    choice = PathChoice(paths)
    async with AsyncExitStack() as stack:
        kit = await read_modelkit(place, reference)
        # A folder is no layer's own: the first one that has it is enough.
        files: dict[KitFile | str, KitFile] = {}
        async for part in kit_chain(place, kit, filters, find=find, stack=stack):
            source = await _Source.of(part, verify_layers=verify_layers, progress=progress, notice=notice)
            for file in [*await source.listed(choice), *await source.read_list(choice)]:
                files.setdefault(file.path if file.is_folder else file, file)
    return FileList(
        kit.digest, tuple(sorted(files.values(), key=lambda file: (file.path.encode(), file.layer)))
    )


async def cat(
    place: Place,
    reference: Tag | Digest,
    path: str,
    write: Callable[[bytes | memoryview], object],
    *,
    verify_layers: bool = False,
    find: Find | None = None,
    progress: Progress | None = None,
    notice: Notice = lambda _: None,
) -> None:
    """Give the content of one file to `write`, which is called in a thread and may block.

    A file of at most `HELD_SIZE_MAX` bytes is verified before the first call; a larger one is passed on as it comes.

    Args:
        path: cleaned, as `parse_file_reference` and `list_files` give it.
        verify_layers, find, notice: as for `list_files`.

    Raises:
        PathMissing, PathIsFolder, PathAmbiguous: the kit has no such file, or several.
        OutputSpoiled: a large file turned out wrong when some of it had been passed on.
        DigestInvalid, SizeInvalid, LayerBroken, LayerTarInvalid: it is wrong, and nothing was passed on.
    """
    output = _HeldOutput(write)
    try:
        async with AsyncExitStack() as stack:
            kit = await read_modelkit(place, reference)
            sources = [
                await _Source.of(part, verify_layers=verify_layers, progress=progress, notice=notice)
                async for part in kit_chain(place, kit, (), find=find, stack=stack)
            ]
            await _cat(sources, path, output)
    except (OciError, ClientError, ContentInvalid) as error:
        if output.passed_on:
            raise OutputSpoiled(
                f"{error}; {output.passed_on} bytes of '{visible(path)}' had been passed on, and are not to be used"
            ) from error
        raise


async def _cat(sources: Sequence[_Source], path: str, output: _HeldOutput) -> None:
    # The file itself, and what is below it should it be a folder.
    choice = PathChoice.below(path)
    found = [(source, file) for source in sources for file in await source.listed(choice)]
    unlisted = [(source, pair) for source in sources for pair in source.unlisted(choice)]
    if not found and len(unlisted) == 1:
        # It can be in this layer only: one reading finds it and gives it out.
        ((source, pair),) = unlisted
        source.say_what_is_read([pair])
        await source.cat_layer(pair, path, output)
        return
    found += [(source, file) for source in sources for file in await source.read_list(choice)]
    files = [(source, file) for source, file in found if file.path == path and not file.is_folder]
    if not files:
        raise _missing(path, is_folder=bool(found))
    if len({file.digest for _, file in files}) > 1:
        entries = " and ".join(sorted({f"{file.section} {file.entry}" for _, file in files}))
        raise PathAmbiguous(
            f"'{visible(path)}' is not the same in all layers that have it, which are those of {entries}"
        )
    source, file = files[0]
    await source.cat_file(file, output)


def _is_from(file: KitFile, pair: EntryLayer) -> bool:
    return (file.layer, file.section, file.entry) == (pair.layer.digest, pair.section, entry_name(pair))


def _missing(path: str, *, is_folder: bool) -> PathMissing:
    if is_folder:
        return PathIsFolder(
            f"'{visible(path)}' is a folder; `kitclient files --path '{visible(path)}/**'` lists what is in it"
        )
    return PathMissing(f"the kit has no file '{visible(path)}'; `kitclient files` lists what it has")


class _Source:
    """The files of one kit, from wherever they are had.

    Args:
        remote: lists the files; None where layers must be read for that.
    """

    def __init__(self, part: KitPart, remote: RemoteFiles | None, progress: Progress, notice: Notice) -> None:
        self._part = part
        self._remote = remote
        self._progress = progress
        self._notice = notice

    @classmethod
    async def of(
        cls, part: KitPart, *, verify_layers: bool, progress: Progress | None, notice: Notice
    ) -> _Source:
        is_known = all(raw_file(pair) is not None for pair in part.pairs)
        remote = None if is_known or verify_layers else await RemoteFiles.discover(part.place)
        return cls(part, remote, progress or Silence(), notice)

    async def listed(self, choice: PathChoice) -> list[KitFile]:
        """What is wanted and known without reading a layer."""
        if self._remote is not None:
            return await self._remote.read_list(self._part, choice)
        known = [raw_file(pair) for pair in self._part.pairs]
        return [file for file in known if file is not None and file.path in choice]

    def unlisted(self, choice: PathChoice) -> list[EntryLayer]:
        """The layers that may hold what is wanted, and must be read to know it."""
        if self._remote is not None:
            return []
        return [pair for pair in self._part.pairs if raw_file(pair) is None and choice.may_hold(pair)]

    async def read_list(self, choice: PathChoice) -> list[KitFile]:
        """What is wanted of those layers."""
        pairs = self.unlisted(choice)
        self.say_what_is_read(pairs)
        files: list[KitFile] = []
        for pair in pairs:
            sink = _Index(pair, choice)
            await self._read_layer(pair, sink)
            files += sink.files
        return files

    def say_what_is_read(self, pairs: Sequence[EntryLayer]) -> None:
        say_what_whole_layers_cost(self._part.place, [pair.layer for pair in pairs], self._notice)

    async def cat_file(self, file: KitFile, output: _HeldOutput) -> None:
        """Give out a file that was listed."""
        pair = next(pair for pair in self._part.pairs if _is_from(file, pair))
        if raw_file(pair) is None and (
            is_hardly_more(pair.layer, file.size) or (file.offset is None and self._remote is None)
        ):
            await self.cat_layer(pair, file.path, output)
            return
        if file.offset is None and self._remote is not None:
            run = FileRun.alone(file)
            open_span: OpenSpan = bind(self._remote.open_file, self._part.kit.digest, file)
        else:
            place, run = self._part.place, FileRun((file,))
            open_span = bind(place.registry.open_blob, place.name, file.layer, run.span)
        with own_threads(2, "cat") as threads:
            sink = _OneFile(file.path, output)
            await read_run(run, open_span, sink, threads=threads, progress=Silence())
        await asyncio.to_thread(output.release)

    async def cat_layer(self, pair: EntryLayer, path: str, output: _HeldOutput) -> None:
        """Look for a file in a layer, and give it out."""
        sink = _OneFile(path, output)
        await self._read_layer(pair, sink)
        if not sink.is_found:
            raise _missing(path, is_folder=sink.is_folder)
        await asyncio.to_thread(output.release)

    async def _read_layer(self, pair: EntryLayer, sink: FileSink) -> None:
        place, plan = self._part.place, layer_plan(pair)
        bar = self._progress.begin(pair.layer)
        limit = UnpackLimit(_SIZE_MAX, _RATIO_MAX)
        outcome: Outcome = "failed"
        try:
            with own_threads(2, "files") as threads:
                async with place.registry.open_blob(place.name, pair.layer.digest) as body:
                    await read_layer(plan, body, sink, limit=limit, threads=threads, progress=bar)
            outcome = "done"
        finally:
            bar.end(outcome)


class _HeldOutput:
    """Passes on what it is given: at the end if that is little, at once otherwise.

    Attributes:
        passed_on: bytes.
    """

    def __init__(self, write: Callable[[bytes | memoryview], object]) -> None:
        self.passed_on = 0
        self._write = write
        self._held: list[bytes] | None = []
        self._held_size = 0

    def add(self, piece: bytes | memoryview) -> None:
        self._held_size += len(piece)
        if self._held_size > HELD_SIZE_MAX:
            self.release()
            self._pass_on(piece)
        elif self._held is not None:
            self._held.append(bytes(piece))

    def release(self) -> None:
        """Pass on what is held: it is verified, or too much to be held until it is."""
        held, self._held = self._held or [], None
        for piece in held:
            self._pass_on(piece)

    def _pass_on(self, piece: bytes | memoryview) -> None:
        self.passed_on += len(piece)
        self._write(piece)


class _OneFile:
    """Gives out one file of those that come.

    Attributes:
        is_folder: of that name there is a folder.
    """

    def __init__(self, path: str, output: _HeldOutput) -> None:
        self.is_found = False
        self.is_folder = False
        self._path = path
        self._output = output
        self._is_on = False

    def folder(self, path: str, mode: int) -> None:
        _ = mode
        self.is_folder |= path == self._path or path.startswith(f"{self._path}/")

    def begin(self, path: str, mode: int, offset: int | None) -> None:
        _ = offset
        self.folder(path.rpartition("/")[0], mode)
        self._is_on = path == self._path
        if self._is_on and self.is_found:
            raise _twice(path)
        self.is_found |= self._is_on

    def write(self, piece: bytes | memoryview) -> None:
        if self._is_on:
            self._output.add(piece)

    def end(self) -> None:
        self._is_on = False

    def close(self) -> None:
        pass


class _Index:
    """Notes what a layer has of what is wanted."""

    def __init__(self, pair: EntryLayer, choice: PathChoice) -> None:
        self._pair = pair
        self._choice = choice
        self._files: dict[str, KitFile] = {}
        self._current: KitFile | None = None
        self._size = 0
        self._hasher = hashlib.sha256()

    @property
    def files(self) -> list[KitFile]:
        return list(self._files.values())

    def folder(self, path: str, mode: int) -> None:
        if path in self._choice:
            self._files.setdefault(path, self._file(path, mode, None))

    def begin(self, path: str, mode: int, offset: int | None) -> None:
        self._current = self._file(path, mode, offset) if path in self._choice else None
        self._size = 0
        self._hasher = hashlib.sha256()

    def write(self, piece: bytes | memoryview) -> None:
        if self._current is not None:
            self._size += len(piece)
            self._hasher.update(piece)

    def end(self) -> None:
        if self._current is None:
            return
        path = self._current.path
        if path in self._files:
            raise _twice(path)
        digest = Digest(f"sha256:{self._hasher.hexdigest()}")
        self._files[path] = replace(self._current, size=self._size, digest=digest)

    def close(self) -> None:
        pass

    def _file(self, path: str, mode: int, offset: int | None) -> KitFile:
        pair = self._pair
        return KitFile(path, 0, mode, None, pair.layer.digest, offset, pair.section, entry_name(pair))


def _twice(path: str) -> LayerBroken:
    return LayerBroken(f"the layer holds '{visible(path)}' twice")


_: tuple[type[FileSink], ...] = (_OneFile, _Index)
