"""`http.accessControl`: who may do what, in zot's block as it is, and `layers` beside it, which is ours.

Read strictly: a key, an action or a pattern that nobody would ever look at is a mistake in a lock.
Source: zot's examples/README.md, "Identity-based Authorization".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from kitspec.errors import FilterInvalid
from kitspec.path_glob import PathGlob
from registry.config_types import Section

ActionName = Literal["read", "create", "update", "delete", "detectManifestCollision"]
LayerWord = Literal["kitfile", "model", "datasets", "code", "docs", "prompts", "mcpservers"]
# Nobody has no name: what everybody may do is said by anonymousPolicy.
Name = Annotated[str, Field(min_length=1)]

# What a repository's name is made of, and what stands for it. Anything else would match no repository, in silence.
_PATTERN = re.compile(r"[a-z0-9*?\[](?:[a-z0-9._*?\[\]!^/-]*[a-z0-9*?\]])?", re.ASCII)


def checked_pattern(pattern: str) -> str:
    """`pattern`, of repositories' names, if one of them could match it.

    Raises:
        ValueError: none can.
    """
    try:
        PathGlob(pattern)
    except FilterInvalid:
        is_glob = False
    else:
        is_glob = True
    if not is_glob or not _PATTERN.fullmatch(pattern) or "//" in pattern:
        raise ValueError(
            f"should have patterns of repositories' names, like team/** or */llm, not {pattern!r}: "
            "names are in lower case and neither begin nor end with a slash; there are no {a,b}: give each an entry of its own"
        )
    return pattern


class Group(Section):
    users: list[Name] = Field(default_factory=list)


class RepositoryPolicy(Section):
    """What some users and groups may do."""

    users: list[Name] = Field(default_factory=list)
    groups: list[Name] = Field(default_factory=list)
    actions: list[ActionName]
    layers: list[LayerWord] | None = None

    @model_validator(mode="before")
    @classmethod
    def _conditions_are_refused(cls, value: object) -> object:
        if isinstance(value, dict) and "conditions" in value:
            raise ValueError(
                "has conditions, which this registry does not evaluate: without them the policy would allow more than it says. "
                "Take them out, or narrow users, actions and repositories instead"
            )
        return value

    @model_validator(mode="after")
    def _somebody_is_meant(self) -> Self:
        if not self.users and not self.groups:
            raise ValueError("should name users or groups; everybody who is logged in is defaultPolicy")
        return self

    @model_validator(mode="after")
    def _layers_limit_reads(self) -> Self:
        if self.layers is None:
            return self
        if not self.layers:
            raise ValueError("should have one layer at least, or no `layers`: then all may be read")
        if self.actions != ["read"]:
            raise ValueError(
                "should have actions: [read] and no other beside layers: who pushes could name in a kit of their own what they may not read"
            )
        return self


class Repositories(Section):
    """What may be done in the repositories that a pattern matches."""

    policies: list[RepositoryPolicy] = Field(default_factory=list)
    defaultPolicy: list[ActionName] = Field(default_factory=list)  # noqa: N815 - zot's name
    anonymousPolicy: list[ActionName] = Field(default_factory=list)  # noqa: N815 - zot's name


class AdminPolicy(Section):
    """What some users and groups may do everywhere."""

    users: list[Name] = Field(default_factory=list)
    groups: list[Name] = Field(default_factory=list)
    actions: list[ActionName] = Field(default_factory=list)


class MetricsPolicy(Section):
    """Who may read /metrics."""

    users: list[Name] = Field(default_factory=list)
    groups: list[Name] = Field(default_factory=list)
    anonymousPolicy: list[Literal["read"]] = Field(default_factory=list)  # noqa: N815 - zot's name


class AccessControl(Section):
    groups: dict[Name, Group] = Field(default_factory=dict)
    repositories: dict[str, Repositories] = Field(default_factory=dict)
    adminPolicy: AdminPolicy = AdminPolicy()  # noqa: N815 - zot's name
    metrics: MetricsPolicy = MetricsPolicy()

    @field_validator("repositories")
    @classmethod
    def _patterns_can_match(cls, value: dict[str, Repositories]) -> dict[str, Repositories]:
        for pattern in value:
            checked_pattern(pattern)
        return value

    def named_groups(self) -> Iterator[tuple[str, Name]]:
        """Each group that something is allowed to, after the path of the key that says so."""
        for pattern, rules in self.repositories.items():
            for number, policy in enumerate(rules.policies):
                yield from (
                    (f"repositories.{pattern}.policies.{number}.groups", name) for name in policy.groups
                )
        yield from (("adminPolicy.groups", name) for name in self.adminPolicy.groups)
        yield from (("metrics.groups", name) for name in self.metrics.groups)

    @property
    def names_anybody(self) -> bool:
        """Whether it makes a difference who somebody is."""
        rules = self.repositories.values()
        return bool(
            self.adminPolicy.users
            or self.adminPolicy.groups
            or self.metrics.users
            or self.metrics.groups
            or any(rule.policies or rule.defaultPolicy for rule in rules)
        )
