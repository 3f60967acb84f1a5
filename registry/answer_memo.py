"""Answers to manifest GETs, kept as bytes and given again to the same request.

A pull by many nodes is the same request again and again, to the byte. aiohttp spends 80 µs and more on parsing it,
a task, a response and its headers (docs/adr/0011-answer-memo.md has the measurement); looking it up costs 3 µs.
A kept answer is given only while every record it was made from still has the version it was read at, so that a tag moved
by any worker is seen at once; and only while its credentials, which are bytes of the request, are still proof of the same identity,
under the very policy that let it in. What is not the very same request goes to aiohttp, untouched.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from email.utils import formatdate
from time import time

from aiohttp import web

from registry.auth.client_address import FORWARDED_FOR
from registry.auth.guard import Guard
from registry.auth.identity import Identity
from registry.auth.policy import Policy
from registry.hosted import Versions
from storage_backends.interface import StorageBackend

# A manifest of a ModelKit has 1 to 20 KB; larger ones are asked for seldom.
_ANSWER_SIZE_MAX = 64 * 1024
_HEAD_SIZE_MAX = 4 * 1024
# Of one worker, all answers together.
_MEMO_SIZE_MAX = 8 * 1024 * 1024

# One whole request without a body, in one pass and without a step back; and not with what makes its answer differ from one
# time to the next. Credentials may be in it: whose they are is looked at each time.
_SIMPLE = re.compile(
    # [^\n] and not [^\r\n]: for a set of one the engine has a loop that is five times as fast.
    rb"(?:GET|HEAD) /[^\n]* HTTP/1\.1\r\n"
    rb"(?:(?!\r\n|(?i:connection: close|content-length:|cookie:|expect:|transfer-encoding:|upgrade:|x-request-id:))"
    rb"(?P<credentials>(?i:authorization:))?+[^\n]++\n)*+"
    rb"\r\n"
)


def is_simple(data: bytes) -> bool:
    """Whether `data` is one whole request without a body, whose answer depends on its bytes, the records and the guard alone."""
    return len(data) <= _HEAD_SIZE_MAX and _SIMPLE.fullmatch(data) is not None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer without its date and its request id, which are put in when it is given.

    Attributes:
        identity, policy: whom it was given to, and what allowed that.
        path, agent, forwarded_for: of the request, for the log.
    """

    versions: Versions
    identity: Identity
    policy: Policy
    head: bytes
    rest: bytes
    path: str
    agent: str
    forwarded_for: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.head) + len(self.rest)


class AnswerMemo:
    """One for each worker."""

    def __init__(self, backend: StorageBackend, guard: Guard) -> None:
        self._version = backend.version_at_once
        self._guard = guard
        self._secret = secrets.token_bytes(32)
        self._answers: OrderedDict[bytes, Answer] = OrderedDict()
        self._size = 0
        self._date_second = 0
        self._date = b""

    def name(self, data: bytes) -> bytes | None:
        """What a request is known by, its bytes, or where it has a password in it their keyed hash; None if it is not simple."""
        match = _SIMPLE.fullmatch(data) if len(data) <= _HEAD_SIZE_MAX else None
        if match is None:
            return None
        if match["credentials"] is None:
            return data
        return hashlib.blake2b(data, key=self._secret).digest()

    def find(self, request: bytes) -> Answer | None:
        """The answer to the request of this name, if it is known and still true."""
        answer = self._answers.get(request)
        if answer is None:
            return None
        guard = self._guard
        if answer.policy is not guard.policy or not guard.is_still(answer.identity):
            self._forget(request)
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

    def keep(
        self,
        name: bytes,
        request: web.BaseRequest,
        response: web.Response,
        versions: Versions,
        *,
        identity: Identity,
        policy: Policy,
    ) -> None:
        """Remember an answer that was just given to `request`, a GET of this `name`, by `identity`, which `policy` let in."""
        body = response.body
        if response.status != 200 or not isinstance(body, bytes) or not response.keep_alive:
            return
        if policy is not self._guard.policy or not self._guard.is_still(identity):
            return
        fields = [
            f"{name}: {value}\r\n"
            for name, value in response.headers.items()
            if name.lower() not in ("date", "x-request-id")
        ]
        answer = Answer(
            versions,
            identity,
            policy,
            ("HTTP/1.1 200 OK\r\n" + "".join(fields)).encode(),
            b"\r\n" + body,
            path=request.rel_url.raw_path,
            agent=request.headers.get("User-Agent", ""),
            forwarded_for=tuple(request.headers.getall(FORWARDED_FOR, ())),
        )
        if answer.size > _ANSWER_SIZE_MAX or any(not self._version(key) for key, _ in versions):
            return
        self._forget(name)
        self._answers[name] = answer
        self._size += answer.size + len(name)
        while self._size > _MEMO_SIZE_MAX:
            self._forget(next(iter(self._answers)))

    def _forget(self, request: bytes) -> None:
        answer = self._answers.pop(request, None)
        if answer is not None:
            self._size -= answer.size + len(request)
