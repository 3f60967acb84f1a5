"""Storage sections beyond those of the folder above."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.storage_backends.s3_server import object_store


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
