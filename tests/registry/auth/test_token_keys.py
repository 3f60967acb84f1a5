"""A-36: keys that replicas share, that are followed by others, and that a reader of the store does not get."""

import asyncio
import json
from typing import Any

import pytest

from kitspec.errors import Unavailable
from registry import layout
from registry.auth.token_keys import Seal, TokenKeys
from storage_backends.interface import StorageBackend
from tests.clock import Clock

DAY = 24 * 3600.0


def keys_on(backend: StorageBackend, clock: Clock, secret: str | None = "s3cret") -> TokenKeys:
    return TokenKeys(backend, rotation_s=30 * DAY, keep_s=10 * DAY, seal=Seal(secret), clock=clock)


async def record_of(backend: StorageBackend) -> dict[str, Any]:
    content, _ = await backend.read(layout.TOKEN_KEYS, size_max=100_000)
    document: dict[str, Any] = json.loads(content)
    return document


async def test_A_36_keys_outlive_a_restart_and_are_shared(backend: StorageBackend, clock: Clock) -> None:
    first, second = keys_on(backend, clock), keys_on(backend, clock)

    await first.start()
    await second.start()

    assert first.signing.id == second.signing.id
    assert await second.find(first.signing.id) is not None


async def test_A_36_replicas_that_start_at_once_agree_on_a_key(backend: StorageBackend, clock: Clock) -> None:
    replicas = [keys_on(backend, clock) for _ in range(5)]

    await asyncio.gather(*(keys.start() for keys in replicas))

    assert len({keys.signing.id for keys in replicas}) == 1


async def test_A_36_two_keys_verify_while_one_follows_the_other(
    backend: StorageBackend, clock: Clock
) -> None:
    keys = keys_on(backend, clock)
    await keys.start()
    old = keys.signing.id

    clock.now += 30 * DAY
    await keys.start()

    assert keys.signing.id != old
    assert await keys.find(old) is not None
    assert await keys.find(keys.signing.id) is not None


async def test_A_36_a_key_goes_when_the_last_of_its_tokens_has_ended(
    backend: StorageBackend, clock: Clock
) -> None:
    keys = keys_on(backend, clock)
    await keys.start()
    old = keys.signing.id

    for _ in range(2):
        clock.now += 30 * DAY
        await keys.start()

    assert await keys.find(old) is None
    assert len((await record_of(backend))["keys"]) == 2


async def test_A_36_a_key_of_another_replica_is_looked_up_when_a_token_has_it(
    backend: StorageBackend, clock: Clock
) -> None:
    first, second = keys_on(backend, clock), keys_on(backend, clock)
    await first.start()
    await second.start()
    clock.now += 30 * DAY
    await first.start()

    assert second.known(first.signing.id) is None
    assert await second.find(first.signing.id) is not None


async def test_keys_that_nobody_has_do_not_make_us_read_for_each(
    backend: StorageBackend, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_on(backend, clock)
    await keys.start()
    clock.now += 10
    reads = 0
    really = backend.read

    async def counted(*arguments: Any, **more: Any) -> Any:
        nonlocal reads
        reads += 1
        return await really(*arguments, **more)

    monkeypatch.setattr(backend, "read", counted)
    for number in range(100):
        assert await keys.find(f"invented{number}") is None

    assert reads == 1


async def test_A_36_V_15_the_store_does_not_show_a_sealed_key(backend: StorageBackend, clock: Clock) -> None:
    await keys_on(backend, clock).start()

    (entry,) = (await record_of(backend))["keys"]

    assert set(entry) == {"id", "created", "sealed"}


async def test_without_a_secret_keys_are_kept_in_the_clear(backend: StorageBackend, clock: Clock) -> None:
    await keys_on(backend, clock, secret=None).start()
    again = keys_on(backend, clock, secret=None)

    await again.start()

    (entry,) = (await record_of(backend))["keys"]
    assert entry["id"] == again.signing.id
    assert "private" in entry


@pytest.mark.parametrize("secret", ["another", None])
async def test_A_36_keys_under_another_secret_are_replaced_and_told(
    secret: str | None, backend: StorageBackend, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    first = keys_on(backend, clock)
    await first.start()

    second = keys_on(backend, clock, secret=secret)
    await second.start()

    assert second.signing.id != first.signing.id
    assert await second.find(first.signing.id) is None
    assert "auth.keys.unusable" in [record.message for record in caplog.records]


async def ids_of(backend: StorageBackend) -> set[str]:
    return {entry["id"] for entry in (await record_of(backend))["keys"]}


async def test_replicas_with_different_secrets_leave_each_others_keys_alone(
    backend: StorageBackend, clock: Clock
) -> None:
    first, second = keys_on(backend, clock, "old"), keys_on(backend, clock, "new")
    await first.start()
    await second.start()
    signing = (first.signing.id, second.signing.id)
    before = await record_of(backend)

    for _ in range(3):
        clock.now += 60
        for keys in (first, second):
            await keys.start()
            assert await keys.find("unknown") is None

    assert (first.signing.id, second.signing.id) == signing
    assert first.known(signing[0]) is not None
    assert second.known(signing[1]) is not None
    assert await record_of(backend) == before


async def test_replicas_with_different_secrets_rotate_each_for_itself(
    backend: StorageBackend, clock: Clock
) -> None:
    first, second = keys_on(backend, clock, "old"), keys_on(backend, clock, "new")
    await first.start()
    clock.now += DAY
    await second.start()
    old = (first.signing.id, second.signing.id)

    clock.now += 30 * DAY
    await first.start()
    await second.start()

    for keys, key_id in zip((first, second), old, strict=True):
        assert keys.signing.id != key_id
        assert await keys.find(key_id) is not None
    assert await ids_of(backend) == {*old, first.signing.id, second.signing.id}


async def test_a_key_of_a_secret_that_nobody_has_any_more_goes_when_its_tokens_have_ended(
    backend: StorageBackend, clock: Clock
) -> None:
    gone, keys = keys_on(backend, clock, "old"), keys_on(backend, clock, "new")
    await gone.start()
    await keys.start()

    clock.now += 30 * DAY
    await keys.start()
    assert gone.signing.id in await ids_of(backend)
    clock.now += 30 * DAY
    await keys.start()

    assert gone.signing.id not in await ids_of(backend)


async def test_a_secret_that_is_another_at_each_start_does_not_fill_the_record(
    backend: StorageBackend, clock: Clock
) -> None:
    lasting = keys_on(backend, clock, "lasting")
    await lasting.start()
    signing = lasting.signing.id
    for number in range(40):
        clock.now += 1
        await keys_on(backend, clock, f"secret {number}").start()
    assert len(await ids_of(backend)) < 20

    clock.now += 60
    await lasting.start()

    assert lasting.signing.id == signing
    assert signing in await ids_of(backend)


async def test_keys_that_somebody_wrote_over_are_kept_and_written_again(
    backend: StorageBackend, clock: Clock
) -> None:
    """As a replica of before does, which throws away what it cannot use."""
    first = keys_on(backend, clock, "old")
    await first.start()
    signing = first.signing.id
    await backend.delete(layout.TOKEN_KEYS)
    second = keys_on(backend, clock, "new")
    await second.start()

    clock.now += 60
    assert await first.find(second.signing.id) is None
    assert first.signing.id == signing
    assert first.known(signing) is not None
    await first.start()

    assert first.signing.id == signing
    assert await ids_of(backend) == {signing, second.signing.id}


async def test_without_a_key_no_token_is_signed_and_that_passes(
    backend: StorageBackend, clock: Clock
) -> None:
    keys = keys_on(backend, clock)
    with pytest.raises(Unavailable):
        _ = keys.signing
    await keys.start()
    old = keys.signing.id
    await backend.delete(layout.TOKEN_KEYS)

    clock.now += 60
    assert await keys.find("unknown") is None
    # Who deletes the record takes back what was signed.
    assert keys.known(old) is None
    with pytest.raises(Unavailable, match="no key"):
        _ = keys.signing
    await keys.start()

    assert keys.signing.id != old


async def test_a_sealed_key_cannot_stand_under_the_id_of_another(
    backend: StorageBackend, clock: Clock
) -> None:
    keys = keys_on(backend, clock)
    await keys.start()
    clock.now += 30 * DAY
    await keys.start()
    document = await record_of(backend)
    first, second = document["keys"]
    first["sealed"], second["sealed"] = second["sealed"], first["sealed"]
    await backend.write(layout.TOKEN_KEYS, json.dumps(document).encode())

    swapped = keys_on(backend, clock)
    await swapped.start()

    assert swapped.known(first["id"]) is None
    assert swapped.known(second["id"]) is None
