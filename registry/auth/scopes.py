"""What a token is asked to be for: `repository:team/llm:pull,push`; parse and format; pure.

Source: CNCF Distribution, "Token Scope Documentation". The class of a type, `repository(plugin)`, is deprecated and ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from registry.auth.identity import Grant
from registry.auth.tokens import ACTIONS, is_scope_name

SCOPES_MAX: Final = 50
"""L-24."""

# A name may hold a colon, as in host:port/name: the type ends at the first, the actions begin behind the last.
_SCOPE = re.compile(
    r"(?P<type>[a-z0-9]{1,32})(?:\([a-z0-9]{1,32}\))?:(?P<name>.{1,512}):(?P<actions>[a-z,*]{1,128})",
    re.ASCII,
)


def parse_scopes(texts: Iterable[str]) -> list[Grant]:
    """The scopes in `texts`, each of which may hold several with spaces between.

    What is no scope that we could ever grant is left out: another type, a name that no repository has, unknown actions.
    Scopes for the same thing become one.
    """
    found: dict[tuple[str, str], frozenset[str]] = {}
    for text in texts:
        for word in text.split(" "):
            scope = _parse(word)
            if scope is not None:
                key = (scope.type, scope.name)
                found[key] = found.get(key, frozenset()) | scope.actions
    return [Grant(kind, name, actions) for (kind, name), actions in found.items()]


def count_scopes(texts: Iterable[str]) -> int:
    """How many words stand in `texts`, whatever they mean."""
    return sum(len(text.split()) for text in texts)


def format_grant(grant: Grant) -> str:
    return f"{grant.type}:{grant.name}:{','.join(sorted(grant.actions))}"


def _parse(word: str) -> Grant | None:
    match = _SCOPE.fullmatch(word)
    if match is None or not is_scope_name(match["type"], match["name"]):
        return None
    actions = frozenset(match["actions"].split(",")) & ACTIONS
    return Grant(match["type"], match["name"], actions) if actions else None
