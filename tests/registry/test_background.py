"""What goes on beside the serving: it ends with the worker, and with nothing else."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from registry import background
from registry.app import _purge_uploads, services_of
from registry.background import running
from registry.config import Config, Uploadpurging
from registry.garbage import Collector
from registry.upload_sessions import UploadSessions
from storage_backends.interface import UploadInfo
from storage_backends.memory import MemoryBackend
from tests.contracts.registry_contract import REPOSITORY


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_PAUSE_S", 0.01)


async def until(event: asyncio.Event) -> None:
    async with asyncio.timeout(5):
        await event.wait()


async def test_work_that_breaks_is_logged_with_its_stack_and_begun_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    times = 0
    is_third = asyncio.Event()

    async def work() -> None:
        nonlocal times
        times += 1
        if times < 3:
            raise ValueError(f"broken {times}")
        is_third.set()
        await asyncio.sleep(60)

    async with running(work, "the work"):
        await until(is_third)

    lines = [record for record in caplog.records if record.message == "task.failed"]
    assert [vars(line)["fields"]["task"] for line in lines] == ["the work"] * 2
    assert [str(line.exc_info[1]) for line in lines if line.exc_info] == ["broken 1", "broken 2"]
    assert {line.levelno for line in lines} == {logging.ERROR}


async def test_it_ends_with_the_block() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async with running(work, "the work"):
        await until(began)

    assert ended.is_set()


async def test_a_collection_that_breaks_is_not_the_last_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs = 0
    is_third = asyncio.Event()

    async def run_when_due(self: Collector, *, interval_s: float) -> None:
        nonlocal runs
        runs += 1
        if runs == 3:
            is_third.set()
        json.loads("a record that is not what it should be")

    monkeypatch.setattr(Collector, "run_when_due", run_when_due)
    collection = {"enabled": True, "interval": 0.1}
    tree = {"storage": {"inmemory": {}, "maintenance": {"garbagecollection": collection}}}

    async with services_of(Config.model_validate(tree)):
        await until(is_third)

    assert "task.failed" in caplog.messages


class SlowClock(MemoryBackend):
    """A store whose clock is ten days behind ours."""

    def now(self) -> float:
        return super().now() - 10 * 24 * 3600.0

    async def uploads(self) -> AsyncIterator[UploadInfo]:
        async for upload in super().uploads():
            yield replace(upload, modified=self.now())


async def test_uploads_are_as_old_as_the_store_says() -> None:
    store = SlowClock()
    sessions = UploadSessions(store, count_max=10, per_repository_max=10, size_max=None)
    upload = await sessions.begin(REPOSITORY)

    async with running(lambda: _purge_uploads(store, sessions, Uploadpurging()), "purge"):
        await asyncio.sleep(0.05)

    assert (await sessions.resume(REPOSITORY, upload.id)).offset == 0
