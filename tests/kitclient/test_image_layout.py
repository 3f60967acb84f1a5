"""LayoutRegistry: the contract, and what a folder that outlives its processes must promise besides."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kitclient.image_layout import LayoutRegistry
from tests.contracts.registry_contract import RegistryContract


class TestLayout(RegistryContract):
    blobs_are_shared = True

    @pytest.fixture
    async def registry(self, tmp_path: Path) -> AsyncIterator[LayoutRegistry]:
        async with LayoutRegistry(tmp_path / "storage") as registry:
            yield registry
