"""Names of things in a registry: repositories, tags, and the tags that name a view.

Source: distribution-spec 1.1.1, "Pulling manifests"; the view grammar is ours (docs/extension.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from kitspec.errors import NameInvalid, TagInvalid

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
