"""LayoutRegistry: the contract, and what a folder that outlives its processes must promise besides."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from filelock import FileLock

from kitclient.image_layout import LayoutRegistry
from kitclient.layout_folder import ImageLayout
from tests.contracts.registry_contract import RegistryContract


class TestLayout(RegistryContract):
    blobs_are_shared = True

    @pytest.fixture
    async def registry(self, tmp_path: Path) -> AsyncIterator[LayoutRegistry]:
        async with LayoutRegistry(tmp_path / "storage") as registry:
            yield registry


def test_INV_C2_a_lock_that_a_killed_writer_left_goes_at_the_next_start(tmp_path: Path) -> None:
    """Killed between giving its blob the final name and removing the lock."""
    layout = ImageLayout(tmp_path)
    layout.create()
    (layout.ingest / "sha256-0a.lock").touch()
    with FileLock(layout.ingest / "sha256-0b.lock"):
        (layout.ingest / "sha256-0c").touch()
        (layout.ingest / "sha256-0c.lock").touch()

        layout.create()

        left = sorted(path.name for path in layout.ingest.iterdir())
    assert left == ["index.lock", "sha256-0b.lock", "sha256-0c", "sha256-0c.lock"]
