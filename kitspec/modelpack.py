"""CNCF ModelPack: its config written from a Kitfile, and a Kitfile made of it.

Source: the ModelPack model-spec, config.md and annotations.md; its legacy form has `diff_ids` and `org.cnai.*` keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import ContentInvalid, DigestInvalid, KitfileInvalid
from kitspec.go_json import to_go_json
from kitspec.kitfile import (
    CONFIG_SIZE_MAX,
    MANIFEST_VERSION,
    Code,
    Dataset,
    Docs,
    Entry,
    Kitfile,
    Model,
    ModelPart,
    Package,
)
from kitspec.manifest import Manifest
from kitspec.media_types import (
    FILEPATH_ANNOTATION,
    KITFILE_ANNOTATION,
    LEGACY_FILEPATH_ANNOTATION,
    parse_layer_media_type,
)
from kitspec.strict_json import parse_json


def to_modelpack_config(
    kitfile: Kitfile, created: datetime | None, *, diff_ids: Sequence[Digest] | None = None
) -> bytes:
    """The config of a ModelPack.

    Args:
        kitfile: with the diffIds of what was packed.
        created: aware; written in UTC, to the second; None to leave it out.
        diff_ids: of the layers, where they are others than those of the Kitfile's entries.

    Raises:
        KitfileInvalid: ModelPack has no place for what the Kitfile names.
    """
    if kitfile.mcp_servers:
        raise KitfileInvalid("mcpServers are not supported when packing in modelpack format")
    package, model = kitfile.package, kitfile.model
    entries = [entry for _, _, entry in kitfile.entries()]
    descriptor = {
        "createdAt": created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if created else "",
        "authors": list(package.authors),
        "name": package.name,
        "version": package.version,
        "licenses": _licenses(kitfile, entries),
        "title": package.name,
        "description": package.description,
    }
    if diff_ids is None:
        diff_ids = [entry.diff_id for entry in entries if entry.diff_id]
    return to_go_json(
        {
            "descriptor": {key: value for key, value in descriptor.items() if value},
            "modelfs": {
                "type": "layers",
                "diffIds": [str(diff_id) for diff_id in diff_ids],
            },
            "config": {"format": model.format} if model is not None and model.format else {},
        }
    )


def _licenses(kitfile: Kitfile, entries: list[Entry]) -> list[str]:
    licenses = {kitfile.package.license, *(getattr(entry, "license", "") for entry in entries)}
    if kitfile.model is not None:
        licenses.add(kitfile.model.license)
    return sorted(licenses - {""})


def kitfile_of(manifest: Manifest, config: bytes) -> Kitfile:
    """The Kitfile of a ModelKit or ModelPack.

    Args:
        config: the blob that `manifest.config` names.

    Raises:
        KitfileInvalid: the config is none, or the documents disagree.
    """
    return (
        Kitfile.from_json(config) if manifest.family == "kitops" else kitfile_of_modelpack(manifest, config)
    )


def kitfile_of_modelpack(manifest: Manifest, config: bytes) -> Kitfile:
    """What the Kitfile of a ModelPack is: the one it carries, else one made of its layers' annotations.

    Args:
        config: the blob that `manifest.config` names.

    Raises:
        KitfileInvalid: a layer does not say which path it is for, or the documents disagree.
    """
    carried = manifest.annotations.get(KITFILE_ANNOTATION)
    if carried is not None:
        return Kitfile.from_json(carried.encode())
    document = _parse_config(config)
    about = _group(document, "descriptor")
    diff_ids = _diff_ids(_group(document, "modelfs"), len(manifest.layers))
    model: Model | None = None
    parts: list[ModelPart] = []
    code: list[Code] = []
    datasets: list[Dataset] = []
    docs: list[Docs] = []
    for layer, diff_id in zip(manifest.layers, diff_ids, strict=True):
        layer_type = parse_layer_media_type(layer.media_type)
        if layer_type is None or layer_type.family == "kitops":
            continue
        identity: dict[str, Any] = {"path": _path(layer), "digest": layer.digest, "diff_id": diff_id}
        match layer_type.kind:
            case "model" if model is None:
                model = Model(
                    name=_word(about, "name"), format=_word(_group(document, "config"), "format"), **identity
                )
            case "model" | "modelpart":
                parts.append(ModelPart(**identity))
            case "code":
                code.append(Code(**identity))
            case "dataset":
                datasets.append(Dataset(**identity))
            case _:
                docs.append(Docs(**identity))
    return Kitfile(
        manifest_version=MANIFEST_VERSION,
        package=_package(about),
        model=_with_parts(model, parts),
        code=tuple(code),
        datasets=tuple(datasets),
        docs=tuple(docs),
    )


def _with_parts(model: Model | None, parts: list[ModelPart]) -> Model | None:
    return replace(model or Model(), parts=tuple(parts)) if parts else model


def _package(about: dict[str, Any]) -> Package:
    authors = about.get("authors")
    return Package(
        name=_word(about, "name"),
        version=_word(about, "version"),
        description=_word(about, "description"),
        authors=tuple(author for author in authors if isinstance(author, str))
        if isinstance(authors, list)
        else (),
    )


def _parse_config(config: bytes) -> dict[str, Any]:
    if len(config) > CONFIG_SIZE_MAX:
        raise KitfileInvalid(f"a config of {len(config)} bytes; at most {CONFIG_SIZE_MAX} are allowed")
    try:
        document = parse_json(config)
    except ContentInvalid as error:
        raise KitfileInvalid(f"the config cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise KitfileInvalid("the config is not an object")
    return document


def _group(document: dict[str, Any], key: str) -> dict[str, Any]:
    group = document.get(key)
    return group if isinstance(group, dict) else {}


def _word(group: dict[str, Any], key: str) -> str:
    word = group.get(key)
    return word if isinstance(word, str) else ""


def _diff_ids(modelfs: dict[str, Any], layer_count: int) -> list[Digest | None]:
    listed = modelfs.get("diffIds", modelfs.get("diff_ids"))
    if listed is None:
        return [None] * layer_count
    if not isinstance(listed, list) or len(listed) != layer_count:
        raise KitfileInvalid(
            f"modelfs of the config does not list a diffId for each of the {layer_count} layers"
        )
    try:
        return [Digest(str(text)) for text in listed]
    except DigestInvalid as error:
        raise KitfileInvalid(f"modelfs of the config: {error}") from error


def _path(layer: Descriptor) -> str:
    path = layer.annotations.get(FILEPATH_ANNOTATION, layer.annotations.get(LEGACY_FILEPATH_ANNOTATION))
    if path is None:
        raise KitfileInvalid(
            f"unknown file path for layer: no {FILEPATH_ANNOTATION} annotation (layer {layer.digest})"
        )
    return path
