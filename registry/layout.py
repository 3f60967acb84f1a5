"""Which key holds what.

    blobs/sha256/ab/abcd…                        content, shared by all repositories
    repositories/<name>/_blobs/sha256/…          link: this repository may serve that blob
    repositories/<name>/_manifests/sha256/…      manifest: a line of JSON about it, then its bytes as received
    repositories/<name>/_referrers/sha256/…/…    descriptor of a manifest, under the digest of its subject
    repositories/<name>/_tags/<tag>              digest of the manifest; the newest write wins
    repositories/<name>/_viewed                  something was derived in this repository
    repositories/<name>/_views/sha256/…/…        a manifest, config or layer that was derived; below, from which manifest
    repositories/<name>/_packs/sha256/…          which choice of which kit this derived ModelPack holds the files of
    catalog/<name>!                              this repository exists
    cache/members/sha256/ab/abcd….tar            what is in a layer; made again when it is missing
    cache/tars/sha256/ab/abcd…                   digest of a tar that stands nowhere, under that of its recipe; the same

`_` cannot begin a component of a repository's name, so nothing here can be mistaken for a repository below.
`!` sorts before every character of a name: keys of the catalogue are in the order of the names.

Keys only: no I/O here. The layout is a promise (docs/storage-layout.md): changing it needs an ADR and a migration.
"""

from __future__ import annotations

from kitspec.digest import Digest
from kitspec.media_types import LayerType
from kitspec.names import RepositoryName, Tag

CATALOG = "catalog/"
_CATALOG_END = "!"


def blob_key(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.encoded[:2]}/{digest.encoded}"


def link_key(name: RepositoryName, digest: Digest) -> str:
    return f"repositories/{name}/_blobs/{digest.algorithm}/{digest.encoded}"


def manifest_key(name: RepositoryName, digest: Digest) -> str:
    return f"repositories/{name}/_manifests/{digest.algorithm}/{digest.encoded}"


def referrers_prefix(name: RepositoryName, subject: Digest) -> str:
    return f"repositories/{name}/_referrers/{subject.algorithm}/{subject.encoded}/"


def referrer_key(name: RepositoryName, subject: Digest, referrer: Digest) -> str:
    return f"{referrers_prefix(name, subject)}{referrer.algorithm}-{referrer.encoded}"


def tags_prefix(name: RepositoryName) -> str:
    return f"repositories/{name}/_tags/"


def tag_key(name: RepositoryName, tag: Tag) -> str:
    return f"{tags_prefix(name)}{tag}"


def viewed_key(name: RepositoryName) -> str:
    return f"repositories/{name}/_viewed"


def view_prefix(name: RepositoryName, digest: Digest) -> str:
    return f"repositories/{name}/_views/{digest.algorithm}/{digest.encoded}/"


def view_key(name: RepositoryName, digest: Digest, source: Digest) -> str:
    return f"{view_prefix(name, digest)}{source.algorithm}-{source.encoded}"


def packs_prefix(name: RepositoryName) -> str:
    return f"repositories/{name}/_packs/"


def pack_key(name: RepositoryName, digest: Digest) -> str:
    return f"{packs_prefix(name)}{digest.algorithm}/{digest.encoded}"


def pack_at(key: str) -> Digest:
    """The derived ModelPack that a key below `packs_prefix` is about."""
    algorithm, encoded = key.rsplit("/", 2)[-2:]
    return Digest(f"{algorithm}:{encoded}")


def members_key(layer: Digest, layer_type: LayerType) -> str:
    kind = layer_type.packaging + (f"+{layer_type.compression}" if layer_type.compression else "")
    return f"cache/members/{layer.algorithm}/{layer.encoded[:2]}/{layer.encoded}.{kind}"


def tar_key(recipe: Digest) -> str:
    return f"cache/tars/{recipe.algorithm}/{recipe.encoded[:2]}/{recipe.encoded}"


def catalog_key(name: RepositoryName) -> str:
    return f"{CATALOG}{name}{_CATALOG_END}"


def name_in_catalog(key: str) -> RepositoryName:
    """The repository that a key below `CATALOG` stands for."""
    return RepositoryName(key.removeprefix(CATALOG).removesuffix(_CATALOG_END))


def catalog_after(name: str) -> str:
    """The key behind which the names greater than `name` begin; `name` need not be a legal one."""
    return f"{CATALOG}{name}{_CATALOG_END}" if name else ""
