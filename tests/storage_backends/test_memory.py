from collections.abc import AsyncIterator

import pytest

from storage_backends.interface import StorageBackend
from storage_backends.memory import MemoryBackend
from tests.contracts.storage_contract import StorageContract


class TestMemory(StorageContract):
    @pytest.fixture
    async def backend(self) -> AsyncIterator[StorageBackend]:
        backend = MemoryBackend()
        await backend.start()
        yield backend
        await backend.close()
        await backend.close()
