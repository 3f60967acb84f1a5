"""A ModelKit, or a part of it, becomes files: fetched, verified and written side by side, shown when all is right.

From a registry only the chosen layers are fetched, and nothing is stored but the files. How files are kept back until
then, and how an unpack that was killed goes on: kitclient/staging.py.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kitclient.archive import LayerPlan, extract
from kitclient.compression import UnpackLimit
from kitclient.errors import ClientError
from kitclient.modelkit import ModelKit, read_modelkit
from kitclient.pipeline import finished, own_threads
from kitclient.progress import Progress, Silence
from kitclient.references import Find, longer, parent_of
from kitclient.staging import Existing, LayerTree, Member, Staging
from kitclient.terminal import visible
from kitclient.transfer import Place
from kitspec.digest import Digest
from kitspec.errors import KitfileInvalid
from kitspec.kitfile import Section
from kitspec.kitfile_rules import clean_path
from kitspec.media_types import FILE_METADATA_ANNOTATION, FILEPATH_ANNOTATION, LEGACY_FILE_METADATA_ANNOTATION
from kitspec.names import Reference, Tag
from kitspec.selection import EntryLayer, Filter, includes_kitfile, parse_filter, select_layers

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


@dataclass(frozen=True, slots=True)
class _Fetch:
    """Attributes: path: of the entry, which is a file or a folder; words: what is said when it begins."""

    place: Place
    plan: LayerPlan
    path: str
    words: str


async def unpack(
    place: Place,
    reference: Tag | Digest,
    target: Path,
    *,
    filters: Sequence[Filter] = (),
    existing: Existing = Existing.REFUSE,
    max_unpacked: int | None = None,
    find: Find | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Unpacked:
    """Unpack what `filters` choose, everything without any, into the folder `target`, which is made when it is not there.

    All or nothing: on any error no file has its name yet, and nothing is left behind.

    Args:
        existing: what to do about files that are there.
        max_unpacked: bytes that may be written; None allows what fits and is not suspiciously compressed.
        find: needed when the kit's model is another kit's.
        notice: called with a sentence about each step.
        warn: called with a sentence about what is not unpacked though the kit names it.

    Raises:
        PathRefused: something is in the way, or two layers bring one file.
        DigestInvalid, LayerBroken, LayerTarInvalid, KitfileInvalid: the kit is not what it says, or nobody may unpack it.
        UnpackRefused: no room, or a chain of kits without end.
    """
    async with AsyncExitStack() as stack:
        kit = await read_modelkit(place, reference)
        fetches = await _plan(place, kit, filters, find=find, stack=stack, notice=notice, warn=warn)
        folder = await stack.enter_async_context(_folder(target))
        staging = await stack.enter_async_context(_in_thread(Staging(folder)))
        notice(f"Unpacking to {folder}")
        kitfile = kit.kitfile.to_yaml() if includes_kitfile(filters) else None
        if kitfile is not None and await asyncio.to_thread(
            _is_there, folder / _KITFILE_NAME, kitfile, existing
        ):
            notice(f"Found existing Kitfile at {folder / _KITFILE_NAME}")
            kitfile = None
        limit = _limit(fetches, staging.free_bytes, max_unpacked)
        unpacker = _Unpacker(staging, existing, limit=limit, progress=progress or Silence(), notice=notice)
        layers = await unpacker.stage(fetches, kitfile, folder)
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
        self, fetches: Sequence[_Fetch], kitfile: bytes | None, folder: Path
    ) -> dict[str, list[Member]]:
        """Everything under its key, verified and not yet placed."""
        await asyncio.to_thread(self._staging.keep_only, [fetch.plan.key for fetch in fetches])
        layers: dict[str, list[Member]] = {}
        if kitfile is not None:
            self._notice(f"Unpacking config to {folder / _KITFILE_NAME}")
            layers |= await asyncio.to_thread(_stage_kitfile, self._staging, kitfile)
        with own_threads(2 * _LAYERS_AT_ONCE, "unpack") as threads:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = {
                        fetch.plan.key: group.create_task(self._stage_layer(fetch, threads))
                        for fetch in fetches
                    }
            except BaseExceptionGroup as errors:
                # The first is what stopped the others.
                raise errors.exceptions[0] from None
        return layers | {key: task.result() for key, task in tasks.items()}

    async def _stage_layer(self, fetch: _Fetch, threads: Executor) -> list[Member]:
        async with self._turns:
            self._notice(fetch.words)
            bar = self._progress.begin(fetch.plan.descriptor)
            members = await asyncio.to_thread(self._staging.verified, fetch.plan.key)
            if members is not None:
                bar.end("exists")
                return members
            if self._existing is Existing.REFUSE:
                # An entry that is a file and is there: no need to fetch it in order to say so.
                await asyncio.to_thread(self._staging.refuse_file, fetch.path)
            opened: list[LayerTree] = []
            try:
                # Not lost when we are cancelled meanwhile: it holds a folder open.
                await finished(asyncio.to_thread(lambda: opened.append(self._staging.layer(fetch.plan.key))))
                (tree,) = opened
                async with fetch.place.registry.open_blob(
                    fetch.place.name, fetch.plan.descriptor.digest
                ) as body:
                    await extract(
                        fetch.plan, aiter(body), tree, limit=self._limit, threads=threads, progress=bar
                    )
                await finished(asyncio.to_thread(tree.keep))
            except BaseException:
                bar.end("failed")
                raise
            finally:
                for tree in opened:
                    await finished(asyncio.to_thread(tree.close))
            bar.end("done")
            return opened[0].members


async def _plan(
    place: Place,
    kit: ModelKit,
    filters: Sequence[Filter],
    *,
    find: Find | None,
    stack: AsyncExitStack,
    notice: Callable[[str], None],
    warn: Callable[[str], None],
) -> list[_Fetch]:
    """What to fetch, from where: the layers of the kits that are referred to first."""
    plans: list[list[_Fetch]] = []
    chain: list[str] = []
    while True:
        plans.insert(0, [_fetch(place, pair) for pair in select_layers(kit.manifest, kit.kitfile, filters)])
        for dataset in kit.kitfile.datasets:
            if dataset.remote_path:
                warn(
                    f"dataset {dataset.name} is not in the kit but at {dataset.remote_path}, and is not unpacked"
                )
        parent = parent_of(kit.kitfile)
        parent_filters = _for_parent(filters)
        if parent is None or not parent_filters:
            # Layers that give the same files are one: an empty one may belong to several entries.
            return list({fetch.plan.key: fetch for plan in plans for fetch in plan}.values())
        chain = longer(chain, parent)
        if find is None:
            raise UnpackRefused(f"the model is the one of {parent}, and nobody said where to find that")
        notice(f"Unpacking referenced modelkit {parent}")
        place, reference = await stack.enter_async_context(find(Reference.parse(parent)))
        kit, filters = await read_modelkit(place, reference), parent_filters


def _for_parent(filters: Sequence[Filter]) -> list[Filter]:
    """Of the kit that `model.path` names only the model is wanted, and only if it is wanted at all."""
    if not filters:
        return [parse_filter("model")]
    model = parse_filter("model").sections
    return [
        replace(filter_, sections=model, kitfile=False) for filter_ in filters if model <= filter_.sections
    ]


def _fetch(place: Place, pair: EntryLayer) -> _Fetch:
    path = clean_path(pair.entry.path)
    plan = LayerPlan(pair.layer, pair.layer_type, diff_id=pair.entry.diff_id)
    if pair.layer_type.packaging == "raw":
        plan = replace(
            plan, path=_checked(pair.layer.annotations.get(FILEPATH_ANNOTATION, path)), mode=_mode(pair)
        )
    elif pair.layer_type.family == "kitops" and pair.entry.digest is None and "/" in path:
        # Before 0.5 the names in a layer were relative to the folder that its path is in.
        plan = replace(plan, path=_checked(path.rpartition("/")[0]))
    return _Fetch(place, plan, path, _words(pair))


def _words(pair: EntryLayer) -> str:
    kind = {
        Section.MODEL_PART: "model part",
        Section.DATASETS: "dataset",
        Section.PROMPTS: "prompt",
        Section.MCP_SERVERS: "MCP server",
    }.get(pair.section, pair.section.value)
    name = f" {pair.entry.name}" if pair.entry.name else ""
    return f"Unpacking {kind}{name} to {pair.entry.path}"


def _mode(pair: EntryLayer) -> int:
    annotations = pair.layer.annotations
    text = annotations.get(FILE_METADATA_ANNOTATION, annotations.get(LEGACY_FILE_METADATA_ANNOTATION, ""))
    with suppress(ValueError, RecursionError, AttributeError):
        mode = json.loads(text).get("mode")
        if isinstance(mode, int):
            return mode
    return 0o644


def _checked(path: str) -> str:
    """A path out of a manifest, as strictly as the names in a tar."""
    components = path.split("/")
    if (
        path != clean_path(path)
        or path.startswith("/")
        or ".." in components
        or visible(path) != path
        or path == "."
    ):
        raise KitfileInvalid(
            f"a layer is to be unpacked to {path[:200]!a}, which is no path in the target folder"
        )
    return path


def _limit(fetches: Sequence[_Fetch], free: int, max_unpacked: int | None) -> UnpackLimit:
    room = max(0, free - min(_ROOM_KEPT, free // 10))
    needed = sum(fetch.plan.descriptor.size for fetch in fetches)
    if max_unpacked is not None:
        return UnpackLimit(max_unpacked, None)
    if needed > room:
        raise UnpackRefused(f"the layers take {needed} bytes, and {room} are free to be used")
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
