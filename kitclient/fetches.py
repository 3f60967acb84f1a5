"""What an unpack fetches, piece by piece: a layer whole, a layer for some of its files, or files without their layer.

Each piece is staged under a key of its own (kitclient/staging.py), so each is one that a later life need not fetch again.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial as bind
from typing import Protocol

from kitclient.archive import EVERYTHING, TreeSink, extract
from kitclient.compression import UnpackLimit
from kitclient.kit_files import KitFile, KitPart, PathChoice
from kitclient.layer_reading import FileRun, LayerPlan, OpenSpan, read_run
from kitclient.progress import BlobProgress
from kitclient.remote import RemoteRegistry
from kitclient.remote_files import RemoteFiles
from kitclient.staging import LayerTree
from kitclient.transfer import Place
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.kitfile import Section
from kitspec.kitfile_rules import clean_path
from kitspec.media_types import FILEPATH_ANNOTATION
from kitspec.selection import EntryLayer, place_of

# Neighbours come in one request when what lies between them is shorter than this …
_GAP_MAX = 64 * 1024
# … and than what a request and the head of its answer take, or while all such gaps are a small part of what is wanted.
_REQUEST_SIZE = 1024
_SPARE_SIZE = 32 * 1024
# What was verified is not fetched again: but for files of one request, of which there are no more than this.
_RUN_SIZE_MAX = 8 * 1024 * 1024
# Headers, padding and the end of a layer that is taken whole because nearly all of it is wanted.
_LAYER_SPARE_SIZE = 4 * 1024


class Fetch(Protocol):
    """A piece of what is unpacked."""

    @property
    def key(self) -> str:
        """Differs when anything differs that decides what comes out."""
        ...

    @property
    def shown(self) -> Descriptor:
        """What is on its way, for those who watch; its size is that of what comes over the network."""
        ...

    @property
    def size_min(self) -> int:
        """Bytes that are written, at the least."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of what it brings, those of them that are known and are not folders for sure."""
        ...

    @property
    def words(self) -> str:
        """What is said when it begins."""
        ...

    async def extract_to(
        self, tree: LayerTree, *, limit: UnpackLimit, threads: Executor, progress: BlobProgress
    ) -> None:
        """Fetch, verify, and write into `tree`, which the caller keeps or drops.

        Args:
            threads: at least two at a time.

        Raises:
            DigestInvalid, SizeInvalid: the bytes are not what they ought to be.
            LayerBroken, LayerTarInvalid, PathRefused: they are, and nobody may unpack them.
        """
        ...


@dataclass(frozen=True, slots=True)
class LayerFetch:
    """A layer that is fetched whole and verified against the manifest.

    Attributes:
        path: of the entry, which is a file or a folder.
        choice: what is wanted of it.
    """

    place: Place
    plan: LayerPlan
    path: str
    choice: PathChoice
    words: str

    @classmethod
    def of(cls, place: Place, pair: EntryLayer, choice: PathChoice = EVERYTHING) -> LayerFetch:
        return cls(place, layer_plan(pair), clean_path(pair.entry.path), choice, _words(pair))

    @property
    def key(self) -> str:
        if self.choice.is_everything:
            return self.plan.key
        return _key(self.plan.key, *sorted(self.choice.patterns))

    @property
    def shown(self) -> Descriptor:
        return self.plan.descriptor

    @property
    def size_min(self) -> int:
        return self.plan.descriptor.size if self.choice.is_everything else 0

    @property
    def files(self) -> tuple[str, ...]:
        return (self.path,) if self.path in self.choice else ()

    async def extract_to(
        self, tree: LayerTree, *, limit: UnpackLimit, threads: Executor, progress: BlobProgress
    ) -> None:
        async with self.place.registry.open_blob(self.place.name, self.plan.descriptor.digest) as body:
            await extract(
                self.plan, body, tree, choice=self.choice, limit=limit, threads=threads, progress=progress
            )


@dataclass(frozen=True, slots=True)
class RunFetch:
    """Files that are fetched without the rest of their layer, each verified by its own digest.

    Attributes:
        open_span: gives the bytes of `run.span`.
    """

    run: FileRun
    media_type: str
    open_span: OpenSpan

    @property
    def key(self) -> str:
        return _key(*(f"{file.layer} {file.digest} {file.mode:o} {file.path}" for file in self.run.files))

    @property
    def shown(self) -> Descriptor:
        return Descriptor(
            self.media_type,
            self.run.files[0].layer,
            self.run.span.size,
            annotations={FILEPATH_ANNOTATION: self._names},
        )

    @property
    def size_min(self) -> int:
        return sum(file.size for file in self.run.files)

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(file.path for file in self.run.files if not file.is_folder)

    @property
    def words(self) -> str:
        return f"Unpacking {self._names}"

    async def extract_to(
        self, tree: LayerTree, *, limit: UnpackLimit, threads: Executor, progress: BlobProgress
    ) -> None:
        sink = TreeSink(tree, limit, EVERYTHING)
        await read_run(self.run, self.open_span, sink, threads=threads, progress=progress)

    @property
    def _names(self) -> str:
        first, *others = self.run.files
        return first.path if not others else f"{first.path} and {len(others)} more"


async def fetches_of(
    part: KitPart, choice: PathChoice, *, verify_layers: bool, notice: Callable[[str], None]
) -> list[Fetch]:
    """What to fetch of a kit so that all that is wanted comes, and little else where the registry can give less.

    Args:
        verify_layers: fetch whole layers also where less could be had.
        notice: told what whole layers cost, where they are not wanted whole.

    Raises:
        OciError, ClientError: the registry cannot say what there is.
    """
    if choice.is_everything:
        return [LayerFetch.of(part.place, pair) for pair in part.pairs]
    # A raw layer is one file, which the manifest names: nobody else need be asked.
    fetches: list[Fetch] = [
        LayerFetch.of(part.place, pair)
        for pair in part.pairs
        if pair.layer_type.packaging == "raw" and choice.may_hold(pair)
    ]
    archives = [pair for pair in part.pairs if pair.layer_type.packaging == "tar"]
    remote = await RemoteFiles.discover(part.place) if archives and not verify_layers else None
    if remote is not None:
        in_archives = {pair.layer.digest for pair in archives}
        listed = [file for file in await remote.read_list(part, choice) if file.layer in in_archives]
        return fetches + _from_list(part, remote, listed, choice)
    archives = [pair for pair in archives if choice.may_hold(pair)]
    say_what_whole_layers_cost(part.place, [pair.layer for pair in archives], notice)
    return fetches + [LayerFetch.of(part.place, pair, choice) for pair in archives]


def say_what_whole_layers_cost(
    place: Place, layers: Sequence[Descriptor], notice: Callable[[str], None]
) -> None:
    """Called before layers are fetched for a part of them; where they lie on this machine there is nothing to say."""
    if layers and isinstance(place.registry, RemoteRegistry):
        size = sum(layer.size for layer in layers)
        what = "a whole layer is" if len(layers) == 1 else f"{len(layers)} whole layers are"
        notice(f"to find what is wanted, {what} fetched from {place.registry.host}: {size} bytes")


def is_hardly_more(layer: Descriptor, size: int) -> bool:
    """Whether to fetch a whole layer and not `size` bytes for parts of it: the manifest vouches for a whole one."""
    return layer.size - size <= size // 100 + _LAYER_SPARE_SIZE


def runs_of(files: Iterable[KitFile]) -> list[FileRun]:
    """Files of uncompressed layers, put together as they are to be fetched.

    Small neighbours come together: always over gaps that are cheaper than a request, and over larger ones, the smallest
    first, while all of those are 1 % of what is wanted and 32 KiB.
    """
    ordered = sorted(files, key=lambda file: (file.layer, file.offset or 0, file.path))
    spare = sum(file.size for file in ordered) // 100 + _SPARE_SIZE
    joined: set[int] = set()
    for gap, position in sorted(_gaps(ordered)):
        if gap > _REQUEST_SIZE:
            spare -= gap
        if spare < 0:
            break
        joined.add(position)
    runs: list[list[KitFile]] = []
    for position, file in enumerate(ordered):
        if position in joined and _distance(runs[-1][0], file) + file.size <= _RUN_SIZE_MAX:
            runs[-1].append(file)
        else:
            runs.append([file])
    return [FileRun(tuple(run)) for run in runs]


def _gaps(ordered: Sequence[KitFile]) -> Iterable[tuple[int, int]]:
    """How far each file is behind the one before, where both may come in one request; and the position of the later."""
    for position in range(1, len(ordered)):
        before, file = ordered[position - 1 : position + 1]
        gap = _distance(before, file) - before.size
        # A list that makes files overlap may be right; it is no matter of neighbours.
        if file.layer == before.layer and 0 <= gap < _GAP_MAX:
            yield gap, position


def _distance(one: KitFile, other: KitFile) -> int:
    return (other.offset or 0) - (one.offset or 0)


def _from_list(
    part: KitPart, remote: RemoteFiles, listed: Sequence[KitFile], choice: PathChoice
) -> list[Fetch]:
    """Layer by layer: the files, or the whole layer where that is hardly more."""
    runs: dict[Digest, list[RunFetch]] = defaultdict(list)
    for fetch in _run_fetches(part, remote, listed):
        runs[fetch.run.files[0].layer].append(fetch)
    fetches: list[Fetch] = []
    for digest, pieces in runs.items():
        pairs = [pair for pair in part.pairs if pair.layer.digest == digest]
        fetched = sum(piece.run.span.size for piece in pieces)
        if is_hardly_more(pairs[0].layer, fetched):
            fetches += [LayerFetch.of(part.place, pair, choice) for pair in pairs]
        else:
            fetches += pieces
    return fetches


def _run_fetches(part: KitPart, remote: RemoteFiles, listed: Sequence[KitFile]) -> Iterator[RunFetch]:
    media_types = {pair.layer.digest: pair.layer.media_type for pair in part.pairs}
    sized = [file for file in listed if file.size]
    for run in runs_of(file for file in sized if file.offset is not None):
        layer = run.files[0].layer
        yield RunFetch(run, media_types[layer], _opening(part, layer, run))
    for file in sized:
        if file.offset is None:
            # The registry cuts it out of the layer.
            open_span: OpenSpan = bind(remote.open_file, part.kit.digest, file)
            yield RunFetch(FileRun.alone(file), media_types[file.layer], open_span)
    # Folders, and files of no bytes.
    unsized: dict[Digest, list[KitFile]] = defaultdict(list)
    for file in listed:
        if not file.size:
            unsized[file.layer].append(file)
    for layer, files in unsized.items():
        run = FileRun(tuple(files))
        yield RunFetch(run, media_types[layer], _opening(part, layer, run))


def _opening(part: KitPart, layer: Digest, run: FileRun) -> OpenSpan:
    return bind(part.place.registry.open_blob, part.place.name, layer, run.span)


def layer_plan(pair: EntryLayer) -> LayerPlan:
    """How a layer is unpacked."""
    goes_to = place_of(pair)
    return LayerPlan(
        pair.layer, pair.layer_type, path=goes_to.path, mode=goes_to.mode, diff_id=pair.entry.diff_id
    )


def _words(pair: EntryLayer) -> str:
    kind = {
        Section.MODEL_PART: "model part",
        Section.DATASETS: "dataset",
        Section.PROMPTS: "prompt",
        Section.MCP_SERVERS: "MCP server",
    }.get(pair.section, pair.section.value)
    name = f" {pair.entry.name}" if pair.entry.name else ""
    return f"Unpacking {kind}{name} to {pair.entry.path}"


def _key(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:40]
