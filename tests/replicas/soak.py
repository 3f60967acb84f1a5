"""Hours in minutes: three replicas over one bucket, everybody at once, and collection back to back with a grace time of seconds.

    python -m tests.replicas.soak --minutes 30

Pushers mount, skip what they are told is here, and push the rest; pullers read whole artifacts; deleters delete what was pushed; others
leave blobs without a manifest. Every request goes to the next replica. At any moment, of what was acknowledged and not deleted:
the manifest is there, and everything that it lists, to the byte. No answer is a 5xx. At the end `fsck` finds no error.

Exit status 1, and what was seen, at the first thing that does not hold. `make soak` builds the object store that it needs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from aiohttp import ClientSession

from kitspec.digest import Digest
from kitspec.media_types import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST
from tests.replicas.cluster import COMMAND, Cluster
from tests.replicas.round_robin import raw_session
from tests.replicas.store import fresh_bucket

GRACE_S: Final = 10
SETTINGS: Final = {
    "MODELREG_STORAGE_MAINTENANCE_GARBAGECOLLECTION_GRACE": f"{GRACE_S}s",
    "MODELREG_STORAGE_MAINTENANCE_GARBAGECOLLECTION_INTERVAL": "1s",
    "MODELREG_STORAGE_MAINTENANCE_UPLOADPURGING_AGE": "60s",
    "MODELREG_STORAGE_MAINTENANCE_UPLOADPURGING_INTERVAL": "10s",
    "MODELREG_STORAGE_REDIRECT_DISABLE": "true",
    "MODELREG_JOURNAL_POLL": "1s",
    "MODELREG_LOG_ACCESSLOG_DISABLED": "true",
}
REPOSITORIES: Final = ("soak/a", "soak/b", "soak/c")
# The same blobs again and again, a few of them at a time: each is pushed, listed, left alone, collected, and pushed anew.
BLOBS: Final = 48
SEASON_S: Final = 2.0
IN_SEASON: Final = 8
PUSHERS, PULLERS, DELETERS, LITTERERS = 5, 3, 3, 1
# An upload that is open keeps the links of its repository (docs/adr/0016-collection.md): if there always were one, none would be collected.
LITTER_EVERY_S, LITTER_FOR_S = 60.0, 8.0
# A client may think for so long between what it was told and its manifest; half the grace time.
THINKING_MAX_S: Final = GRACE_S / 2
_BIG: Final = 6 * 1024 * 1024
_PROGRESS_S: Final = 10.0


class Broken(Exception):
    """Something does not hold."""


@dataclass
class Artifact:
    """A manifest that can be pushed to a repository, and whether it is meant to be there."""

    repository: str
    manifest: bytes
    blobs: list[bytes]
    is_live: bool = False
    # Pushed, deleted and read by one at a time: what is meant to be there is then never in doubt. Blobs have no such thing.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def digest(self) -> Digest:
        return Digest.of(self.manifest)


class Soak:
    def __init__(self, url: str, session: ClientSession, seed: int) -> None:
        self._url = url
        self._session = session
        self._random = random.Random(seed)
        sizes = [2, 100, 4096, 70_000, 1_000_000]
        self._contents = [
            self._random.randbytes(_BIG if number == 0 else sizes[number % len(sizes)])
            for number in range(BLOBS)
        ]
        self._artifacts: list[Artifact] = []
        self._began = time.monotonic()
        self.counts: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        """Raises: Broken."""
        ends = time.monotonic() + seconds
        work: list[Callable[[], Awaitable[None]]] = [
            *[self._push] * PUSHERS,
            *[self._pull] * PULLERS,
            *[self._delete] * DELETERS,
            *[self._litter] * LITTERERS,
        ]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._report(ends))
            for one in work:
                group.create_task(self._repeat(one, ends))
        for artifact in self._artifacts:
            if artifact.is_live:
                await self._check(artifact)

    async def _repeat(self, work: Callable[[], Awaitable[None]], ends: float) -> None:
        while time.monotonic() < ends:
            await work()
            await asyncio.sleep(0)

    async def _report(self, ends: float) -> None:
        while (left := ends - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _PROGRESS_S))
            print(
                f"{max(0, ends - time.monotonic()):.0f} s left: {dict(sorted(self.counts.items()))}",
                flush=True,
            )

    # ---- what they do

    async def _push(self) -> None:
        artifact = self._some_artifact()
        async with artifact.lock:
            for blob in artifact.blobs:
                await self._provide(artifact.repository, blob)
            if self._random.random() < 0.3:
                await asyncio.sleep(self._random.uniform(0, THINKING_MAX_S))
            target = f"/v2/{artifact.repository}/manifests/{artifact.digest}"
            status, body, _ = await self._ask(
                "PUT", target, artifact.manifest, headers={"Content-Type": OCI_MANIFEST}
            )
            if status != 201:
                raise Broken(f"a manifest whose blobs were all said to be here: {status} {body[:300]!r}")
            artifact.is_live = True
            self.counts["pushes"] += 1
            if self._random.random() < 0.2:
                await self._check(artifact)

    def _some_artifact(self) -> Artifact:
        """One that was there before, or one that never was."""
        if self._artifacts and self._random.random() < 0.3:
            return self._random.choice(self._artifacts[-IN_SEASON:])
        blobs = self._random.sample(self._in_season(), self._random.randint(2, 5))
        config, *layers = blobs
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": _descriptor(config, OCI_CONFIG),
            "layers": [_descriptor(layer, OCI_LAYER) for layer in layers],
            "annotations": {"number": str(len(self._artifacts))},
        }
        artifact = Artifact(self._random.choice(REPOSITORIES), json.dumps(document).encode(), blobs)
        self._artifacts.append(artifact)
        return artifact

    def _in_season(self) -> list[bytes]:
        """What is pushed these days: one blob goes out of fashion every `SEASON_S`, and comes back when all have been."""
        first = int((time.monotonic() - self._began) / SEASON_S)
        return [self._contents[number % BLOBS] for number in range(first, first + IN_SEASON)]

    async def _provide(self, repository: str, blob: bytes) -> None:
        """As clients do: push only what they are not told is here."""
        digest = Digest.of(blob)
        match self._random.choice(("head", "mount", "push")):
            case "head":
                status, _, _ = await self._ask("HEAD", f"/v2/{repository}/blobs/{digest}")
                if status == 200:
                    self.counts["skipped"] += 1
                    return
            case "mount":
                source = self._random.choice(REPOSITORIES)
                query = f"?mount={digest}&from={source}"
                status, _, headers = await self._ask("POST", f"/v2/{repository}/blobs/uploads/{query}")
                if status == 201:
                    self.counts["mounted"] += 1
                    return
                await self._upload(headers["Location"], digest, blob)
                return
        if self._random.random() < 0.3:
            await self._ask("POST", f"/v2/{repository}/blobs/uploads/?digest={digest}", blob, expect=(201,))
            self.counts["blobs"] += 1
            return
        _, _, headers = await self._ask("POST", f"/v2/{repository}/blobs/uploads/", expect=(202,))
        await self._upload(headers["Location"], digest, blob)

    async def _upload(self, location: str, digest: Digest, blob: bytes) -> None:
        path = location.removeprefix(self._url)
        cut = self._random.choice((0, len(blob) // 2, len(blob)))
        if cut:
            _, _, headers = await self._ask("PATCH", path, blob[:cut], expect=(202,))
            path = headers["Location"].removeprefix(self._url)
        await self._ask("PUT", f"{path}?digest={digest}", blob[cut:], expect=(201,))
        self.counts["blobs"] += 1

    async def _litter(self) -> None:
        """A blob that nobody will list, and an upload that nobody goes on with; for a while each minute."""
        into_minute = (time.monotonic() - self._began) % LITTER_EVERY_S
        if into_minute > LITTER_FOR_S:
            await asyncio.sleep(1)
            return
        repository = self._random.choice(REPOSITORIES)
        await self._provide(repository, self._random.choice(self._in_season()))
        _, _, headers = await self._ask("POST", f"/v2/{repository}/blobs/uploads/", expect=(202,))
        await self._ask("PATCH", headers["Location"].removeprefix(self._url), b"abandoned", expect=(202,))
        self.counts["litter"] += 1
        await asyncio.sleep(self._random.uniform(0, 2))

    async def _pull(self) -> None:
        async with self._one_that_is_there() as artifact:
            if artifact is not None:
                await self._check(artifact)
                self.counts["pulls"] += 1

    async def _delete(self) -> None:
        async with self._one_that_is_there() as artifact:
            if artifact is not None:
                target = f"/v2/{artifact.repository}/manifests/{artifact.digest}"
                artifact.is_live = False
                await self._ask("DELETE", target, expect=(202,))
                for _ in range(3):  # whichever replica is asked
                    await self._ask("GET", target, expect=(404,))
                self.counts["deletes"] += 1
        await asyncio.sleep(self._random.uniform(0, 0.2))

    @asynccontextmanager
    async def _one_that_is_there(self) -> AsyncIterator[Artifact | None]:
        there = [one for one in self._artifacts if one.is_live and not one.lock.locked()]
        if not there:
            await asyncio.sleep(0.05)
            yield None
            return
        artifact = self._random.choice(there)
        async with artifact.lock:
            yield artifact if artifact.is_live else None

    # ---- what has to hold

    async def _check(self, artifact: Artifact) -> None:
        base = f"/v2/{artifact.repository}"
        status, body, _ = await self._ask("GET", f"{base}/manifests/{artifact.digest}")
        if status != 200 or body != artifact.manifest:
            raise Broken(f"{artifact.repository}@{artifact.digest} was pushed: {status} {body[:300]!r}")
        for blob in artifact.blobs:
            digest = Digest.of(blob)
            status, body, _ = await self._ask("GET", f"{base}/blobs/{digest}")
            if status != 200 or body != blob:
                raise Broken(
                    f"{digest}, listed by {artifact.repository}@{artifact.digest}: {status} {body[:300]!r}"
                )

    async def _ask(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        *,
        expect: tuple[int, ...] = (),
        headers: dict[str, str] | None = None,
    ) -> tuple[int, bytes, Any]:
        async with self._session.request(
            method, self._url + target, data=body, headers=headers, allow_redirects=False
        ) as answer:
            content = await answer.read()
            self.counts["requests"] += 1
            if answer.status >= 500 or (expect and answer.status not in expect):
                raise Broken(
                    f"{method} {target}: {answer.status} {content[:300]!r}, wanted {expect or 'no 5xx'}"
                )
            return answer.status, content, answer.headers


def _descriptor(content: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": Digest.of(content), "size": len(content)}


def collected(folder: Path) -> Counter[str]:
    """What the replicas say that they collected."""
    counts: Counter[str] = Counter()
    for log in folder.glob("*.log"):
        for line in log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == "collection.done":
                    counts["collections"] += 1
                    for kind in ("links", "content", "uploads", "leftovers"):
                        counts[kind] += event.get(kind, 0)
    return counts


async def _soak(cluster: Cluster, seconds: float, seed: int) -> Counter[str]:
    async with raw_session() as session:
        soak = Soak(cluster.url, session, seed)
        await soak.run(seconds)
    return soak.counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch, fresh_bucket() as (bucket, _):
        folder = Path(scratch)
        with Cluster(bucket, folder, replicas=3, settings=SETTINGS) as cluster:
            counts = asyncio.run(_soak(cluster, options.minutes * 60, seed))
            peaks = [cluster.replica(place).memory_peak // 2**20 for place in range(3)]
        removed = collected(folder)
        fsck = subprocess.run(
            [COMMAND, "fsck", "--storage", f"s3://{bucket.name}"],
            env=os.environ | bucket.environment,
            check=False,
        )
    print(f"done: {dict(sorted(counts.items()))}")
    print(f"collected: {dict(sorted(removed.items()))}; peak memory of the replicas: {peaks} MiB")
    if fsck.returncode:
        print("fsck found errors", file=sys.stderr)
        return 1
    if not removed["content"] or not removed["uploads"]:
        print("nothing was collected: this proves nothing", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
