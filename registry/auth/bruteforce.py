"""Guessing passwords is made slow: whoever sent wrong ones waits before the next is looked at.

Counted for each pair of address and user, and, with more patience, for each address. Never for a user alone: then
anybody could lock anybody out. What is known to be right (a remembered login) is never asked to wait.

An attempt counts as wrong from its beginning until it turns out to be right, so that guessing in parallel gains nothing.
Counts are of one worker, in memory, and as many as `_ENTRIES_MAX`.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

# A person who mistypes, or a program that tries a few old passwords.
PAIR_FREE: Final = 5
# Many people may share an address: an office, a proxy that does not say for whom it asks.
ADDRESS_FREE: Final = 50
DELAY_MAX_S: Final = 60.0
# What was wrong so long ago is forgiven.
FORGET_S: Final = 15 * 60.0
_ENTRIES_MAX: Final = 10_000


@dataclass(slots=True)
class _Count:
    wrong: int = 0
    last: float = 0.0


class Backoff:
    """
    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: OrderedDict[tuple[str, str], _Count] = OrderedDict()

    def wait_s(self, address: str, user: str) -> int:
        """Whole seconds before this address may try a password of this user; 0 for now."""
        now = self._clock()
        delay = max(
            self._rest(_pair(address, user), PAIR_FREE, now), self._rest(_all(address), ADDRESS_FREE, now)
        )
        return math.ceil(delay)

    def begin(self, address: str, user: str) -> None:
        """An attempt begins: it counts as wrong."""
        now = self._clock()
        for key in (_pair(address, user), _all(address)):
            count = self._counts.setdefault(key, _Count())
            if now - count.last > FORGET_S:
                count.wrong = 0
            count.wrong += 1
            count.last = now
            self._counts.move_to_end(key)
        while len(self._counts) > _ENTRIES_MAX:
            self._counts.popitem(last=False)

    def was_right(self, address: str, user: str) -> None:
        """The attempt was right: the wrong ones of this pair before it were mistakes."""
        self._counts.pop(_pair(address, user), None)
        self._take_back(_all(address))

    def was_nothing(self, address: str, user: str) -> None:
        """The attempt was not made after all."""
        self._take_back(_pair(address, user))
        self._take_back(_all(address))

    def _take_back(self, key: tuple[str, str]) -> None:
        count = self._counts.get(key)
        if count is not None:
            count.wrong = max(0, count.wrong - 1)

    def _rest(self, key: tuple[str, str], free: int, now: float) -> float:
        count = self._counts.get(key)
        if count is None or count.wrong < free or now - count.last > FORGET_S:
            return 0.0
        # 1, 2, 4 … seconds; the exponent is bounded before it is used.
        delay = min(2.0 ** min(count.wrong - free, 16), DELAY_MAX_S)
        return max(0.0, count.last + delay - now)


def _pair(address: str, user: str) -> tuple[str, str]:
    return (address, user)


def _all(address: str) -> tuple[str, str]:
    """No user's name is empty."""
    return (address, "")
