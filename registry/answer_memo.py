"""Answers to manifest GETs, kept as bytes and given again to the same request.

A pull by many nodes is the same request again and again, to the byte. aiohttp spends 80 µs and more on parsing it,
a task, a response and its headers (docs/adr/0011-answer-memo.md has the measurement); looking it up costs 3 µs.
A kept answer is given only while every record it was made from still has the version it was read at, so that a tag moved
by any worker is seen at once. What is not the very same request goes to aiohttp, untouched.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from email.utils import formatdate
from time import time

from aiohttp import web

from registry.hosted import Versions
from storage_backends.interface import StorageBackend

# A manifest of a ModelKit has 1 to 20 KB; larger ones are asked for seldom.
_ANSWER_SIZE_MAX = 64 * 1024
_HEAD_SIZE_MAX = 4 * 1024
# Of one worker, all answers together.
_MEMO_SIZE_MAX = 8 * 1024 * 1024

_END_OF_HEAD = b"\r\n\r\n"
# What makes a request more than its head, or its answer differ from one caller to the next.
_NOT_SIMPLE = (
    b"\r\nauthorization:",
    b"\r\nconnection: close",
    b"\r\ncontent-length:",
    b"\r\ncookie:",
    b"\r\nexpect:",
    b"\r\ntransfer-encoding:",
    b"\r\nupgrade:",
    b"\r\nx-request-id:",
)


def is_simple(data: bytes) -> bool:
    """Whether `data` is one whole request without a body, whose answer depends on its bytes and the records alone."""
    if not data.startswith((b"GET /", b"HEAD /")) or len(data) > _HEAD_SIZE_MAX:
        return False
    if data.find(_END_OF_HEAD) != len(data) - len(_END_OF_HEAD):
        return False
    head = data.lower()
    return b" http/1.1\r\n" in head and not any(field in head for field in _NOT_SIMPLE)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer without its date and its request id, which are put in when it is given.

    Attributes:
        path, agent: of the request, for the log.
    """

    versions: Versions
    head: bytes
    rest: bytes
    path: str
    agent: str

    @property
    def size(self) -> int:
        return len(self.head) + len(self.rest)


class AnswerMemo:
    """One for each worker."""

    def __init__(self, backend: StorageBackend) -> None:
        self._version = backend.version_at_once
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()
        self._size = 0
        self._date_second = 0
        self._date = b""

    def find(self, request: bytes) -> Answer | None:
        """The answer to a request, if it is known and still true."""
        answer = self._answers.get(request)
        if answer is None:
            return None
        for key, version in answer.versions:
            if self._version(key) != version:
                self._forget(request)
                return None
        return answer

    def render(self, answer: Answer, request_id: str) -> bytes:
        """The bytes to send."""
        second = int(time())
        if second != self._date_second:
            self._date_second = second
            self._date = formatdate(second, usegmt=True).encode()
        return b"%bDate: %b\r\nX-Request-Id: %b\r\n%b" % (
            answer.head,
            self._date,
            request_id.encode(),
            answer.rest,
        )

    def keep(self, data: bytes, request: web.BaseRequest, response: web.Response, versions: Versions) -> None:
        """Remember an answer that was just given to `request`, a GET that came as `data`, for which `is_simple` holds."""
        body = response.body
        if response.status != 200 or not isinstance(body, bytes) or not response.keep_alive:
            return
        fields = [
            f"{name}: {value}\r\n"
            for name, value in response.headers.items()
            if name.lower() not in ("date", "x-request-id")
        ]
        answer = Answer(
            versions,
            ("HTTP/1.1 200 OK\r\n" + "".join(fields)).encode(),
            b"\r\n" + body,
            path=request.rel_url.raw_path,
            agent=request.headers.get("User-Agent", ""),
        )
        if answer.size > _ANSWER_SIZE_MAX or any(not self._version(key) for key, _ in versions):
            return
        self._forget(data)
        self._answers[data] = answer
        self._size += answer.size + len(data)
        while self._size > _MEMO_SIZE_MAX:
            self._forget(next(iter(self._answers)))

    def _forget(self, request: bytes) -> None:
        answer = self._answers.pop(request, None)
        if answer is not None:
            self._size -= answer.size + len(request)
