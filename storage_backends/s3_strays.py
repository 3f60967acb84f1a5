"""What is in a bucket and is nobody's, or cannot be read, where no reader of keys would meet it: for fsck. Only reads."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from storage_backends.checks import INTERNAL, is_key, is_upload_id
from storage_backends.interface import ObjectDamaged, ObjectMissing, Stray, UploadMissing
from storage_backends.s3_client import S3Client
from storage_backends.s3_format import TRASH, UPLOADS, data_id, is_probe_key, is_trash_key
from storage_backends.s3_listing import pages
from storage_backends.s3_parts import Holding
from storage_backends.s3_records import Records
from storage_backends.s3_sweep import read_trash
from storage_backends.threads import Threads


async def strays(client: S3Client, records: Records, threads: Threads) -> AsyncGenerator[Stray, None]:
    """See `StorageBackend.strays`. Folders that a console has made are objects whose names end with a slash."""
    async for page in pages(client, threads, ""):
        for listed in page:
            if not is_key(listed.key):
                yield Stray(listed.key)
    async for page in pages(client, threads, f"{INTERNAL}/"):
        for listed in page:
            if is_trash_key(listed.key) or _upload_id(listed.key) is not None:
                damage = await threads.run(_damage, client, records, listed.key)
                if damage:
                    yield Stray(listed.key, damage)
            elif data_id(listed.key) is None and not is_probe_key(listed.key):
                yield Stray(listed.key)


def _upload_id(key: str) -> str | None:
    upload_id = key.removeprefix(UPLOADS)
    return upload_id if key.startswith(UPLOADS) and is_upload_id(upload_id) else None


def _damage(client: S3Client, records: Records, key: str) -> str:
    """Why a record of ours cannot be read; "" if it can, or is gone."""
    try:
        if key.startswith(TRASH):
            read_trash(records, key)
        else:
            Holding.read(client, records, key.removeprefix(UPLOADS))
    except (ObjectMissing, UploadMissing):
        pass
    except ObjectDamaged as error:
        return str(error)
    return ""
