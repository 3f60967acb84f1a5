"""TLS of the listening port: `http.tls` as a context, whose certificate is followed while it serves.

A certificate and its key are read once, checked in a context of their own, and only then loaded into the one that serves:
OpenSSL takes the certificate before it finds that the key belongs to another one. Connections that are open keep what they
began with. What cannot be used changes nothing. Other changes of `http.tls` are changes of the configuration (reload.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from registry.config import Config, Tls
from registry.logs import log_event

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S: Final = 2.0
# A chain of ten certificates with keys of 16384 bits is a third of that.
_FILE_SIZE_MAX: Final = 256 * 1024
_HSTS: Final = "Strict-Transport-Security"
# A year; not of subdomains, which may be somebody else's.
_HSTS_VALUE: Final = "max-age=31536000"


class TlsUnusable(Exception):
    """Files of `http.tls` cannot be used.

    Attributes:
        problems: one line each, beginning with the path of the key.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


@dataclass(frozen=True, slots=True)
class KeyPair:
    """The content of a certificate's and its key's file, checked to belong together. Blocks while it is read and loaded."""

    certificate: bytes
    key: bytes = field(repr=False)

    @classmethod
    def read(cls, certificate: Path, key: Path) -> KeyPair:
        """Raises: TlsUnusable."""
        contents: list[bytes] = []
        problems: list[str] = []
        for name, path in (("certificate", certificate), ("key", key)):
            try:
                contents.append(read_limited(path, _FILE_SIZE_MAX))
            except OSError as error:
                problems.append(f"http.tls.{name}: {path} cannot be read: {error.strerror or error}")
        if problems:
            raise TlsUnusable(*problems)
        pair = cls(*contents)
        pair.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        return pair

    def load_into(self, context: ssl.SSLContext) -> None:
        """Raises: TlsUnusable: `context` may then hold half of the pair."""
        _refuse_no_certificate(self.certificate)
        try:
            with _as_path(self.certificate) as certificate, _as_path(self.key) as key:
                context.load_cert_chain(certificate, key, password=_no_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise TlsUnusable(
                    "http.tls.key: belongs to another certificate than http.tls.certificate; give the two that were made together"
                ) from error
            if error.reason in {"EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"}:
                raise TlsUnusable(
                    f"http.tls.certificate: too weak for OpenSSL ({error.reason}); make a stronger one"
                ) from error
            raise TlsUnusable("http.tls.key: should be a private key in PEM, without a password") from error
        except _PasswordWanted as error:
            raise TlsUnusable(
                "http.tls.key: is encrypted, and nobody is here to type its password; decrypt it"
            ) from error


class _PasswordWanted(ValueError):
    pass


def _no_password() -> str:
    raise _PasswordWanted


def read_limited(path: Path, size_max: int) -> bytes:
    """A file of the operator's. Blocks. Raises: OSError: also when it has more than `size_max` bytes."""
    with path.open("rb") as file:
        content = file.read(size_max + 1)
    if len(content) > size_max:
        raise OSError(f"more than {size_max} bytes")
    return content


def _refuse_no_certificate(content: bytes) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=content.decode("latin-1"))
    except (ssl.SSLError, ValueError) as error:
        raise TlsUnusable(
            "http.tls.certificate: should be certificates in PEM, the server's own first"
        ) from error


@contextmanager
def _as_path(content: bytes) -> Iterator[str]:
    """A path that leads to `content` for as long as the block lasts, where possible without a disk: it may be a key."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
        try:
            os.set_blocking(descriptor, False)  # it never waits: this is memory
            os.write(descriptor, content)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    with tempfile.NamedTemporaryFile() as file:  # only its owner may read it
        file.write(content)
        file.flush()
        yield file.name


class ServerTls:
    """The context of a port, and the pair that it has loaded. Constructed in a thread: it reads files.

    Raises:
        TlsUnusable: with every problem.
    """

    def __init__(self, tls: Tls) -> None:
        assert tls.certificate is not None
        assert tls.key is not None
        self._files = (tls.certificate, tls.key)
        self._problems: tuple[str, ...] = ()
        self.context = context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = (
            ssl.TLSVersion.TLSv1_3 if tls.minimumtls == "tls1.3" else ssl.TLSVersion.TLSv1_2
        )
        context.set_alpn_protocols(["http/1.1"])
        problems = list(_trust(context, tls.clientcas))
        try:
            self._pair = KeyPair.read(*self._files)
        except TlsUnusable as error:
            problems += error.problems
        if problems:
            raise TlsUnusable(*problems)
        self._pair.load_into(context)
        if tls.clientcas:
            is_required = tls.clientauth == "require-and-verify-client-cert"
            context.verify_mode = ssl.CERT_REQUIRED if is_required else ssl.CERT_OPTIONAL

    async def follow(self) -> None:
        """Take over what the files say, every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        """Take over what the files say now. What they said before stays when that cannot be used, and the log says so once."""
        try:
            pair = await asyncio.to_thread(KeyPair.read, *self._files)
        except TlsUnusable as error:
            if error.problems != self._problems:
                self._problems = error.problems
                log_event(
                    logger,
                    logging.ERROR,
                    "tls.certificate.unusable",
                    problem=str(error),
                    effect="the certificate that was read before stays in force",
                )
            return
        if pair != self._pair:
            pair.load_into(
                self.context
            )  # no handshake may begin meanwhile, and it is checked: it takes no disk
            self._pair = pair
            log_event(logger, logging.INFO, "tls.certificate.read", path=str(self._files[0]))
        elif self._problems:
            log_event(logger, logging.INFO, "tls.certificate.restored", path=str(self._files[0]))
        self._problems = ()


def _trust(context: ssl.SSLContext, paths: list[Path]) -> Iterator[str]:
    for number, path in enumerate(paths):
        try:
            context.load_verify_locations(path)
        except ssl.SSLError:
            yield f"http.tls.clientcas.{number}: {path} should be certificates in PEM"
        except OSError as error:
            yield f"http.tls.clientcas.{number}: {path} cannot be read: {error.strerror}"


def with_hsts(config: Config) -> Config:
    """`config` whose answers tell browsers to come by HTTPS only, where TLS is ours; unless `http.headers` has a word on it."""
    headers = config.http.headers
    if config.http.tls.certificate is None or any(name.lower() == _HSTS.lower() for name in headers):
        return config
    http = config.http.model_copy(update={"headers": headers | {_HSTS: [_HSTS_VALUE]}})
    return config.model_copy(update={"http": http})


def tls_problems(tls: Tls) -> tuple[str, ...]:
    """Why the port could not be served with `tls`, each beginning with the path of its key. Blocks: it opens the files."""
    if tls.certificate is None:
        return ()
    try:
        ServerTls(tls)
    except TlsUnusable as error:
        return error.problems
    return ()
