"""A listing of a bucket, page by page, whoever goes through it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Final

from storage_backends.checks import INTERNAL
from storage_backends.s3_client import Listed, S3Client
from storage_backends.threads import Threads

_OWN: Final = f"{INTERNAL}/"
# Greater than every key of ours and smaller than every other that comes behind them.
_BEHIND_OWN: Final = f"{INTERNAL}/~"


async def pages(
    client: S3Client, threads: Threads, prefix: str, after: str = ""
) -> AsyncGenerator[Sequence[Listed], None]:
    """What begins with `prefix` and is greater than `after`, a request for each 1000.

    What the backend keeps for itself is passed over, unless the prefix asks for it.
    """
    is_own = prefix.startswith(_OWN)
    is_more = True
    while is_more:
        page, is_more = await threads.run(_page, client, prefix, after)
        shown = page if is_own else [listed for listed in page if not listed.key.startswith(_OWN)]
        after = page[-1].key if page else after
        if len(shown) < len(page) and after.startswith(_OWN):
            after = _BEHIND_OWN
        yield shown


def _page(client: S3Client, prefix: str, after: str) -> tuple[Sequence[Listed], bool]:
    return client.again(lambda: client.list(prefix, after=after))
