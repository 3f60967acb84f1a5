"""Descriptors: what points at content.

Source: image-spec 1.1.1, descriptor.md, "Properties".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kitspec.digest import Digest

_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A pointer to content: its media type, digest and size in bytes.

    Unknown properties are not kept: a descriptor that must survive to the byte is read from its manifest's bytes.
    """

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    artifact_type: str | None = None
    urls: tuple[str, ...] = ()
    data: bytes | None = None
    platform: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """In the key order of the Go structs: mediaType, digest, size, urls, annotations, data, platform, artifactType."""
        import base64

        document: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": str(self.digest),
            "size": self.size,
        }
        if self.urls:
            document["urls"] = list(self.urls)
        if self.annotations:
            document["annotations"] = dict(sorted(self.annotations.items()))
        if self.data is not None:
            document["data"] = base64.b64encode(self.data).decode()
        if self.platform is not None:
            document["platform"] = dict(self.platform)
        if self.artifact_type is not None:
            document["artifactType"] = self.artifact_type
        return document
