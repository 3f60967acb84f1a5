"""Tokens from elsewhere: external token servers and OpenID providers of workloads."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.serialization import Encoding

from kitspec.errors import Unavailable
from registry.auth import key_sources
from registry.auth.auth_config import Oidc
from registry.auth.identity import Grant
from registry.auth.issuers import ExternalIssuer, Issuer, WorkloadIssuer
from registry.auth.key_sources import CertificateBundle, FetchedJwks, JwksFile
from registry.auth.tokens import Rules, TokenInvalid, parse_token, sign_token
from registry.auth.verification_keys import libtrust_fingerprint
from registry.auth.watched_file import FileUnusable
from tests.registry.auth.logins import ISSUER, SERVICE, Sources, TestIssuer
from tests.registry.auth.test_verification_keys import certificate

RULES = Rules(ISSUER, frozenset({SERVICE}), frozenset({"ES256"}))
ACCESS = [{"type": "repository", "name": "a/b", "actions": ["pull"]}]


@pytest.fixture
def sources() -> Sources:
    return Sources()


@pytest.fixture
def issuer() -> TestIssuer:
    return TestIssuer()


@pytest.fixture
async def keys(issuer: TestIssuer, tmp_path: Path, sources: Sources) -> JwksFile:
    (tmp_path / "jwks.json").write_bytes(issuer.jwks())
    keys = JwksFile(tmp_path / "jwks.json", "jwks", sources)
    await keys.start()
    return keys


async def refused(issuer: Issuer, token: str) -> str:
    with pytest.raises(TokenInvalid) as caught:
        await issuer.login(parse_token(token))
    return str(caught.value)


async def test_who_an_external_token_is_for_and_what_it_allows_is_the_issuers_word(
    issuer: TestIssuer, keys: JwksFile
) -> None:
    login = await ExternalIssuer(RULES, keys).login(parse_token(issuer.token(access=ACCESS)))

    assert (login.name, login.method) == ("alice", "bearer")
    assert login.grants == (Grant("repository", "a/b", frozenset({"pull"})),)


async def test_an_external_token_without_access_grants_nothing(issuer: TestIssuer, keys: JwksFile) -> None:
    login = await ExternalIssuer(RULES, keys).login(parse_token(issuer.token()))

    assert login.grants == ()


@pytest.mark.parametrize("key_id", ["../../key", "' OR 1=1\0", "AAAA:BBBB", None])
async def test_A_31_a_kid_that_nobody_trusts_is_refused(
    key_id: str | None, issuer: TestIssuer, keys: JwksFile
) -> None:
    token = sign_token(issuer.claims(), issuer.key, "ES256", key_id=key_id or "x")

    assert "no key with this kid" in await refused(ExternalIssuer(RULES, keys), token)


async def test_V_03_a_trusted_kid_with_another_key_is_refused(issuer: TestIssuer, keys: JwksFile) -> None:
    attacker = TestIssuer()
    token = sign_token(attacker.claims(), attacker.key, "ES256", key_id=issuer.key_id)

    assert "signature" in await refused(ExternalIssuer(RULES, keys), token)


async def test_A_36_a_key_that_was_removed_is_trusted_no_more_at_once(
    issuer: TestIssuer, keys: JwksFile, tmp_path: Path
) -> None:
    external = ExternalIssuer(RULES, keys)
    token = issuer.token()
    login = await external.login(parse_token(token))
    assert login.is_current()

    (tmp_path / "jwks.json").write_bytes(TestIssuer().jwks())
    await keys._file.look()

    assert not login.is_current()
    await refused(external, token)


class TestBundle:
    @pytest.fixture
    async def bundle(self, issuer: TestIssuer, tmp_path: Path, sources: Sources) -> CertificateBundle:
        pem = certificate("issuer", issuer.key).public_bytes(Encoding.PEM)
        (tmp_path / "bundle.pem").write_bytes(pem)
        bundle = CertificateBundle(tmp_path / "bundle.pem", "rootcertbundle", sources)
        await bundle.start()
        return bundle

    async def test_a_key_is_found_by_the_ids_of_old_and_new_token_servers(
        self, issuer: TestIssuer, bundle: CertificateBundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(key_sources, "keys_of_certificates", _whenever)
        for key_id in (issuer.key_id, libtrust_fingerprint(issuer.key.public_key())):
            token = sign_token(issuer.claims(), issuer.key, "ES256", key_id=key_id)

            assert (await ExternalIssuer(RULES, bundle).login(parse_token(token))).name == "alice"

    async def test_A_31_a_chain_of_the_tokens_own_is_refused(
        self, issuer: TestIssuer, bundle: CertificateBundle
    ) -> None:
        attacker = TestIssuer()
        own = certificate("issuer", attacker.key)
        token = _with_chain(attacker, [own.public_bytes(Encoding.DER)])

        assert "chain" in await refused(ExternalIssuer(RULES, bundle), token)

    async def test_A_31_a_chain_is_refused_where_only_a_key_set_is_trusted(
        self, issuer: TestIssuer, keys: JwksFile
    ) -> None:
        own = certificate("issuer", issuer.key)
        token = _with_chain(issuer, [own.public_bytes(Encoding.DER)])

        assert "x5c" in await refused(ExternalIssuer(RULES, keys), token)


def _whenever(certificates: Any, *, now: object) -> Any:
    from registry.auth.verification_keys import keys_of_certificates
    from tests.registry.auth.test_verification_keys import NOW

    return keys_of_certificates(certificates, now=NOW)


def _with_chain(issuer: TestIssuer, chain: list[bytes]) -> str:
    import base64

    import jwt

    texts = [base64.b64encode(item).decode() for item in chain]
    return jwt.encode(issuer.claims(), issuer.key, "ES256", headers={"kid": issuer.key_id, "x5c": texts})


class TestWorkloads:
    def of(self, keys: JwksFile, **more: Any) -> WorkloadIssuer:
        return WorkloadIssuer(Oidc(issuer=ISSUER, audiences=[SERVICE, "other"], **more), keys)

    async def test_a_workload_is_its_subject_with_a_prefix_that_no_person_has(
        self, issuer: TestIssuer, keys: JwksFile
    ) -> None:
        login = await self.of(keys).login(parse_token(issuer.token(sub="repo:acme/app:ref:refs/heads/main")))

        assert (login.name, login.method) == ("oidc:repo:acme/app:ref:refs/heads/main", "oidc")
        assert (login.groups, login.grants, login.binding) == (frozenset(), None, "")

    async def test_claims_are_mapped_to_name_and_groups(self, issuer: TestIssuer, keys: JwksFile) -> None:
        workloads = self.of(keys, claimmapping={"username": "actor", "groups": "teams"}, prefix="ci/")

        login = await workloads.login(parse_token(issuer.token(actor="bot", teams=["a", "b", 5, ""])))

        assert (login.name, login.groups) == ("ci/bot", {"ci/a", "ci/b"})

    async def test_required_claims_are_exact(self, issuer: TestIssuer, keys: JwksFile) -> None:
        workloads = self.of(keys, requiredclaims={"repository_owner": "acme"})

        assert await workloads.login(parse_token(issuer.token(repository_owner="acme")))
        for owner in ("acme2", "ACME", ["acme"], None, True):
            assert "repository_owner" in await refused(workloads, issuer.token(repository_owner=owner))

    @pytest.mark.parametrize("subject", ["", 5, ["alice"], "a\nb", "x" * 300, None], ids=str)
    async def test_a_name_that_cannot_be_one_is_refused(
        self, subject: object, issuer: TestIssuer, keys: JwksFile
    ) -> None:
        await refused(self.of(keys), issuer.token(sub=subject))

    async def test_groups_that_are_no_list_are_refused(self, issuer: TestIssuer, keys: JwksFile) -> None:
        workloads = self.of(keys, claimmapping={"groups": "teams"})

        for teams in ({"a": 1}, 5, ["x"] * 201):
            await refused(workloads, issuer.token(teams=teams))
        assert (await workloads.login(parse_token(issuer.token(teams="one")))).groups == {"oidc:one"}

    @pytest.mark.parametrize("claims", [{"aud": "elsewhere"}, {"exp": 1}, {"iss": ISSUER + "/x"}], ids=str)
    async def test_a_token_for_somebody_else_is_refused(
        self, claims: dict[str, Any], issuer: TestIssuer, keys: JwksFile
    ) -> None:
        await refused(self.of(keys), issuer.token(**claims))


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def provider(handler: Handler) -> AsyncIterator[str]:
    """An HTTP server of this machine; its address."""
    runner = web.ServerRunner(web.Server(handler))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class TestFetched:
    @pytest.fixture
    def clock(self) -> list[float]:
        return [1000.0]

    def fetched(
        self, url: str | None, sources: Sources, clock: list[float], issuer: str = ISSUER
    ) -> FetchedJwks:
        return FetchedJwks(
            issuer, url, cafile=None, source="oidc.0", observer=sources, clock=lambda: clock[0]
        )

    def serving(self, answers: dict[str, Any], asked: list[str]) -> AbstractAsyncContextManager[str]:
        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            asked.append(request.path)
            answer = answers.get(request.path, 404)
            if isinstance(answer, int):
                return web.Response(status=answer, headers={"Location": "http://127.0.0.1:1/"})
            return web.Response(body=answer)

        return provider(handler)

    async def test_keys_are_fetched_from_an_address(
        self, issuer: TestIssuer, sources: Sources, clock: list[float]
    ) -> None:
        async with self.serving({"/jwks": issuer.jwks()}, []) as url:
            keys = self.fetched(f"{url}/jwks", sources, clock)
            await keys.start()

            assert await keys.find(parse_token(issuer.token()))
        assert sources.stale == {"oidc.0": False}

    async def test_an_issuer_is_asked_where_its_keys_are(self, sources: Sources, clock: list[float]) -> None:
        answers: dict[str, Any] = {}
        async with self.serving(answers, []) as url:
            issuer = TestIssuer(url)
            answers["/.well-known/openid-configuration"] = json.dumps(
                {"issuer": url, "jwks_uri": f"{url}/keys"}
            ).encode()
            answers["/keys"] = issuer.jwks()
            keys = self.fetched(None, sources, clock, issuer=url)
            await keys.start()

            assert await keys.find(parse_token(issuer.token()))

    @pytest.mark.parametrize(
        "discovery",
        [
            {"issuer": "https://evil.example", "jwks_uri": "{url}/keys"},
            {"jwks_uri": "{url}/keys"},
            {"issuer": "{url}"},
            {"issuer": "{url}", "jwks_uri": "http://192.0.2.1/keys"},
            {"issuer": "{url}", "jwks_uri": "file:///etc/passwd"},
            {"issuer": "{url}", "jwks_uri": ["{url}/keys"]},
            ["{url}"],
        ],
        ids=str,
    )
    async def test_A_52_a_discovery_that_leads_elsewhere_is_not_followed(
        self, discovery: object, issuer: TestIssuer, sources: Sources, clock: list[float]
    ) -> None:
        answers: dict[str, Any] = {"/keys": issuer.jwks()}
        asked: list[str] = []
        async with self.serving(answers, asked) as url:
            text = json.dumps(discovery).replace("{url}", url)
            answers["/.well-known/openid-configuration"] = text.encode()
            keys = self.fetched(None, sources, clock, issuer=url)
            await keys.start()

            with pytest.raises(Unavailable):
                await keys.find(parse_token(issuer.token()))
        assert "/keys" not in asked
        assert sources.stale == {"oidc.0": True}

    @pytest.mark.parametrize(
        "answer",
        [302, 404, 500, b"", b"[]", b"x" * (1024 * 1024 + 1)],
        ids=["302", "404", "500", "empty", "list", "large"],
    )
    async def test_A_52_an_answer_that_is_no_key_set_is_not_taken(
        self, answer: object, issuer: TestIssuer, sources: Sources, clock: list[float]
    ) -> None:
        async with self.serving({"/jwks": answer}, []) as url:
            keys = self.fetched(f"{url}/jwks", sources, clock)
            await keys.start()

            with pytest.raises(Unavailable):
                await keys.find(parse_token(issuer.token()))
        assert sources.stale == {"oidc.0": True}

    async def test_an_issuer_that_cannot_be_reached_is_asked_again(
        self, issuer: TestIssuer, sources: Sources, clock: list[float]
    ) -> None:
        answers: dict[str, Any] = {"/jwks": 500}
        asked: list[str] = []
        async with self.serving(answers, asked) as url:
            keys = self.fetched(f"{url}/jwks", sources, clock)
            await keys.start()
            answers["/jwks"] = issuer.jwks()
            token = parse_token(issuer.token())

            with pytest.raises(Unavailable):
                await keys.find(token)
            clock[0] += 30
            assert await keys.find(token)
        assert len(asked) == 2

    async def test_keys_that_were_fetched_stay_when_the_issuer_fails(
        self, issuer: TestIssuer, sources: Sources, clock: list[float]
    ) -> None:
        answers: dict[str, Any] = {"/jwks": issuer.jwks()}
        async with self.serving(answers, []) as url:
            keys = self.fetched(f"{url}/jwks", sources, clock)
            await keys.start()
            state = keys.state
            answers["/jwks"] = 500
            await keys.start()

            assert await keys.find(parse_token(issuer.token()))
            assert keys.state is state
        assert sources.stale == {"oidc.0": True}

    async def test_a_key_that_is_new_is_fetched_and_invented_ones_cost_nothing(
        self, issuer: TestIssuer, sources: Sources, clock: list[float]
    ) -> None:
        answers: dict[str, Any] = {"/jwks": issuer.jwks()}
        asked: list[str] = []
        async with self.serving(answers, asked) as url:
            keys = self.fetched(f"{url}/jwks", sources, clock)
            await keys.start()
            new = TestIssuer()
            answers["/jwks"] = new.jwks()
            clock[0] += 30

            found = await asyncio.gather(*(keys.find(parse_token(new.token())) for _ in range(10)))
            assert len(found) == 10
            for _ in range(20):
                with pytest.raises(TokenInvalid):
                    await keys.find(parse_token(TestIssuer().token()))
        assert len(asked) == 2


async def test_a_key_set_that_is_not_there_is_an_error_at_the_start(tmp_path: Path, sources: Sources) -> None:
    with pytest.raises(FileUnusable):
        await JwksFile(tmp_path / "missing", "jwks", sources).start()
