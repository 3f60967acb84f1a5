"""Work that goes on beside other work, for as long as that lasts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

from registry.logs import log_event

logger = logging.getLogger(__name__)

# Before what has failed is begun again: what fails at once and always is a line of the log now and then.
_PAUSE_S: Final = 10.0


@asynccontextmanager
async def running(work: Callable[[], Coroutine[Any, Any, None]], name: str) -> AsyncIterator[None]:
    """Work that goes on beside the block, and ends with it."""
    task = asyncio.create_task(kept_up(work, name), name=name)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def kept_up(work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
    """Do work that nobody waits for. What it raises is logged, and it is begun again soon: else it would end in silence."""
    while True:
        try:
            return await work()
        except Exception as error:  # noqa: BLE001 - nobody else would hear of it
            log_event(logger, logging.ERROR, "task.failed", task=name, error=error)
        await asyncio.sleep(_PAUSE_S)
