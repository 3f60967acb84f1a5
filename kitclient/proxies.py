"""Which proxy stands between us and a host: the one that was given, else the environment's."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import urllib.request

from yarl import URL

from kitclient.errors import TransportRefused
from kitclient.origin import is_local


class Proxies:
    """HTTP proxies; their name and password, if any, stand in their URL and are shown to them alone.

    Args:
        given: for every host. None takes `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`, in lower case too, and none between
            us and this machine or its network by address.
    """

    def __init__(self, given: str | None) -> None:
        self._given = _parsed(given) if given else None

    def find(self, url: URL) -> URL | None:
        """The proxy on the way to a URL, if any.

        Raises:
            TransportRefused: the environment names something that is none.
        """
        if self._given is not None:
            return self._given
        host = url.host or ""
        if is_local(host) or urllib.request.proxy_bypass(f"{host}:{url.port}") or _is_exempt(host):
            return None
        proxy = urllib.request.getproxies().get(url.scheme)
        return _parsed(proxy) if proxy else None


def _parsed(text: str) -> URL:
    # Its address may hold a password: it is not quoted.
    with contextlib.suppress(ValueError):
        url = URL(text if "://" in text else f"http://{text}")
        if url.scheme in {"http", "https"} and url.host:
            return url
    raise TransportRefused("the proxy is not usable: wanted http://host:port, or https://")


def _is_exempt(host: str) -> bool:
    """Whether `NO_PROXY` names a network (CIDR) that the address is in; names and addresses the library knows."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for text in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(","):
        network, slash, _ = text.strip().partition("/")
        try:
            if network and slash and address in ipaddress.ip_network(text.strip(), strict=False):
                return True
        except ValueError:
            continue
    return False
