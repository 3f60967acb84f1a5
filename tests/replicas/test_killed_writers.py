"""A process that is killed while it sends a record to the store: the record that was there stays.

The kernel closes the connections of a killed process in good order. A gateway that takes the bytes so far for all there are
(versitygw 1.8 does, unless a checksum says otherwise) would put half a record in the place of a whole one.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from storage_backends.s3_client import S3Client, S3Settings
from storage_backends.s3_errors import TryAgain
from tests.replicas.store import fresh_bucket

KEY = "_store/uploads/x"
# As large as a state with bytes that wait for their part; a small body comes with its head.
SIZE = 4 * 1024 * 1024

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def settings() -> Iterator[S3Settings]:
    with fresh_bucket() as (_, settings):
        yield settings


@contextmanager
def cut_after(endpoint: str, size: int) -> Iterator[str]:
    """A relay for one connection, closed in good order on the far side once `size` bytes have been sent."""
    url = urlsplit(endpoint)
    assert url.hostname is not None
    far = (url.hostname, url.port or 80)

    def relay() -> None:
        near, _ = listener.accept()
        with near, socket.create_connection(far) as store:
            left = size
            while left and (chunk := near.recv(min(left, 65536))):
                store.sendall(chunk)
                left -= len(chunk)
            store.shutdown(socket.SHUT_WR)
            with suppress(OSError):
                while store.recv(65536):  # until the store has made up its mind
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=relay)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize("is_conditional", [False, True])
@pytest.mark.parametrize("sent", [2000, SIZE // 2, SIZE])
def test_a_record_that_did_not_arrive_whole_is_not_written(
    settings: S3Settings, sent: int, is_conditional: bool
) -> None:
    assert settings.endpoint is not None
    with closing(S3Client(settings, connections=1)) as client:
        version = client.put(KEY, b"whole")

        with cut_after(settings.endpoint, sent) as endpoint:
            cut = S3Client(replace(settings, endpoint=endpoint), connections=1)
            with closing(cut), pytest.raises(TryAgain):
                cut.put(KEY, b"x" * SIZE, expect=version if is_conditional else None)

        assert client.get(KEY).read() == b"whole"
