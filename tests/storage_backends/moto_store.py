"""A second object store for tests: moto's server, which keeps everything in memory and checks no signature.

It stands for stores that are not built on files: keys may be below other keys, ETags are MD5 sums, each answer comes from a
dictionary. It is there to be different from versitygw, not to be fast.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from tests.storage_backends.s3_server import Buckets

_COMMAND: Final = f"{sys.prefix}/bin/moto_server"
_START_TIMEOUT_S: Final = 30.0


@contextmanager
def moto_store(log: Path) -> Iterator[Buckets]:
    """A store that runs until the end of the block.

    Args:
        log: a file, for what it says.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [_COMMAND, "-H", "127.0.0.1", "-p", str(port)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        _wait_until_it_listens(server, port, log)
        with closing(Buckets(f"http://127.0.0.1:{port}", "any-key", "any-secret")) as buckets:
            yield buckets
    finally:
        server.terminate()
        server.wait()


def _wait_until_it_listens(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"moto does not listen: {log.read_text(errors='replace')[-2000:]}")
