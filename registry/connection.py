"""One connection: aiohttp's, which also gives kept answers to requests it has seen before."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

from registry.answer_memo import is_simple
from registry.http_limits import LimitedConnection, Server

if TYPE_CHECKING:
    from registry.middleware import Dispatch


class Connection(LimitedConnection):
    """A connection of our server.

    A read is looked up in the memo only while aiohttp waits for a request and has no part of one: every read before was
    a whole simple request (`is_simple`), and its answer has been sent. From the first other read on, the
    connection is aiohttp's alone.

    Attributes:
        memorable: the request that is being answered, where its answer may be kept.
    """

    __slots__ = ("_dispatch", "_is_simple", "memorable")

    def __init__(
        self,
        server: Server,
        dispatch: Dispatch,
        *,
        loop: asyncio.AbstractEventLoop,
        **arguments: Any,  # noqa: ANN401 - aiohttp's
    ) -> None:
        super().__init__(server, loop=loop, **arguments)
        self._dispatch = dispatch
        self._is_simple = True
        self.memorable: bytes | None = None

    def data_received(self, data: bytes) -> None:
        if self._is_simple:
            self.memorable = None
            self._is_simple = is_simple(data)
            if self._is_simple and self._is_waiting():
                if self._give_kept_answer(data):
                    return
                self.memorable = data
        super().data_received(data)

    def _is_waiting(self) -> bool:
        """aiohttp has answered everything and waits; what was sent has left."""
        return (
            self._waiter is not None
            and not self._messages
            and not self._close
            and not self._force_close
            and self.transport is not None
            and self.transport.get_write_buffer_size() == 0
        )

    def _give_kept_answer(self, request: bytes) -> bool:
        memo = self._dispatch.memo
        answer = memo.find(request)
        if answer is None:
            return False
        identity = secrets.token_hex(8)
        assert self.transport is not None
        self.transport.write(memo.render(answer, identity))
        # The clocks start anew, as after an answer of aiohttp's own.
        self.head_since = None
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        self._dispatch.count_kept_answer(answer, identity, self.peername)
        return True
