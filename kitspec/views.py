"""A part of a ModelKit, or the same bytes in another form: the manifests and configs that make it a thing of its own.

    slice       some entries of a kit, as a smaller kit: the same layers, a config that lists only what is kept
    image       the layers as an OCI image, for docker, podman, containerd and Kubernetes' image volumes
    readable    the same, with modes that let everybody read what is in it
    modelpack   every file a layer of its own, as CNCF ModelPack has it

Pure and deterministic: the same kit and the same choice give the same bytes, for ever. What is derived says what it was
derived from, and by which version of these rules; a change of the rules is another version. Source: docs/extension.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import FilterInvalid, KitfileInvalid
from kitspec.go_json import to_go_json
from kitspec.kitfile import CONFIG_SIZE_MAX, Entry, Kitfile, Section
from kitspec.kitfile_rules import clean_path
from kitspec.manifest import DESCRIPTOR_COUNT_MAX, MANIFEST_SIZE_MAX, Manifest
from kitspec.media_types import (
    CREATED_ANNOTATION,
    FILE_METADATA_ANNOTATION,
    FILEPATH_ANNOTATION,
    KITFILE_ANNOTATION,
    LEGACY_FILE_METADATA_ANNOTATION,
    LEGACY_FILEPATH_ANNOTATION,
    MANIFEST_TYPES,
    MODELPACK_ARTIFACT,
    MODELPACK_CONFIG,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    TITLE_ANNOTATION,
    LayerType,
)
from kitspec.modelpack import to_modelpack_config
from kitspec.names import ViewName
from kitspec.selection import SECTIONS_OF_TYPE, EntryLayer, Filter, choose_entries, pair_layers
from kitspec.strict_json import parse_json

VIEW_OF_ANNOTATION = "ml.modelkit-registry.view.of"
"""Digest of the manifest that a view was made from."""
VIEW_ANNOTATION = "ml.modelkit-registry.view"
VIEW_VERSION = "v1"

Form = Literal["image", "readable", "modelpack"]
FORMS: tuple[Form, ...] = ("image", "readable", "modelpack")

# An image of files has no processor of its own; these are the two that clusters have, and docker asks for one.
_PLATFORMS = (("amd64", "linux"), ("arm64", "linux"))

Place = tuple[Section, int]
"""An entry of a Kitfile: its section and its position there."""


@dataclass(frozen=True, slots=True)
class Kit:
    """A ModelKit or ModelPack artifact as it is stored.

    Attributes:
        digest: of the manifest's bytes.
        content: the manifest's bytes.
        config: the bytes that `manifest.config` names.
    """

    digest: Digest
    content: bytes
    manifest: Manifest
    config: bytes
    kitfile: Kitfile


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest, an index or a config that was derived."""

    media_type: str
    content: bytes

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(self.media_type, Digest.of(self.content), len(self.content))


@dataclass(frozen=True, slots=True)
class View:
    """What was derived.

    Attributes:
        root: the manifest or index that stands for all of it.
        parts: the other documents, each to be had by its digest.
    """

    root: Document
    parts: tuple[Document, ...]


# ---- what is chosen


def places_of(kitfile: Kitfile) -> Iterator[tuple[Place, Entry]]:
    """Every entry, also those whose content is elsewhere and that have no layer."""
    if kitfile.model is not None:
        yield (Section.MODEL, 0), kitfile.model
        for index, part in enumerate(kitfile.model.parts):
            yield (Section.MODEL_PART, index), part
    for section, listed in kitfile.lists():
        for index, entry in enumerate(listed):
            yield (section, index), entry


def choose_by_name(kitfile: Kitfile, selectors: Sequence[str]) -> frozenset[Place]:
    """What the selectors of a tag mean: `model`, `datasets_train-set`; no selectors mean everything.

    Raises:
        FilterInvalid: a selector means nothing in this kit, or two entries; the message names what there is.
    """
    if not selectors:
        return frozenset(place for place, _ in places_of(kitfile))
    chosen: set[Place] = set()
    for selector in selectors:
        chosen |= _choose_one(kitfile, selector)
    return frozenset(chosen)


def choose_by_filter(kitfile: Kitfile, filters: Sequence[Filter]) -> frozenset[Place]:
    """What filters in the syntax of kit's `--filter` mean; none mean everything.

    Raises:
        FilterInvalid: a filter chooses nothing in this kit, or a value of it means two entries.
    """
    if not filters:
        return choose_by_name(kitfile, ())
    chosen: set[Place] = set()
    for filter_ in filters:
        if filter_.values:
            found = {(section, index) for section, index, _ in choose_entries(kitfile, filter_)}
        else:
            found = {place for place, _ in places_of(kitfile) if place[0] in filter_.sections}
        if not found and not filter_.kitfile:
            raise FilterInvalid(f"the filter {str(filter_)!a} chooses nothing; the kit has {_offer(kitfile)}")
        chosen |= found
    return frozenset(chosen)


def selector_of(section: Section, entry: Entry) -> str:
    """The selector that means this one entry."""
    return f"{_type_of(section)}_{_slug(entry)}"


def layers_of(kit: Kit, chosen: frozenset[Place]) -> tuple[EntryLayer, ...]:
    """The layers of the chosen entries, in the manifest's order.

    Raises:
        KitfileInvalid: the kit's documents disagree.
    """
    return tuple(
        pair for pair in pair_layers(kit.manifest, kit.kitfile) if (pair.section, pair.index) in chosen
    )


def kept_entries(kitfile: Kitfile, chosen: frozenset[Place]) -> Kitfile:
    """The Kitfile with only the chosen entries."""

    def kept(section: Section, listed: Sequence[_AnyEntry]) -> tuple[_AnyEntry, ...]:
        return tuple(entry for index, entry in enumerate(listed) if (section, index) in chosen)

    model = kitfile.model
    if model is not None:
        model = replace(model, parts=kept(Section.MODEL_PART, model.parts))
        if (Section.MODEL, 0) not in chosen:
            model = replace(model, path="", digest=None, diff_id=None) if model.parts else None
    return replace(
        kitfile,
        model=model,
        code=kept(Section.CODE, kitfile.code),
        datasets=kept(Section.DATASETS, kitfile.datasets),
        docs=kept(Section.DOCS, kitfile.docs),
        prompts=kept(Section.PROMPTS, kitfile.prompts),
        mcp_servers=kept(Section.MCP_SERVERS, kitfile.mcp_servers),
    )


_AnyEntry = TypeVar("_AnyEntry")


def _choose_one(kitfile: Kitfile, selector: str) -> set[Place]:
    word, underscore, slug = selector.partition("_")
    sections = SECTIONS_OF_TYPE.get(word)
    if sections is None or (underscore and not slug):
        raise FilterInvalid(
            f"the selector {selector[:128]!a} is none; wanted one of {', '.join(SECTIONS_OF_TYPE)}, "
            "perhaps with _ and the name of an entry"
        )
    within = [(place, entry) for place, entry in places_of(kitfile) if place[0] in sections]
    fitting = [(place, entry) for place, entry in within if not underscore or _slug(entry) == slug]
    if not fitting and (underscore or sections):
        raise FilterInvalid(f"the selector {selector[:128]!a} chooses nothing; the kit has {_offer(kitfile)}")
    if underscore and len(fitting) > 1:
        both = " and ".join(f"{entry.name or entry.path!a}" for _, entry in fitting[:2])
        raise FilterInvalid(
            f"the selector {selector[:128]!a} means {both}; choose {word} as a whole, or use ?filter="
        )
    return {place for place, _ in fitting}


_OFFER_MAX = 20


def _offer(kitfile: Kitfile) -> str:
    selectors = [selector_of(place[0], entry) for place, entry in places_of(kitfile)]
    shown = ", ".join(text[:128] for text in selectors[:_OFFER_MAX]) or "no entries"
    return shown if len(selectors) <= _OFFER_MAX else f"{shown} and {len(selectors) - _OFFER_MAX} more"


def _type_of(section: Section) -> str:
    return next(word for word, sections in SECTIONS_OF_TYPE.items() if section in sections)


_NOT_IN_SLUG = re.compile(r"[^A-Za-z0-9-]", re.ASCII)


def _slug(entry: Entry) -> str:
    return _NOT_IN_SLUG.sub("-", entry.name or clean_path(entry.path))


# ---- slices


def slice_of(kit: Kit, chosen: frozenset[Place], *, source: Digest | None = None) -> View:
    """The chosen entries as a kit of their own, which kit itself accepts.

    kit pairs the n-th layer of a kind with the n-th entry, and compares digests: so the config is written anew, without
    the entries that were not chosen. Order and text of what is kept stay as they are, keys that nobody here knows too.

    Args:
        source: if the kit is itself a slice, what it was made from: so a slice of a slice is the slice of its source.

    Raises:
        KitfileInvalid: the kit's documents disagree.
    """
    layers = {id(pair.layer) for pair in layers_of(kit, chosen)}
    manifest: dict[str, Any] = parse_json(kit.content, numbers_as_text=True)
    if kit.manifest.family == "kitops":
        config = _config_document(kit.config)
        _keep_entries(config, kit.kitfile, chosen)
        content = to_go_json(config)
    else:
        content = _modelpack_config(kit, layers)
    part = Document(kit.manifest.config.media_type, content)
    listed = manifest["layers"] or ()
    annotations = dict(manifest.get("annotations") or {})
    if KITFILE_ANNOTATION in annotations and kit.manifest.family != "kitops":
        carried = _config_document(annotations[KITFILE_ANNOTATION].encode())
        _keep_entries(carried, kit.kitfile, chosen)
        annotations[KITFILE_ANNOTATION] = to_go_json(carried).decode()
    manifest.pop("subject", None)  # the slice is no referrer of what its source refers to
    manifest["config"] = part.descriptor.to_json()
    manifest["layers"] = [
        text for layer, text in zip(kit.manifest.layers, listed, strict=True) if id(layer) in layers
    ]
    manifest["annotations"] = dict(sorted((annotations | _provenance(source or kit.digest)).items()))
    return _view(Document(kit.manifest.media_type, to_go_json(manifest)), [part])


_LIST_KEYS = {
    Section.CODE: "code",
    Section.DATASETS: "datasets",
    Section.DOCS: "docs",
    Section.PROMPTS: "prompts",
    Section.MCP_SERVERS: "mcpServers",
}
_OF_THE_MODEL_ITSELF = ("path", "digest", "diffId")


def _keep_entries(config: dict[str, Any], kitfile: Kitfile, chosen: frozenset[Place]) -> None:
    if kitfile.model is not None:
        model = config["model"]
        parts = [
            part
            for index, part in enumerate(model.get("parts") or ())
            if (Section.MODEL_PART, index) in chosen
        ]
        if (Section.MODEL, 0) not in chosen:
            for key in _OF_THE_MODEL_ITSELF:
                model.pop(key, None)
        _put_list(model, "parts", parts)
        if (Section.MODEL, 0) not in chosen and not parts:
            del config["model"]
    for section, key in _LIST_KEYS.items():
        if config.get(key):
            _put_list(
                config, key, [entry for index, entry in enumerate(config[key]) if (section, index) in chosen]
            )


def _put_list(group: dict[str, Any], key: str, items: list[Any]) -> None:
    if items:
        group[key] = items
    else:
        group.pop(key, None)


def _config_document(content: bytes) -> dict[str, Any]:
    document = parse_json(content, numbers_as_text=True)
    if not isinstance(document, dict):
        raise KitfileInvalid("the config is not an object")
    return document


def _modelpack_config(kit: Kit, layers: set[int]) -> bytes:
    """The config of a ModelPack that holds only these layers.

    Nobody has looked into it yet if the ModelPack carries a Kitfile.
    """
    config = _config_document(kit.config)
    group = config.get("modelfs")
    for key in ("diffIds", "diff_ids"):
        if isinstance(group, dict) and isinstance(listed := group.get(key), list):
            if len(listed) != len(kit.manifest.layers):
                raise KitfileInvalid(
                    f"modelfs of the config lists {len(listed)} {key}, and the manifest {len(kit.manifest.layers)} layers"
                )
            group[key] = [
                text for layer, text in zip(kit.manifest.layers, listed, strict=True) if id(layer) in layers
            ]
    return to_go_json(config)


# ---- images


@dataclass(frozen=True, slots=True)
class ImageLayer:
    """A layer as an image has it.

    Attributes:
        blob: with the media type of an image's layer.
        diff_id: digest of the inflated tar.
        note: what `docker history` says of it.
    """

    blob: Descriptor
    diff_id: Digest
    note: str


def image_of(kit: Kit, layers: Sequence[ImageLayer]) -> View:
    """An image of these layers, for each processor that clusters have.

    Raises:
        KitfileInvalid: there are no layers; an image without any can be pulled by nobody.
    """
    if not layers:
        raise KitfileInvalid("nothing that was chosen has a layer; an image needs one at least")
    parts: list[Document] = []
    listed: list[Descriptor] = []
    for architecture, system in _PLATFORMS:
        config = Document(OCI_CONFIG, to_go_json(_image_config(kit, layers, architecture, system)))
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config.descriptor.to_json(),
            "layers": [layer.blob.to_json() for layer in layers],
            "annotations": _provenance(kit.digest),
        }
        document = Document(OCI_MANIFEST, to_go_json(manifest))
        parts += [config, document]
        listed.append(replace(document.descriptor, platform={"architecture": architecture, "os": system}))
    index = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [descriptor.to_json() for descriptor in listed],
        "annotations": _provenance(kit.digest),
    }
    return _view(Document(OCI_INDEX, to_go_json(index)), parts)


def _image_config(
    kit: Kit, layers: Sequence[ImageLayer], architecture: str, system: str
) -> dict[str, object]:
    created = _created(kit)
    return {
        **({"created": _rfc3339(created)} if created is not None else {}),
        "architecture": architecture,
        "os": system,
        # `docker create` asks for a command, though there is nothing to run.
        "config": {"Cmd": ["/files-only"]},
        "rootfs": {"type": "layers", "diff_ids": [str(layer.diff_id) for layer in layers]},
        "history": [{"created_by": layer.note} for layer in layers],
    }


# ---- ModelPack


@dataclass(frozen=True, slots=True)
class PackFile:
    """A file, to be a layer of its own.

    Attributes:
        path: in the kit; relative and cleaned.
        mode: permission bits.
    """

    path: str
    section: Section
    digest: Digest
    size: int
    mode: int


def modelpack_of(kit: Kit, files: Iterable[PackFile]) -> View:
    """A ModelPack in which every file is a `raw` layer under its own digest.

    Raises:
        KitfileInvalid: there are more files than a manifest may list, or none.
    """
    layers: list[Descriptor] = []
    for file in files:
        layers.append(_pack_layer(file))
        if len(layers) > DESCRIPTOR_COUNT_MAX:
            raise KitfileInvalid(
                f"more than {DESCRIPTOR_COUNT_MAX} files, which is what a manifest may list; choose a part (.only.)"
            )
    if not layers:
        raise KitfileInvalid("nothing that was chosen holds a file")
    created = _created(kit)
    content = to_modelpack_config(
        replace(kit.kitfile, mcp_servers=()),
        created,
        diff_ids=[layer.digest for layer in layers],
    )
    config = Document(MODELPACK_CONFIG, content)
    annotations = _provenance(kit.digest) | (
        {CREATED_ANNOTATION: _rfc3339(created)} if created is not None else {}
    )
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": MODELPACK_ARTIFACT,
        "config": config.descriptor.to_json(),
        "layers": [layer.to_json() for layer in layers],
        "annotations": dict(sorted(annotations.items())),
    }
    return _view(Document(OCI_MANIFEST, to_go_json(manifest)), [config])


def _pack_layer(file: PackFile) -> Descriptor:
    # ModelPack has no word for MCP servers, which are programs.
    kind = "code" if file.section is Section.MCP_SERVERS else file.section.layer_kind
    name = file.path.rpartition("/")[2]
    metadata = {"name": name, "mode": file.mode, "uid": 0, "gid": 0, "size": file.size, "typeflag": 0}
    about = to_go_json(metadata).decode()
    return Descriptor(
        str(LayerType(kind, "raw", None, "modelpack")),
        file.digest,
        file.size,
        annotations={
            FILEPATH_ANNOTATION: file.path,
            FILE_METADATA_ANNOTATION: about,
            # modctl of before the renaming reads these only; oras reads the title.
            LEGACY_FILEPATH_ANNOTATION: file.path,
            LEGACY_FILE_METADATA_ANNOTATION: about,
            TITLE_ANNOTATION: file.path,
        },
    )


# ---- all of them


def _provenance(source: Digest) -> dict[str, str]:
    return {VIEW_ANNOTATION: VIEW_VERSION, VIEW_OF_ANNOTATION: str(source)}


# RFC 3339 as Go writes it. `fromisoformat` alone takes more, and each Python more than the one before.
_MOMENT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?(?:Z|[+-][0-9]{2}:[0-9]{2})"
)
# Year 1 is how Go says that there is none; and before this one, platforms write years in different widths.
_YEAR_MIN = 1000


def _created(kit: Kit) -> datetime | None:
    """When the kit was packed, by its own word, in UTC; None when it does not say, or not clearly."""
    text = kit.manifest.annotations.get(CREATED_ANNOTATION, "")
    if _MOMENT.fullmatch(text) is None:
        return None
    try:
        moment = datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return moment if moment.year >= _YEAR_MIN else None


def _rfc3339(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _view(root: Document, parts: Sequence[Document]) -> View:
    for document in (root, *parts):
        limit = MANIFEST_SIZE_MAX if document.media_type in MANIFEST_TYPES else CONFIG_SIZE_MAX
        if len(document.content) > limit:
            raise KitfileInvalid(
                f"the view would have a document of {len(document.content)} bytes; at most {limit} are allowed: "
                "choose a part (.only.)"
            )
    return View(root, tuple(parts))


def form_of(name: ViewName) -> Form | None:
    """The form that a view's tag asks for; None for a ModelKit.

    Raises:
        FilterInvalid: nobody knows it.
    """
    for form in FORMS:
        if name.form == form:
            return form
    if name.form is not None:
        raise FilterInvalid(f"the form {name.form[:64]!a} is none; wanted .as.{' or .as.'.join(FORMS)}")
    return None
