"""Keys of users for their programs: made, used, limited, taken back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.errors import Denied, NameUnknown, QueryInvalid, Unauthorized
from registry import layout
from registry.auth import api_keys
from registry.auth.api_keys import LIFE_MAX_S, ApiKeys
from registry.auth.identity import Grant
from storage_backends.interface import StorageBackend
from tests.clock import Clock


@pytest.fixture
def users() -> set[str]:
    return {"alice", "bob"}


@pytest.fixture
def keys(backend: StorageBackend, clock: Clock, users: set[str]) -> ApiKeys:
    return ApiKeys(backend, is_user=users.__contains__, per_user_max=3, clock=clock)


async def made(
    keys: ApiKeys, owner: str = "alice", *, life_s: float | None = None, scopes: tuple[str, ...] = ()
) -> str:
    text, _ = await keys.create(owner, label="ci", life_s=life_s, scopes=scopes)
    return text


async def test_a_key_is_its_owner(keys: ApiKeys) -> None:
    login = await keys.login(await made(keys))

    assert (login.name, login.method, login.grants, login.expires) == ("alice", "apikey", None, None)
    assert login.is_current()


async def test_a_key_may_be_less_than_its_owner(keys: ApiKeys) -> None:
    login = await keys.login(await made(keys, scopes=("repository:a/b:pull", "registry:catalog:*")))

    assert login.grants == (
        Grant("repository", "a/b", frozenset({"pull"})),
        Grant("registry", "catalog", frozenset({"*"})),
    )


async def test_V_15_the_store_does_not_have_the_secret(keys: ApiKeys, backend: StorageBackend) -> None:
    text = await made(keys)
    secret = text[37:]

    contents = [
        (await backend.read(info.key, size_max=10_000))[0] async for info in backend.list(layout.API_KEYS)
    ]

    assert len(contents) == 1
    assert secret.encode() not in contents[0]
    assert set(json.loads(contents[0])) == {"owner", "label", "created", "expires", "scopes", "secret"}


async def test_a_key_that_was_taken_back_lets_nobody_in_at_once(keys: ApiKeys) -> None:
    text = await made(keys)
    login = await keys.login(text)

    await keys.revoke("alice", login.binding.removeprefix(api_keys.BINDING))

    assert not login.is_current()
    with pytest.raises(Unauthorized):
        await keys.login(text)


async def test_a_key_that_was_taken_back_before_it_was_asked_for_again_is_not_current(keys: ApiKeys) -> None:
    _, key = await keys.create("alice", label="ci", life_s=None, scopes=())
    await keys.revoke("alice", key.id)

    assert not keys.current(key)()


async def test_where_the_store_cannot_be_asked_at_once_a_key_is_trusted_for_seconds(
    keys: ApiKeys, backend: StorageBackend, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "version_at_once", lambda _: None)
    login = await keys.login(await made(keys))

    assert login.is_current()
    clock.now += 10
    assert not login.is_current()


async def test_V_14_a_key_ends_with_its_owner(keys: ApiKeys, users: set[str]) -> None:
    text = await made(keys)
    login = await keys.login(text)

    users.remove("alice")

    assert not login.is_current()
    with pytest.raises(Unauthorized):
        await keys.login(text)


async def test_a_key_may_end_by_itself(keys: ApiKeys, clock: Clock) -> None:
    text = await made(keys, life_s=60)
    assert (await keys.login(text)).expires == clock.now + 60

    clock.now += 60

    with pytest.raises(Unauthorized):
        await keys.login(text)


async def test_whoever_was_let_in_by_a_key_is_so_until_it_ends(
    keys: ApiKeys, clock: Clock, backend: StorageBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = await made(keys, life_s=5)
    login = await keys.login(text)
    monkeypatch.setattr(backend, "version_at_once", lambda _: None)
    across_a_network = await keys.login(text)
    monkeypatch.undo()

    clock.now += 4
    assert login.is_current()
    assert across_a_network.is_current()
    clock.now += 1
    assert not login.is_current()
    assert not across_a_network.is_current()


@pytest.mark.parametrize("life_s", [0, -1, 3601])
async def test_a_life_that_is_not_allowed_is_refused(
    life_s: int, backend: StorageBackend, clock: Clock
) -> None:
    keys = ApiKeys(backend, is_user=lambda _: True, expiration_max_s=3600, clock=clock)

    with pytest.raises(QueryInvalid, match="a life of"):
        await made(keys, life_s=life_s)


@pytest.mark.parametrize(
    "life_s", [LIFE_MAX_S + 1, 253402300800, 2**63 - 1, 10**400, -(10**400)], ids=range(5)
)
async def test_a_life_that_ends_in_no_year_is_refused_and_leaves_nothing(
    life_s: int, backend: StorageBackend, clock: Clock
) -> None:
    for longest in (0.0, 1e15):
        keys = ApiKeys(backend, is_user=lambda _: True, expiration_max_s=longest, clock=clock)

        with pytest.raises(QueryInvalid, match="a life of") as caught:
            await made(keys, life_s=life_s)

        assert len(caught.value.message) < 200
        assert await keys.list("alice") == []


async def test_no_key_lives_longer_than_a_century(backend: StorageBackend, clock: Clock) -> None:
    keys = ApiKeys(backend, is_user=lambda _: True, expiration_max_s=1e15, clock=clock)

    for life_s in (None, LIFE_MAX_S):
        assert (await keys.login(await made(keys, life_s=life_s))).expires == clock.now + LIFE_MAX_S


async def test_a_key_lives_as_long_as_is_allowed_when_nobody_says(
    backend: StorageBackend, clock: Clock
) -> None:
    keys = ApiKeys(backend, is_user=lambda _: True, expiration_max_s=3600, clock=clock)

    assert (await keys.login(await made(keys))).expires == clock.now + 3600


async def test_a_user_sees_and_takes_back_only_their_own(keys: ApiKeys) -> None:
    text = await made(keys, "alice")
    key_id = text[4:36]

    assert [key.id for key in await keys.list("alice")] == [key_id]
    assert await keys.list("bob") == []
    for owner, name in (("bob", key_id), ("alice", "0" * 32), ("alice", "../x"), ("alice", "")):
        with pytest.raises(NameUnknown):
            await keys.revoke(owner, name)
    assert (await keys.login(text)).name == "alice"


async def test_a_user_has_as_many_as_are_allowed(keys: ApiKeys) -> None:
    for _ in range(3):
        await made(keys)

    with pytest.raises(Denied, match="3 API keys"):
        await made(keys)
    await made(keys, "bob")


@pytest.mark.parametrize("label", ["x" * 101, "a\nb", "\0"])
async def test_a_label_that_is_none_is_refused(label: str, keys: ApiKeys) -> None:
    with pytest.raises(QueryInvalid, match="label"):
        await keys.create("alice", label=label, life_s=None, scopes=())


@pytest.mark.parametrize("scope", ["", "repository:*:pull", "repository:a/b:fly", "nonsense"])
async def test_a_scope_that_is_none_is_refused_and_not_passed_over(scope: str, keys: ApiKeys) -> None:
    with pytest.raises(QueryInvalid, match="scope"):
        await made(keys, scopes=("repository:a/b:pull", scope))


@pytest.mark.parametrize("change", ["id", "secret", "prefix", "shorter", "longer", "case"])
async def test_what_is_nearly_a_key_lets_nobody_in(change: str, keys: ApiKeys) -> None:
    text = await made(keys)
    other = await made(keys)
    changed = {
        "id": other[:36] + text[36:],
        "secret": text[:-2] + ("AA" if text[-2:] != "AA" else "BB"),
        "prefix": "mkx_" + text[4:],
        "shorter": text[:-1],
        "longer": text + "A",
        "case": text[:4] + text[4:36].upper() + "G" + text[37:],
    }[change]

    with pytest.raises(Unauthorized):
        await keys.login(changed)


@given(st.text(max_size=120))
def test_any_text_lets_nobody_in_and_reads_no_key_of_the_store(text: str) -> None:
    assert api_keys._TEXT.fullmatch(text) is None
