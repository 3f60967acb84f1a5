"""Stores that are not versitygw: one that is built otherwise, and some that break a promise and are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final

import pytest
from botocore.credentials import Credentials

from storage_backends.interface import StorageBackend
from storage_backends.s3 import S3Backend
from storage_backends.s3_client import S3Settings
from tests.contracts.storage_contract import StorageContract
from tests.storage_backends.moto_store import moto_store
from tests.storage_backends.s3_relay import Asked, relay
from tests.storage_backends.s3_server import Buckets, object_store

pytestmark = pytest.mark.s3

COMMAND: Final = f"{sys.prefix}/bin/modelkit-registry"
TIMEOUT_S: Final = 60.0


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buckets]:
    with moto_store(tmp_path_factory.mktemp("moto") / "log") as buckets:
        yield buckets


class TestS3OnMoto(StorageContract):
    """All of the contract. What moto cannot stand for is tried on versitygw alone (test_s3.py): it takes any signature, also
    of a URL that has expired, and any checksum."""

    @pytest.fixture
    async def backend(self, moto: Buckets) -> AsyncIterator[StorageBackend]:
        backend = S3Backend(moto.new())
        try:
            await backend.start()
            yield backend
        finally:
            await backend.close()


# -- stores that say yes and do something else

Lie = Callable[[Asked], bool]


def ignoring(method: str, header: str) -> Lie:
    """A store that has never heard of a condition."""

    def change(asked: Asked) -> bool:
        return asked.method == method and asked.headers.pop(header, None) is not None

    return change


def from_the_beginning(asked: Asked) -> bool:
    """A store whose listings ignore where to begin."""
    return asked.query.pop("start-after", None) is not None


def only_some(asked: Asked) -> bool:
    """A store whose listings forget something, and say that they are complete."""
    return (
        asked.operation == "ListObjects"
        and asked.query.update({"prefix": asked.query["prefix"] + "a"}) is None
    )


LIES: Final = {
    "If-None-Match of a PUT": (
        ignoring("PUT", "If-None-Match"),
        "a create where an object is (If-None-Match: *)",
    ),
    "If-Match of a PUT": (ignoring("PUT", "If-Match"), "an overwrite of an old version (If-Match)"),
    "If-Match of a DELETE": (ignoring("DELETE", "If-Match"), "a delete of an old version (If-Match)"),
    "StartAfter": (
        from_the_beginning,
        "a listing does not begin behind the key that was asked for (StartAfter)",
    ),
    "a part of a listing": (only_some, "a listing after a write is not complete"),
}


@pytest.fixture(scope="module")
def bucket() -> Iterator[S3Settings]:
    with object_store() as buckets:
        yield buckets.new()


def run(bucket: S3Settings, lie: Lie, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of ours, on a store that lies; it is expected to end by itself."""
    assert bucket.endpoint is not None
    assert bucket.access_key is not None
    assert bucket.secret_key is not None
    with relay(bucket.endpoint, Credentials(bucket.access_key, bucket.secret_key)) as store:
        store.change = lie
        settings = {
            "MODELREG_STORAGE_S3_REGIONENDPOINT": store.url,
            "MODELREG_STORAGE_S3_ACCESSKEY": bucket.access_key,
            "MODELREG_STORAGE_S3_SECRETKEY": bucket.secret_key,
        }
        ended = subprocess.run(
            [COMMAND, *arguments, "--storage", f"s3://{bucket.bucket}"],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert bucket.secret_key not in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr + ended.stdout
    return ended


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(("lie", "promise"), LIES.values(), ids=LIES)
def test_a_registry_does_not_start_on_a_store_that_ignores(
    bucket: S3Settings, lie: Lie, promise: str, workers: str
) -> None:
    ended = run(bucket, lie, "serve", "--listen", "127.0.0.1:0", "--workers", workers)

    assert ended.returncode == 1, ended
    assert f"this object store cannot be used: {promise}" in ended.stderr
    assert " serving " not in ended.stderr


@pytest.mark.parametrize(("lie", "promise"), LIES.values(), ids=LIES)
def test_nothing_is_collected_on_a_store_that_ignores(bucket: S3Settings, lie: Lie, promise: str) -> None:
    ended = run(bucket, lie, "garbage-collect")

    assert ended.returncode == 1, ended
    assert f"this object store cannot be used: {promise}" in ended.stderr


def test_a_store_that_is_asked_anew_and_does_not_lie_is_not_refused(bucket: S3Settings) -> None:
    """What is signed anew is taken: the refusals above are about what was left out."""
    ended = run(bucket, lambda _: True, "garbage-collect", "--dry-run")

    assert ended.returncode == 0, ended
