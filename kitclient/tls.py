"""TLS to a registry: whom we trust, what we show of ourselves and to whom, and what a failure means to a user.

The registry's own scheme, host and port get our certificate if they ask for one, and may go unverified if the user says so.
Where a registry sends us (its store, its token service) is verified always, and is shown no certificate: it would prove
who we are to somebody whom the registry chose.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kitclient.errors import TransportRefused

# OpenSSL's X509_V_ERR_… (openssl-verification-options, "x509_vfy.h"), and what is to be done.
_ANOTHER = "the registry needs another certificate"
_AUTHORITY = "name its authority with --tls-cert FILE"
_UNKNOWN_ISSUER = (
    "no authority that is trusted here has issued it, or the server leaves out an intermediate certificate"
)
_REASONS = {
    9: ("it is not valid yet", "check the clock of this machine"),
    10: ("it, or a certificate above it, has expired", _ANOTHER),
    18: ("it is self-signed", _AUTHORITY),
    19: ("its authority is not trusted here: self-signed certificate in its chain", _AUTHORITY),
    20: (_UNKNOWN_ISSUER, _AUTHORITY),
    21: (_UNKNOWN_ISSUER, _AUTHORITY),
    62: ("it is for another host", "check the registry's name"),
    64: ("it is for another address", "use the registry's name"),
    66: ("its key is too weak", _ANOTHER),
    67: ("the key of its authority is too weak", _ANOTHER),
    68: ("it, or a certificate above it, is signed with a weak hash", _ANOTHER),
}
# What OpenSSL makes of a peer's alert, in an error's `reason`; of an alert without a word of its own the text is shown.
_ALERTS = {
    "CERTIFICATE_REQUIRED": "it wants to see a certificate of ours: give --cert FILE and --key FILE",
    "UNKNOWN_CA": "it does not trust the authority of our certificate (--cert)",
    "BAD_CERTIFICATE": "it does not take our certificate (--cert)",
    "CERTIFICATE_EXPIRED": "our certificate (--cert) has expired",
    "CERTIFICATE_REVOKED": "our certificate (--cert) has been revoked",
    "HANDSHAKE_FAILURE": "it speaks TLS that is not spoken here, or wants a certificate of ours (--cert, --key)",
    "PROTOCOL_VERSION": "it speaks no version of TLS that is safe",
    "UNSUPPORTED_PROTOCOL": "it speaks no version of TLS that is safe",
}


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """How a registry's certificate is checked, and our own that it may ask for.

    Attributes:
        verify: off means that anybody can be the registry.
        ca_files: certificates to trust besides the system's.
        client_key: of the certificate; None when it is in the same file.
    """

    verify: bool = True
    ca_files: tuple[Path, ...] = ()
    client_certificate: Path | None = None
    client_key: Path | None = None


@dataclass(frozen=True, slots=True)
class TlsContexts:
    """What the HTTP library is given; True is its own context, with the system's authorities.

    Attributes:
        own: for the registry itself.
        elsewhere: for where it sends us.
    """

    own: ssl.SSLContext | bool = True
    elsewhere: ssl.SSLContext | bool = True


def with_host_files(options: TlsOptions, folder: Path) -> TlsOptions:
    """The options, and what a host's own folder adds to them, in the form of Docker's `certs.d`.

    Args:
        folder: every `*.crt` in it is an authority, a `*.cert` with the `*.key` of the same name is ours. It need not be there.

    Raises:
        TransportRefused: a certificate without its key.
    """
    authorities = tuple(sorted(folder.glob("*.crt")))
    options = replace(options, ca_files=options.ca_files + authorities)
    certificate = next(iter(sorted(folder.glob("*.cert"))), None)
    if certificate is None or options.client_certificate is not None:
        return options
    key = certificate.with_suffix(".key")
    if not key.exists():
        raise TransportRefused(f"{certificate} has no key beside it; wanted {key.name}")
    return replace(options, client_certificate=certificate, client_key=key)


def tls_contexts(options: TlsOptions) -> TlsContexts:
    """Read the files; slow: the system's certificates are many.

    Raises:
        TransportRefused: a file cannot be used.
    """
    if options == TlsOptions():
        return TlsContexts()
    elsewhere = _trusting(options.ca_files) if options.ca_files else True
    own = _trusting(options.ca_files)
    if options.client_certificate is not None:
        _show(own, options.client_certificate, options.client_key)
    if not options.verify:
        own.check_hostname = False
        own.verify_mode = ssl.CERT_NONE
    return TlsContexts(own, elsewhere)


def _trusting(ca_files: tuple[Path, ...]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for path in ca_files:
        try:
            context.load_verify_locations(cafile=path)
        except OSError as error:
            raise TransportRefused(
                f"{path} holds no certificate that can be used: {_reason(error)}"
            ) from error
    return context


def _show(context: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    def no_passphrase() -> str:
        # Without this the library asks at the terminal, and waits.
        raise TransportRefused(f"the key {key or certificate} is encrypted; give one that is not")

    try:
        context.load_cert_chain(certificate, key, password=no_passphrase)
    except OSError as error:
        shown = f"{certificate} with the key {key}" if key is not None else f"{certificate} as its own key"
        raise TransportRefused(f"{shown} cannot be used: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    return str(reason).replace("_", " ").lower()


def tls_error_of(error: BaseException | None) -> ssl.SSLError | None:
    """The TLS error that an error of the HTTP library stands for."""
    for one in _origins(error):
        if isinstance(one, ssl.SSLError):
            return one
    return None


def _origins(error: BaseException | None) -> Iterator[BaseException | None]:
    while error is not None:
        # The HTTP library's errors are TLS errors by their class, and say what was the matter in an attribute.
        yield getattr(error, "certificate_error", None)
        yield getattr(error, "os_error", None)
        yield error
        error = error.__cause__


def explained(error: ssl.SSLError, host: str) -> str:
    """What an error of TLS with `host` means to a user, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        words = error.verify_message or str(error)
        reason, advice = _REASONS.get(error.verify_code, (words, _ANOTHER))
        return f"the certificate of {host} is not trusted: {reason} ({words.rstrip('.')}); {advice}"
    reason = error.reason or str(error)
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER" in reason:
        return f"{host} gave an HTTP response to an HTTPS client; if it speaks plain http, use --plain-http"
    for word, meaning in _ALERTS.items():
        if reason.endswith(word):
            return f"{host} ended the TLS connection: {meaning}"
    return f"TLS with {host} failed: {_reason(error)}"
