"""Writes that a browser sends for a page of somebody else: it adds a remembered password or a certificate by itself.

A page may send a POST anywhere without asking, as a form does; to a registry on this machine, too, where nobody logs in.
Clients that are no browsers send neither of these fields.

Not seen here: a page that had its own name lead to us (DNS rebinding). Its browser takes us for the page's site and says so,
and `Host` is the page's. Only a login keeps it out, or a proxy that knows our names (docs/threat-model.md).

Source: Fetch Metadata (Sec-Fetch-Site), RFC 6454 (Origin).
"""

from __future__ import annotations

from collections.abc import Mapping

from kitspec.errors import Denied

_OWN_SITES = frozenset({"same-origin", "none"})  # none: what somebody typed
_SHOWN_LENGTH_MAX = 100


def refuse_other_sites(headers: Mapping[str, str], own_origin: str | None) -> None:
    """
    Args:
        own_origin: the address that browsers have us under (`http.host`), where a proxy changes `Host`.

    Raises:
        Denied: the browser says that a page elsewhere has the request sent.
    """
    origin = headers.get("Origin")
    site = headers.get("Sec-Fetch-Site")
    # The browser's own word counts more; older ones, and plain HTTP, have only the other field.
    is_other = (
        site not in _OWN_SITES
        if site is not None
        else origin is not None and not _is_ours(origin, headers, own_origin)
    )
    if is_other:
        seen = "unknown" if origin is None else f"{origin[:_SHOWN_LENGTH_MAX]!a}"
        raise Denied(
            f"a page of another site (Origin {seen}) may not change anything here; its user's client, or a page under this "
            "registry's own address, may (http.host, where a proxy changes Host)"
        )


def _is_ours(origin: str, headers: Mapping[str, str], own_origin: str | None) -> bool:
    # The scheme is not compared: behind a proxy we do not know with which one it was asked.
    authority = origin.partition("://")[2].lower()
    own = (headers.get("Host", ""), (own_origin or "").partition("://")[2])
    return authority != "" and authority in {text.lower() for text in own}
