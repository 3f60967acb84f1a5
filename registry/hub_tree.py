"""The files of a ModelKit at the paths where the hub shows them: those of the model at the root, where loaders look for them.

    in the kit                 shown, with root "auto"        where model.path is ./model/, or a file in it
    model/config.json          config.json
    docs/guide.md              docs/guide.md
    README.md                  README.md                      unless there is a model/README.md: the model's file is the one shown

A folder is where a file is in it: the Hub, like git, has no others. Every file is shown at one path, and only there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from kitspec.digest import Digest
from kitspec.errors import FileUnknown
from kitspec.kitfile import Section
from kitspec.kitfile_rules import clean_path
from registry.kits import ChosenKit, KitFile, KitLayer, Kits
from storage_backends.interface import ObjectMissing

HubRoot = Literal["auto", "kit"]

# Greater than any name in a folder that anybody gives.
_LAST_NAME: Final = "\U0010ffff"


@dataclass(frozen=True, slots=True)
class HubFile:
    """Attributes: path: where it is shown."""

    path: str
    file: KitFile

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def digest(self) -> Digest:
        assert self.file.digest is not None  # only a folder has none
        return self.file.digest


@dataclass(frozen=True, slots=True)
class HubFolder:
    path: str


LeaveOut = Callable[[str], str | None]
"""Given the path of a file: the folder above it of which nothing is wanted, or None."""


class HubTree:
    """
    Args:
        root: the folder of the kit whose files are shown at the root; "" for the kit's own.
    """

    def __init__(self, kits: Kits, choice: ChosenKit, root: str) -> None:
        self._kits = kits
        self._choice = choice
        self._root = root

    async def find(self, path: str) -> HubFile | None:
        """The file that is shown at a path.

        Raises:
            ManifestInvalid: two layers have different ones, or a layer cannot be looked into.
        """
        file = await self._file_at(f"{self._root}/{path}") if self._root else None
        if file is None and self._moved_folder(path) is None:
            file = await self._file_at(path)
            if file is not None and await self._is_shadowed(path):
                file = None
        return None if file is None else HubFile(path, file)

    async def has_folder(self, path: str) -> bool:
        return await anext(self.files(prefix=f"{path}/"), None) is not None

    async def files(
        self, *, prefix: str = "", after: str = "", leave_out: LeaveOut = lambda _: None
    ) -> AsyncIterator[HubFile]:
        """Files whose paths begin with `prefix` and are greater than `after`, in the order of the paths' bytes.

        Raises:
            ManifestInvalid: a layer cannot be looked into.
        """
        if not self._root:
            streams = [self._kit_files("", prefix, after, leave_out)]
        else:
            beside = self._kit_files(
                "", prefix, after, lambda path: self._moved_folder(path) or leave_out(path)
            )
            streams = [
                self._kit_files(f"{self._root}/", prefix, after, leave_out),
                self._unshadowed(beside),
            ]
        async for file in _merged(streams):
            yield file

    async def entries(
        self, folder: str, *, is_recursive: bool, after: str = ""
    ) -> AsyncIterator[HubFile | HubFolder]:
        """What is in a folder, "" for the root; each folder before the first file in it.

        Args:
            is_recursive: with what is in the folders below.
            after: `position_of` the entry behind which to begin.

        Raises:
            ManifestInvalid: a layer cannot be looked into.
        """
        prefix = f"{folder}/" if folder else ""
        last = after

        def leave_out(path: str) -> str | None:
            child = next(iter(_folders_between(prefix, path)), None)
            return child if child is not None and not is_recursive and last.startswith(f"{child}/") else None

        async for file in self.files(prefix=prefix, after=after, leave_out=leave_out):
            for above in _folders_between(prefix, file.path):
                # What is in a folder stands together: it was listed if and only if the last entry is in it.
                if not last.startswith(f"{above}/"):
                    last = f"{above}/"
                    yield HubFolder(above)
                if not is_recursive:
                    break
            else:
                last = file.path
                yield file

    # ---- inside

    async def _kit_files(
        self, below: str, prefix: str, after: str, leave_out: LeaveOut
    ) -> AsyncIterator[HubFile]:
        """Files whose paths in the kit begin with `below`, which is not shown; over what is left out it leaps."""
        start: str | None = after
        while start is not None:
            after, start = start, None
            async for file in self._kits.files(self._choice, prefix=below + prefix, after=below + after):
                path = file.path.removeprefix(below)
                folder = None if file.is_folder else leave_out(path)
                if folder is not None and f"{folder}/{_LAST_NAME}" > after:
                    start = f"{folder}/{_LAST_NAME}"
                    break
                if folder is None and not file.is_folder:
                    yield HubFile(path, file)

    async def _unshadowed(self, files: AsyncIterator[HubFile]) -> AsyncIterator[HubFile]:
        """Those of the files beside the model's that none of the model's hides."""
        is_model_there: dict[str, bool] = {}
        async for file in files:
            first = file.path.partition("/")[0]
            if first not in is_model_there:
                is_model_there[first] = await self._has(f"{self._root}/{first}")
            if not is_model_there[first] or not await self._is_shadowed(file.path):
                yield file

    async def _is_shadowed(self, path: str) -> bool:
        """Whether the model has a file where this one would be shown, or one above it, or some below it."""
        if not self._root:
            return False
        for folder in _folders_between("", path):
            if await self._file_at(f"{self._root}/{folder}") is not None:
                return True
            if not await self._has(f"{self._root}/{folder}"):
                return False
        return await self._has(f"{self._root}/{path}")

    async def _has(self, path: str) -> bool:
        """Whether the kit has a file at a path, or some below it."""
        if await self._file_at(path) is not None:
            return True
        return await anext(self._kit_files("", f"{path}/", "", lambda _: None), None) is not None

    async def _file_at(self, path: str) -> KitFile | None:
        try:
            return await self._kits.find_file(self._choice, path)
        except FileUnknown:
            return None

    def _moved_folder(self, path: str) -> str | None:
        """The model's folder, if a path of the kit is in it: what is there is shown elsewhere."""
        return self._root if self._root and path.startswith(f"{self._root}/") else None


async def tree_of(kits: Kits, choice: ChosenKit, root: HubRoot) -> HubTree:
    """
    Raises:
        ManifestInvalid: the model's layer cannot be looked into.
    """
    return HubTree(kits, choice, await _model_folder(kits, choice) if root == "auto" else "")


def position_of(entry: HubFile | HubFolder) -> str:
    """For `after`: behind this entry."""
    return f"{entry.path}/" if isinstance(entry, HubFolder) else entry.path


async def _model_folder(kits: Kits, choice: ChosenKit) -> str:
    """The folder that the model is, or that it is in; "" for the kit's root, and where there is no model."""
    model = choice.kit.kitfile.model
    layer = next((layer for layer in choice.layers if layer.pair.section is Section.MODEL), None)
    if model is None or layer is None:
        return ""
    path = clean_path(model.path)
    if await _is_file(kits, layer, path):
        return path.rpartition("/")[0]
    return "" if path == "." else path


async def _is_file(kits: Kits, layer: KitLayer, path: str) -> bool:
    """Whether an entry's path is a file in its layer. Not by `find_file`: that would hash a large model first."""
    layer_type = layer.pair.layer_type
    if layer_type.packaging == "raw":
        return True
    above = f"{layer.place.path}/" if layer.place.path else ""
    try:
        member = (await kits.indexes.table(layer.digest, layer_type)).find(path.removeprefix(above))
    except ObjectMissing:
        return False  # whoever asks for a file is told
    return member is not None and not member.is_folder


def _folders_between(prefix: str, path: str) -> list[str]:
    """The folders above a path, the outermost first, that are below `prefix`."""
    return [path[:cut] for cut, character in enumerate(path) if character == "/" and cut >= len(prefix)]


async def _merged(streams: Sequence[AsyncIterator[HubFile]]) -> AsyncIterator[HubFile]:
    """Ordered streams as one; of files at one path the first. No stream is asked for more before that is wanted."""
    heads = [await anext(stream, None) for stream in streams]
    previous: str | None = None
    while any(heads):
        _, index = min((head.path, index) for index, head in enumerate(heads) if head is not None)
        head = heads[index]
        assert head is not None
        if head.path != previous:
            yield head
        previous = head.path
        heads[index] = await anext(streams[index], None)
