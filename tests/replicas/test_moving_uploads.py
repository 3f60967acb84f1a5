"""An upload belongs to no replica: each of its requests may go to another, and any of them may be killed (X-19, X-20)."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from yarl import URL

from tests.replicas import schedules
from tests.replicas.cluster import Cluster, running
from tests.replicas.fleet import Client, Kill, fleet_of
from tests.replicas.pushing import Kit, Mounting, Push, Sending, Stored, Way, check, digest_of
from tests.replicas.store import empty_trash, leftovers

MIB = 1024 * 1024
# More than a part of S3, a little, and the rest: parts, bytes that wait for their part, and both in one chunk.
SIZE = 12 * MIB + 5
CUTS = (6 * MIB, 6 * MIB + 77, 11 * MIB)
# `make test-replicas` says 500.
SCHEDULES = int(os.environ.get("SCHEDULES", "12"))
# Of tens of megabytes each.
SEGMENT_SCHEDULES = max(4, SCHEDULES // 10)
SPARES = 3
_UPLOAD_AGE = "MODELREG_STORAGE_MAINTENANCE_UPLOADPURGING_AGE"

pytestmark = [pytest.mark.s3, pytest.mark.timeout(120 + 3 * SCHEDULES)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("replicas"), spares=SPARES) as cluster:
        yield cluster


@pytest.fixture
def content(request: pytest.FixtureRequest) -> bytes:
    """Of this test alone: nobody has pushed it before."""
    return random.Random(request.node.nodeid).randbytes(SIZE)


async def push_at(cluster: Cluster, content: bytes, places: Sequence[int], *kills: Kill) -> Push:
    """Push a blob in four PATCHes and a manifest, the first requests at these places, and read it at every place."""
    async with fleet_of(cluster) as fleet:
        push = Push(
            Client(fleet, random.Random(0), kills, deque(places)), f"moving/{digest_of(content)[-16:]}"
        )
        kit = await push.kit([Sending(content, cuts=CUTS)], "v1")
        await check(Client(fleet, random.Random(0)), kit)
    return push


async def test_X_20_each_request_of_an_upload_may_go_to_another_replica(
    cluster: Cluster, content: bytes
) -> None:
    push = await push_at(cluster, content, [0, 1, 2, 0, 1, 2])

    assert not push.happened


@pytest.mark.parametrize("request_number", range(6))
async def test_X_20_what_a_killed_replica_has_acknowledged_is_not_asked_for_again(
    cluster: Cluster, content: bytes, request_number: int
) -> None:
    push = await push_at(cluster, content, [0, 1, 2, 0, 1, 2], Kill(request_number))

    assert not push.happened


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("request_number", [1, 2, 4])
async def test_X_20_another_replica_goes_on_with_a_chunk_in_which_one_was_killed(
    cluster: Cluster, content: bytes, request_number: int, share: float
) -> None:
    push = await push_at(cluster, content, [0, 1, 2, 0, 1, 2], Kill(request_number, share=share))

    assert push.happened == {"went on, an answer was lost": 1}


@pytest.mark.parametrize("delay_ms", range(0, 60, 10))
async def test_X_20_the_last_PUT_of_a_killed_replica_had_its_effect_or_none(
    cluster: Cluster, content: bytes, delay_ms: int
) -> None:
    push = await push_at(cluster, content, [0, 1, 2, 0, 1, 2], Kill(5, delay_s=delay_ms / 1000))

    # Killed between the end of the upload and the link to its content, it leaves a clean 404.
    gone = "begun anew, the upload was gone after its PUT"
    assert set(push.happened) <= {"went on, an answer was lost", "201 was lost, the blob is there", gone}


async def test_X_20_an_upload_that_is_gone_is_a_clean_404_everywhere_and_a_push_from_the_start_works(
    cluster: Cluster, content: bytes
) -> None:
    async with fleet_of(cluster) as fleet:
        client = Client(fleet, random.Random(0))
        begun = await client.ask("POST", "/v2/moving/gone/blobs/uploads/", place=0)
        path = URL(begun.headers["Location"], encoded=True).raw_path
        await client.ask("PATCH", path, body=content[: CUTS[0]], place=1)
        await client.ask("DELETE", path, place=2)

        answers = [
            await client.ask(method, path + query, body=body, place=place)
            for method, query, body in (
                ("GET", "", b""),
                ("PATCH", "", content),
                ("PUT", f"?digest={digest_of(content)}", b""),
                ("DELETE", "", b""),
            )
            for place in fleet.places
        ]

    assert {answer.status for answer in answers} == {404}
    assert {json.loads(answer.body)["errors"][0]["code"] for answer in answers} == {"BLOB_UPLOAD_UNKNOWN"}
    await push_at(cluster, content, [0, 1, 2])


async def test_what_one_replica_has_acknowledged_the_others_mount_and_find_at_once(
    cluster: Cluster, content: bytes
) -> None:
    async with fleet_of(cluster) as fleet:
        mine = Push(Client(fleet, random.Random(0), (), deque([0, 0, 0])), "moving/mine")
        await mine.blob(Sending(content, Way.PUT))

        others = Push(Client(fleet, random.Random(0), (), deque([1, 2])), "moving/others")
        kit = await others.kit([Mounting(Stored.of(content), "moving/mine")], "v1")

        await check(Client(fleet, random.Random(0)), kit)


def run_and_delete(
    folder: Path,
    seeds: Sequence[int],
    schedule_of: Callable[[int, Sequence[Kit]], schedules.Schedule],
    settings: Mapping[str, str],
) -> tuple[schedules.Outcome, int, list[str]]:
    """Push, read, delete and collect; with the kills there were, and what is left in the bucket."""

    async def push_and_delete(cluster: Cluster) -> tuple[schedules.Outcome, int]:
        async with fleet_of(cluster) as fleet:
            outcome = await schedules.run(fleet, seeds, schedule_of)
            await schedules.read_again(fleet, outcome.kits)
            await schedules.delete_all(fleet, outcome.kits)
        return outcome, fleet.kills

    with running(folder, spares=SPARES, settings=settings) as cluster:
        outcome, kills = asyncio.run(push_and_delete(cluster))
        for place in range(len(cluster)):
            cluster.stop(place)
        cluster.operate("garbage-collect", "--offline", "--grace", "0s", settings={_UPLOAD_AGE: "1ms"})
        asyncio.run(empty_trash(cluster.bucket))
        return outcome, kills, leftovers(cluster.bucket)


@pytest.mark.parametrize(
    ("schedule_of", "count", "settings"),
    [
        (schedules.Schedule.of, SCHEDULES, {}),
        (schedules.Schedule.of_segments, SEGMENT_SCHEDULES, {"MODELREG_STORAGE_REDIRECT_DISABLE": "true"}),
    ],
    ids=["any", "segments and a tail"],
)
def test_random_schedules_with_kills_lose_nothing_acknowledged_and_leave_nothing_behind(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    schedule_of: Callable[[int, Sequence[Kit]], schedules.Schedule],
    count: int,
    settings: Mapping[str, str],
) -> None:
    """X-19, X-20: `SCHEDULES` pushes, each request to a random replica, one or two of which are killed meanwhile."""
    began = time.monotonic()

    outcome, kills, left = run_and_delete(tmp_path, range(count), schedule_of, settings)

    with capsys.disabled():
        print(f"\n{len(outcome.kits)} schedules, {kills} kills, {time.monotonic() - began:.0f} s")  # noqa: T201
        for what, times in sorted(outcome.happened.items()):
            print(f"{times:6} {what}")  # noqa: T201
    assert len(outcome.kits) == count
    assert kills >= count / 2
    assert not left
