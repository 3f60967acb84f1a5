"""Prints the sum of the column COLUMN of the Parquet file SOURCE, a path or an address, as duckdb computes it.

duckdb's own HTTP is an extension that it downloads; fsspec's does as well.
"""

import sys
from datetime import UTC, datetime

import duckdb
from fsspec.implementations.http import HTTPFileSystem


class FileSystem(HTTPFileSystem):
    """fsspec's, with what duckdb asks of it."""

    async def _exists(self, path: str, **_: object) -> bool:
        # fsspec begins to fetch the file to learn whether there is one.
        await self._info(path)
        return True

    def modified(self, path: str) -> datetime:
        _ = path  # fsspec takes no time from HTTP
        return datetime(2020, 1, 1, tzinfo=UTC)


source, column = sys.argv[1:]
connection = duckdb.connect()
# One thread: sums of floating-point numbers depend on their order.
connection.execute("SET threads = 1")
connection.register_filesystem(FileSystem(block_size=64 * 1024))
print(connection.execute(f'SELECT count(*), sum("{column}") FROM read_parquet(?)', [source]).fetchall())  # noqa: S608
