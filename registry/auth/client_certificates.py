"""Names of clients by their certificates, which TLS has verified against `http.tls.clientcas`; pure.

The mapping is explicit: one place of the certificate is the name, and a certificate that has none there, or several, is
nobody. Source: RFC 5280 4.1.2.6 (subject), 4.2.1.6 (alternative names), as `ssl.SSLSocket.getpeercert` gives them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from ssl import cert_time_to_seconds
from typing import Any, Final

from registry.auth.auth_config import Clientcertificates
from registry.auth.login import Login
from registry.auth.tokens import is_user_name

_KIND_OF_ALTERNATIVE: Final = {"dns": "DNS", "email": "email", "uri": "URI"}


def login_of_certificate(certificate: Mapping[str, Any], rule: Clientcertificates) -> Login | None:
    """Whoever the certificate stands for; None for nobody.

    Args:
        certificate: as `getpeercert()` has it; empty where the client showed none.
    """
    names = set(_names_in(certificate, rule.name))
    if len(names) != 1:
        return None
    name = rule.prefix + names.pop()
    expires = cert_time_to_seconds(certificate["notAfter"])
    # TLS looked when the connection began, which may be long ago.
    if not is_user_name(name) or expires <= time.time():
        return None
    return Login(name, method="certificate", expires=float(expires))


def _names_in(certificate: Mapping[str, Any], place: str) -> Iterator[str]:
    if place == "commonname":
        for relative_name in certificate.get("subject", ()):
            yield from (value for attribute, value in relative_name if attribute == "commonName" and value)
        return
    wanted = _KIND_OF_ALTERNATIVE[place]
    yield from (value for kind, value in certificate.get("subjectAltName", ()) if kind == wanted and value)
