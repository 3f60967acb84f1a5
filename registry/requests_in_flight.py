"""How many requests of one address, and of one user, are answered at a time: no more than that, whoever else asks.

A request counts from the end of its header until the last byte of its answer has left, or nobody is there to take it. Counts
are of one worker. An answer that was kept (`answer_memo.py`) is given within one step of the event loop, so it is never in flight
beside another: it is not counted. Nor are questions about health, which must not go unanswered because a client asks for much.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final

from kitspec.errors import TooManyRequests
from registry.auth.client_address import ClientAddresses
from registry.config import Limits
from registry.http_limits import address_group

# To parse addresses costs several microseconds.
_REMEMBERED_MAX: Final = 1024


class RequestsInFlight:
    """One for each worker.

    Args:
        on_refusal: told for each request that is refused what there were too many of: "address" or "user".
    """

    def __init__(self, limits: Limits, on_refusal: Callable[[str], None]) -> None:
        self._addresses = ClientAddresses(limits.trustedproxies)
        self._known_key = lru_cache(_REMEMBERED_MAX)(self._find_key)
        self._on_refusal = on_refusal
        self.addresses = Share("address", limits.requestsperaddress, "limits.requestsperaddress")
        self.users = Share("user", limits.requestsperuser, "limits.requestsperuser")

    def key_of(self, address: str) -> str:
        """Whom a request from this address counts for, as for wrong passwords; "" for nobody: a trusted proxy that does not say."""
        return self._known_key(address)

    def _find_key(self, address: str) -> str:
        return "" if self._addresses.is_proxy(address) else address_group((address,))

    def request(self) -> RequestInFlight:
        """One more, that counts for nobody yet. Whoever takes it ends it."""
        return RequestInFlight(self)

    def refused(self, share: Share) -> None:
        self._on_refusal(share.kind)


class Share:
    """What each of a kind, address or user, has in flight.

    Args:
        allowed: at a time; 0 for any.
        setting: that says so.
    """

    def __init__(self, kind: str, allowed: int, setting: str) -> None:
        self.kind = kind
        self.allowed = allowed
        self._setting = setting
        self.in_flight: dict[str, int] = {}

    def is_used_up(self, key: str) -> bool:
        return self.in_flight.get(key, 0) >= self.allowed

    def refusal(self, key: str) -> TooManyRequests:
        count = self.in_flight[key]
        return TooManyRequests(
            f"{count} requests of the {self.kind} {key} are being answered, and {self.allowed} are allowed at a time: "
            f"send fewer at once, try again when some have ended, or ask the operator for more ({self._setting})",
            detail={"in_flight": count, "allowed": self.allowed},
        )

    def add(self, key: str) -> None:
        self.in_flight[key] = self.in_flight.get(key, 0) + 1

    def remove(self, key: str) -> None:
        left = self.in_flight[key] - 1
        if left:
            self.in_flight[key] = left
        else:
            del self.in_flight[key]


class RequestInFlight:
    """A request, and for whom it counts."""

    __slots__ = ("_counted", "_of")

    def __init__(self, of: RequestsInFlight) -> None:
        self._of = of
        self._counted: list[tuple[Share, str]] = []

    def count_for_address(self, key: str) -> None:
        """
        Args:
            key: of `key_of`.

        Raises:
            TooManyRequests: it has too many already; this one does not count.
        """
        self._count(self._of.addresses, key)

    def count_for_user(self, name: str) -> None:
        """
        Args:
            name: "" for somebody who has none.

        Raises:
            TooManyRequests: as `count_for_address`.
        """
        self._count(self._of.users, name)

    def _count(self, share: Share, key: str) -> None:
        if not key or not share.allowed:
            return
        if share.is_used_up(key):
            self._of.refused(share)
            raise share.refusal(key)
        share.add(key)
        self._counted.append((share, key))

    def end(self) -> None:
        """It is answered, or never will be."""
        for share, key in self._counted:
            share.remove(key)
        self._counted.clear()
