"""Logging in with a name and a password of the htpasswd file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from kitspec.errors import TooManyRequests, Unauthorized
from registry.auth.bruteforce import Backoff
from registry.auth.htpasswd import Users
from registry.auth.http_auth import BasicCredentials
from registry.auth.login import Login
from registry.auth.password_checks import PasswordChecks
from registry.logs import RateGate, log_event

logger = logging.getLogger(__name__)

# In a flood of guesses; the others are counted.
_LOGGED_PER_SECOND = 10

WRONG = "the user name or the password is wrong"
"""Said whichever of the two it is."""

BINDING = "password:"


class Passwords:
    """The users of the htpasswd file.

    Args:
        users: the file as it is now.
    """

    def __init__(self, users: Callable[[], Users], checks: PasswordChecks, backoff: Backoff) -> None:
        self._users = users
        self._checks = checks
        self._backoff = backoff
        self._gate = RateGate(_LOGGED_PER_SECOND)

    def is_user(self, name: str) -> bool:
        return self._users().hash_of(name) is not None

    def is_version(self, name: str, version: str) -> bool:
        """Whether the password of `name` is still the one that it was when `version` was taken."""
        return self._users().version_of(name) == version

    async def login(self, credentials: BasicCredentials, key: bytes, address: str) -> Login:
        """Check a password.

        Args:
            key: the same for the same credentials: those that come at once are checked once.
            address: of the client, for which wrong ones are counted.

        Raises:
            Unauthorized: nobody has this name and password.
            TooManyRequests: wrong ones came before from this address, or too many are being checked.
        """
        users = self._users()
        user = credentials.user
        is_right = await self._attempt(
            key, user, address, lambda: users.is_password(user, credentials.password)
        )
        stored = users.hash_of(user)
        if not is_right or stored is None:
            self._log_refusal(user, address)
            raise Unauthorized(WRONG)
        return Login(
            user,
            method="basic",
            binding=f"{BINDING}{users.version_of(user)}",
            is_current=lambda: self._users().hash_of(user) == stored,
        )

    async def _attempt(self, key: bytes, user: str, address: str, check: Callable[[], bool]) -> bool:
        if self._checks.is_pending(key):
            return await self._checks.run(key, check)
        if wait_s := self._backoff.wait_s(address, user):
            raise TooManyRequests(
                f"too many wrong passwords from this address; the next may come in {wait_s} s",
                retry_after_s=wait_s,
            )
        self._backoff.begin(address, user)
        try:
            is_right = await self._checks.run(key, check)
        except TooManyRequests:
            self._backoff.was_nothing(address, user)
            raise
        if is_right:
            self._backoff.was_right(address, user)
        return is_right

    def _log_refusal(self, user: str, address: str) -> None:
        if self._gate.admit(time.time()):
            suppressed = self._gate.take_held()
            log_event(
                logger, logging.WARNING, "login.refused", user=user, remote=address, suppressed=suppressed
            )
