"""A ModelKit as it lies in a registry: its manifest, and the Kitfile that its config carries."""

from __future__ import annotations

from dataclasses import dataclass

from kitclient.errors import ClientError
from kitclient.transfer import Place
from kitspec.digest import Digest
from kitspec.errors import DigestInvalid, SizeInvalid
from kitspec.interface import StoredManifest
from kitspec.kitfile import CONFIG_SIZE_MAX, Kitfile
from kitspec.manifest import Index, Manifest, parse_manifest
from kitspec.modelpack import kitfile_of
from kitspec.names import Tag


class NotAModelKit(ClientError):
    """The reference names something else."""


@dataclass(frozen=True, slots=True)
class ModelKit:
    stored: StoredManifest
    manifest: Manifest
    kitfile: Kitfile

    @property
    def digest(self) -> Digest:
        return self.stored.digest

    @property
    def size(self) -> int:
        """Bytes of all layers."""
        return sum(layer.size for layer in self.manifest.layers)


async def read_modelkit(place: Place, reference: Tag | Digest) -> ModelKit:
    """Read a kit's manifest and Kitfile: KitOps of any version, or ModelPack.

    Raises:
        ManifestUnknown, NameUnknown: there is no such reference.
        NotAModelKit: it is an image, an index, or something else.
        KitfileInvalid, DigestInvalid: it is one, and broken.
    """
    stored = await place.registry.get_manifest(place.name, reference)
    manifest = parse_manifest(stored.content, stored.media_type)
    if isinstance(manifest, Index):
        raise NotAModelKit(
            f"{reference} is an index of {len(manifest.manifests)} manifests; name one of them by its digest"
        )
    if manifest.family is None:
        raise NotAModelKit(
            f"reference {reference} exists but is not a modelkit: its config is {manifest.config.media_type}"
        )
    return ModelKit(stored, manifest, kitfile_of(manifest, await _read_config(place, manifest)))


async def _read_config(place: Place, manifest: Manifest) -> bytes:
    descriptor = manifest.config
    if descriptor.data is not None:
        return descriptor.data
    if descriptor.size > CONFIG_SIZE_MAX:
        raise SizeInvalid(f"the config has {descriptor.size} bytes; at most {CONFIG_SIZE_MAX} are read")
    content = bytearray()
    async with place.registry.open_blob(place.name, descriptor.digest) as body:
        async for chunk in body:
            content += chunk
            if len(content) > descriptor.size:
                raise SizeInvalid(
                    f"the config is larger than the {descriptor.size} bytes that its manifest says"
                )
    if Digest.of(content, descriptor.digest.algorithm) != descriptor.digest:
        raise DigestInvalid(f"the config does not hash to {descriptor.digest}")
    return bytes(content)
