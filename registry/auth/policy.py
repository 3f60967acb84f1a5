"""What somebody may do: one function, pure, over a policy that does not change.

    decide(policy, identity, action, repository)
      the longest pattern that matches the repository decides, none of the shorter ones
      allowed  = its policies that name the user or a group of theirs, together
               + defaultPolicy for everybody who is known
               + anonymousPolicy for everybody
               + adminPolicy, whatever the repository
      limited by what a token is for, if one was shown

What is not allowed is denied. Semantics are zot's, but for one thing: who is known may also do what anonymous may, as leaving
the credentials away would let them (docs/adr/0018-access-control.md).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from kitspec.path_glob import PathGlob
from registry.auth.auth_config import Auth
from registry.auth.identity import Grant, Identity
from registry.auth.layers import LayerScope
from registry.auth.policy_config import AccessControl

# Names come from requests: what was found out about them is kept for as many.
_REMEMBERED_MAX: Final = 4096


class Action(enum.StrEnum):
    """What a request does. In a repository: zot's words; with the registry as a whole: ours, which no file grants by name."""

    READ = "read"
    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    # No right but a promise: a manifest with more than one tag is not deleted by its digest.
    DETECT_COLLISION = "detectManifestCollision"

    ENTER = "enter"  # GET /v2/: to be told that one's credentials are good
    LIST = "list"  # the catalogue, of what may be read
    MONITOR = "monitor"  # /metrics


ALL_ACTIONS: Final = frozenset((Action.READ, Action.CREATE, Action.UPDATE, Action.DELETE))

# What an action of a token allows. Source: the token specification's "Resource Actions"; `*` is everything.
_OF_TOKEN: Final[Mapping[str, frozenset[Action]]] = {
    "pull": frozenset((Action.READ,)),
    "push": frozenset((Action.CREATE, Action.UPDATE)),
    "delete": frozenset((Action.DELETE,)),
    "*": ALL_ACTIONS,
}
# What a token is for whose scope is of the registry as a whole: `registry:catalog:*` is Distribution's, the other ours.
_OF_REGISTRY: Final = {"catalog": Action.LIST, "metrics": Action.MONITOR}


@dataclass(frozen=True, slots=True)
class Rule:
    """What some users and groups may do. Attributes: layers: of kits, that may be read; None for all."""

    users: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    actions: frozenset[Action] = frozenset()
    layers: LayerScope | None = None

    def is_about(self, name: str, groups: frozenset[str]) -> bool:
        return name in self.users or not self.groups.isdisjoint(groups)


@dataclass(frozen=True, slots=True)
class Rules:
    """What may be done in the repositories that `pattern` matches.

    Attributes:
        default: by everybody who is known.
        anonymous: by everybody.
    """

    pattern: str
    rules: tuple[Rule, ...] = ()
    default: frozenset[Action] = frozenset()
    anonymous: frozenset[Action] = frozenset()


# Of a repository that no pattern matches.
_NO_RULES: Final = Rules("no pattern")


@dataclass(frozen=True, slots=True)
class Decision:
    """Attributes: layers: of kits, that may be read; None for all. reason: for the log."""

    is_allowed: bool
    layers: LayerScope | None = None
    reason: str = ""


class Policy:
    """Who may do what. Never changed: another one takes its place.

    Args:
        repositories: in the order of the file, which decides between patterns of the same length.
        admin: holds in every repository.
        groups: of each user, beside those that the authenticator knows.
        metrics: who may read /metrics; `Action.READ` in `metrics.anonymous` is everybody.
        is_for_everybody: there is no authentication, so nobody can be asked for credentials.
        are_tokens_enough: what a token of nobody is for may be done: whoever issued it has decided.
    """

    def __init__(
        self,
        repositories: Iterable[Rules] = (),
        *,
        admin: Rule | None = None,
        groups: Mapping[str, frozenset[str]] | None = None,
        metrics: Rules | None = None,
        is_for_everybody: bool = False,
        are_tokens_enough: bool = False,
    ) -> None:
        # A stable sort: of two that are equally long the first in the file decides.
        self._repositories = sorted(repositories, key=lambda rules: -len(rules.pattern))
        self._globs = [PathGlob(rules.pattern) for rules in self._repositories]
        self.admin = admin or Rule()
        self.metrics = metrics or Rules("metrics")
        self.is_for_everybody = is_for_everybody
        self.are_tokens_enough = are_tokens_enough
        self._groups = groups or {}
        self.rules_of = lru_cache(_REMEMBERED_MAX)(self._rules_of)

    @classmethod
    def from_config(cls, config: AccessControl | None, auth: Auth | None) -> Policy:
        """
        Args:
            config: `http.accessControl`; without it everybody who is known may do everything, and nobody else anything.
            auth: how to be known; without it, and without `config`, everybody may do everything.
        """
        if config is None:
            return OPEN if auth is None else _for_the_known(auth)
        groups: dict[str, frozenset[str]] = {}
        for group, members in config.groups.items():
            for user in members.users:
                groups[user] = groups.get(user, frozenset()) | {group}
        repositories = [
            Rules(
                pattern,
                tuple(
                    _rule(policy.users, policy.groups, policy.actions, policy.layers)
                    for policy in rules.policies
                ),
                default=_actions(rules.defaultPolicy),
                anonymous=_actions(rules.anonymousPolicy),
            )
            for pattern, rules in config.repositories.items()
        ]
        admin, metrics = config.adminPolicy, config.metrics
        return cls(
            repositories,
            admin=_rule(admin.users, admin.groups, admin.actions),
            groups=groups,
            metrics=Rules(
                "metrics",
                (_rule(metrics.users, metrics.groups, ["read"]),),
                anonymous=_actions(metrics.anonymousPolicy),
            ),
            is_for_everybody=auth is None,
        )

    def groups_of(self, identity: Identity) -> frozenset[str]:
        return identity.groups | self._groups.get(identity.name, frozenset())

    @property
    def shows_something_to_everybody(self) -> bool:
        """Whether there may be something to read without credentials."""
        return any(Action.READ in rules.anonymous for rules in self._repositories)

    def _rules_of(self, repository: str) -> Rules | None:
        for glob, rules in zip(self._globs, self._repositories, strict=True):
            if glob.matches(repository):
                return rules
        return None


def _rule(
    users: Iterable[str], groups: Iterable[str], actions: Iterable[str], layers: Iterable[str] | None = None
) -> Rule:
    scope = LayerScope(frozenset(layers)) if layers is not None else None
    return Rule(frozenset(users), frozenset(groups), _actions(actions), scope)


def _actions(names: Iterable[str]) -> frozenset[Action]:
    return frozenset(Action(name) for name in names)


OPEN: Final = Policy(
    [Rules("**", anonymous=ALL_ACTIONS)],
    metrics=Rules("metrics", anonymous=frozenset((Action.READ,))),
    is_for_everybody=True,
)
"""Everybody may do everything: nothing is configured."""

NOBODY: Final = Policy()
"""Nobody may do anything."""


def _for_the_known(auth: Auth) -> Policy:
    """Whoever has logged in may do everything, as in zot. Where tokens come from elsewhere, they say what they are for."""
    return Policy(
        [Rules("**", default=ALL_ACTIONS)],
        metrics=Rules("metrics", default=frozenset((Action.READ,))),
        are_tokens_enough=auth.token is not None and auth.token.is_external,
    )


def decide(policy: Policy, identity: Identity, action: Action, repository: str = "") -> Decision:
    """Whether `identity` may do `action`.

    Args:
        repository: its checked name; "" for what is done with the registry as a whole.
    """
    match action:
        case Action.ENTER:
            # Who has shown a token of nobody has shown credentials; who has shown none is to be asked for them.
            return Decision(policy.is_for_everybody or identity.method != "anonymous", reason="credentials")
        case Action.LIST:
            return _decide_list(policy, identity)
        case Action.MONITOR:
            return _decide_metrics(policy, identity)
        case _:
            return _decide_in_repository(policy, identity, action, repository)


def granted(
    policy: Policy, identity: Identity, type_: str, name: str, actions: Iterable[str]
) -> frozenset[str]:
    """Which of the actions that are asked for a token of `identity` may be for; what is not known is passed over.

    Args:
        type_, name, actions: of a scope of the token specification; `name` is a checked one if `type_` is `repository`.
    """
    asked = frozenset(actions)
    if type_ == "registry" and name in _OF_REGISTRY:
        is_allowed = decide(policy, identity, _OF_REGISTRY[name]).is_allowed
        return asked & {"*"} if is_allowed else frozenset()
    if type_ != "repository":
        return frozenset()
    wanted = frozenset(_OF_TOKEN) - {"*"} if "*" in asked else asked & _OF_TOKEN.keys()
    return frozenset(
        word
        for word in wanted
        if any(decide(policy, identity, action, name).is_allowed for action in _OF_TOKEN[word])
    )


def _decide_list(policy: Policy, identity: Identity) -> Decision:
    """What is listed is what may be read, so everybody may ask for whom there can be something."""
    if not _is_granted_of_registry(identity, "catalog"):
        return Decision(False, reason="the token is not for the catalogue")
    is_allowed = not identity.is_anonymous or policy.shows_something_to_everybody
    return Decision(is_allowed, reason="something may be readable")


def _decide_metrics(policy: Policy, identity: Identity) -> Decision:
    if Action.READ not in policy.metrics.anonymous and not _is_granted_of_registry(identity, "metrics"):
        return Decision(False, reason="the token is not for the metrics")
    return _decide_rules(policy, identity, Action.READ, policy.metrics)


def _is_granted_of_registry(identity: Identity, name: str) -> bool:
    return identity.grants is None or any(
        grant.type == "registry" and grant.name == name and "*" in grant.actions for grant in identity.grants
    )


def _decide_in_repository(policy: Policy, identity: Identity, action: Action, repository: str) -> Decision:
    if identity.grants is not None and not _is_granted(identity.grants, action, repository):
        return Decision(False, reason=f"the token is not for {action} in {repository}")
    decision = _decide_rules(policy, identity, action, policy.rules_of(repository))
    if decision.is_allowed and action in (Action.CREATE, Action.UPDATE):
        # Whatever the token is for: a key for pushes alone would not show the limit, and what it pushes is read without it.
        reading = decide(policy, without_limits(identity), Action.READ, repository)
        if reading.is_allowed and reading.layers is not None:
            reason = "who may read some layers only could name others in a kit of their own, and so read them"
            return Decision(False, reason=reason)
    return decision


def _is_granted(grants: Iterable[Grant], action: Action, repository: str) -> bool:
    if action is Action.DETECT_COLLISION:
        return True  # it takes away
    return any(
        grant.type == "repository"
        and grant.name == repository
        and any(action in _OF_TOKEN.get(word, ()) for word in grant.actions)
        for grant in grants
    )


def _decide_rules(policy: Policy, identity: Identity, action: Action, rules: Rules | None) -> Decision:
    rules = rules or _NO_RULES
    where = f"of {rules.pattern}"
    if action in rules.anonymous:
        return Decision(True, reason=f"anonymousPolicy {where}")
    if identity.is_anonymous and not (policy.are_tokens_enough and identity.grants is not None):
        return Decision(False, reason=f"not in anonymousPolicy {where}")
    if action in rules.default:
        return Decision(True, reason=f"defaultPolicy {where}")
    groups = policy.groups_of(identity)
    if action in policy.admin.actions and policy.admin.is_about(identity.name, groups):
        return Decision(True, reason="adminPolicy")
    applying = [
        rule for rule in rules.rules if action in rule.actions and rule.is_about(identity.name, groups)
    ]
    if not applying:
        return Decision(False, reason=f"in no policy {where}")
    return Decision(True, _layers_of(applying), f"a policy {where}")


def _layers_of(rules: Iterable[Rule]) -> LayerScope | None:
    """What several rules let somebody read, together."""
    scope = LayerScope(frozenset())
    for rule in rules:
        if rule.layers is None:
            return None
        scope |= rule.layers
    return scope


def without_limits(identity: Identity) -> Identity:
    """The same, whatever their token is for."""
    return replace(identity, grants=None)
