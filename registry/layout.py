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
    journal/20261125/12/3640.123456-…            what was written in one moment (journal.py)
    journal-marks/<reader>                       up to which entry of the journal somebody has read
    journal-marks/notifications-<endpoint>.lease who tells that endpoint, and of what it was told (notifications.py)
    maintenance/collection                       who collects, and when that was done last (garbage.py)
    auth/token-keys                              what tokens are signed with (auth/token_keys.py)
    auth/api-keys/<user>/<id>                    an API key, hashed; <user> is a digest of its owner's name (auth/api_keys.py)
    cache/members/sha256/ab/abcd….tar            what is in a layer; made again when it is missing
    cache/tars/sha256/ab/abcd…                   digest of a tar that stands nowhere, under that of its recipe; the same

`_` cannot begin a component of a repository's name, so nothing here can be mistaken for a repository below.
`!` sorts before every character of a name: keys of the catalogue are in the order of the names.

Keys only: no I/O here. The layout is a promise (docs/storage-layout.md): changing it needs an ADR and a migration.
"""

from __future__ import annotations

from dataclasses import dataclass

from kitspec.digest import Digest
from kitspec.errors import OciError
from kitspec.media_types import LayerType
from kitspec.names import RepositoryName, Tag

BLOBS = "blobs/"
REPOSITORIES = "repositories/"
CATALOG = "catalog/"
MEMBERS = "cache/members/"
JOURNAL = "journal/"
JOURNAL_MARKS = "journal-marks/"
COLLECTION = "maintenance/collection"
TOKEN_KEYS = "auth/token-keys"  # noqa: S105 - a prefix of keys
API_KEYS = "auth/api-keys/"
_CATALOG_END = "!"


def blob_key(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.encoded[:2]}/{digest.encoded}"


def link_key(name: RepositoryName, digest: Digest) -> str:
    return f"repositories/{name}/_blobs/{digest.algorithm}/{digest.encoded}"


def manifests_prefix(name: RepositoryName) -> str:
    return f"repositories/{name}/_manifests/"


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


def journal_mark_key(reader: str) -> str:
    return f"{JOURNAL_MARKS}{reader}"


def api_keys_prefix(user: str) -> str:
    """
    Args:
        user: a digest of the name, in hex: names are not made of what keys are made of.
    """
    return f"{API_KEYS}{user}/"


def api_key_key(user: str, key_id: str) -> str:
    return f"{api_keys_prefix(user)}{key_id}"


def catalog_key(name: RepositoryName) -> str:
    return f"{CATALOG}{name}{_CATALOG_END}"


def name_in_catalog(key: str) -> RepositoryName:
    """The repository that a key below `CATALOG` stands for."""
    return RepositoryName(key.removeprefix(CATALOG).removesuffix(_CATALOG_END))


def catalog_after(name: str) -> str:
    """The key behind which the names greater than `name` begin; `name` need not be a legal one."""
    return f"{CATALOG}{name}{_CATALOG_END}" if name else ""


@dataclass(frozen=True, slots=True)
class InRepository:
    """What a key below `REPOSITORIES` stands for.

    Attributes:
        kind: the component that begins with `_`.
        digest: of the blob, the manifest, the subject, or what was derived.
        other: of the referrer, or the source of what was derived.
        tag: below `_tags`.
    """

    name: RepositoryName
    kind: str
    digest: Digest | None = None
    other: Digest | None = None
    tag: Tag | None = None


def in_repository(key: str) -> InRepository | None:
    """What a key of a repository stands for; None for one that is none of ours."""
    path, mark, rest = key.removeprefix(REPOSITORIES).partition("/_")
    kind, *parts = f"_{rest}".split("/")
    if not mark:
        return None
    try:
        name = RepositoryName(path)
        match kind, parts:
            case "_blobs" | "_manifests" | "_packs", [algorithm, encoded]:
                return InRepository(name, kind, Digest(f"{algorithm}:{encoded}"))
            case "_referrers" | "_views", [algorithm, encoded, other]:
                digest = Digest(f"{algorithm}:{encoded}")
                return InRepository(name, kind, digest, Digest(other.replace("-", ":", 1)))
            case "_tags", [tag]:
                return InRepository(name, kind, tag=Tag(tag))
            case "_viewed", []:
                return InRepository(name, kind)
            case _:
                pass
    except OciError:
        pass
    return None


def digest_of(key: str) -> Digest | None:
    """Of a key whose last component is a digest without its algorithm, as those of `BLOBS` and, with a suffix, `MEMBERS`."""
    try:
        algorithm, fan, encoded = key.split("/")[-3:]
        digest = Digest(f"{algorithm}:{encoded.partition('.')[0]}")
    except (ValueError, OciError):
        return None
    return digest if fan == digest.encoded[:2] else None
