"""Who may do what, as a table: `decide` is pure, so each rule of it is a row."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from registry.auth.auth_config import Auth
from registry.auth.identity import ANONYMOUS, Grant, Identity
from registry.auth.policy import ALL_ACTIONS, OPEN, Action, Policy, decide, granted
from registry.auth.policy_config import AccessControl
from registry.config import Config
from registry.config_sources import load_config

READ, CREATE, UPDATE, DELETE = Action.READ, Action.CREATE, Action.UPDATE, Action.DELETE
ALL = {READ, CREATE, UPDATE, DELETE}

# zot's own example, and what is ours.
CONFIG: dict[str, Any] = {
    "groups": {"g1": {"users": ["jack", "alice"]}, "ops": {"users": ["olga"]}},
    "repositories": {
        "**": {"defaultPolicy": ["read"]},
        "prod/**": {
            "policies": [
                {"users": ["alice"], "actions": ["read", "create"]},
                {"groups": ["g1"], "actions": ["update"]},
                {"users": ["serving"], "actions": ["read"], "layers": ["model"]},
                {"groups": ["docs-readers"], "actions": ["read"], "layers": ["kitfile", "docs"]},
                {"users": ["both"], "actions": ["read"], "layers": ["model"]},
                {"users": ["both"], "actions": ["read"]},
                {"users": ["sly"], "actions": ["read"], "layers": ["docs"]},
                {"users": ["sly"], "actions": ["create", "update", "delete"]},
            ]
        },
        "prod/public/*": {"anonymousPolicy": ["read"], "defaultPolicy": ["read", "create"]},
        "prod/drop": {"policies": [{"users": ["alice"], "actions": ["create"]}]},
        "open/*": {"anonymousPolicy": ["read", "create"]},
        "*/open": {"policies": [{"users": ["alice"], "actions": ["delete"]}]},
    },
    "adminPolicy": {"users": ["admin"], "groups": ["ops"], "actions": ["read", "create", "update", "delete"]},
    "metrics": {"users": ["prom"], "groups": ["ops"]},
}
AUTH = Auth.model_validate({"htpasswd": {"path": "users"}})
ELSEWHERE = Auth.model_validate(
    {"token": {"realm": "https://auth.example", "service": "s", "issuer": "i", "jwks": "keys.json"}}
)
POLICY = Policy.from_config(AccessControl.model_validate(CONFIG), AUTH)


def user(name: str, *groups: str, grants: tuple[Grant, ...] | None = None) -> Identity:
    return Identity(name, frozenset(groups), "basic" if grants is None else "bearer", grants)


def token(name: str, *grants: tuple[str, str]) -> Identity:
    """Of the form `("prod/a", "pull,push")`."""
    return user(
        name,
        grants=tuple(Grant("repository", to, frozenset(actions.split(","))) for to, actions in grants),
    )


ROWS = [
    # without credentials what is not allowed is denied
    (ANONYMOUS, "team/a", set()),
    (ANONYMOUS, "prod/a", set()),
    (ANONYMOUS, "prod/public/a", {READ}),
    (ANONYMOUS, "open/a", {READ, CREATE}),
    # everybody who is known
    (user("bob"), "team/a", {READ}),
    (user("bob"), "team/a/b/c", {READ}),
    # the longest pattern decides, and none of the shorter ones: bob reads `**`, and not `prod/**`
    (user("bob"), "prod/a", set()),
    (user("bob"), "prod", set()),
    (user("bob"), "production/a", {READ}),
    (user("bob"), "prod/public/a", {READ, CREATE}),
    (user("bob"), "prod/public/a/b", set()),
    (user("alice"), "prod/drop", {CREATE}),
    # of two that are equally long the first one in the file
    (user("alice"), "open/open", {READ, CREATE}),
    (user("alice"), "shut/open", {DELETE}),
    # policies of a user and of their groups add up
    (user("alice"), "prod/a", {READ, CREATE, UPDATE}),
    (user("jack"), "prod/a", {UPDATE}),
    (user("stranger", "g1"), "prod/a", {UPDATE}),
    (user("stranger", "docs-readers"), "prod/a", {READ}),
    # a name is not a group, nor a part of another name, nor nobody's
    (user("g1"), "prod/a", set()),
    (user("alic"), "prod/a", set()),
    (user("Alice"), "prod/a", set()),
    (Identity("", frozenset({"g1"})), "prod/a", set()),
    # what anonymous may do, everybody may
    (user("bob"), "open/a", {READ, CREATE}),
    # admins everywhere, by name and by group, where a pattern matches and where none does
    (user("admin"), "prod/a", ALL),
    (user("olga"), "team/a", ALL),
    (user("x", "ops"), "prod/drop", ALL),
    # who may read some layers only does not push what it could read them by
    (user("sly"), "prod/a", {READ, DELETE}),
    (user("serving"), "prod/a", {READ}),
    # a token takes away, and never gives
    (token("sly", ("prod/a", "push")), "prod/a", set()),
    (token("sly", ("prod/a", "push,delete")), "prod/a", {DELETE}),
    (token("sly", ("prod/a", "*")), "prod/a", {READ, DELETE}),
    (token("admin", ("prod/a", "pull")), "prod/a", {READ}),
    (token("admin", ("prod/a", "push")), "prod/a", {CREATE, UPDATE}),
    (token("admin", ("prod/a", "delete")), "prod/a", {DELETE}),
    (token("admin", ("prod/a", "*")), "prod/a", ALL),
    (token("admin", ("prod/a", "*")), "prod/b", set()),
    (token("admin", ("prod/*", "*"), ("**", "*"), ("", "*")), "prod/a", set()),
    (token("admin", ("prod/a", "pull"), ("prod/a", "delete")), "prod/a", {READ, DELETE}),
    (token("admin", ("prod/a", "PULL,read,create")), "prod/a", set()),
    (token("bob", ("prod/a", "*")), "prod/a", set()),
    (token("bob"), "team/a", set()),
    (token("", ("prod/public/a", "pull")), "prod/public/a", {READ}),
    (token("", ("team/a", "pull")), "team/a", set()),
    (user("admin", grants=(Grant("registry", "prod/a", frozenset({"*"})),)), "prod/a", set()),
    (user("admin", grants=(Grant("plugin", "prod/a", frozenset({"*"})),)), "prod/a", set()),
]


@pytest.mark.parametrize(("identity", "repository", "allowed"), ROWS, ids=range(len(ROWS)))
def test_exactly_what_the_policy_says_is_allowed(
    identity: Identity, repository: str, allowed: set[Action]
) -> None:
    assert {
        action for action in ALL_ACTIONS if decide(POLICY, identity, action, repository).is_allowed
    } == allowed


LAYER_ROWS = [
    (user("serving"), "model"),
    (user("x", "docs-readers"), "kitfile, docs"),
    (user("serving", "docs-readers"), "kitfile, model, docs"),
    (user("both"), None),
    (user("admin"), None),
    (user("admin", "docs-readers"), None),
    (token("serving", ("prod/a", "pull")), "model"),
]


@pytest.mark.parametrize(("identity", "layers"), LAYER_ROWS, ids=range(len(LAYER_ROWS)))
def test_layers_of_several_policies_add_up_and_a_policy_without_any_is_of_all(
    identity: Identity, layers: str | None
) -> None:
    decision = decide(POLICY, identity, READ, "prod/a")

    assert decision.is_allowed
    assert (None if decision.layers is None else str(decision.layers)) == layers


@pytest.mark.parametrize(
    ("identity", "allowed"),
    [
        (ANONYMOUS, {Action.LIST}),  # something is readable by everybody
        (token(""), {Action.ENTER}),
        (user("bob"), {Action.ENTER, Action.LIST}),
        (user("prom"), {Action.ENTER, Action.LIST, Action.MONITOR}),
        (user("x", "ops"), {Action.ENTER, Action.LIST, Action.MONITOR}),
        (user("admin"), {Action.ENTER, Action.LIST, Action.MONITOR}),
        (token("bob", ("team/a", "*")), {Action.ENTER}),
        (token("prom", ("team/a", "*")), {Action.ENTER}),
        (token("admin"), {Action.ENTER}),
        (
            user("prom", grants=(Grant("registry", "metrics", frozenset({"*"})),)),
            {Action.ENTER, Action.MONITOR},
        ),
        (user("bob", grants=(Grant("registry", "metrics", frozenset({"*"})),)), {Action.ENTER}),
        (user("prom", grants=(Grant("registry", "metrics", frozenset({"pull"})),)), {Action.ENTER}),
        (user("prom", grants=(Grant("repository", "metrics", frozenset({"*"})),)), {Action.ENTER}),
        (
            user("bob", grants=(Grant("registry", "catalog", frozenset({"*"})),)),
            {Action.ENTER, Action.LIST},
        ),
        (user("bob", grants=(Grant("registry", "catalog", frozenset({"pull"})),)), {Action.ENTER}),
        (user("bob", grants=(Grant("repository", "catalog", frozenset({"*"})),)), {Action.ENTER}),
    ],
    ids=range(16),
)
def test_what_is_done_with_the_registry_as_a_whole_is_decided_too(
    identity: Identity, allowed: set[Action]
) -> None:
    actions = {Action.ENTER, Action.LIST, Action.MONITOR}

    assert {action for action in actions if decide(POLICY, identity, action).is_allowed} == allowed


def test_a_token_for_something_else_reads_the_metrics_only_where_everybody_may() -> None:
    limited = token("prom", ("team/a", "pull"))
    for_all = Policy.from_config(
        AccessControl.model_validate({"metrics": {"anonymousPolicy": ["read"]}}), AUTH
    )

    assert not decide(Policy.from_config(None, AUTH), limited, Action.MONITOR).is_allowed
    assert not decide(Policy.from_config(None, ELSEWHERE), token(""), Action.MONITOR).is_allowed
    assert decide(for_all, limited, Action.MONITOR).is_allowed


def test_without_accounts_and_without_a_policy_everybody_may_do_everything() -> None:
    policy = Policy.from_config(None, None)

    assert policy is OPEN
    assert all(
        decide(policy, ANONYMOUS, action, "a").is_allowed
        for action in Action
        if action is not Action.DETECT_COLLISION
    )


def test_with_accounts_and_no_policy_whoever_is_known_may_do_everything_and_nobody_else_anything() -> None:
    policy = Policy.from_config(None, AUTH)

    actions = set(Action) - {Action.DETECT_COLLISION}
    assert all(decide(policy, user("x"), action, "a").is_allowed for action in actions)
    assert not any(decide(policy, ANONYMOUS, action, "a").is_allowed for action in actions)


def test_without_a_policy_a_token_of_nobody_is_for_what_its_issuer_says() -> None:
    policy = Policy.from_config(None, ELSEWHERE)
    nobody = token("", ("a", "pull"))

    assert decide(policy, nobody, READ, "a").is_allowed
    assert not decide(policy, nobody, DELETE, "a").is_allowed
    assert not decide(policy, nobody, READ, "b").is_allowed
    assert not decide(Policy.from_config(None, AUTH), nobody, READ, "a").is_allowed


def test_a_policy_without_accounts_is_about_everybody() -> None:
    policy = Policy.from_config(AccessControl.model_validate(CONFIG), None)

    assert decide(policy, ANONYMOUS, Action.ENTER).is_allowed
    assert decide(policy, ANONYMOUS, READ, "open/a").is_allowed
    assert not decide(policy, ANONYMOUS, READ, "team/a").is_allowed


def test_an_empty_policy_denies_everything_to_everybody() -> None:
    policy = Policy.from_config(AccessControl(), AUTH)

    assert not any(decide(policy, user("x"), action, "a").is_allowed for action in ALL_ACTIONS)


NAMES = st.sampled_from(["", "alice", "bob", "admin", "serving", "sly"])
REPOSITORIES = st.sampled_from(["team/a", "prod/a", "prod/public/a", "prod/drop", "open/a", "open/open"])
GRANTS = st.lists(
    st.builds(
        Grant,
        st.sampled_from(["repository", "registry"]),
        REPOSITORIES,
        st.frozensets(st.sampled_from(["pull", "push", "delete", "*", "x"])),
    )
).map(tuple)


@given(NAMES, GRANTS, REPOSITORIES, st.sampled_from(sorted(ALL_ACTIONS)))
def test_no_token_allows_what_its_owner_may_not(
    name: str, grants: tuple[Grant, ...], repository: str, action: Action
) -> None:
    with_token = decide(POLICY, Identity(name, method="bearer", grants=grants), action, repository)
    without = decide(POLICY, Identity(name, method="basic"), action, repository)

    assert without.is_allowed or not with_token.is_allowed


WORDS = {"pull": {READ}, "push": {CREATE, UPDATE}, "delete": {DELETE}}


@pytest.mark.parametrize("words", [w for n in range(4) for w in combinations(WORDS, n)], ids=",".join)
@pytest.mark.parametrize("name", ["", "alice", "bob", "admin", "serving", "sly", "both"])
@pytest.mark.parametrize("repository", ["team/a", "prod/a", "prod/public/a", "open/a", "open/open"])
def test_a_token_allows_what_its_owner_may_as_far_as_it_is_for_that(
    name: str, repository: str, words: tuple[str, ...]
) -> None:
    limited = token(name, (repository, ",".join(words)))

    for action in ALL_ACTIONS:
        with_token = decide(POLICY, limited, action, repository)
        without = decide(POLICY, Identity(name, method="basic"), action, repository)
        is_for_this = any(action in WORDS[word] for word in words)
        assert with_token.is_allowed == (without.is_allowed and is_for_this)
        assert with_token.layers == (without.layers if with_token.is_allowed else None)


@pytest.mark.parametrize(
    ("identity", "type_", "name", "asked", "given"),
    [
        (user("alice"), "repository", "prod/a", "pull,push,delete", "pull,push"),
        (user("alice"), "repository", "prod/a", "*", "pull,push"),
        (user("admin"), "repository", "prod/a", "*", "pull,push,delete"),
        (user("serving"), "repository", "prod/a", "pull,push", "pull"),
        (user("jack"), "repository", "prod/a", "pull,push", "push"),
        (user("sly"), "repository", "prod/a", "*", "pull,delete"),
        (token("sly", ("prod/a", "push")), "repository", "prod/a", "*", ""),
        (ANONYMOUS, "repository", "prod/public/a", "pull,push", "pull"),
        (ANONYMOUS, "repository", "prod/a", "pull", ""),
        (user("admin"), "repository", "prod/a", "read,create,PULL", ""),
        (user("bob"), "registry", "catalog", "*", "*"),
        (user("bob"), "registry", "catalog", "pull", ""),
        (user("bob"), "registry", "other", "*", ""),
        (user("prom"), "registry", "metrics", "*,pull", "*"),
        (user("bob"), "registry", "metrics", "*", ""),
        (ANONYMOUS, "registry", "metrics", "*", ""),
        (user("admin"), "plugin", "prod/a", "pull", ""),
    ],
    ids=range(17),
)
def test_a_token_is_for_the_part_of_what_was_asked_that_the_policy_allows(
    identity: Identity, type_: str, name: str, asked: str, given: str
) -> None:
    actions = granted(POLICY, identity, type_, name, asked.split(","))

    assert actions == frozenset(filter(None, given.split(",")))


# ---- the file


def test_zots_block_is_taken_as_it_is() -> None:
    access = AccessControl.model_validate(
        {
            "groups": {"group1": {"users": ["jack", "john"]}},
            "repositories": {
                "prod/**": {
                    "policies": [
                        {
                            "users": ["alice"],
                            "groups": ["group1"],
                            "actions": ["read", "create", "update", "delete", "detectManifestCollision"],
                        }
                    ],
                    "defaultPolicy": ["read"],
                    "anonymousPolicy": [],
                },
                "*/llm-[0-9]?": {"anonymousPolicy": ["read"]},
            },
            "adminPolicy": {
                "users": ["admin"],
                "groups": [],
                "actions": ["read", "create", "update", "delete"],
            },
            "metrics": {"users": ["prom"], "anonymousPolicy": ["read"]},
        }
    )

    assert access.names_anybody


REFUSED = {
    "unknown key": ({"repository": {}}, "repository"),
    "unknown action": ({"repositories": {"a": {"defaultPolicy": ["write"]}}}, "read"),
    "unknown layer": (
        {"repositories": {"a": {"policies": [{"users": ["u"], "actions": ["read"], "layers": ["weights"]}]}}},
        "kitfile",
    ),
    "no layer": (
        {"repositories": {"a": {"policies": [{"users": ["u"], "actions": ["read"], "layers": []}]}}},
        "one layer at least",
    ),
    "layers and a push": (
        {
            "repositories": {
                "a": {"policies": [{"users": ["u"], "actions": ["read", "create"], "layers": ["docs"]}]}
            }
        },
        "actions: \\[read\\]",
    ),
    "conditions": (
        {
            "repositories": {
                "a": {
                    "policies": [
                        {"users": ["u"], "actions": ["read"], "conditions": [{"expression": "true"}]}
                    ]
                }
            }
        },
        "conditions",
    ),
    "nobody": ({"repositories": {"a": {"policies": [{"actions": ["read"]}]}}}, "users or groups"),
    "the empty name": (
        {"repositories": {"a": {"policies": [{"users": [""], "actions": ["read"]}]}}},
        "at least 1 character",
    ),
    "an upper-case pattern": ({"repositories": {"Team/*": {}}}, "lower case"),
    "a pattern with a slash at its end": ({"repositories": {"team/": {}}}, "slash"),
    "a pattern with a slash at its head": ({"repositories": {"/team/**": {}}}, "slash"),
    "alternatives": ({"repositories": {"{a,b}/**": {}}}, "an entry of its own"),
    "a pattern that leads out": ({"repositories": {"team/../b": {}}}, "patterns"),
    "no pattern": ({"repositories": {"": {}}}, "patterns"),
    "somebody who updates metrics": ({"metrics": {"anonymousPolicy": ["update"]}}, "read"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_mistake_in_the_file_is_refused_and_said(what: str) -> None:
    document, message = REFUSED[what]

    with pytest.raises(ValidationError, match=message):
        AccessControl.model_validate(document)


@pytest.mark.parametrize(
    "access",
    [
        {"repositories": {"a": {"defaultPolicy": ["read"]}}},
        {"repositories": {"a": {"policies": [{"users": ["u"], "actions": ["read"]}]}}},
        {"groups": {"g": {"users": ["u"]}}, "adminPolicy": {"groups": ["g"], "actions": ["read"]}},
        {"metrics": {"users": ["u"]}},
    ],
    ids=range(4),
)
def test_a_policy_for_somebody_needs_a_way_to_be_somebody(access: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="nobody can log in"):
        Config.model_validate({"http": {"accessControl": access}})

    auth = {"htpasswd": {"path": "users"}}
    assert Config.model_validate({"auth": auth, "http": {"accessControl": access}}).http.accessControl


def test_a_policy_for_everybody_needs_no_accounts() -> None:
    access = {"repositories": {"public/**": {"anonymousPolicy": ["read"]}}}

    assert Config.model_validate({"http": {"accessControl": access}}).http.accessControl


def test_a_policy_can_come_from_the_environment() -> None:
    environ = {
        "MODELREG_AUTH_HTPASSWD_PATH": "users",
        "MODELREG_HTTP_ACCESSCONTROL": '{"repositories": {"**": {"anonymousPolicy": ["read"]}}}',
        "MODELREG_HTTP_ACCESSCONTROL_ADMINPOLICY_USERS_0": "root",
    }

    access = load_config(environ=environ).config.http.accessControl

    assert access is not None
    assert access.repositories["**"].anonymousPolicy == ["read"]
    assert access.adminPolicy.users == ["root"]
