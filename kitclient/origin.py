"""Where a URL that a server sent may take us: the rules that keep credentials and requests where they belong.

A registry may send us elsewhere: a redirect of a blob to its store, an upload's `Location`, a token service's realm.
We go there without credentials, over http or https, never from https to http, and never into our own network: an
address that is loopback, private or link-local is taken only from a registry that is itself at such an address.
Names are not resolved for this: a company's store may well have a private address.
"""

from __future__ import annotations

import ipaddress
import re

from yarl import URL

from kitclient.errors import ServerMisbehaved

# Nothing that two parsers could read differently: no controls, spaces, quotes, backslashes; the rest as it came,
# since a presigned URL is only good to the byte.
_CLEAN_URL = re.compile(r"[!#-;=?-\[\]_a-z~%]{1,16384}", re.ASCII)
_LAST_LABEL_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9a-fA-F]*)\.?", re.ASCII)


def is_same_origin(one: URL, other: URL) -> bool:
    """Same scheme, host and port, default ports filled in."""
    return (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port)


def follow(base: URL, target: str, *, origin: URL, what: str) -> URL:
    """The URL that `target` means at `base`, if we may go there.

    Args:
        origin: of the registry that we talk to.
        what: the name of the field, for the message.

    Raises:
        ServerMisbehaved: we may not.
    """
    if _CLEAN_URL.fullmatch(target) is None:
        raise ServerMisbehaved(f"{origin.host} sent a {what} that is not a clean URL: {target[:200]!a}")
    try:
        url = base.join(URL(target, encoded=True)).with_fragment(None)
        host, port = url.host, url.port
    except ValueError as error:
        raise ServerMisbehaved(f"{origin.host} sent a {what} that is not a URL: {target[:200]!a}") from error
    # The query may be a signature: it stays out of messages.
    shown = str(url.with_query(None))[:200]
    if url.scheme not in {"http", "https"} or not host or port is None:
        raise ServerMisbehaved(f"{origin.host} sent a {what} to {shown!a}; only http and https are followed")
    if url.user is not None or url.password is not None:
        raise ServerMisbehaved(f"{origin.host} sent a {what} with a user name in it")
    if url.scheme == "http" and (base.scheme == "https" or origin.scheme == "https"):
        raise ServerMisbehaved(f"{origin.host} sent a {what} from https down to {shown!a}; refused")
    if host != origin.host and is_local(host) and not is_local(origin.host or ""):
        raise ServerMisbehaved(f"{origin.host} sent a {what} to the local address {shown!a}; refused")
    return url


def is_local(host: str) -> bool:
    """Whether a host names this machine or its network, in any spelling of an address."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        # 127.1, 2130706433 and 0x7f000001 are addresses to the resolver, though to no standard.
        return _LAST_LABEL_NUMERIC.fullmatch(name) is not None
    mapped = getattr(address, "ipv4_mapped", None)
    return not (mapped or address).is_global
