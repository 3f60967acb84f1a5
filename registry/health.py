"""Whether this worker can serve: asked of the storage now and then, not of every request."""

from __future__ import annotations

import asyncio

from storage_backends.interface import StorageBackend, StorageError


class Health:
    """
    Args:
        threshold: probes in a row that must fail before the worker calls itself not ready.
    """

    def __init__(self, backend: StorageBackend, *, interval_s: float, threshold: int) -> None:
        self._backend = backend
        self._interval_s = interval_s
        self._threshold = threshold
        self._failures = 0
        self.is_started = False
        self.is_draining = False
        self.problem: str | None = None

    @property
    def is_ready(self) -> bool:
        return self.is_started and not self.is_draining and self._failures < self._threshold

    async def probe(self) -> None:
        """Ask the storage once."""
        try:
            async with asyncio.timeout(self._interval_s):
                await self._backend.probe()
        except (StorageError, TimeoutError) as error:
            self._failures += 1
            self.problem = f"storage: {type(error).__name__}"
        else:
            self._failures = 0
            self.problem = None

    async def watch(self) -> None:
        """Probe until cancelled."""
        while True:
            await self.probe()
            await asyncio.sleep(self._interval_s)
