"""The door: who sent a request, and whether they may do what it asks. Knows no route; one for each worker."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kitspec.errors import Denied, Unauthorized
from registry.auth.identity import ANONYMOUS, Authenticator, Identity, Scope
from registry.auth.policy import Action, Decision, Policy, decide, without_limits

if TYPE_CHECKING:
    from aiohttp import web

_LOG_IN = "credentials are needed: log in to the registry"


class CredentialsNeeded(Unauthorized):
    """Better credentials would help: the answer says which.

    The message is the same whatever was asked for: nobody without credentials learns what there is (V-19).

    Attributes:
        scope: what they are needed for.
        error: of RFC 6750: `invalid_token`, `insufficient_scope`, or None where there were none.
    """

    def __init__(self, message: str, *, scope: Scope, error: str | None = None) -> None:
        super().__init__(message)
        self.scope = scope
        self.error = error


class Guard:
    """
    Args:
        authenticator: None where there is no authentication: then everybody is anonymous.

    Attributes:
        policy: may be replaced at any time; every request is decided by the one that is there when it begins.
    """

    def __init__(self, policy: Policy, authenticator: Authenticator | None = None) -> None:
        self.policy = policy
        self._authenticator = authenticator

    async def identify(self, request: web.BaseRequest, scope: Scope) -> Identity:
        """Who sent a request.

        Args:
            scope: what it needs, to be named where the credentials will not do.

        Raises:
            CredentialsNeeded: they are malformed, wrong or expired.
            TooManyRequests: too many wrong ones came before.
        """
        if self._authenticator is None:
            return ANONYMOUS
        try:
            return await self._authenticator.identify(request)
        except Unauthorized as error:
            raise CredentialsNeeded(error.message, scope=scope, error="invalid_token") from error

    def is_still(self, identity: Identity) -> bool:
        """Whether the credentials that were proof of an identity still are; without any there is nothing to be revoked.

        What is not in the request's bytes, as a client's certificate, is never said to be.
        """
        if identity.method == "anonymous":
            return True
        if self._authenticator is None or identity.method == "certificate":
            return False
        if identity.expires is not None and identity.expires <= time.time():
            return False
        return self._authenticator.is_still(identity)

    def decide(self, identity: Identity, action: Action, repository: str = "") -> Decision:
        return decide(self.policy, identity, action, repository)

    def require(
        self, identity: Identity, actions: Sequence[Action], repository: str, scope: Scope
    ) -> Decision:
        """The decision on the first of `actions` that is allowed.

        Raises:
            CredentialsNeeded: none is, and other credentials, or another token, might be for one.
            Denied: none is.
        """
        for action in actions:
            decision = self.decide(identity, action, repository)
            if decision.is_allowed:
                return decision
        if identity.method == "anonymous" and self._authenticator is not None:
            raise CredentialsNeeded(_LOG_IN, scope=scope)
        # A token can be exchanged for a better one, if the policy or the token of somebody would allow that.
        if identity.grants is not None:
            unlimited = without_limits(identity)
            if any(self.decide(unlimited, action, repository).is_allowed for action in actions):
                message = "the token is not for this; a token for the scope in WWW-Authenticate is needed"
                raise CredentialsNeeded(message, scope=scope, error="insufficient_scope")
            if identity.is_anonymous:
                raise CredentialsNeeded(_LOG_IN, scope=scope, error="insufficient_scope")
        raise Denied(_denial(identity, actions, repository))

    def challenges(self, error: Unauthorized) -> Sequence[str]:
        """The values of `WWW-Authenticate` that go with an error; none where there is no authentication."""
        if self._authenticator is None:
            return ()
        if isinstance(error, CredentialsNeeded):
            return self._authenticator.challenge(scope=error.scope, error=error.error)
        return self._authenticator.challenge(scope=(), error=None)


def _denial(identity: Identity, actions: Sequence[Action], repository: str) -> str:
    who = f"{identity.name!a}" if not identity.is_anonymous else "nobody in particular"
    what = " or ".join(actions)
    where = f" in {repository}" if repository else ""
    return f"{who} may not {what}{where}; whoever runs the registry grants it (http.accessControl)"
