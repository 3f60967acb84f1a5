"""A registry on a socket, in this process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from registry.app import run_worker
from registry.config import Config

Serve = Callable[..., AbstractAsyncContextManager[str]]


@asynccontextmanager
async def served(config: Config) -> AsyncIterator[str]:
    """The URL of a registry with this configuration, drained at the end."""
    stop, ready = asyncio.Event(), asyncio.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        worker = asyncio.create_task(run_worker(config, listener, stop=stop, ready=ready.set))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait([worker, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if worker.done():
            worker.result()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stop.set()
            await worker


def configured(storage: dict[str, Any], /, **sections: Any) -> Config:
    """A configuration for tests: one worker, a short drain, no log of requests."""
    http = {"draintimeout": 5, **sections.pop("http", {})}
    log = {"accesslog": {"disabled": True}}
    return Config.model_validate(
        {"workers": 1, "log": log, "http": http, "storage": {**storage, **sections.pop("storage", {})}}
        | sections
    )


@pytest.fixture(params=["memory", "local"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The `storage` section of each backend."""
    if request.param == "memory":
        yield {"inmemory": {}}
    else:
        yield {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}


@pytest.fixture
async def registry_url(storage: dict[str, Any]) -> AsyncIterator[str]:
    """A registry with nothing in it and every setting at its default."""
    async with served(configured(storage)) as url:
        yield url


@pytest.fixture
def serve(storage: dict[str, Any]) -> Serve:
    """`async with serve(limits={...}) as url`: a registry with settings of the test's own."""
    return lambda **sections: served(configured(storage, **sections))
