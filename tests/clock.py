"""A clock that stands until a test moves it."""

from typing import Final

BEGIN: Final = 1_800_000_000.0


class Clock:
    """Attributes: now: seconds since the epoch, as `time.time` tells them."""

    def __init__(self, now: float = BEGIN) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
