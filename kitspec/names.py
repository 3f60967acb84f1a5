"""Names of things in a registry: repositories, tags, the tags that name a view, and references as people type them.

Source: distribution-spec 1.1.1, "Pulling manifests"; the view grammar is ours (docs/extension.md); references are kit's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from kitspec.digest import Digest
from kitspec.errors import DigestInvalid, NameInvalid, ReferenceInvalid, TagInvalid

# Linear: every alternative begins with a character that the one before cannot take.
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", re.ASCII)

# Clients limit host and name together to 255 (distribution-spec 1.1.1, "Pulling manifests"), and so do file names.
REPOSITORY_NAME_LENGTH_MAX = 255
COMPONENT_LENGTH_MAX = 128
TAG_LENGTH_MAX = 128

_VIEW = re.compile(r"(?P<base>.+?)(?:\.only\.(?P<selectors>.+?))?(?:\.as\.(?P<form>[a-z0-9]+))?", re.ASCII)


class RepositoryName(str):
    """`<name>` of the specification: lower-case components joined by `/`."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Check `text`.

        Raises:
            NameInvalid: the grammar does not allow it, or it is too long.
        """
        if len(text) > REPOSITORY_NAME_LENGTH_MAX:
            raise NameInvalid(
                f"repository name of {len(text)} characters; at most {REPOSITORY_NAME_LENGTH_MAX} are allowed"
            )
        if _REPOSITORY.fullmatch(text) is None:
            raise NameInvalid(
                f"not a repository name: {text!a}; wanted lower-case letters, digits and single separators "
                "(. _ __ -) in components joined by /"
            )
        if any(len(component) > COMPONENT_LENGTH_MAX for component in text.split("/")):
            raise NameInvalid(f"a component of {text!a} is longer than {COMPONENT_LENGTH_MAX} characters")
        return super().__new__(cls, text)


class Tag(str):
    """A tag whose grammar has been checked. It may name a view: see `view_of`."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Check `text`.

        Raises:
            TagInvalid: the grammar does not allow it.
        """
        if _TAG.fullmatch(text) is None:
            raise TagInvalid(
                f"not a tag: {text[:160]!a}; wanted a letter, digit or _ and then at most 127 of letters, "
                "digits, '.', '_' and '-'"
            )
        return super().__new__(cls, text)


def fallback_tag(subject: Digest) -> Tag:
    """The tag under which a client lists the referrers of `subject` where the registry cannot.

    Source: distribution-spec 1.1.1, "Referrers Tag Schema"; digests that are spoken hold nothing a tag may not.
    """
    return Tag(f"{subject.algorithm[:32]}-{subject.encoded[:64]}")


@dataclass(frozen=True, slots=True)
class ViewName:
    """What a tag of the form `<base>.only.<selector>….as.<form>` asks for.

    Attributes:
        base: the tag that is looked at.
        selectors: as written, each a Kitfile section or `section_entry`; empty means everything.
        form: the other shape that is wanted, or None for a ModelKit.
    """

    base: Tag
    selectors: tuple[str, ...]
    form: str | None


def view_of(tag: Tag) -> ViewName | None:
    """The view that `tag` names, or None for an ordinary tag.

    Every tag with `.only.` inside or `.as.<word>` at its end is taken, so that later forms break nobody's tags.
    """
    match = _VIEW.fullmatch(tag)
    if match is None or (match["selectors"] is None and match["form"] is None):
        return None
    selectors = tuple(match["selectors"].split(".")) if match["selectors"] is not None else ()
    return ViewName(base=Tag(match["base"]), selectors=selectors, form=match["form"])


LOCAL_REGISTRY = "localhost"
"""The registry of a reference that names none: the local store."""
# Where kit keeps what was packed without a name. No registry can hold it: it is outside the grammar.
_UNNAMED = "_"
_HOST = re.compile(
    r"(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?",
    re.ASCII,
)
_REFERENCE_LENGTH_MAX = 1024


@dataclass(frozen=True, slots=True)
class Reference:
    """`[registry/]repository[:tag[,tag…]|@digest]`, as people type it.

    Attributes:
        registry: `host[:port]`, as written.
        repository: None for what has no name: a bare digest in the local store.
        tag: None when none was given; what that means depends on the command.
        further_tags: behind the first, each after a comma.
    """

    registry: str
    repository: RepositoryName | None
    tag: Tag | None = None
    digest: Digest | None = None
    further_tags: tuple[Tag, ...] = ()

    @classmethod
    def parse(cls, text: str, *, default_registry: str = LOCAL_REGISTRY) -> Self:
        """Read `text`.

        The part before the first `/` is a registry only if it has a `.` or a `:`, or is `localhost`.
        Of a tag and a digest together the digest counts. A digest alone is something without a name in the local store.

        Raises:
            ReferenceInvalid: the grammar does not allow it.
        """
        if not text or len(text) > _REFERENCE_LENGTH_MAX:
            raise ReferenceInvalid(
                f"a reference of {len(text)} characters; wanted [registry/]repository[:tag|@digest]"
            )
        try:
            return cls._parse(text, default_registry)
        except (NameInvalid, TagInvalid, DigestInvalid) as error:
            raise ReferenceInvalid(f"invalid reference {text!a}: {error.message}") from error

    @classmethod
    def _parse(cls, text: str, default_registry: str) -> Self:
        if _is_digest(text):
            return cls(LOCAL_REGISTRY, None, digest=Digest(text))
        first, slash, rest = text.partition("/")
        if slash and ("." in first or ":" in first or first == LOCAL_REGISTRY):
            registry, path = _check_host(first), rest
        else:
            registry, path = default_registry, text
        path, at, digest_text = path.partition("@")
        name, colon, tag_text = path.partition(":")
        digest = Digest(digest_text) if at else None
        tags = tuple(Tag(tag) for tag in tag_text.split(",")) if colon else ()
        if at and len(tags) > 1:
            raise ReferenceInvalid(f"invalid reference {text!a}: a digest and several tags")
        repository = None if name == _UNNAMED and registry == LOCAL_REGISTRY else _check_repository(name)
        if digest is not None or not tags:
            return cls(registry, repository, digest=digest)
        return cls(registry, repository, tag=tags[0], further_tags=tags[1:])

    @property
    def display(self) -> str:
        """For people: without the registry and the repository that nobody typed."""
        if self.repository is None:
            return self.digest if self.digest is not None else ""
        return str(self).removeprefix(f"{LOCAL_REGISTRY}/")

    def __str__(self) -> str:
        """Parses back to the same."""
        name = f"{self.registry}/{self.repository if self.repository is not None else _UNNAMED}"
        if self.digest is not None:
            return f"{name}@{self.digest}"
        if self.tag is not None:
            return f"{name}:{','.join((self.tag, *self.further_tags))}"
        return name


def _is_digest(text: str) -> bool:
    try:
        Digest(text)
    except DigestInvalid:
        return False
    return True


def _check_host(text: str) -> str:
    match = _HOST.fullmatch(text)
    host = text if match is None or match["port"] is None else text[: match.start("port") - 1]
    labels_are_whole = text.startswith("[") or all(
        label and not label.startswith("-") and not label.endswith("-") for label in host.split(".")
    )
    if match is None or not labels_are_whole or int(match["port"] or 0) > 65535:
        raise ReferenceInvalid(f"not a registry: {text[:160]!a}; wanted host or host:port")
    return text


def _check_repository(text: str) -> RepositoryName:
    if text != text.lower():
        raise ReferenceInvalid(f"repository ({text[:160]!a}) name must be lowercase")
    if text and not (text[0].isalnum() and text[-1].isalnum()):
        raise ReferenceInvalid(f"repository ({text[:160]!a}) name must start and end with a letter or number")
    return RepositoryName(text)
