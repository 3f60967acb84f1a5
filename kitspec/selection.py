"""Which layers of a ModelKit a filter chooses, and which entry of the Kitfile each layer is.

filter := type ("," type)* [ ":" value ("," value)* ]; a layer is chosen when any filter chooses it.
Source: the reference of `kit unpack`; what kit 1.7 was seen to do.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kitspec.descriptor import Descriptor
from kitspec.errors import FilterInvalid, KitfileInvalid, LayerTarInvalid
from kitspec.kitfile import Entry, Kitfile, Section
from kitspec.kitfile_rules import clean_path
from kitspec.layer_tar import clean_member_path
from kitspec.manifest import Manifest
from kitspec.media_types import (
    FILE_METADATA_ANNOTATION,
    FILEPATH_ANNOTATION,
    LAYER_SUBTYPE_ANNOTATION,
    LEGACY_FILE_METADATA_ANNOTATION,
    LEGACY_FILEPATH_ANNOTATION,
    PROMPT_SUBTYPE,
    LayerKind,
    LayerType,
    parse_layer_media_type,
)

SECTIONS_OF_TYPE: Mapping[str, frozenset[Section]] = {
    "kitfile": frozenset(),
    "model": frozenset((Section.MODEL, Section.MODEL_PART)),
    "datasets": frozenset((Section.DATASETS,)),
    "code": frozenset((Section.CODE,)),
    "docs": frozenset((Section.DOCS,)),
    "prompts": frozenset((Section.PROMPTS,)),
    "mcpservers": frozenset((Section.MCP_SERVERS,)),
}
"""What the types of a filter and the selectors of a tag mean."""
_FORMAT = "invalid filter: should be in format <type1>,<type2>[:<filter1>,<filter2>]"


@dataclass(frozen=True, slots=True)
class Filter:
    """Attributes: sections: chosen ones; values: names or paths of entries, none for all; kitfile: the Kitfile itself."""

    sections: frozenset[Section]
    values: tuple[str, ...] = ()
    kitfile: bool = False

    def __str__(self) -> str:
        """Parses back to the same."""
        words = ["kitfile"] if self.kitfile else []
        words += [
            word for word, sections in SECTIONS_OF_TYPE.items() if sections and sections <= self.sections
        ]
        return ":".join([",".join(words), *([",".join(self.values)] if self.values else [])])


def parse_filter(text: str) -> Filter:
    """Read one filter, `datasets:train` or `model,code`.

    Raises:
        FilterInvalid: the grammar does not allow it.
    """
    types, colon, values = text.partition(":")
    if ":" in values:
        raise FilterInvalid(_FORMAT)
    sections: frozenset[Section] = frozenset()
    kitfile = False
    for word in types.split(","):
        name = "datasets" if word == "dataset" else word
        if name not in SECTIONS_OF_TYPE:
            *known, last = (f"'{known}'" for known in SECTIONS_OF_TYPE)
            raise FilterInvalid(
                f"invalid filter type {word[:80]} (must be one of {', '.join(known)}, or {last})"
            )
        sections |= SECTIONS_OF_TYPE[name]
        kitfile = kitfile or name == "kitfile"
    wanted = tuple(values.split(",")) if colon else ()
    if not all(wanted):
        raise FilterInvalid(_FORMAT)
    return Filter(sections, wanted, kitfile)


def includes_kitfile(filters: Sequence[Filter]) -> bool:
    """The Kitfile is wanted: nothing is filtered, or it is asked for."""
    return not filters or any(filter_.kitfile for filter_ in filters)


@dataclass(frozen=True, slots=True)
class EntryLayer:
    """An entry of the Kitfile and the layer that holds it.

    Attributes:
        index: of the entry in its section.
    """

    layer: Descriptor
    layer_type: LayerType
    section: Section
    index: int
    entry: Entry


def select_layers(
    manifest: Manifest, kitfile: Kitfile, filters: Sequence[Filter] = ()
) -> tuple[EntryLayer, ...]:
    """The layers that `filters` choose, all without any, in the manifest's order.

    Raises:
        KitfileInvalid: the Kitfile and the manifest disagree about what there is.
        FilterInvalid: a value means two entries.
    """
    pairs = pair_layers(manifest, kitfile)
    if not filters:
        return pairs
    chosen = {
        (section, index) for filter_ in filters for section, index, _ in choose_entries(kitfile, filter_)
    }
    return tuple(pair for pair in pairs if (pair.section, pair.index) in chosen)


def choose_entries(kitfile: Kitfile, filter_: Filter) -> Iterator[tuple[Section, int, Entry]]:
    """The entries that one filter chooses.

    A value is a name or a path, exactly as the Kitfile has it. A path that is written otherwise (`m.bin` for `./m.bin`)
    does as well, if nothing matches exactly.

    Raises:
        FilterInvalid: a path that is written otherwise fits two entries.
    """
    within = [place for place in kitfile.entries() if place[0] in filter_.sections]
    if not filter_.values:
        yield from within
        return
    wanted = set(filter_.values)
    exact = [(place, {place[2].name, place[2].path} & wanted) for place in within]
    yield from (place for place, hits in exact if hits)
    for value in wanted.difference(*(hits for _, hits in exact)):
        yield from _choose_by_clean_path(within, value)


def _choose_by_clean_path(
    places: Sequence[tuple[Section, int, Entry]], value: str
) -> Sequence[tuple[Section, int, Entry]]:
    fitting = [place for place in places if clean_path(place[2].path) == clean_path(value)]
    if len(fitting) > 1:
        paths = " and ".join(entry.path for _, _, entry in fitting)
        raise FilterInvalid(f"the filter value {value!a} fits {paths}; write it as the Kitfile does")
    return fitting


_Group = tuple[LayerKind, bool]


def pair_layers(manifest: Manifest, kitfile: Kitfile) -> tuple[EntryLayer, ...]:
    """Each layer with its entry, in the manifest's order.

    By digest where the config has digests; kits of before 0.5 have none, and their order counts within each kind.
    Layers of kinds that no section has are passed over.

    Raises:
        KitfileInvalid: an entry has no layer, or a layer no entry.
    """
    layers: dict[_Group, list[tuple[int, Descriptor, LayerType]]] = defaultdict(list)
    for position, layer in enumerate(manifest.layers):
        layer_type = parse_layer_media_type(layer.media_type)
        if layer_type is not None:
            layers[_group_of_layer(layer, layer_type)].append((position, layer, layer_type))
    entries: dict[_Group, list[tuple[Section, int, Entry]]] = defaultdict(list)
    for section, index, entry in kitfile.entries():
        entries[_group_of_entry(section, manifest)].append((section, index, entry))
    pairs: list[tuple[int, EntryLayer]] = []
    for group in {**entries, **layers}:
        pairs += _pair_group(group[0], layers[group], entries[group])
    return tuple(pair for _, pair in sorted(pairs, key=lambda pair: pair[0]))


def _group_of_layer(layer: Descriptor, layer_type: LayerType) -> _Group:
    if layer_type.kind == "modelpart" and layer_type.family != "kitops":
        return "model", False  # ModelPack has further weights; they are parts in a Kitfile
    return layer_type.kind, layer.annotations.get(LAYER_SUBTYPE_ANNOTATION) == PROMPT_SUBTYPE


def _group_of_entry(section: Section, manifest: Manifest) -> _Group:
    if section is Section.MODEL_PART and manifest.family not in ("kitops", None):
        return "model", False
    return section.layer_kind, section is Section.PROMPTS


def _pair_group(
    kind: LayerKind,
    layers: Sequence[tuple[int, Descriptor, LayerType]],
    entries: Sequence[tuple[Section, int, Entry]],
) -> Iterable[tuple[int, EntryLayer]]:
    if len(layers) != len(entries):
        raise KitfileInvalid(
            f"the Kitfile names {len(entries)} layers of kind {kind}, and the manifest has {len(layers)}"
        )
    if all(entry.digest is not None for _, _, entry in entries):
        layers = _in_order_of_entries(kind, layers, entries)
    for (position, layer, layer_type), (section, index, entry) in zip(layers, entries, strict=True):
        if entry.digest is not None and entry.digest != layer.digest:
            raise _mismatch(kind, entry)
        yield position, EntryLayer(layer, layer_type, section, index, entry)


def _in_order_of_entries(
    kind: LayerKind,
    layers: Sequence[tuple[int, Descriptor, LayerType]],
    entries: Sequence[tuple[Section, int, Entry]],
) -> Sequence[tuple[int, Descriptor, LayerType]]:
    by_digest: dict[str, list[tuple[int, Descriptor, LayerType]]] = defaultdict(list)
    for place in reversed(layers):
        by_digest[place[1].digest].append(place)
    ordered = []
    for _, _, entry in entries:
        if not by_digest[str(entry.digest)]:
            raise _mismatch(kind, entry)
        ordered.append(by_digest[str(entry.digest)].pop())
    return ordered


def _mismatch(kind: LayerKind, entry: Entry) -> KitfileInvalid:
    return KitfileInvalid(
        f"digest in config and manifest do not match in {kind}: "
        f"no layer of the manifest for {entry.digest} ({entry.path!a})"
    )


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where the content of a layer goes when it is unpacked.

    Attributes:
        path: of the file that a raw layer is; for a tar, the folder that its names are relative to, "" for the root.
        mode: of the file that a raw layer is.
    """

    path: str = ""
    mode: int = 0o644


def place_of(pair: EntryLayer) -> LayerPlace:
    """Where a layer's content goes.

    Raises:
        KitfileInvalid: to no path inside the kit.
    """
    path = clean_path(pair.entry.path)
    if pair.layer_type.packaging == "raw":
        annotations = pair.layer.annotations
        named = annotations.get(FILEPATH_ANNOTATION, annotations.get(LEGACY_FILEPATH_ANNOTATION, path))
        return LayerPlace(_checked_path(named), _mode_of(pair.layer))
    if pair.layer_type.family == "kitops" and pair.entry.digest is None and "/" in path:
        # Before 0.5 the names in a layer were relative to the folder that its path is in.
        return LayerPlace(_checked_path(path.rpartition("/")[0]))
    return LayerPlace()


def _checked_path(text: str) -> str:
    """A path out of a manifest, as strictly as the names in a tar."""
    where = f"a layer is to be unpacked to {text[:200]!a}, which is no path in the target folder"
    try:
        path = clean_member_path(text.encode())
    except LayerTarInvalid as error:
        raise KitfileInvalid(f"{where}: {error}") from error
    if not path or path != text:
        raise KitfileInvalid(where)
    return path


def _mode_of(layer: Descriptor) -> int:
    annotations = layer.annotations
    text = annotations.get(FILE_METADATA_ANNOTATION, annotations.get(LEGACY_FILE_METADATA_ANNOTATION, ""))
    with suppress(ValueError, RecursionError, AttributeError):
        mode = json.loads(text).get("mode")
        if type(mode) is int:
            return mode & 0o7777
    return 0o644


def layer_annotations(section: Section, entry: Entry) -> dict[str, str]:
    """What a layer says about itself, in kits of 1.15 and later."""
    annotations = {FILEPATH_ANNOTATION: clean_path(entry.path)}
    if section is Section.PROMPTS:
        annotations[LAYER_SUBTYPE_ANNOTATION] = PROMPT_SUBTYPE
    return annotations
