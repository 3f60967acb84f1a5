"""The bucket that replicas share: a fresh one, in the object store of the tests; and what is in it, seen past the registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import boto3

from storage_backends.s3 import S3Backend
from storage_backends.s3_client import S3Settings
from tests.replicas.cluster import Bucket
from tests.storage_backends.s3_server import object_store


@contextmanager
def fresh_bucket() -> Iterator[tuple[Bucket, S3Settings]]:
    """A bucket for replicas, and the settings with which a test looks into it. Needs $VERSITYGW or $S3_ENDPOINT."""
    with object_store() as buckets:
        settings = buckets.new()
        assert settings.endpoint is not None
        assert settings.access_key is not None
        assert settings.secret_key is not None
        yield Bucket(settings.endpoint, settings.bucket, settings.access_key, settings.secret_key), settings


async def empty_trash(bucket: Bucket) -> None:
    """Remove what a collection has deleted and the store keeps for those who still read it; nobody does."""
    settings = S3Settings(
        bucket.name,
        region="us-east-1",
        endpoint=bucket.endpoint,
        access_key=bucket.access_key,
        secret_key=bucket.secret_key,
        trash_delay_s=0.0,
    )
    backend = S3Backend(settings)
    await backend.start()
    try:
        async for _ in backend.sweep(age_s=0.0):
            pass
    finally:
        await backend.close()


# Of a registry in which nothing is stored any more: names that repositories had, and what was written when.
_KEPT_WHEN_EMPTY = ("catalog/", "journal/", "journal-marks/", "maintenance/")


def leftovers(bucket: Bucket) -> list[str]:
    """What a collection has left behind in a registry of which everything was deleted, and should not have."""
    client = boto3.client(
        "s3",
        endpoint_url=bucket.endpoint,
        region_name="us-east-1",
        aws_access_key_id=bucket.access_key,
        aws_secret_access_key=bucket.secret_key,
    )
    with closing(client):
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name)
        objects = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket.name)
        uploads = [entry["Key"] for page in pages for entry in page.get("Uploads", ())]
    return [
        *(key for key in objects if not key.startswith(_KEPT_WHEN_EMPTY)),
        *(f"{key} (a multipart upload)" for key in uploads),
    ]
