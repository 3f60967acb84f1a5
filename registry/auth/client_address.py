"""Whose request it is, by address: the peer's, or what trusted proxies say; pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# A longer chain of proxies is a forged one.
_HOPS_MAX = 32


def client_address(peer: str, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str:
    """The address that is not one of our proxies and nearest to us; `peer` where that cannot be told.

    Args:
        peer: of the connection; "" where there is none.
        forwarded_for: the `X-Forwarded-For` fields: each proxy adds whom it heard from, at the end. What stands before
            the last hop that is not ours can be invented, and is not looked at.
    """
    hops = [hop.strip() for field in forwarded_for for hop in field.split(",")]
    address = peer
    for hop in [*reversed(hops[-_HOPS_MAX:])]:
        if not _is_trusted(address, trusted) or _parsed(hop) is None:
            break
        address = hop
    return address


def _is_trusted(address: str, trusted: Sequence[Network]) -> bool:
    parsed = _parsed(address)
    return parsed is not None and any(parsed in network for network in trusted)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return parsed.ipv4_mapped or parsed if isinstance(parsed, ipaddress.IPv6Address) else parsed
