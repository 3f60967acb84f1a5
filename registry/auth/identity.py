"""Who a caller is: what authentication finds out and policy decides on.

Nothing here checks anything. An `Identity` is made by an `Authenticator`, and by nobody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aiohttp import web

Scope = Sequence[tuple[str, str, tuple[str, ...]]]
"""What a token would have to be for: (type, name, actions), as in `repository:team/llm:pull,push`."""


@dataclass(frozen=True, slots=True)
class Grant:
    """One entry of a token's `access`.

    Attributes:
        type: `repository` or `registry`.
        name: of the repository, or `catalog` or `metrics`; compared as text, never as a pattern.
        actions: of the token specification: `pull`, `push`, `delete`, `*`.
    """

    type: str
    name: str
    actions: frozenset[str]


@dataclass(frozen=True, slots=True)
class Identity:
    """Whoever sent a request.

    Attributes:
        name: "" for anonymous.
        groups: those that the authenticator knows of; policy adds the ones of its own configuration.
        method: "anonymous", "basic", "bearer", "apikey", "certificate" or "oidc".
        grants: what a token is limited to; None: all that the policy allows.
        expires: when the proof ends, in seconds since 1970; None: not by itself. Asked at a request's start only.
    """

    name: str
    groups: frozenset[str] = frozenset()
    method: str = "anonymous"
    grants: tuple[Grant, ...] | None = None
    expires: float | None = None

    @property
    def is_anonymous(self) -> bool:
        return not self.name


ANONYMOUS = Identity("")


class Authenticator(Protocol):
    """Finds out who sent a request."""

    async def identify(self, request: web.BaseRequest) -> Identity:
        """Who sent `request`; `ANONYMOUS` where it carries no credentials.

        Raises:
            Unauthorized: the credentials are malformed, wrong or no longer good.
            TooManyRequests: too many wrong ones came before.
        """
        ...

    def is_still(self, identity: Identity) -> bool:
        """Whether the same credentials would still be proof of `identity`; False where that cannot be said at once.

        Asked, without a pause for anything, each time an answer is given that was kept for these very credentials
        (`answer_memo.py`): a password that was changed or a key that was revoked must make it False. `expires` is looked at by
        whoever asks. An implementation that does not know says False, and `identify` is asked as ever.
        """
        ...

    def challenge(self, *, scope: Scope, error: str | None) -> Sequence[str]:
        """The values of `WWW-Authenticate` that say how to be let in; at least one.

        Args:
            scope: what the request needs.
            error: `invalid_token`, `insufficient_scope`, or None where no credentials were sent.
        """
        ...
