"""TLS: who is trusted, who is shown our certificate, and that a failure names its reason."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from kitclient.credentials import Credential
from kitclient.errors import TransportRefused
from kitclient.tls import TlsOptions, tls_contexts, with_host_files
from kitspec.digest import Digest
from tests.authority import HOST, Authority, Issued, self_signed
from tests.contracts.registry_contract import CONTENT, read_blob
from tests.kitclient.peer import Peer, client, serving


async def credentials(host: str) -> Credential:
    _ = host
    return Credential("user", "canary-password")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def answer(request: web.Request) -> web.Response:
    """Everything that is asked for; the credentials first."""
    if "Authorization" not in request.headers:
        return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="r"'})
    return web.Response(body=CONTENT)


def over_tls(peer: Peer, options: TlsOptions | None = None, *, host: str = HOST):
    return client(peer, host=host, plain_http=False, tls=options, credentials=credentials)


def trusting(*authorities: Authority) -> TlsOptions:
    return TlsOptions(ca_files=tuple(authority.file for authority in authorities))


async def test_a_private_authority_is_trusted_when_it_is_named(authority: Authority):
    async with (
        serving(answer, tls=authority.issue().server_context()) as peer,
        over_tls(peer, trusting(authority)) as registry,
    ):
        await registry.ping()

    assert peer.authorizations[0] == []
    assert len(peer.authorizations[1]) == 1


# What is wrong with a certificate, and what is said of it.
BAD: dict[str, tuple[Callable[[Authority, Path], Issued], str]] = {
    "expired": (lambda authority, _: authority.issue(days=-1), r"has expired.*needs another certificate"),
    "self-signed": (lambda _, folder: self_signed(folder), r"is self-signed.*--tls-cert"),
    "wrong host": (
        lambda authority, _: authority.issue("other.example"),
        r"for another host.*check the registry",
    ),
    "unknown authority": (
        lambda _, folder: Authority(folder, "unknown").issue(),
        r"its authority is not trusted here.*--tls-cert",
    ),
    "unknown authority, not sent": (
        lambda _, folder: Authority(folder, "unknown").issue(with_chain=False),
        r"no authority that is trusted here.*--tls-cert",
    ),
    "missing intermediate": (
        lambda authority, folder: Authority(folder, "between", above=authority).issue(with_chain=False),
        r"leaves out an intermediate certificate",
    ),
    "1024 bits": (lambda authority, _: authority.issue(bits=1024), r"key is too weak.*another certificate"),
    "SHA-1": (
        lambda authority, folder: Authority(folder, "old", above=authority, bits=2048).issue(sha1=True),
        r"weak hash.*another certificate",
    ),
}


@pytest.mark.parametrize("fault", BAD)
async def test_C_30_a_certificate_that_is_not_to_be_trusted_is_refused_with_its_reason(
    authority: Authority, tmp_path: Path, fault: str
):
    make, words = BAD[fault]
    context = make(authority, tmp_path).server_context()
    async with serving(answer, tls=context) as peer, over_tls(peer, trusting(authority)) as registry:
        with pytest.raises(TransportRefused, match=words) as refusal:
            await registry.ping()

    assert HOST in str(refusal.value)
    assert peer.requests == [], "it was asked something all the same"


async def test_an_intermediate_that_is_sent_is_trusted(authority: Authority, tmp_path: Path):
    context = Authority(tmp_path, "between", above=authority).issue().server_context()
    async with serving(answer, tls=context) as peer, over_tls(peer, trusting(authority)) as registry:
        await registry.ping()


async def test_without_verification_anybody_can_be_the_registry(tmp_path: Path):
    context = self_signed(tmp_path).server_context()
    async with serving(answer, tls=context) as peer, over_tls(peer, TlsOptions(verify=False)) as registry:
        await registry.ping()


async def test_C_30_who_is_not_verified_is_the_registry_and_not_where_it_sends_us(tmp_path: Path):
    """ "`--insecure` needed per host": a store and a token service are verified whatever the user allows the registry."""
    context = self_signed(tmp_path).server_context()
    async with serving(answer, tls=context) as store:

        async def redirect(request: web.Request) -> web.Response:
            _ = request
            return web.Response(status=307, headers={"Location": f"https://{HOST}:{store.port}/blob"})

        async with (
            serving(redirect, tls=context) as peer,
            over_tls(peer, TlsOptions(verify=False)) as registry,
        ):
            with pytest.raises(TransportRefused, match="self-signed"):
                await read_blob(registry, Digest.of(CONTENT))

    assert store.requests == []


async def test_a_token_service_is_verified_whatever_the_user_allows_the_registry(tmp_path: Path):
    context = self_signed(tmp_path).server_context()
    async with serving(answer, tls=context) as service:

        async def challenge(request: web.Request) -> web.Response:
            _ = request
            field = f'Bearer realm="https://auth.example:{service.port}/token"'
            return web.Response(status=401, headers={"WWW-Authenticate": field})

        async with (
            serving(challenge, tls=context) as peer,
            over_tls(peer, TlsOptions(verify=False)) as registry,
        ):
            with pytest.raises(TransportRefused, match=r"auth\.example.*self-signed"):
                await registry.ping()

    assert service.requests == []


# ---- our certificate


def showing(authority: Authority, issued: Issued) -> TlsOptions:
    return TlsOptions(
        ca_files=(authority.file,), client_certificate=issued.certificate, client_key=issued.key
    )


async def test_our_certificate_is_shown_to_a_registry_that_asks_for_it(authority: Authority):
    context = authority.issue().server_context(client_authority=authority.file)
    async with (
        serving(answer, tls=context) as peer,
        over_tls(peer, showing(authority, authority.issue("me"))) as registry,
    ):
        await registry.ping()


async def test_our_certificate_and_key_may_be_in_one_file(authority: Authority):
    ours = authority.issue("me")
    ours.certificate.write_bytes(ours.certificate.read_bytes() + ours.key.read_bytes())
    context = authority.issue().server_context(client_authority=authority.file)
    options = TlsOptions(ca_files=(authority.file,), client_certificate=ours.certificate)
    async with serving(answer, tls=context) as peer, over_tls(peer, options) as registry:
        await registry.ping()


@contextmanager
def strict(context: ssl.SSLContext) -> Iterator[int]:
    """The port of a server that tells by an alert why it ends a handshake, which asyncio's does not."""

    stopping = threading.Event()

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            if stopping.is_set():
                connection.close()
                return
            connection.settimeout(10)
            tls = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            with contextlib.suppress(ssl.SSLError):
                tls.do_handshake()
            # To the end: what is left unread when a connection is closed may take the alert with it.
            with socket.socket(fileno=tls.detach()) as connection, contextlib.suppress(OSError):
                connection.settimeout(2)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stopping.set()
            socket.create_connection(listener.getsockname()).close()
            thread.join(timeout=10)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("ours", "words"),
    [(None, "wants .* certificate of ours.*--cert"), ("stranger", r"our certificate \(--cert\)")],
)
async def test_a_registry_that_wants_a_certificate_says_so(
    authority: Authority, tmp_path: Path, version: ssl.TLSVersion, ours: str | None, words: str
):
    context = authority.issue().server_context(client_authority=authority.file)
    context.maximum_version = version
    options = trusting(authority)
    if ours is not None:
        options = showing(authority, Authority(tmp_path, ours).issue("me"))
    with strict(context) as port:
        async with over_tls(Peer(answer, port), options) as registry:
            with pytest.raises(TransportRefused, match=words):
                await registry.ping()


async def test_our_certificate_is_not_shown_to_where_a_registry_sends_us(authority: Authority):
    wants_one = authority.issue("store.example").server_context(client_authority=authority.file)
    wants_one.verify_mode = ssl.CERT_OPTIONAL
    shown: list[object] = []

    async def store_answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        shown.append(request.transport.get_extra_info("peercert"))
        return web.Response(body=CONTENT)

    async with serving(store_answer, tls=wants_one) as store:

        async def redirect(request: web.Request) -> web.Response:
            _ = request
            url = f"https://store.example:{store.port}/blob?X-Amz-Signature=s"
            return web.Response(status=307, headers={"Location": url})

        context = authority.issue().server_context(client_authority=authority.file)
        options = showing(authority, authority.issue("me"))
        async with serving(redirect, tls=context) as peer, over_tls(peer, options) as registry:
            assert await read_blob(registry, Digest.of(CONTENT)) == CONTENT

    assert shown in ([{}], [None])


# ---- files


def test_files_that_cannot_be_used_are_named(authority: Authority, tmp_path: Path):
    one, other = authority.issue("one"), authority.issue("other")
    secret = authority.issue("secret", passphrase=b"canary")
    junk = tmp_path / "junk.crt"
    junk.write_text("junk")
    absent = tmp_path / "absent.crt"

    for options, words in (
        (TlsOptions(ca_files=(junk,)), rf"{junk} holds no certificate"),
        (TlsOptions(ca_files=(absent,)), rf"{absent} .*no such file"),
        (TlsOptions(client_certificate=absent), rf"{absent} .*no such file"),
        (TlsOptions(client_certificate=one.certificate, client_key=other.key), "key values mismatch"),
        (TlsOptions(client_certificate=secret.certificate, client_key=secret.key), "encrypted"),
    ):
        with pytest.raises(TransportRefused, match=words):
            tls_contexts(options)


def test_a_hosts_folder_adds_its_authorities_and_our_certificate(authority: Authority, tmp_path: Path):
    folder = tmp_path / "certs.d" / "registry.example:5000"
    given = TlsOptions(verify=False, ca_files=(authority.file,))
    assert with_host_files(given, folder) == given

    folder.mkdir(parents=True)
    for name in ("b.crt", "a.crt", "client.cert", "client.key", "README"):
        (folder / name).touch()

    assert with_host_files(given, folder) == TlsOptions(
        verify=False,
        ca_files=(authority.file, folder / "a.crt", folder / "b.crt"),
        client_certificate=folder / "client.cert",
        client_key=folder / "client.key",
    )
    chosen = TlsOptions(client_certificate=authority.file)
    assert with_host_files(chosen, folder).client_certificate == authority.file
    (folder / "client.key").unlink()
    with pytest.raises(TransportRefused, match=r"client\.key"):
        with_host_files(given, folder)
