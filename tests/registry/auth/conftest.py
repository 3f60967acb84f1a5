"""A store in memory with a clock of the test's, and storage sections beyond those of the folder above."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from storage_backends.interface import StorageBackend
from storage_backends.memory import MemoryBackend
from tests.clock import Clock
from tests.storage_backends.s3_server import object_store


@pytest.fixture
async def backend() -> AsyncIterator[StorageBackend]:
    backend = MemoryBackend()
    await backend.start()
    yield backend
    await backend.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def s3_storage() -> Iterator[dict[str, Any]]:
    """The `storage` section of a bucket of the test's own."""
    with object_store() as buckets:
        bucket = buckets.new()
        section = {
            "bucket": bucket.bucket,
            "regionendpoint": bucket.endpoint,
            "accesskey": bucket.access_key,
            "secretkey": bucket.secret_key,
        }
        yield {"s3": section}
