"""The files of a ModelKit one by one: what is known of each, which are wanted, and the kits that they come from.

Nothing is fetched here but manifests and Kitfiles. Where bytes come from: kitclient/single_files.py for `files` and
`cat`, kitclient/fetches.py for `unpack`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from kitclient.errors import ClientError
from kitclient.modelkit import ModelKit, read_modelkit
from kitclient.references import Find, ReferenceChainInvalid, longer, parent_of
from kitclient.transfer import Place
from kitspec.digest import Digest
from kitspec.errors import LayerTarInvalid, ReferenceInvalid
from kitspec.kitfile import Section
from kitspec.kitfile_rules import clean_path
from kitspec.layer_tar import clean_member_path
from kitspec.names import Reference
from kitspec.path_glob import PathGlob
from kitspec.selection import EntryLayer, Filter, parse_filter, place_of, select_layers

_SPECIAL = frozenset("*?[")


class PathMissing(ClientError):
    """The kit has no such file."""


class PathIsFolder(PathMissing):
    """The kit has a folder of that name, and a file is wanted."""


class PathAmbiguous(ClientError):
    """Two layers of the kit have different files of one name."""


@dataclass(frozen=True, slots=True)
class KitFile:
    """A file or a folder as a layer has it.

    Attributes:
        path: from the root of the kit, cleaned.
        size: of the content in bytes; 0 for a folder.
        mode: as the layer says it: permission bits, perhaps with setuid, setgid and sticky.
        digest: of the content; None for a folder.
        layer: the blob that it is in.
        offset: of the content in that blob; None where the blob is compressed, and for a folder.
        entry: name of the Kitfile's entry that the layer belongs to, its path when it has none.
    """

    path: str
    size: int
    mode: int
    digest: Digest | None
    layer: Digest
    offset: int | None
    section: Section
    entry: str

    @property
    def is_folder(self) -> bool:
        return self.digest is None


def entry_name(pair: EntryLayer) -> str:
    """What an entry is called: `KitFile.entry`."""
    return pair.entry.name or pair.entry.path


def raw_file(pair: EntryLayer) -> KitFile | None:
    """The file that an uncompressed raw layer is, which its descriptor says all about; None for other layers."""
    if pair.layer_type.packaging != "raw" or pair.layer_type.compression is not None:
        return None
    goes_to, layer = place_of(pair), pair.layer
    return KitFile(
        goes_to.path,
        layer.size,
        goes_to.mode,
        layer.digest,
        layer.digest,
        offset=0,
        section=pair.section,
        entry=entry_name(pair),
    )


class PathChoice:
    """Which paths are wanted: those that a pattern matches (kitspec/path_glob.py), or all when there is no pattern.

    Raises:
        FilterInvalid: something is no pattern.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self.patterns = tuple(dict.fromkeys(patterns))
        self._globs = [PathGlob(pattern) for pattern in self.patterns]
        self._heads = [head for pattern in self.patterns for head in _heads(pattern)]

    @classmethod
    def below(cls, path: str) -> PathChoice:
        """What lies below a folder, and the folder itself."""
        return cls([f"{_literally(path)}/**"])

    @property
    def is_everything(self) -> bool:
        return not self.patterns

    def __contains__(self, path: str) -> bool:
        """Whether a cleaned path is wanted."""
        return not self._globs or any(glob.matches(path) for glob in self._globs)

    def may_hold(self, pair: EntryLayer) -> bool:
        """Whether a layer may hold what is wanted: its files are at its entry's path, or below it."""
        if pair.layer_type.packaging == "raw":
            return place_of(pair).path in self
        path = clean_path(pair.entry.path)
        return not self._heads or path == "." or any(head.matches(path) for head in self._heads)

    def unmatched(self, paths: Iterable[str]) -> list[str]:
        """The patterns that none of `paths` matches."""
        left = dict(zip(self.patterns, self._globs, strict=True))
        for path in paths:
            for pattern in [pattern for pattern, glob in left.items() if glob.matches(path)]:
                del left[pattern]
            if not left:
                break
        return list(left)


def _heads(pattern: str) -> list[PathGlob]:
    """Patterns for the paths at or below which `pattern` can match: its first component, its first two, and so on."""
    components = [part for part in pattern.split("/") if part not in ("", ".")]
    return [PathGlob("/".join(components[:count])) for count in range(1, len(components) + 1)]


def _literally(path: str) -> str:
    return "".join(f"[{character}]" if character in _SPECIAL else character for character in path)


def parse_file_reference(text: str) -> tuple[Reference, str]:
    """`REFERENCE:PATH`, as people type it: the longest reference with a tag or a digest, and the path behind it.

    Neither tags nor digests hold a `:` that could be taken for the one between, so a path may.

    Raises:
        ReferenceInvalid: there is no such reference in front, or no path behind it.
    """
    cut = text.rfind(":")
    while cut > 0:
        reference = _labelled(text[:cut])
        if reference is not None:
            return reference, _file_path(text[cut + 1 :], text)
        cut = text.rfind(":", 0, cut)
    raise ReferenceInvalid(
        f"not a file of a kit: {text[:200]!a}; wanted REFERENCE:PATH, where the reference has a tag or a digest, "
        "such as registry.example.com/team/model:v1:config.json"
    )


def _labelled(text: str) -> Reference | None:
    try:
        reference = Reference.parse(text)
    except ReferenceInvalid:
        return None
    return reference if reference.tag is not None or reference.digest is not None else None


def _file_path(text: str, whole: str) -> str:
    try:
        path = clean_member_path(text.encode(errors="surrogateescape"))
    except LayerTarInvalid as error:
        raise ReferenceInvalid(f"no kit has such a file: {error}") from error
    if not path:
        raise ReferenceInvalid(f"{whole[:200]!a} names no file; wanted REFERENCE:PATH")
    return path


@dataclass(frozen=True, slots=True)
class KitPart:
    """A kit, and what is wanted of it.

    Attributes:
        pairs: the layers that `filters` choose, each with its entry.
    """

    place: Place
    kit: ModelKit
    filters: tuple[Filter, ...]
    pairs: tuple[EntryLayer, ...]


async def kit_chain(
    place: Place,
    kit: ModelKit,
    filters: Sequence[Filter],
    *,
    find: Find | None,
    stack: AsyncExitStack,
    on_parent: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[KitPart]:
    """The kit, then the one whose model it has, and so on.

    Args:
        stack: keeps the places of the others open.
        on_parent: called with the reference of each of the others before it is looked for.

    Raises:
        ReferenceChainInvalid: there is another, and no `find`; or they have no end.
    """
    chain: list[str] = []
    while True:
        yield KitPart(place, kit, tuple(filters), select_layers(kit.manifest, kit.kitfile, filters))
        parent, filters = parent_of(kit.kitfile), _for_parent(filters)
        if parent is None or not filters:
            return
        chain = longer(chain, parent)
        if find is None:
            raise ReferenceChainInvalid(
                f"the model is the one of {parent}, and nobody said where to find that"
            )
        on_parent(parent)
        place, reference = await stack.enter_async_context(find(Reference.parse(parent)))
        kit = await read_modelkit(place, reference)


def _for_parent(filters: Sequence[Filter]) -> list[Filter]:
    """Of the kit that `model.path` names only the model is wanted, and only if it is wanted at all."""
    if not filters:
        return [parse_filter("model")]
    model = parse_filter("model").sections
    return [
        replace(filter_, sections=model, kitfile=False) for filter_ in filters if model <= filter_.sections
    ]
