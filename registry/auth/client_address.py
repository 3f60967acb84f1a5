"""Whose request it is, by address: the peer's, or what trusted proxies say; pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

FORWARDED_FOR: Final = "X-Forwarded-For"

# A longer chain of proxies is a forged one.
_HOPS_MAX = 32
# To parse addresses costs several microseconds. A client can make as many as it likes, so there is a limit to both.
_REMEMBERED_MAX: Final = 1024
_REMEMBERED_LENGTH_MAX: Final = 100


def client_address(peer: str, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str:
    """The address that is not one of our proxies and nearest to us; `peer` where that cannot be told.

    Args:
        peer: of the connection; "" where there is none.
        forwarded_for: the `X-Forwarded-For` fields: each proxy adds whom it heard from, at the end. What stands before
            the last hop that is not ours can be invented, and is not looked at.
    """
    if not _is_trusted(peer, trusted):
        return peer
    hops = [hop.strip() for field in forwarded_for for hop in field.split(",")]
    address = peer
    for hop in [*reversed(hops[-_HOPS_MAX:])]:
        parsed = _parsed(hop)
        if not _is_trusted(address, trusted) or parsed is None:
            break
        address = str(parsed)  # and no more: what stands behind a % could be any text
    return address


class ClientAddresses:
    """From where requests are, for all that is told or counted of them: logs, the journal, limits. One for each worker.

    Args:
        trusted_proxies: `limits.trustedproxies`.
    """

    def __init__(self, trusted_proxies: Sequence[str]) -> None:
        self._trusted = [ipaddress.ip_network(text) for text in trusted_proxies]
        self._remembered = lru_cache(_REMEMBERED_MAX)(self._find)

    def address_of(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """`client_address`, for the proxies that are configured."""
        if not self._trusted or not forwarded_for:
            return peer
        if sum(map(len, forwarded_for)) > _REMEMBERED_LENGTH_MAX:
            return self._find(peer, tuple(forwarded_for))
        return self._remembered(peer, tuple(forwarded_for))

    def is_proxy(self, address: str) -> bool:
        return _is_trusted(address, self._trusted)

    def _find(self, peer: str, forwarded_for: tuple[str, ...]) -> str:
        return client_address(peer, forwarded_for, self._trusted)


def _is_trusted(address: str, trusted: Sequence[Network]) -> bool:
    parsed = _parsed(address)
    return parsed is not None and any(parsed in network for network in trusted)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return parsed.ipv4_mapped or parsed if isinstance(parsed, ipaddress.IPv6Address) else parsed
