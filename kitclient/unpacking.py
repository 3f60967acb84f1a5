"""A ModelKit, or a part of it, becomes files: fetched, verified and written side by side, shown when all is right.

From a registry only what is chosen is fetched, and nothing is stored but the files: kitclient/fetches.py. How files are
kept back until then, and how an unpack that was killed goes on: kitclient/staging.py.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kitclient.compression import UnpackLimit
from kitclient.errors import ClientError
from kitclient.fetches import Fetch, fetches_of
from kitclient.kit_files import PathChoice, PathMissing, kit_chain
from kitclient.modelkit import ModelKit, read_modelkit
from kitclient.pipeline import finished, own_threads
from kitclient.progress import Progress, Silence
from kitclient.references import Find
from kitclient.staging import Existing, LayerTree, Member, Staging
from kitclient.transfer import Place
from kitspec.digest import Digest
from kitspec.names import Tag
from kitspec.selection import Filter, includes_kitfile

_LAYERS_AT_ONCE = 4
# No packer reaches this by honest means, but for files of zeros; --max-unpacked lifts it.
_RATIO_MAX = 1000
# What others on the file system need while we fill it.
_ROOM_KEPT = 1024 * 1024 * 1024
_KITFILE_NAME = "Kitfile"


class UnpackRefused(ClientError):
    """The kit cannot be unpacked here."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What became of it.

    Attributes:
        kept: paths that were there and, as asked, left alone.
    """

    digest: Digest
    kept: tuple[str, ...]


async def unpack(
    place: Place,
    reference: Tag | Digest,
    target: Path,
    *,
    filters: Sequence[Filter] = (),
    paths: Sequence[str] = (),
    verify_layers: bool = False,
    existing: Existing = Existing.REFUSE,
    max_unpacked: int | None = None,
    find: Find | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Unpacked:
    """Unpack what `filters` and `paths` choose, everything without any, into the folder `target`, made if needed.

    All or nothing: on any error no file has its name yet, and nothing is left behind.

    Args:
        paths: patterns (kitspec/path_glob.py); of the filtered layers only files that one of them matches are wanted, and
            the Kitfile likewise. A registry that has our extension is asked for those files and for little else.
        verify_layers: fetch the layers of such files whole from any registry, and verify them against the manifest.
        existing: what to do about files that are there.
        max_unpacked: bytes that may be written; None allows what fits and is not suspiciously compressed.
        find: needed when the kit's model is another kit's.
        notice: called with a sentence about each step.
        warn: called with a sentence about what is not unpacked though the kit names it.

    Raises:
        PathRefused: something is in the way, or two layers bring one file.
        DigestInvalid, LayerBroken, LayerTarInvalid, KitfileInvalid: the kit is not what it says, or nobody may unpack it.
        PathMissing: no file matches any of `paths`.
        FilterInvalid: one of them is no pattern.
        UnpackRefused: no room.
        ReferenceChainInvalid: a chain of kits without end.
    """
    choice = PathChoice(paths)
    async with AsyncExitStack() as stack:
        kit = await read_modelkit(place, reference)
        fetches = await _plan(
            place,
            kit,
            filters,
            choice,
            verify_layers=verify_layers,
            find=find,
            stack=stack,
            notice=notice,
            warn=warn,
        )
        folder = await stack.enter_async_context(_folder(target))
        staging = await stack.enter_async_context(_in_thread(Staging(folder)))
        notice(f"Unpacking to {folder}")
        wants_kitfile = includes_kitfile(filters) and _KITFILE_NAME in choice
        kitfile = kit.kitfile.to_yaml() if wants_kitfile else None
        if kitfile is not None and await asyncio.to_thread(
            _is_there, folder / _KITFILE_NAME, kitfile, existing
        ):
            notice(f"Found existing Kitfile at {folder / _KITFILE_NAME}")
            kitfile = None
        limit = _limit(fetches, staging.free_bytes, max_unpacked)
        unpacker = _Unpacker(staging, existing, limit=limit, progress=progress or Silence(), notice=notice)
        layers = await unpacker.stage(fetches, kitfile, folder)
        brought = [member.path for members in layers.values() for member in members]
        brought += [_KITFILE_NAME] if wants_kitfile else []
        _check_chosen(choice, await asyncio.to_thread(choice.unmatched, brought), warn)
        # Not to be interrupted: it takes no time, and half of it would be neither here nor there.
        kept = await finished(asyncio.to_thread(staging.place, layers, existing))
    return Unpacked(kit.digest, tuple(kept))


class _Unpacker:
    def __init__(
        self,
        staging: Staging,
        existing: Existing,
        *,
        limit: UnpackLimit,
        progress: Progress,
        notice: Callable[[str], None],
    ) -> None:
        self._staging = staging
        self._existing = existing
        self._limit = limit
        self._progress = progress
        self._notice = notice
        self._turns = asyncio.Semaphore(_LAYERS_AT_ONCE)

    async def stage(
        self, fetches: Sequence[Fetch], kitfile: bytes | None, folder: Path
    ) -> dict[str, list[Member]]:
        """Everything under its key, verified and not yet placed."""
        await asyncio.to_thread(self._staging.keep_only, [fetch.key for fetch in fetches])
        layers: dict[str, list[Member]] = {}
        if kitfile is not None:
            self._notice(f"Unpacking config to {folder / _KITFILE_NAME}")
            layers |= await asyncio.to_thread(_stage_kitfile, self._staging, kitfile)
        with own_threads(2 * _LAYERS_AT_ONCE, "unpack") as threads:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = {
                        fetch.key: group.create_task(self._stage_fetch(fetch, threads)) for fetch in fetches
                    }
            except BaseExceptionGroup as errors:
                # The first is what stopped the others.
                raise errors.exceptions[0] from None
        return layers | {key: task.result() for key, task in tasks.items()}

    async def _stage_fetch(self, fetch: Fetch, threads: Executor) -> list[Member]:
        async with self._turns:
            self._notice(fetch.words)
            bar = self._progress.begin(fetch.shown)
            members = await asyncio.to_thread(self._staging.verified, fetch.key)
            if members is not None:
                bar.end("exists")
                return members
            if self._existing is Existing.REFUSE:
                # A file that is there: no need to fetch it in order to say so.
                await asyncio.to_thread(self._refuse_files, fetch.files)
            opened: list[LayerTree] = []
            try:
                # Not lost when we are cancelled meanwhile: it holds a folder open.
                await finished(asyncio.to_thread(lambda: opened.append(self._staging.layer(fetch.key))))
                (tree,) = opened
                await fetch.extract_to(tree, limit=self._limit, threads=threads, progress=bar)
                await finished(asyncio.to_thread(tree.keep))
            except BaseException:
                bar.end("failed")
                raise
            finally:
                for tree in opened:
                    await finished(asyncio.to_thread(tree.close))
            bar.end("done")
            return opened[0].members

    def _refuse_files(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._staging.refuse_file(path)


async def _plan(
    place: Place,
    kit: ModelKit,
    filters: Sequence[Filter],
    choice: PathChoice,
    *,
    verify_layers: bool,
    find: Find | None,
    stack: AsyncExitStack,
    notice: Callable[[str], None],
    warn: Callable[[str], None],
) -> list[Fetch]:
    """What to fetch, from where: what is in the kits that are referred to first."""
    plans: list[list[Fetch]] = []
    chain = kit_chain(
        place,
        kit,
        filters,
        find=find,
        stack=stack,
        on_parent=lambda parent: notice(f"Unpacking referenced modelkit {parent}"),
    )
    async for part in chain:
        for dataset in part.kit.kitfile.datasets:
            if dataset.remote_path:
                warn(
                    f"dataset {dataset.name} is not in the kit but at {dataset.remote_path}, and is not unpacked"
                )
        plans.insert(0, await fetches_of(part, choice, verify_layers=verify_layers, notice=notice))
    # Pieces that give the same files are one: an empty layer may belong to several entries.
    return list({fetch.key: fetch for plan in plans for fetch in plan}.values())


def _check_chosen(choice: PathChoice, unmatched: Sequence[str], warn: Callable[[str], None]) -> None:
    """See that there was something to unpack.

    Raises:
        PathMissing: no pattern matches anything.
    """
    if choice.patterns and len(unmatched) == len(choice.patterns):
        raise PathMissing(
            f"nothing of what is chosen matches {' or '.join(unmatched)}; `kitclient files` lists what there is"
        )
    for pattern in unmatched:
        warn(f"nothing of what is chosen matches {pattern}")


def _limit(fetches: Sequence[Fetch], free: int, max_unpacked: int | None) -> UnpackLimit:
    room = max(0, free - min(_ROOM_KEPT, free // 10))
    needed = sum(fetch.size_min for fetch in fetches)
    if max_unpacked is not None:
        return UnpackLimit(max_unpacked, None)
    if needed > room:
        raise UnpackRefused(f"what is chosen takes {needed} bytes, and {room} are free to be used")
    return UnpackLimit(room, _RATIO_MAX)


def _is_there(path: Path, content: bytes, existing: Existing) -> bool:
    """Whether this very Kitfile is there already.

    Raises:
        UnpackRefused: another one is, and may not be replaced.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UnpackRefused(f"cannot read the existing Kitfile at {path}: {error.strerror}") from error
    with os.fdopen(file, "rb") as reader:
        if reader.read(len(content) + 1) == content:
            return True
    if existing is not Existing.REPLACE:
        raise UnpackRefused(f"failed to unpack config: path '{path}' already exists, and is another Kitfile")
    return False


def _stage_kitfile(staging: Staging, content: bytes) -> dict[str, list[Member]]:
    tree = staging.layer("kitfile")
    try:
        file = tree.create_file(_KITFILE_NAME, 0o644)
        with os.fdopen(os.dup(file), "wb") as writer:
            writer.write(content)
        tree.close_file(_KITFILE_NAME, file)
        tree.keep()
    finally:
        tree.close()
    return {"kitfile": tree.members}


@asynccontextmanager
async def _folder(target: Path) -> AsyncIterator[Path]:
    """The target, resolved; what was made of it goes again if nothing comes into it."""

    folder = Path(await asyncio.to_thread(os.path.realpath, target))
    made: list[Path] = []

    def make() -> None:
        made.extend(path for path in (folder, *folder.parents) if not path.exists())
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)

    def remove() -> None:
        for path in made:
            with suppress(OSError):
                path.rmdir()

    try:
        try:
            await finished(asyncio.to_thread(make))
        except OSError as error:
            raise UnpackRefused(f"failed to create directory {target}: {error.strerror}") from error
        yield folder
    except BaseException:
        await finished(asyncio.to_thread(remove))
        raise


@asynccontextmanager
async def _in_thread(staging: Staging) -> AsyncIterator[Staging]:
    try:
        await finished(asyncio.to_thread(staging.__enter__))
        yield staging
    finally:
        await finished(asyncio.to_thread(staging.__exit__, None, None, None))
