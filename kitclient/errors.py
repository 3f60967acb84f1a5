"""What can go wrong on the client's side; what a registry answered is an `OciError` (kitspec.errors).

    ClientError
    ├── RegistryUnreachable     no connection, or it broke too often; a later try may help
    │   ├── AuthorizationRenewed  a token ended while a body was sent; with the new one it can be sent again
    │   └── TransportRefused    TLS fails, or plain HTTP met HTTPS: a setting is wrong, a retry does not help
    ├── ServerMisbehaved        the registry breaks the protocol, or asks for what a client must not do
    ├── CredentialsUnusable     a credential file or helper is broken; not the same as none stored
    └── StoreUnusable           the local store is broken, busy or cannot be written

Each message says what was tried, what was seen, and what to do where that is known; never a secret.
"""

from __future__ import annotations


class ClientError(Exception):
    """Root of what the client itself raises."""


class RegistryUnreachable(ClientError):
    pass


class AuthorizationRenewed(RegistryUnreachable):
    pass


class TransportRefused(RegistryUnreachable):
    pass


class ServerMisbehaved(ClientError):
    pass


class CredentialsUnusable(ClientError):
    pass


class StoreUnusable(ClientError):
    pass
