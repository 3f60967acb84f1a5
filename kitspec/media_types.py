"""What media types and annotation names mean, for all the formats that are spoken.

    OCI image manifest and index · Docker schema 2 · KitOps ModelKit 0.5 to 1.17 · CNCF ModelPack, and its
    legacy form (`vnd.cnai`, `org.cnai`) that old tools still have in their registries

Strings live here and nowhere else. Source: image-spec 1.1.1, media-types.md; Docker's image manifest v2 schema 2;
the ModelKit specification; the ModelPack model-spec.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

# ---- manifests

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"

MANIFEST_TYPES = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST)
"""All that are stored; in the order in which a client should ask for them."""

DOCKER_SCHEMA_1_TYPES = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)
"""Known in order to be refused by name: they hold layers but no sizes, and their signature hides the digest."""


def is_index_type(media_type: str) -> bool:
    """A list of manifests."""
    return media_type in (OCI_INDEX, DOCKER_LIST)


def is_manifest_type(media_type: str) -> bool:
    """A manifest with a config and layers."""
    return media_type in (OCI_MANIFEST, DOCKER_MANIFEST)


# ---- configs, artifacts, blobs

OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
OCTET_STREAM = "application/octet-stream"

MODELKIT_ARTIFACT = "application/vnd.kitops.modelkit.manifest.v1+json"
MODELKIT_CONFIG = "application/vnd.kitops.modelkit.config.v1+json"
MODELKIT_INDEX_ARTIFACT = "application/vnd.kitops.modelkit.index.v1+json"

MODELPACK_ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
MODELPACK_CONFIG = "application/vnd.cncf.model.config.v1+json"
LEGACY_MODELPACK_ARTIFACT = "application/vnd.cnai.model.manifest.v1+json"
LEGACY_MODELPACK_CONFIG = "application/vnd.cnai.model.config.v1+json"

_FOREIGN_LAYERS = frozenset(
    (
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    )
)


def is_foreign_layer_type(media_type: str) -> bool:
    """A layer that a registry need not hold: its bytes are at the URLs of its descriptor."""
    return media_type in _FOREIGN_LAYERS


# ---- annotations

CREATED_ANNOTATION = "org.opencontainers.image.created"
TITLE_ANNOTATION = "org.opencontainers.image.title"
REF_NAME_ANNOTATION = "org.opencontainers.image.ref.name"

CLI_VERSION_ANNOTATION = "ml.kitops.modelkit.cli-version"
KITFILE_ANNOTATION = "ml.kitops.modelkit.kitfile"
LAYER_SUBTYPE_ANNOTATION = "ml.kitops.modelkit.layer-subtype"
PROMPT_SUBTYPE = "prompt"
ORIGINAL_TAG_ANNOTATION = "ml.kitops.modelkit.original-tag"
RESERVED_ANNOTATION_PREFIX = "ml.kitops.modelkit."

FILEPATH_ANNOTATION = "org.cncf.model.filepath"
FILE_METADATA_ANNOTATION = "org.cncf.model.file.metadata+json"
UNTESTED_ANNOTATION = "org.cncf.model.file.mediatype.untested"
LEGACY_FILEPATH_ANNOTATION = "org.cnai.model.filepath"
LEGACY_FILE_METADATA_ANNOTATION = "org.cnai.model.file.metadata+json"

# ---- layers

LayerKind = Literal["model", "modelpart", "dataset", "code", "docs", "mcpb"]
"""KitOps' words; a prompt is a `code` layer with an annotation."""
Packaging = Literal["tar", "raw"]
Compression = Literal["gzip", "zstd"]
Family = Literal["kitops", "modelpack", "legacy-modelpack"]

_MODELPACK_WORDS: dict[LayerKind, str] = {
    "model": "weight",
    "modelpart": "weight.config",
    "dataset": "dataset",
    "code": "code",
    "docs": "doc",
}
_MODELPACK_KINDS: dict[str, LayerKind] = {word: kind for kind, word in _MODELPACK_WORDS.items()}
_KITOPS_KINDS: dict[str, LayerKind] = {kind: kind for kind in get_args(LayerKind)}
_PREFIXES: dict[str, Family] = {
    "application/vnd.kitops.modelkit": "kitops",
    "application/vnd.cncf.model": "modelpack",
    "application/vnd.cnai.model": "legacy-modelpack",
}
_LAYER = re.compile(
    r"(?P<prefix>application/vnd\.(?:kitops\.modelkit|cncf\.model|cnai\.model))\.(?P<word>[a-z]+(?:\.config)?)"
    r"\.v1\.(?P<packaging>tar|raw)(?:\+(?P<compression>gzip|zstd))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class LayerType:
    """What a ModelKit or ModelPack layer holds, and how it is wrapped."""

    kind: LayerKind
    packaging: Packaging = "tar"
    compression: Compression | None = None
    family: Family = "kitops"

    def __str__(self) -> str:
        """The media type.

        Raises:
            ValueError: ModelPack has no word for this kind.
        """
        prefix = next(prefix for prefix, family in _PREFIXES.items() if family == self.family)
        word: str | None = self.kind if self.family == "kitops" else _MODELPACK_WORDS.get(self.kind)
        if word is None:
            raise ValueError(f"ModelPack has no {self.kind} layers")
        compression = f"+{self.compression}" if self.compression is not None else ""
        return f"{prefix}.{word}.v1.{self.packaging}{compression}"


def parse_layer_media_type(text: str) -> LayerType | None:
    """What the media type of a ModelKit or ModelPack layer says; None for anything else.

    `raw+gzip` is read in ModelPack too, although its specification only writes `raw`.
    """
    match = _LAYER.fullmatch(text)
    if match is None:
        return None
    family = _PREFIXES[match["prefix"]]
    kind = (_KITOPS_KINDS if family == "kitops" else _MODELPACK_KINDS).get(match["word"])
    if kind is None:
        return None
    packaging: Packaging = "tar" if match["packaging"] == "tar" else "raw"
    compression: Compression | None = None
    if match["compression"] is not None:
        compression = "gzip" if match["compression"] == "gzip" else "zstd"
    return LayerType(kind, packaging, compression, family)


def artifact_family(artifact_type: str | None, config_media_type: str) -> Family | None:
    """The format of a manifest with these types; None when it is no ModelKit.

    Either is enough: kits of before 1.15 have no artifact type.
    """
    families: dict[str | None, Family] = {
        MODELKIT_ARTIFACT: "kitops",
        MODELKIT_CONFIG: "kitops",
        MODELPACK_ARTIFACT: "modelpack",
        MODELPACK_CONFIG: "modelpack",
        LEGACY_MODELPACK_ARTIFACT: "legacy-modelpack",
        LEGACY_MODELPACK_CONFIG: "legacy-modelpack",
    }
    return families.get(artifact_type) or families.get(config_media_type)
