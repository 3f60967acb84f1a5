"""Credentials that were found right a moment ago, so that not every request pays for a password or a signature.

What is kept is an HMAC under a key of this process: memory holds neither passwords nor tokens. Only what was right is
kept. Each use asks anew whether what it rested on is still so: a password that was changed, a user who was removed, a key
that was revoked are not let in by their memory.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from registry.auth.http_auth import BasicCredentials, Credentials
from registry.auth.login import Login

AGE_MAX_S: Final = 300.0
ENTRIES_MAX: Final = 10_000


class CredentialMemo:
    """One for each worker.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._process_key = secrets.token_bytes(32)
        self._logins: OrderedDict[bytes, tuple[float, Login]] = OrderedDict()

    def key_of(self, credentials: Credentials) -> bytes:
        """Under which these credentials are kept; tells nothing of them."""
        if isinstance(credentials, BasicCredentials):
            # A name holds no NUL, so two pairs never make the same text.
            text = b"basic\0%b\0%b" % (credentials.user.encode(), credentials.password)
        else:
            text = b"bearer\0" + credentials.text.encode()
        return hmac.digest(self._process_key, text, "sha256")

    def find(self, key: bytes) -> Login | None:
        """The login that these credentials were, if that is still so."""
        kept = self._logins.get(key)
        if kept is None:
            return None
        until, login = kept
        if self._clock() >= until or not login.is_current():
            del self._logins[key]
            return None
        self._logins.move_to_end(key)
        return login

    def keep(self, key: bytes, login: Login, *, age_s: float = AGE_MAX_S) -> None:
        """Remember a login for `age_s`, and not beyond the end of its proof."""
        until = self._clock() + min(age_s, AGE_MAX_S)
        if login.expires is not None:
            until = min(until, login.expires)
        self._logins[key] = (until, login)
        self._logins.move_to_end(key)
        while len(self._logins) > ENTRIES_MAX:
            self._logins.popitem(last=False)
