"""A proxy in front of an object store that counts what is asked of it, and may change what is asked.

Bodies stream both ways. What is passed on as it came keeps its signature, `Host` and all; what is changed is signed anew, so
that the store takes it for what the sender asked.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote, urlencode

from aiohttp import ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from multidict import CIMultiDict
from yarl import URL

# Of one hop: the proxy's own client and server say these themselves.
_OF_THE_HOP: Final = {"connection", "expect", "keep-alive", "transfer-encoding"}
_SIGNED: Final = {"authorization", "host", "x-amz-date", "x-amz-content-sha256"}
_REGION: Final = "us-east-1"
_START_TIMEOUT_S: Final = 10.0

# The operation of a request by its method and the names in its query, the first that fits.
_OPERATIONS: Final = (
    ("GET", "list-type", "ListObjects"),
    ("GET", "prefix", "ListObjects"),
    ("GET", "delimiter", "ListObjects"),
    ("GET", "uploadId", "ListParts"),
    ("GET", "uploads", "ListMultipartUploads"),
    ("GET", "", "GetObject"),
    ("HEAD", "", "HeadObject"),
    ("POST", "uploads", "CreateMultipartUpload"),
    ("POST", "uploadId", "CompleteMultipartUpload"),
    ("POST", "delete", "DeleteObjects"),
    ("PUT", "partNumber", "UploadPart"),
    ("PUT", "", "PutObject"),
    ("DELETE", "uploadId", "AbortMultipartUpload"),
    ("DELETE", "", "DeleteObject"),
)
# AWS's price list for S3 Standard, us-east-1: $5.00 for a million PUT, COPY, POST or LIST, $0.40 for a million of others,
# nothing for deletes and for aborts.
_FREE: Final = {"DeleteObject", "DeleteObjects", "AbortMultipartUpload"}
_READS: Final = {"GetObject", "HeadObject"}
USD_PER_WRITE: Final = 5.00 / 1e6
USD_PER_READ: Final = 0.40 / 1e6


@dataclass(frozen=True, slots=True)
class Cost:
    """What requests to a store come to.

    Attributes:
        writes: PUT, COPY, POST and LIST.
        reads: GET and HEAD.
    """

    writes: int
    reads: int
    deletes: int

    @property
    def requests(self) -> int:
        return self.writes + self.reads + self.deletes

    @property
    def usd(self) -> float:
        return self.writes * USD_PER_WRITE + self.reads * USD_PER_READ


def cost_of(counted: Counter[str]) -> Cost:
    deletes = sum(count for operation, count in counted.items() if operation in _FREE)
    reads = sum(count for operation, count in counted.items() if operation in _READS)
    return Cost(counted.total() - deletes - reads, reads, deletes)


@dataclass
class Asked:
    """A request on its way to the store. What is changed here is what the store gets."""

    method: str
    path: str
    query: dict[str, str]
    headers: CIMultiDict[str]

    @property
    def operation(self) -> str:
        """As S3's documentation calls it."""
        is_copy = "x-amz-copy-source" in self.headers
        name = next(
            operation
            for method, query, operation in _OPERATIONS
            if method == self.method and (not query or query in self.query)
        )
        return f"{name}Copy" if is_copy else name


@dataclass
class Relay:
    """
    Attributes:
        url: where it listens.
        counted: requests so far, by operation.
        change: asked at each request whether it has changed it; credentials are needed then.
    """

    url: str = ""
    counted: Counter[str] = field(default_factory=Counter)
    change: Callable[[Asked], bool] = lambda _: False

    def take(self) -> Counter[str]:
        """What was counted, which begins anew."""
        counted, self.counted = self.counted, Counter()
        return counted


@contextmanager
def relay(endpoint: str, credentials: Credentials | None = None) -> Iterator[Relay]:
    """A proxy on loopback for the store at `endpoint`, with an event loop and a thread of its own, until the end of the block.

    Args:
        credentials: to sign with what `change` has changed.
    """
    relayed = Relay()
    is_listening = threading.Event()
    loop = asyncio.new_event_loop()
    is_over = asyncio.Event()

    async def listen() -> None:
        async with _listening(relayed, endpoint, credentials):
            is_listening.set()
            await is_over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(listen(),), name="S3 relay")
    thread.start()
    try:
        if not is_listening.wait(_START_TIMEOUT_S):
            raise TimeoutError("the relay does not listen")
        yield relayed
    finally:
        loop.call_soon_threadsafe(is_over.set)
        thread.join()
        loop.close()


@asynccontextmanager
async def _listening(relayed: Relay, endpoint: str, credentials: Credentials | None) -> AsyncIterator[None]:
    async with ClientSession(
        connector=TCPConnector(limit=0),
        auto_decompress=False,
        cookie_jar=DummyCookieJar(),
        timeout=ClientTimeout(total=None),
    ) as session:

        async def serve(request: web.BaseRequest) -> web.StreamResponse:
            asked = _asked(request)
            relayed.counted[asked.operation] += 1
            url = URL(endpoint + request.raw_path, encoded=True)
            body: AsyncIterator[bytes] | bytes | None = (
                request.content.iter_any() if request.body_exists else None
            )
            if relayed.change(asked):
                assert credentials is not None, "what is changed has to be signed"
                body = whole = await request.read()
                url = _sign(asked, endpoint, whole, credentials)
            async with session.request(
                asked.method, url, headers=asked.headers, data=body, skip_auto_headers=("Content-Type",)
            ) as answer:
                return await _pass_back(request, answer)

        runner = web.ServerRunner(web.Server(serve, auto_decompress=False), shutdown_timeout=0)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            relayed.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield
        finally:
            await runner.cleanup()


def _asked(request: web.BaseRequest) -> Asked:
    headers = CIMultiDict(
        (name, text) for name, text in request.headers.items() if name.lower() not in _OF_THE_HOP
    )
    return Asked(request.method, request.raw_path.partition("?")[0], dict(request.rel_url.query), headers)


def _sign(asked: Asked, endpoint: str, body: bytes, credentials: Credentials) -> URL:
    """Sign what is asked now; the URL to ask it at."""
    headers = {name: text for name, text in asked.headers.items() if name.lower() not in _SIGNED}
    # Encoded as the signature has it.
    query = urlencode(asked.query, quote_via=quote, safe="-_.~")
    url = f"{endpoint}{asked.path}?{query}" if query else endpoint + asked.path
    request = AWSRequest(asked.method, url, data=body, headers=headers)
    S3SigV4Auth(credentials, "s3", _REGION).add_auth(request)
    asked.headers = CIMultiDict(request.headers.items())
    return URL(url, encoded=True)


async def _pass_back(request: web.BaseRequest, answer: ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, reason=answer.reason)
    for name, text in answer.headers.items():
        if name.lower() not in _OF_THE_HOP:
            response.headers.add(name, text)
    with suppress(ConnectionError):  # who asked has heard enough
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
    return response
