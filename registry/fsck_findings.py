"""What `fsck` can find: a closed list, each with what was wanted instead and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any


class Severity(StrEnum):
    ERROR = "error"
    """Something that was acknowledged cannot be had, or an answer would be wrong."""
    WARNING = "warning"
    """Nobody asks for it, or it is made again; but this registry did not write it so."""
    GARBAGE = "garbage"
    """Nothing refers to it: the next collection removes it."""
    NOTE = "note"
    """As the configuration allows."""


_ERROR, _WARNING, _GARBAGE, _NOTE = Severity

_MADE_AGAIN = "remove it: it is made again when somebody asks"
_NONE_OF_OURS = "remove it, if you know what it is: no collection does"
_COLLECTED = "nothing, or `modelkit-registry garbage-collect`"


class Kind(Enum):
    """Each: its word, its severity, what was wanted, and what to do."""

    CONTENT_DIGEST = (
        "content-digest",
        _ERROR,
        "bytes that hash to the digest in its key",
        "restore it from a backup, or remove it and push it again: a push does not replace what is there",
    )
    CONTENT_UNREADABLE = (
        "content-unreadable",
        _ERROR,
        "content that can be read",
        "see to the disk or the bucket; restore it from a backup, or remove it and push it again",
    )
    CONTENT_NAME = ("content-name", _WARNING, "blobs/<algorithm>/<two digits>/<hex>", _NONE_OF_OURS)
    CONTENT_UNLINKED = ("content-unlinked", _GARBAGE, "a link from a repository", _COLLECTED)
    LINK_DANGLING = (
        "link-dangling",
        _ERROR,
        "the content that it lets the repository serve",
        "push the blob again, or restore it from a backup",
    )
    MANIFEST_RECORD = (
        "manifest-record",
        _ERROR,
        "a line of JSON and the manifest",
        "push it again, or restore it from a backup",
    )
    MANIFEST_DIGEST = (
        "manifest-digest",
        _ERROR,
        "bytes that hash to the digest in the record",
        "push it again, or restore it from a backup",
    )
    MANIFEST_KEY = (
        "manifest-key",
        _ERROR,
        "the manifest whose digest is in the key",
        "push that manifest again, or remove this",
    )
    MANIFEST_INVALID = (
        "manifest-invalid",
        _ERROR,
        "a manifest of a type that is stored",
        "remove it; all blobs of its repository are kept until then",
    )
    MANIFEST_AFFECTED = (
        "manifest-affected",
        _ERROR,
        "content that is there and whole",
        "mend the content, which has a line of its own, or delete the manifest",
    )
    LISTED_MISSING = (
        "listed-missing",
        _ERROR,
        "everything that a manifest lists, in its repository",
        "push what is missing again, or delete the manifest",
    )
    LISTED_SPARSE = ("listed-sparse", _NOTE, "everything that a manifest lists", "nothing: allowsparse is on")
    LISTED_SIZE = (
        "listed-size",
        _ERROR,
        "the size that the manifest says",
        "if the content does not hash to its digest, mend that; else delete the manifest",
    )
    TAG_RECORD = (
        "tag-record",
        _ERROR,
        "JSON with the digest of a manifest",
        "push the tag again, or delete it",
    )
    TAG_DANGLING = (
        "tag-dangling",
        _ERROR,
        "a manifest of its repository",
        "push the manifest again, or delete the tag",
    )
    REFERRER_MISSING = (
        "referrer-missing",
        _ERROR,
        "an entry in the referrers of its subject",
        "push the manifest again",
    )
    REFERRER_STALE = (
        "referrer-stale",
        _ERROR,
        "what its manifest says of itself",
        "remove it, then push its manifest again",
    )
    REFERRER_ORPHAN = ("referrer-orphan", _GARBAGE, "the manifest that it tells of", _COLLECTED)
    CATALOG_MISSING = (
        "catalog-missing",
        _ERROR,
        "an entry in the catalogue",
        "push a manifest to the repository again",
    )
    CATALOG_NAME = ("catalog-name", _ERROR, "catalog/<name>! with a legal name", "remove it")
    VIEW_DAMAGED = ("view-damaged", _ERROR, "a derived document, or the recipe of a layer", _MADE_AGAIN)
    VIEW_UNMARKED = (
        "view-unmarked",
        _ERROR,
        "_viewed in the repository",
        "remove what is below _views and _packs: it is made again when somebody asks",
    )
    VIEW_ORPHAN = ("view-orphan", _GARBAGE, "the manifest that it was derived from", _COLLECTED)
    PACK_DAMAGED = ("pack-damaged", _ERROR, "JSON that tells of entries of a Kitfile", _MADE_AGAIN)
    PACK_ORPHAN = ("pack-orphan", _GARBAGE, "the derived ModelPack that it is about", _COLLECTED)
    CACHE_DAMAGED = ("cache-damaged", _WARNING, "what this version writes there", _MADE_AGAIN)
    CACHE_ORPHAN = ("cache-orphan", _GARBAGE, "the layer that it tells of", _COLLECTED)
    JOURNAL_DAMAGED = (
        "journal-damaged",
        _WARNING,
        "lines of JSON, a change each",
        "nothing: readers pass over it, and trimming removes it",
    )
    RECORD_DAMAGED = (
        "record-damaged",
        _ERROR,
        "a JSON object",
        "restore it from a backup, or remove it: what it kept (keys, a lease) is then made anew, or lost",
    )
    RECORD_UNREADABLE = (
        "record-unreadable",
        _ERROR,
        "a record that can be read",
        "see to the disk or the bucket, and restore it from a backup",
    )
    KEY_IN_THE_WAY = (
        "key-in-the-way",
        _ERROR,
        "keys of the registry only: this one would be taken for one",
        "remove it",
    )
    KEY_FOREIGN = ("key-foreign", _WARNING, "keys of the storage layout", _NONE_OF_OURS)
    INTERNAL_DAMAGED = (
        "internal-damaged",
        _ERROR,
        "a record of the storage backend that can be read",
        "no bytes are swept until it can be: restore it, or remove it as docs/operations.md says",
    )
    LEFTOVER = ("leftover", _GARBAGE, "nothing that nobody can reach", _COLLECTED)
    LEFTOVERS_UNKNOWN = (
        "leftovers-unknown",
        _WARNING,
        "a store that tells what crashed writers left",
        "see to what is named; of a folder that lacks something: start a registry on it once, which makes it",
    )

    def __init__(self, word: str, severity: Severity, wanted: str, remedy: str) -> None:
        self.word = word
        self.severity = severity
        self.wanted = wanted
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        key: of the object that is wrong, or that something is missing for.
        seen: without content of what is stored, and without secrets.
        version: of the object at `key` when it was seen; "" for what no object is at fault for.
        size: bytes that would go, of garbage.
    """

    kind: Kind
    key: str
    seen: str
    version: str = field(default="", repr=False)
    size: int = 0

    @property
    def severity(self) -> Severity:
        return self.kind.severity

    def to_line(self) -> str:
        kind = self.kind
        return f"{kind.severity} {kind.word} {self.key}: {self.seen}; wanted {kind.wanted}: {kind.remedy}"

    def to_json(self) -> dict[str, Any]:
        return {
            "severity": self.severity,
            "kind": self.kind.word,
            "key": self.key,
            "seen": self.seen,
            "wanted": self.kind.wanted,
            "remedy": self.kind.remedy,
        }
