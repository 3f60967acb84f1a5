from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage_backends.interface import StorageBackend
from storage_backends.local import LocalBackend
from tests.contracts.storage_contract import StorageContract


class TestLocal(StorageContract):
    @pytest.fixture
    async def backend(self, tmp_path: Path) -> AsyncIterator[StorageBackend]:
        backend = LocalBackend(tmp_path / "root")
        await backend.start()
        yield backend
        await backend.close()
        await backend.close()
