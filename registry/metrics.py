"""What is counted: Distribution's `registry_*` families and our `modelreg_*`, in Prometheus' text form.

Counting is plain arithmetic in this process: a request costs one to two microseconds, and prometheus_client's shared files
cost a dozen times as much (docs/adr/0010-workers.md). Several workers share a folder: each writes what it has counted there once a second, and whoever is
asked adds up: its own numbers as of now, the others' as of at most a second ago. What a worker that crashed had written
stays counted; only its gauges go. Every label has a closed set of values: no client can make a series.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from registry.config import Limits

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# Distribution's names, where it has one.
HANDLERS: Final = frozenset(
    {"base", "blob", "blob_upload", "blob_upload_chunk", "catalog", "manifest", "tags"}
    | {"health", "metrics", "referrers"}
    | {"api_keys", "token"}
    | {"archive", "discovery", "file", "files", "hub", "kitfile", "tensors"}
)
METHODS: Final = frozenset({"delete", "get", "head", "options", "patch", "post", "put"})
ACTIONS: Final = frozenset(
    {"append", "begin", "commit", "abort", "create", "delete", "deliver", "list", "probe", "read", "stat"}
    | {"touch", "write"}
)
KINDS: Final = frozenset(
    {"links", "content", "referrers", "views", "packs", "tables", "uploads", "journal", "leftovers"}
)
_OTHER: Final = "other"

# Distribution's bounds, so that its dashboards fit, and beyond them what models need: hours and hundreds of gigabytes.
SECONDS_BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0, 3600.0)
SIZE_BOUNDS: Final = (*(float(1024 * 2**power) for power in range(22)), 2.0**35, 2.0**38, 2.0**41)

_FLUSH_INTERVAL_S: Final = 1.0
_VERSION: Final = importlib.metadata.version("modelkit-registry")

Labels = tuple[str, ...]
Series = tuple[str, Labels]


@dataclass(frozen=True, slots=True)
class Family:
    """One row of /metrics.

    Attributes:
        bounds: upper ends of the buckets; a histogram has some.
        gauge: counts what is now, so a worker that ended has none of it.
    """

    help: str
    labels: Labels = ()
    bounds: tuple[float, ...] = ()
    gauge: bool = False


FAMILIES: Final[Mapping[str, Family]] = {
    "registry_http_requests_total": Family("Requests answered.", ("handler", "method", "code")),
    "registry_http_request_duration_seconds": Family(
        "From the end of the request's header to the end of the answer.",
        ("handler", "method", "code"),
        SECONDS_BOUNDS,
    ),
    "registry_http_request_size_bytes": Family(
        "Bytes of request bodies.", ("handler", "method", "code"), SIZE_BOUNDS
    ),
    "registry_http_response_size_bytes": Family(
        "Bytes of response bodies.", ("handler", "method", "code"), SIZE_BOUNDS
    ),
    "registry_http_in_flight_requests": Family("Requests that are being answered.", ("handler",), gauge=True),
    "registry_storage_action_seconds": Family("What the store took.", ("driver", "action"), SECONDS_BOUNDS),
    "modelreg_received_bytes_total": Family("Bytes of request bodies."),
    "modelreg_sent_bytes_total": Family("Bytes of responses, heads and bodies."),
    "modelreg_uploads_in_progress": Family("Requests that are sending content right now.", gauge=True),
    "modelreg_upload_commit_seconds": Family(
        "From the last byte of a blob until it was durable.", (), SECONDS_BOUNDS
    ),
    "modelreg_manifest_cache_total": Family(
        "Manifest lookups, by whether memory had the answer.", ("result",)
    ),
    "modelreg_connections": Family("Connections that are open.", gauge=True),
    "modelreg_connections_refused_total": Family("Connections closed on arrival.", ("reason",)),
    "modelreg_connections_timed_out_total": Family(
        "Connections closed because the peer was silent.", ("phase",)
    ),
    "modelreg_requests_refused_total": Family(
        "Requests beyond what one address, or one user, may have answered at a time.", ("reason",)
    ),
    "modelreg_logins_total": Family(
        "Credentials that were checked; those that were remembered are not.", ("method", "result")
    ),
    "modelreg_auth_source_stale": Family(
        "1 while a file or an address of users or keys cannot be read: what was read before stays in force.",
        ("source",),
        gauge=True,
    ),
    "registry_notifications_events_total": Family(
        "Attempts to tell an endpoint of an event: it took it, it said no, or there was no answer.",
        ("type", "endpoint"),
    ),
    "registry_notifications_status_total": Family("Answers of endpoints.", ("code", "endpoint")),
    "registry_notifications_pending_total": Family(
        "Entries of the journal that an endpoint was not told of; of more than 1000 it says 1000.",
        ("endpoint",),
        gauge=True,
    ),
    "modelreg_collections_total": Family(
        "Collections of this worker, by how they ended: finished, failed, lost to another worker, stopped with this one.",
        ("outcome",),
    ),
    "modelreg_collected_total": Family("What collections of this worker have removed.", ("kind",)),
    "modelreg_collected_bytes_total": Family("Bytes of content that went with it."),
    "modelreg_collection_finished_timestamp_seconds": Family(
        "When any worker of any replica last finished a collection; 0 for never.", gauge=True
    ),
    "modelreg_collection_interval_seconds": Family("In which a collection is due.", gauge=True),
    "modelreg_limit": Family("The limits in force.", ("name",), gauge=True),
    "modelreg_info": Family("1, with the version.", ("version",), gauge=True),
    "modelreg_workers": Family("Worker processes.", gauge=True),
    "process_resident_memory_bytes": Family("Memory of all workers.", gauge=True),
    "process_cpu_seconds_total": Family("Processor time of all workers."),
}
# Each worker says the same, or what it has heard of last: adding them up would make nonsense of it.
_SAME_EVERYWHERE: Final = frozenset(
    {"modelreg_limit", "modelreg_info"}
    | {"modelreg_collection_finished_timestamp_seconds", "modelreg_collection_interval_seconds"}
)


@dataclass(slots=True)
class Snapshot:
    """Numbers at one moment. A histogram is the count of each bucket, then the sum of what was observed."""

    values: dict[Series, float]
    histograms: dict[Series, list[float]]

    def to_json(self) -> bytes:
        values = [[name, labels, value] for (name, labels), value in self.values.items()]
        histograms = [[name, labels, numbers] for (name, labels), numbers in self.histograms.items()]
        return json.dumps([values, histograms]).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Snapshot:
        values, histograms = json.loads(content)
        return cls(
            {(name, tuple(labels)): value for name, labels, value in values},
            {(name, tuple(labels)): numbers for name, labels, numbers in histograms},
        )

    def add(self, other: Snapshot) -> None:
        for series, value in other.values.items():
            mine = self.values.get(series, 0)
            self.values[series] = max(mine, value) if series[0] in _SAME_EVERYWHERE else mine + value
        for series, numbers in other.histograms.items():
            counts = self.histograms.get(series)
            self.histograms[series] = (
                numbers if counts is None else [a + b for a, b in zip(counts, numbers, strict=True)]
            )

    def without_gauges(self) -> Snapshot:
        counted = {series: value for series, value in self.values.items() if not FAMILIES[series[0]].gauge}
        return Snapshot(counted, self.histograms)


class Metrics:
    """The numbers of this process. Count from one thread, the event loop's; `render` may be called from any."""

    def __init__(self) -> None:
        self._values: dict[Series, float] = {
            ("modelreg_workers", ()): 1.0,
            ("modelreg_info", (_VERSION,)): 1.0,
        }
        self._histograms: dict[Series, list[float]] = {}
        self._requests: dict[tuple[str, str, int], tuple[list[float], list[float], list[float]]] = {}
        self._in_flight: dict[str, int] = {}
        self._folder: Path | None = None
        self._own_file = ""

    def request_started(self, handler: str) -> None:
        self._in_flight[handler] = self._in_flight.get(handler, 0) + 1

    def request_finished(
        self, handler: str, method: str, status: int, *, seconds: float, received: int, sent: int
    ) -> None:
        """Count an answered request, one for each `request_started`.

        Args:
            handler: one of HANDLERS, `-` and `_` being the same; anything else counts as "other".
            received, sent: bytes of the bodies.
        """
        self._in_flight[handler] = self._in_flight.get(handler, 1) - 1
        series = self._requests.get((handler, method, status))
        if series is None:
            series = self._request_series(handler, method, status)
        durations, received_sizes, sent_sizes = series
        durations[bisect_left(SECONDS_BOUNDS, seconds)] += 1
        durations[-1] += seconds
        received_sizes[bisect_left(SIZE_BOUNDS, received)] += 1
        received_sizes[-1] += received
        sent_sizes[bisect_left(SIZE_BOUNDS, sent)] += 1
        sent_sizes[-1] += sent

    def storage_action(self, driver: str, action: str, seconds: float) -> None:
        self._observe("registry_storage_action_seconds", (driver, _known(action, ACTIONS)), seconds)

    def upload_started(self) -> None:
        self._count("modelreg_uploads_in_progress", (), 1)

    def upload_ended(self) -> None:
        self._count("modelreg_uploads_in_progress", (), -1)

    def upload_committed(self, seconds: float) -> None:
        self._observe("modelreg_upload_commit_seconds", (), seconds)

    def manifest_looked_up(self, *, hit: bool) -> None:
        self._count("modelreg_manifest_cache_total", ("hit" if hit else "miss",), 1)

    def connection_opened(self) -> None:
        self._count("modelreg_connections", (), 1)

    def connection_closed(self) -> None:
        self._count("modelreg_connections", (), -1)

    def connection_refused(self, reason: str) -> None:
        self._count("modelreg_connections_refused_total", (_known(reason, {"total", "address"}),), 1)

    def connection_timed_out(self, phase: str) -> None:
        self._count(
            "modelreg_connections_timed_out_total",
            (_known(phase, {"header", "body", "response"}),),
            1,
        )

    def request_refused(self, reason: str) -> None:
        self._count("modelreg_requests_refused_total", (_known(reason, {"address", "user"}),), 1)

    def login(self, method: str, *, is_good: bool) -> None:
        """Count credentials that were checked. `method` is "basic" or "bearer"."""
        self._count("modelreg_logins_total", (method, "good" if is_good else "refused"), 1)

    def auth_source(self, source: str, *, is_stale: bool) -> None:
        """Show how a source is doing. `source` comes from the configuration, so there are as many as that names."""
        self._values["modelreg_auth_source_stale", (source,)] = float(is_stale)

    def events_waiting(self, endpoint: str, entries: int) -> None:
        """Show how far behind an endpoint is. Names come from the configuration, so there are as many as that has."""
        self._values["registry_notifications_pending_total", (endpoint,)] = entries

    def event_sent(self, endpoint: str, status: int) -> None:
        self._count("registry_notifications_events_total", ("Successes", endpoint), 1)
        self._count("registry_notifications_status_total", (str(status), endpoint), 1)

    def event_failed(self, endpoint: str, status: int | None) -> None:
        outcome = "Errors" if status is None else "Failures"
        self._count("registry_notifications_events_total", (outcome, endpoint), 1)
        if status is not None:
            self._count("registry_notifications_status_total", (str(status), endpoint), 1)

    def collection_ended(self, outcome: str, removed: Mapping[str, int], size: int) -> None:
        self._count("modelreg_collections_total", (outcome,), 1)
        for kind, count in removed.items():
            self._count("modelreg_collected_total", (_known(kind, KINDS),), count)
        self._count("modelreg_collected_bytes_total", (), size)

    def collection_looked(self, *, finished: float | None, interval_s: float) -> None:
        self._values["modelreg_collection_finished_timestamp_seconds", ()] = finished or 0.0
        self._values["modelreg_collection_interval_seconds", ()] = interval_s

    def show_limits(self, limits: Limits) -> None:
        for name, value in limits:
            if isinstance(value, int | float):
                self._values["modelreg_limit", (name,)] = value

    def share(self, folder: Path, worker: int) -> None:
        """From now on answer for all workers that share `folder`, and let them answer for this one."""
        self._folder = folder
        self._own_file = f"{worker}-{os.getpid()}.json"
        self.flush()
        threading.Thread(target=self._flush_forever, name="metrics", daemon=True).start()

    def flush(self) -> None:
        """Write what was counted to where the other workers read it."""
        if self._folder is not None:
            scratch = self._folder / f"{self._own_file}.new"
            scratch.write_bytes(self._snapshot().to_json())
            scratch.replace(self._folder / self._own_file)

    def render(self) -> bytes:
        """The answer to GET /metrics. Reads files when there are several workers: not for the event loop."""
        total = self._snapshot()
        if self._folder is not None:
            with _locked(self._folder):
                for path in self._folder.glob("*.json"):
                    if path.name != self._own_file:
                        total.add(Snapshot.from_json(path.read_bytes()))
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Rows(total))
        return generate_latest(registry)

    def _request_series(
        self, handler: str, method: str, status: int
    ) -> tuple[list[float], list[float], list[float]]:
        labels = (
            _known(handler.replace("-", "_"), HANDLERS),
            _known(method.lower(), METHODS),
            str(status) if 100 <= status <= 599 else _OTHER,
        )
        series = (
            self._histogram("registry_http_request_duration_seconds", labels),
            self._histogram("registry_http_request_size_bytes", labels),
            self._histogram("registry_http_response_size_bytes", labels),
        )
        if _OTHER not in labels:  # what a client invents is not remembered
            self._requests[handler, method, status] = series
        return series

    def _histogram(self, name: str, labels: Labels) -> list[float]:
        numbers = self._histograms.get((name, labels))
        if numbers is None:
            numbers = self._histograms[name, labels] = [0.0] * (len(FAMILIES[name].bounds) + 2)
        return numbers

    def _observe(self, name: str, labels: Labels, value: float) -> None:
        numbers = self._histogram(name, labels)
        numbers[bisect_left(FAMILIES[name].bounds, value)] += 1
        numbers[-1] += value

    def _count(self, name: str, labels: Labels, amount: float) -> None:
        self._values[name, labels] = self._values.get((name, labels), 0.0) + amount

    def _snapshot(self) -> Snapshot:
        # list() copies in one step of the interpreter: the event loop may add a series meanwhile.
        histograms = {series: list(numbers) for series, numbers in list(self._histograms.items())}
        values = dict(self._values)
        for handler, count in list(self._in_flight.items()):
            series = ("registry_http_in_flight_requests", (_known(handler.replace("-", "_"), HANDLERS),))
            values[series] = values.get(series, 0.0) + count
        for (name, labels), numbers in histograms.items():
            if name == "registry_http_request_duration_seconds":
                values["registry_http_requests_total", labels] = sum(numbers[:-1])
            elif name == "registry_http_request_size_bytes":
                _add(values, "modelreg_received_bytes_total", numbers[-1])
            elif name == "registry_http_response_size_bytes":
                _add(values, "modelreg_sent_bytes_total", numbers[-1])
        values["process_cpu_seconds_total", ()] = sum(os.times()[:2])
        if (resident := _resident_bytes()) is not None:
            values["process_resident_memory_bytes", ()] = resident
        return Snapshot(values, histograms)

    def _flush_forever(self) -> None:
        ticker = threading.Event()
        while not ticker.wait(_FLUSH_INTERVAL_S):
            with contextlib.suppress(OSError):  # a full disk, or the folder is gone because all is ending
                self.flush()


_process_metrics = Metrics()


def process_metrics() -> Metrics:
    """The numbers of this process; there is one of them, as there is one process."""
    return _process_metrics


def fold_ended(folder: Path, process: int) -> None:
    """Keep what the worker `process` had counted before it ended, once nobody writes it any more."""
    with _locked(folder):
        for path in folder.glob(f"*-{process}.json"):
            ended = folder / "ended.json"
            total = Snapshot.from_json(path.read_bytes()).without_gauges()
            if ended.exists():
                total.add(Snapshot.from_json(ended.read_bytes()))
            scratch = ended.with_suffix(".new")
            scratch.write_bytes(total.to_json())
            scratch.replace(ended)
            path.unlink()


class _Rows(Collector):
    def __init__(self, total: Snapshot) -> None:
        self._total = total

    def collect(self) -> Iterator[Metric]:
        for name, family in FAMILIES.items():
            if family.bounds:
                yield self._histogram(name, family)
                continue
            kind = GaugeMetricFamily if family.gauge else CounterMetricFamily
            row: Any = kind(name, family.help, labels=family.labels)
            for (series, labels), value in sorted(self._total.values.items()):
                if series == name:
                    row.add_metric(labels, value)
            yield row

    def _histogram(self, name: str, family: Family) -> Metric:
        row = HistogramMetricFamily(name, family.help, labels=family.labels)
        for (series, labels), numbers in sorted(self._total.histograms.items()):
            if series == name:
                so_far, buckets = 0.0, []
                for bound, count in zip((*map(_bound, family.bounds), "+Inf"), numbers, strict=False):
                    so_far += count
                    buckets.append((bound, so_far))
                row.add_metric(labels, buckets, numbers[-1])
        return row


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    import fcntl  # there are several workers only where there is fork, and then there is this

    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _known(value: str, values: frozenset[str] | set[str]) -> str:
    return value if value in values else _OTHER


def _add(values: dict[Series, float], name: str, amount: float) -> None:
    values[name, ()] = values.get((name, ()), 0.0) + amount


def _bound(value: float) -> str:
    return f"{value:g}" if value < 1e6 else str(value)


def _resident_bytes() -> float | None:
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # not Linux
        return None
    return float(pages) * os.sysconf("SC_PAGE_SIZE")
