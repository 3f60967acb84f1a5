"""What views cost: rows about our own server, against itself. A server without the extension is passed over.

A kit here is one layer, a tar of one large file and some small ones, as `kit pack` writes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from statistics import median

from bench.figures import MIB, Measure, Target
from bench.servers import Server
from bench.wire import SALT_SIZE, Blob, Connection, Source, UnexpectedReply
from bench.workloads import NAME, Figures, Material, Workload

_BLOCK = 512
_LARGE_FILE = "model/large.bin"
_SMALL_FILE = "model/small.bin"
_LAYER_TYPE = "application/vnd.kitops.modelkit.model.v1.tar"
_CONFIG_TYPE = "application/vnd.kitops.modelkit.config.v1+json"
_PUSHES = 3
_QUESTIONS = 100
_STREAMS = 15

_INDEXING = "push of kits of 1 GiB / of bytes that are no kit"
_FIRST_BYTE = "first byte of a file in a layer of 5 GiB / of 5 MiB"
_FILE_STREAM = "pull of a file of 1 GiB / of its layer"


def indexing(server: Server, material: Material) -> Figures:
    """Kits one after the other, so that what is done after a push is in the way of the next."""
    if not knows_kits(server):
        return {}
    layers = _kit_source(material, "layer", material.scale.large)
    seconds = [_seconds_of_pushes(server, source) for source in (material.large, layers)]
    return {_INDEXING: seconds[0] / seconds[1]}


def first_byte(server: Server, material: Material) -> Figures:
    """Asked for in turn, once both are indexed."""
    if not knows_kits(server):
        return {}
    sizes = {"large": 5 * material.scale.large, "small": 5 * MIB}
    layers = {tag: _kit_source(material, tag, size).blob() for tag, size in sizes.items()}
    with Connection(server.url) as connection:
        for tag, layer in layers.items():
            _push_kit(connection, NAME, layer, tag)
    seconds: dict[str, list[float]] = {tag: [] for tag in sizes}
    with Connection(server.url) as connection:
        for tag in sizes:
            connection.get(_file(tag, _SMALL_FILE))
        for _ in range(_QUESTIONS):
            for tag, taken in seconds.items():
                start = time.perf_counter()
                connection.get(_file(tag, _SMALL_FILE))
                taken.append(time.perf_counter() - start)
    return {_FIRST_BYTE: median(seconds["large"]) / median(seconds["small"])}


def file_stream(server: Server, material: Material) -> Figures:
    """In turn, from the page cache."""
    if not knows_kits(server):
        return {}
    blob = _kit_source(material, "layer", material.scale.large).blob()
    with Connection(server.url) as connection:
        _push_kit(connection, NAME, blob, "v1")
        rates: dict[str, list[float]] = {"layer": [], "file": []}
        targets = {"layer": f"/v2/{NAME}/blobs/{blob.digest}", "file": _file("v1", _LARGE_FILE)}
        connection.get(f"/v2/{NAME}/_modelkit/files/v1")  # answered when all is hashed
        for target in targets.values():
            connection.stream(target)
        for _ in range(_STREAMS):
            for what, target in targets.items():
                start = time.perf_counter()
                size = connection.stream(target)
                rates[what].append(size / (time.perf_counter() - start))
    return {_FILE_STREAM: median(rates["file"]) / median(rates["layer"])}


def _seconds_of_pushes(server: Server, source: Source) -> float:
    def push_all(blobs: Sequence[Blob]) -> None:
        with Connection(server.url) as connection:
            for index, blob in enumerate(blobs):
                _push_kit(connection, NAME, blob, f"v{index}")

    push_all([source.blob() for _ in range(_PUSHES)])  # see workloads._timed_push
    server.remove_blobs()
    blobs = [source.blob() for _ in range(_PUSHES)]
    start = time.perf_counter()
    push_all(blobs)
    seconds = time.perf_counter() - start
    server.remove_blobs()
    return seconds


def _kit_source(material: Material, name: str, size: int) -> Source:
    """Blobs that are tars: a large file with the salt at its end, and at the far end of the layer a small one."""
    known = material.more.get(name)
    if known is None:
        size += -(size + SALT_SIZE) % _BLOCK
        head = _header("model", 0, b"5") + _header(_SMALL_FILE, _BLOCK) + bytes(_BLOCK)
        head += _header(_LARGE_FILE, size + SALT_SIZE)
        known = material.more[name] = Source(
            material.scratch / f"kit-{name}", size, head=head, rest=bytes(2 * _BLOCK)
        )
    return known


def _header(path: str, size: int, typeflag: bytes = b"0") -> bytes:
    """POSIX.1-2017, pax, "ustar Interchange Format"."""
    block = bytearray(_BLOCK)
    block[0 : len(path)] = path.encode()
    block[100:148] = b"0000644\0" + b"0001750\0" + b"0000000\0" + b"%011o\0" % size + b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = typeflag
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _push_kit(connection: Connection, name: str, layer: Blob, tag: str) -> None:
    connection.push_whole(name, layer)
    entry = {"name": "m", "path": "model", "digest": layer.digest, "diffId": layer.digest}
    config = json.dumps({"manifestVersion": "1.0.0", "package": {}, "model": entry}).encode()
    digest = connection.push_bytes(name, config)
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": _CONFIG_TYPE, "digest": digest, "size": len(config)},
        "layers": [{"mediaType": _LAYER_TYPE, "digest": layer.digest, "size": layer.size}],
    }
    connection.push_manifest(name, tag, json.dumps(manifest).encode())


def _file(tag: str, path: str) -> str:
    return f"/v2/{NAME}/_modelkit/files/{tag}/{path}"


def knows_kits(server: Server) -> bool:
    with Connection(server.url) as connection:
        try:
            return b"_modelkit" in connection.get("/v2/_oci/ext/discover")
        except UnexpectedReply:
            return False


def _measure(name: str, target: Target) -> Measure:
    return Measure(name, "x", more_is_better=target.sign == ">=", target=target)


WORKLOADS = (
    Workload("indexing", (_measure(_INDEXING, Target(">=", 0.9, is_ratio=False)),), indexing),
    Workload(
        "first-byte", (_measure(_FIRST_BYTE, Target("<=", 1.1, is_ratio=False)),), first_byte, rounds_max=3
    ),
    Workload("file-stream", (_measure(_FILE_STREAM, Target(">=", 0.9, is_ratio=False)),), file_stream),
)
