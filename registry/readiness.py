"""Asks a registry that runs on this machine whether it can serve: what `modelkit-registry health` does.

A command of the image's own for health checks, so that the image needs no curl. The standard library alone: it runs every
few seconds, beside a registry that wants the processor.
"""

from __future__ import annotations

import http.client
import json
import ssl

from registry.config import Http

# Half of what a container's health check is usually given (HEALTHCHECK --timeout=5s), the start of Python not counted.
TIMEOUT_S = 2.5
# Told apart from clients in the log.
USER_AGENT = "modelkit-registry-health"
# A reason is a line; whatever answers with more is no registry of ours.
_ANSWER_SIZE_MAX = 4096


class NotReady(Exception):
    """It cannot serve, or does not answer; the message says which."""


def address_to_ask(listens_at: str) -> str:
    """Where to reach what listens at `http.addr`: every address includes loopback."""
    host, _, port = listens_at.rpartition(":")
    return f"127.0.0.1:{port}" if host in {"", "0.0.0.0", "[::]"} else listens_at  # noqa: S104 - compared, not bound


def ask_ready(http_config: Http, address: str) -> None:
    """GET /readyz, below `http.prefix`, with TLS where the configuration has it.

    Args:
        address: `HOST:PORT`.

    Raises:
        NotReady: another answer than 200, or none within `TIMEOUT_S` for each step.
    """
    connection = _connection(http_config, address)
    try:
        connection.request(
            "GET",
            f"{http_config.prefix.rstrip('/')}/readyz",
            headers={"Connection": "close", "User-Agent": USER_AGENT},
        )
        answer = connection.getresponse()
        content = answer.read(_ANSWER_SIZE_MAX)
    except (OSError, http.client.HTTPException) as error:
        raise NotReady(f"{address}: no answer: {_reason(http_config, error)}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise NotReady(f"{address}: not ready: {_said(content) or f'status {answer.status}'}")


def _connection(http_config: Http, address: str) -> http.client.HTTPConnection:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if http_config.tls.certificate is None:
        return http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
    # The certificate names what clients call it, not this address; and nothing secret is said or believed.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, int(port), timeout=TIMEOUT_S, context=context)


def _reason(http_config: Http, error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"not within {TIMEOUT_S:g} s"
    reason = str(error) or type(error).__name__
    tls = http_config.tls
    if (
        tls.clientcas
        and tls.clientauth == "require-and-verify-client-cert"
        and not isinstance(error, ConnectionRefusedError)
    ):
        # A server that wants one may close without a word.
        return f"{reason} (it wants a certificate of whoever asks; http.tls.clientauth: verify-client-cert-if-given does not)"
    return reason


def _said(content: bytes) -> str:
    try:
        answer = json.loads(content)
    except ValueError:
        return ""
    reason = answer.get("reason") if isinstance(answer, dict) else None
    return reason if isinstance(reason, str) else ""
