"""The promises of an OciRegistry: kept by the server's core, and by core, HTTP and client together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from kitclient.remote import RemoteRegistry
from kitspec.interface import OciRegistry
from registry.app import services_of
from tests.contracts.registry_contract import RegistryContract
from tests.registry.conftest import configured


class TestCore(RegistryContract):
    @pytest.fixture
    async def registry(self, storage: dict[str, Any]) -> AsyncIterator[OciRegistry]:
        async with services_of(configured(storage)) as services:
            yield services.registry


class TestOverHttp(RegistryContract):
    @pytest.fixture
    async def registry(self, registry_url: str) -> AsyncIterator[OciRegistry]:
        async with RemoteRegistry(urlsplit(registry_url).netloc, plain_http=True) as remote:
            yield remote
