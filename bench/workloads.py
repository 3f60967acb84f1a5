"""What a server is made to do. Each workload gets a server of its own on a fresh folder and gives one figure per measure."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.figures import GIB, MIB, Measure, Target
from bench.manifest_load import manifest_gets_per_second
from bench.servers import Server
from bench.wire import Blob, Connection, Source

GB = 10**9
NAME = "bench/model"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much work. The full scale is what the targets are about; the quick one only shows that everything runs."""

    large: int = GIB
    several: int = 256 * MIB
    held: int = GIB
    seconds: float = 5
    rounds: int = 5
    small_files: int = 10_000


QUICK = Scale(large=8 * MIB, several=2 * MIB, held=2 * MIB, seconds=0.3, rounds=1, small_files=100)


class Material:
    """The bytes to push, made once for all servers and all rounds."""

    def __init__(self, scratch: Path, scale: Scale) -> None:
        self.scale = scale
        self.scratch = scratch
        self.more: dict[str, Source] = {}
        """What a workload makes for itself, once."""
        self.large = Source(scratch / "large", scale.large)
        self.several = Source(scratch / "several", scale.several)
        self.small = Source(scratch / "small", MIB)
        # Same size, same bytes: a second file would only cost disk.
        self.held = self.large if scale.held == scale.large else Source(scratch / "held", scale.held)


Figures = dict[str, float]
Run = Callable[[Server, Material], Figures]


@dataclass(frozen=True, slots=True)
class Workload:
    """A name for `--only`, the rows that it fills, and how.

    Attributes:
        rounds_max: for what is long and does not vary.
        workers: of each server, where not one a core.
        streams: servers send blobs themselves, and never their address in an object store.
    """

    name: str
    measures: tuple[Measure, ...]
    run: Run
    rounds_max: int = 100
    workers: int | None = None
    streams: bool = True


def push_whole(server: Server, material: Material) -> Figures:
    return timed_push(server, material.large, Connection.push_whole, "push of 1 GiB, one PUT", "push")


def push_stream(server: Server, material: Material) -> Figures:
    return timed_push(server, material.large, Connection.push_stream, "push of 1 GiB, one PATCH stream")


def push_eight(server: Server, material: Material) -> Figures:
    return timed_push(server, material.several, Connection.push_whole, "8 pushes of 256 MiB at once", count=8)


def pull_one(server: Server, material: Material) -> Figures:
    return timed_pull(server, [material.large.blob()], 3, "pull of 1 GiB", "pull")


def pull_eight(server: Server, material: Material) -> Figures:
    return timed_pull(server, [material.several.blob() for _ in range(8)], 3, "8 pulls of 256 MiB at once")


def small_pushes(server: Server, material: Material) -> Figures:
    """A blob of 1 MiB, a config and a manifest, again and again on 8 connections, each a push of new content."""
    deadline = time.perf_counter() + material.scale.seconds

    def push_until_deadline(_: int) -> int:
        count = 0
        with Connection(server.url) as connection:
            while time.perf_counter() < deadline:
                push_model(connection, material.small.blob(), f"v{threading.get_ident()}-{count}")
                count += 1
        return count

    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        count = sum(pool.map(push_until_deadline, range(8)))
    return {"small pushes": count / (time.perf_counter() - start)}


def manifest_gets(server: Server, material: Material) -> Figures:
    with Connection(server.url) as connection:
        push_model(connection, material.small.blob(), "v1")
    target = f"{server.url}/v2/{NAME}/manifests/v1"
    return {"manifest GETs by tag": manifest_gets_per_second(target, material.scale.seconds)}


def memory(server: Server, material: Material) -> Figures:
    return peak_memory(server, [material.held.blob() for _ in range(16)])


def peak_memory(server: Server, blobs: list[Blob]) -> Figures:
    """After all were pushed at once, and after all were pulled at once then."""
    at_once(server, blobs, Connection.push_whole)
    pushing = server.peak_memory_mib()
    at_once(server, blobs, lambda connection, name, blob: connection.pull(name, blob.digest))
    pulling = server.peak_memory_mib()
    if pushing is None or pulling is None:
        return {}
    return {
        "peak memory of a process, 16 pushes": pushing,
        "peak memory of a process, then 16 pulls": pulling,
    }


def rate(name: str, target: Target | None = None) -> Measure:
    return Measure(name, "GB/s", more_is_better=True, target=target)


def cpu(name: str) -> Measure:
    return Measure(f"server CPU, {name}", "s/GiB", more_is_better=False)


def _per_second(name: str, target: Target) -> Measure:
    return Measure(name, "1/s", more_is_better=True, target=target)


def memory_measures(limit_mib: float) -> tuple[Measure, ...]:
    target = Target("<", limit_mib, is_ratio=False)
    names = ("16 pushes", "then 16 pulls")
    return tuple(
        Measure(f"peak memory of a process, {name}", "MiB", more_is_better=False, target=target)
        for name in names
    )


WORKLOADS = (
    Workload("push", (rate("push of 1 GiB, one PUT", Target(">=", 1.5)), cpu("push")), push_whole),
    Workload("push-stream", (rate("push of 1 GiB, one PATCH stream", Target(">=", 1.5)),), push_stream),
    Workload("pull", (rate("pull of 1 GiB", Target(">=", 1.0)), cpu("pull")), pull_one),
    Workload("push-8", (rate("8 pushes of 256 MiB at once"),), push_eight),
    Workload("pull-8", (rate("8 pulls of 256 MiB at once"),), pull_eight),
    Workload("small-pushes", (_per_second("small pushes", Target(">=", 1.0)),), small_pushes),
    Workload("manifests", (_per_second("manifest GETs by tag", Target(">=", 3.0)),), manifest_gets),
    Workload("memory", memory_measures(150), memory, rounds_max=1),
)


def timed_push(
    server: Server,
    source: Source,
    push: Callable[[Connection, str, Blob], object],
    row: str,
    cpu_row: str | None = None,
    *,
    count: int = 1,
) -> Figures:
    """The second of two pushes, when what the first one took of the machine's memory has become free again.

    Memory that nobody ever touched, or that the host of a virtual machine took back, costs 2 s/GB to touch; a registry
    that has run for a day has none of it. What one server leaves free is of no use to another: they ask for it in
    pieces of other sizes.
    """
    at_once(server, [source.blob() for _ in range(count)], push)
    server.remove_blobs()
    blobs = [source.blob() for _ in range(count)]
    size = sum(blob.size for blob in blobs)
    with _stopwatch(server, size) as figures:
        at_once(server, blobs, push)
    return _named(figures, row, cpu_row)


def timed_pull(
    server: Server, blobs: list[Blob], times: int, row: str, cpu_row: str | None = None
) -> Figures:
    """Pull what was pushed and checked just now: it comes from the page cache, on every server."""
    at_once(server, blobs, Connection.push_whole)
    at_once(server, blobs, lambda connection, name, blob: connection.check(name, blob.digest))

    def pull(connection: Connection, name: str, blob: Blob) -> None:
        for _ in range(times):
            connection.pull(name, blob.digest)

    with _stopwatch(server, times * sum(blob.size for blob in blobs)) as figures:
        at_once(server, blobs, pull)
    return _named(figures, row, cpu_row)


@contextmanager
def _stopwatch(server: Server, size: int) -> Iterator[Figures]:
    """Fills in the rate and, where it can be seen, the CPU time."""
    figures: Figures = {}
    cpu, start = server.cpu_s(), time.perf_counter()
    yield figures
    figures["rate"] = size / GB / (time.perf_counter() - start)
    cpu_after = server.cpu_s()
    if cpu is not None and cpu_after is not None:
        figures["cpu"] = (cpu_after - cpu) / (size / GIB)


def _named(figures: Figures, row: str, cpu_row: str | None) -> Figures:
    named = {row: figures["rate"]}
    if cpu_row is not None and "cpu" in figures:
        named[f"server CPU, {cpu_row}"] = figures["cpu"]
    return named


def at_once(server: Server, blobs: list[Blob], transfer: Callable[[Connection, str, Blob], object]) -> None:
    """Every blob on a connection and a thread of its own; the threads wait in the kernel, not for each other."""

    def one(blob: Blob) -> None:
        with Connection(server.url) as connection:
            transfer(connection, NAME, blob)

    with ThreadPoolExecutor(len(blobs)) as pool:
        list(pool.map(one, blobs))


def push_model(connection: Connection, layer: Blob, tag: str) -> None:
    connection.push_whole(NAME, layer)
    config = json.dumps({"made-for": layer.digest}).encode()
    digest = connection.push_bytes(NAME, config)
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest,
            "size": len(config),
        },
        "layers": [
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": layer.digest,
                "size": layer.size,
            }
        ],
    }
    connection.push_manifest(NAME, tag, json.dumps(manifest).encode())
