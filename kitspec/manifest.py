"""Manifests and indexes: read-only views of bytes that stay as they are, and the writing of new ones.

A view holds what a registry or a client acts on and forgets the rest; nothing is ever written back from it
(docs/adr/0005-bytes-as-received.md). Source: image-spec 1.1.1, manifest.md and image-index.md.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import ContentInvalid, DigestInvalid, ManifestInvalid, ManifestTypeUnsupported
from kitspec.go_json import to_go_json
from kitspec.media_types import (
    DOCKER_SCHEMA_1_TYPES,
    LEGACY_MODELPACK_CONFIG,
    MANIFEST_TYPES,
    MODELKIT_ARTIFACT,
    MODELKIT_CONFIG,
    MODELPACK_ARTIFACT,
    MODELPACK_CONFIG,
    OCI_MANIFEST,
    Family,
    artifact_family,
    is_foreign_layer_type,
    is_index_type,
)
from kitspec.strict_json import INTEGER_MAX, parse_json

# The spec asks for "at least 4 megabytes" (distribution-spec 1.1.1, "Pushing Manifests"); more only feeds an attacker.
MANIFEST_SIZE_MAX = 4 * 1024 * 1024
# Twice what other registries have been seen to take; checking that each exists costs a read of the store.
DESCRIPTOR_COUNT_MAX = 20_000
_MEDIA_TYPE_LENGTH_MAX = 255

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest with a config and layers."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    annotations: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    artifact_type: str | None = None

    def references(self) -> Iterator[tuple[str, Descriptor]]:
        """Where and what: every descriptor whose content must be in the registry.

        Not the subject, which may come later, and not foreign layers, whose bytes are at their URLs.
        """
        yield "config", self.config
        for position, layer in enumerate(self.layers):
            if not (layer.urls and is_foreign_layer_type(layer.media_type)):
                yield f"layers[{position}]", layer

    @property
    def referrer_artifact_type(self) -> str:
        """`artifactType` of this manifest in a list of referrers."""
        return self.artifact_type or self.config.media_type

    @property
    def family(self) -> Family | None:
        """The ModelKit or ModelPack format that this is; None for other artifacts."""
        return artifact_family(self.artifact_type, self.config.media_type)


@dataclass(frozen=True, slots=True)
class Index:
    """A list of manifests."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    annotations: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    artifact_type: str | None = None

    def references(self) -> Iterator[tuple[str, Descriptor]]:
        """Where and what: every manifest that must be in the registry."""
        for position, manifest in enumerate(self.manifests):
            yield f"manifests[{position}]", manifest

    @property
    def referrer_artifact_type(self) -> str | None:
        """`artifactType` of this index in a list of referrers."""
        return self.artifact_type


def referrer_of(manifest: Manifest | Index, digest: Digest, size: int) -> Descriptor:
    """A manifest as the list of its subject's referrers shows it: distribution-spec 1.1.1, "Listing Referrers"."""
    return Descriptor(
        manifest.media_type,
        digest,
        size,
        annotations=manifest.annotations,
        artifact_type=manifest.referrer_artifact_type,
    )


def parse_manifest(content: bytes, media_type: str) -> Manifest | Index:
    """The view of a manifest; the size of `content` is the caller's to bound.

    Args:
        media_type: what it was declared as, without parameters, in lower case.

    Raises:
        ManifestTypeUnsupported: `media_type` is none that is stored.
        ManifestInvalid: the document breaks a rule; the message says where.

    Spec: image-spec 1.1.1, manifest.md and image-index.md.
    """
    if media_type not in MANIFEST_TYPES:
        raise _unsupported(media_type)
    try:
        document = parse_json(content)
    except ContentInvalid as error:
        raise ManifestInvalid(f"the manifest cannot be read: {error}") from error
    if type(document) is not dict:
        raise ManifestInvalid(f"the manifest is {_saw(document)}; wanted an object")
    _check_kind(document, media_type)
    subject = document.get("subject")
    common: dict[str, Any] = {
        "media_type": media_type,
        "subject": None if subject is None else _descriptor(subject, "subject"),
        "annotations": _annotations(document.get("annotations"), "annotations"),
        "artifact_type": _optional_media_type(document, "artifactType", ""),
    }
    if is_index_type(media_type):
        return Index(manifests=_descriptors(document, "manifests"), **common)
    if document.get("config") is None:
        raise ManifestInvalid("config is missing; wanted a descriptor")
    config = _descriptor(document["config"], "config")
    return Manifest(config=config, layers=_descriptors(document, "layers"), **common)


def _unsupported(media_type: str) -> ManifestTypeUnsupported:
    if media_type in DOCKER_SCHEMA_1_TYPES:
        return ManifestTypeUnsupported(
            "Docker image manifests of schema 1 are not stored: push the image with a client of 2016 or later, "
            "which sends schema 2 or OCI"
        )
    return ManifestTypeUnsupported(
        f"not a manifest type that is stored: {media_type[:160]!a}; wanted one of {', '.join(MANIFEST_TYPES)}"
    )


def _check_kind(document: dict[str, Any], media_type: str) -> None:
    version = document.get("schemaVersion")
    if type(version) is not int or version != 2:
        raise ManifestInvalid(f"schemaVersion is {_saw(version)}; wanted 2")
    declared = document.get("mediaType")
    if declared is not None and declared != media_type:
        raise ManifestInvalid(f"mediaType is {_saw(declared)}, yet the manifest was declared as {media_type}")
    # A document that reads as both is two things under one digest (CVE-2021-41190).
    misplaced = ("config", "layers", "fsLayers") if is_index_type(media_type) else ("manifests", "fsLayers")
    for key in misplaced:
        if document.get(key) is not None:
            raise ManifestInvalid(f"{key} has no place in a document of type {media_type}")


def _descriptors(document: dict[str, Any], field: str) -> tuple[Descriptor, ...]:
    if field not in document:
        raise ManifestInvalid(f"{field} is missing; wanted a list of descriptors")
    values = document[field]
    if values is None:  # kit up to 1.14 writes null for an empty list
        return ()
    if type(values) is not list:
        raise ManifestInvalid(f"{field} is {_saw(values)}; wanted a list of descriptors")
    if len(values) > DESCRIPTOR_COUNT_MAX:
        raise ManifestInvalid(
            f"{field} holds {len(values)} descriptors; at most {DESCRIPTOR_COUNT_MAX} are allowed"
        )
    return tuple([_descriptor(value, f"{field}[{position}]") for position, value in enumerate(values)])


def _descriptor(value: object, where: str) -> Descriptor:
    if not isinstance(value, dict):
        raise ManifestInvalid(f"{where} is {_saw(value)}; wanted a descriptor")
    digest = value.get("digest")
    if not isinstance(digest, str):
        raise ManifestInvalid(f"{where}.digest is {_saw(digest)}; wanted a digest")
    try:
        digest = Digest(digest)
    except DigestInvalid as error:
        raise ManifestInvalid(f"{where}.digest: {error}") from error
    size = value.get("size")
    if type(size) is not int or not 0 <= size <= INTEGER_MAX:
        raise ManifestInvalid(f"{where}.size is {_saw(size)}; wanted an integer from 0 to 2^63 - 1")
    media_type = _optional_media_type(value, "mediaType", where)
    if media_type is None:
        raise ManifestInvalid(f"{where}.mediaType is missing")
    if len(value) == 3:
        return Descriptor(media_type, digest, size)
    return Descriptor(
        media_type,
        digest,
        size,
        annotations=_annotations(value.get("annotations"), f"{where}.annotations"),
        artifact_type=_optional_media_type(value, "artifactType", where),
        urls=_urls(value.get("urls"), f"{where}.urls"),
        data=_data(value.get("data"), digest, size, f"{where}.data"),
        platform=_platform(value.get("platform"), f"{where}.platform"),
    )


def _optional_media_type(members: dict[str, Any], field: str, where: str) -> str | None:
    value = members.get(field)
    if value is None or value == "":
        return None
    if (
        not isinstance(value, str)
        or len(value) > _MEDIA_TYPE_LENGTH_MAX
        or not (value.isascii() and value.isprintable() and "/" in value)
    ):
        raise ManifestInvalid(
            f"{where}{'.' if where else ''}{field} is {_saw(value)}; "
            f"wanted type/subtype in at most {_MEDIA_TYPE_LENGTH_MAX} characters of ASCII"
        )
    return value


def _annotations(value: object, where: str) -> Mapping[str, str]:
    if value is None:
        return _NOTHING
    if not isinstance(value, dict):
        raise ManifestInvalid(f"{where} is {_saw(value)}; wanted an object of strings")
    for key, text in value.items():
        if not isinstance(text, str):
            raise ManifestInvalid(f"{where}[{key[:80]!a}] is {_saw(text)}; wanted a string")
    return MappingProxyType(value)


def _urls(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(url, str) for url in value):
        raise ManifestInvalid(f"{where} is {_saw(value)}; wanted a list of strings")
    return tuple(value)


def _data(value: object, digest: Digest, size: int, where: str) -> bytes | None:
    if value is None:
        return None
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except (binascii.Error, ValueError):
        data = None
    if data is None:
        raise ManifestInvalid(f"{where} is {_saw(value)}; wanted base64")
    if len(data) != size or Digest.of(data, digest.algorithm) != digest:
        raise ManifestInvalid(f"{where} is not the content that its descriptor names: {digest}, {size} bytes")
    return data


def _platform(value: object, where: str) -> Mapping[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ManifestInvalid(f"{where} is {_saw(value)}; wanted an object")
    return MappingProxyType(value)


def _saw(value: object) -> str:
    """A value in a few ASCII characters, for a message."""
    if value is None:
        return "missing or null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = repr(value) if not isinstance(value, str) else ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def format_manifest(
    config: Descriptor,
    layers: Sequence[Descriptor],
    annotations: Mapping[str, str] | None = None,
    style: Literal["current", "1.7"] = "current",
) -> bytes:
    """The bytes of a ModelKit or ModelPack manifest, as kit writes them.

    Args:
        style: "1.7" leaves out what kit 1.7 did not know, so that its digests come out.
    """
    document: dict[str, Any] = {"schemaVersion": 2}
    if style == "current":
        document["mediaType"] = OCI_MANIFEST
        artifact_type = _ARTIFACT_TYPES.get(config.media_type)
        if artifact_type is not None:
            document["artifactType"] = artifact_type
    document["config"] = config.to_json()
    listed = [layer.to_json() for layer in layers]
    document["layers"] = None if style == "1.7" and not listed else listed
    if annotations:
        document["annotations"] = dict(sorted(annotations.items()))
    return to_go_json(document)


_ARTIFACT_TYPES = {
    MODELKIT_CONFIG: MODELKIT_ARTIFACT,
    MODELPACK_CONFIG: MODELPACK_ARTIFACT,
    LEGACY_MODELPACK_CONFIG: MODELPACK_ARTIFACT,
}
