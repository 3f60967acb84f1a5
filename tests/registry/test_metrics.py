"""Counting: whose names, whose labels, over how many processes."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from registry.config import Config
from registry.metered_backend import MeteredBackend
from registry.metrics import FAMILIES, HANDLERS, Metrics, fold_ended
from storage_backends.memory import MemoryBackend
from tests.registry.wire import Wire

ROOT = Path(__file__).parents[2]


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, /, **labels: str) -> float:
    return samples(metrics).get((name, tuple(sorted(labels.items()))), 0.0)


def answer(metrics: Metrics, handler: str = "manifest", method: str = "GET", status: int = 200) -> None:
    metrics.request_started(handler)
    metrics.request_finished(handler, method, status, seconds=0.02, received=3, sent=2000)


def test_a_request_counts_under_distributions_names() -> None:
    metrics = Metrics()

    answer(metrics)
    answer(metrics, "blob-upload", "PUT", 201)
    metrics.request_started("blob")

    labels = {"handler": "manifest", "method": "get", "code": "200"}
    assert value(metrics, "registry_http_requests_total", **labels) == 1
    assert value(metrics, "registry_http_request_duration_seconds_bucket", le="0.01", **labels) == 0
    assert value(metrics, "registry_http_request_duration_seconds_bucket", le="0.025", **labels) == 1
    assert value(metrics, "registry_http_request_duration_seconds_sum", **labels) == pytest.approx(0.02)
    assert value(metrics, "registry_http_response_size_bytes_bucket", le="2048", **labels) == 1
    assert value(metrics, "registry_http_request_size_bytes_count", **labels) == 1
    assert (
        value(metrics, "registry_http_requests_total", handler="blob_upload", method="put", code="201") == 1
    )
    assert value(metrics, "registry_http_in_flight_requests", handler="blob") == 1
    assert value(metrics, "registry_http_in_flight_requests", handler="manifest") == 0
    assert value(metrics, "modelreg_received_bytes_total") == 6
    assert value(metrics, "modelreg_sent_bytes_total") == 4000


async def test_what_the_kernel_sends_is_counted_too(registry_url: str) -> None:
    wire = Wire(registry_url)
    content = bytes(1 << 20)
    digest = await wire.push_blob("a", content)
    before = await _sent(wire)

    await wire("GET", f"/v2/a/blobs/{digest}")

    assert await _sent(wire) - before >= len(content)


async def _sent(wire: Wire) -> float:
    text = (await wire("GET", "/metrics")).body.decode()
    return next(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "modelreg_sent_bytes_total"
    )


def test_L_28_V_34_what_a_client_invents_makes_no_series() -> None:
    metrics = Metrics()
    answer(metrics, "manifest", "BREW", 200)
    before = len(samples(metrics))

    for number in range(1000):
        answer(metrics, f"handler{number}", f"METHOD{number}", 600 + number)
        metrics.storage_action("filesystem", f"action{number}", 0.1)

    assert (
        value(metrics, "registry_http_requests_total", handler="other", method="other", code="other") == 1000
    )
    assert len(samples(metrics)) < before + 200
    assert metrics._requests == {}


def test_every_family_is_filled_and_in_the_manual() -> None:
    metrics = Metrics()
    answer(metrics)
    metrics.storage_action("filesystem", "read", 0.001)
    metrics.upload_started()
    metrics.upload_ended()
    metrics.upload_committed(0.5)
    metrics.manifest_looked_up(hit=True)
    metrics.connection_opened()
    metrics.connection_closed()
    metrics.connection_refused("total")
    metrics.connection_timed_out("body")
    metrics.request_refused("address")
    metrics.login("basic", is_good=True)
    metrics.auth_source("htpasswd", is_stale=False)
    metrics.events_waiting("ci", 2)
    metrics.event_sent("ci", 204)
    metrics.event_failed("ci", None)
    metrics.collection_ended("finished", {"links": 1}, 2)
    metrics.collection_looked(finished=1e9, interval_s=3600.0)
    metrics.show_limits(Config().limits)
    manual = (ROOT / "docs" / "operations.md").read_text()

    names = {name for name, _ in samples(metrics)}

    assert all(any(found.startswith(name) for found in names) for name in FAMILIES)
    assert {name for name in FAMILIES if f"`{name}`" not in manual} == set()


def test_what_endpoints_are_told_counts_under_distributions_names() -> None:
    metrics = Metrics()

    metrics.events_waiting("ci", 3)
    metrics.event_sent("ci", 204)
    metrics.event_failed("ci", 503)
    metrics.event_failed("ci", None)
    metrics.events_waiting("ci", 2)

    events = "registry_notifications_events_total"
    assert value(metrics, events, type="Successes", endpoint="ci") == 1
    assert value(metrics, events, type="Failures", endpoint="ci") == 1
    assert value(metrics, events, type="Errors", endpoint="ci") == 1
    assert value(metrics, "registry_notifications_status_total", code="503", endpoint="ci") == 1
    assert value(metrics, "registry_notifications_pending_total", endpoint="ci") == 2


def test_what_collections_did_is_counted_also_when_they_failed() -> None:
    metrics = Metrics()

    metrics.collection_ended("finished", {"links": 2, "content": 1}, 700)
    metrics.collection_ended("failed", {"links": 1, "leftovers": 4, "invented": 1}, 50)

    assert value(metrics, "modelreg_collections_total", outcome="finished") == 1
    assert value(metrics, "modelreg_collections_total", outcome="failed") == 1
    assert value(metrics, "modelreg_collected_total", kind="links") == 3
    assert value(metrics, "modelreg_collected_total", kind="leftovers") == 4
    assert value(metrics, "modelreg_collected_total", kind="other") == 1
    assert value(metrics, "modelreg_collected_bytes_total") == 750


def test_the_last_collection_is_the_latest_that_any_worker_has_heard_of(tmp_path: Path) -> None:
    workers = [Metrics() for _ in range(3)]
    for number, worker in enumerate(workers):
        worker._folder, worker._own_file = tmp_path, f"{number}-{1000 + number}.json"
        worker.collection_looked(finished=[None, 2e9, 1e9][number], interval_s=3600.0)
        worker.flush()

    for worker in workers:
        assert value(worker, "modelreg_collection_finished_timestamp_seconds") == 2e9
        assert value(worker, "modelreg_collection_interval_seconds") == 3600
    assert value(_looked(None), "modelreg_collection_finished_timestamp_seconds") == 0


def _looked(finished: float | None) -> Metrics:
    metrics = Metrics()
    metrics.collection_looked(finished=finished, interval_s=3600.0)
    return metrics


def test_the_limits_in_force_are_visible() -> None:
    metrics = Metrics()

    metrics.show_limits(Config.model_validate({"limits": {"connections": 17}}).limits)

    assert value(metrics, "modelreg_limit", name="connections") == 17
    assert value(metrics, "modelreg_limit", name="headertimeout") == 10


def test_whoever_is_asked_answers_for_all_workers(tmp_path: Path) -> None:
    workers = [Metrics() for _ in range(3)]
    for number, worker in enumerate(workers):
        worker.show_limits(Config().limits)
        worker._folder, worker._own_file = tmp_path, f"{number}-{1000 + number}.json"
        worker.connection_opened()
        answer(worker)
        worker.flush()
    answer(workers[1])

    labels = {"handler": "manifest", "method": "get", "code": "200"}
    assert value(workers[1], "registry_http_requests_total", **labels) == 4
    assert value(workers[0], "registry_http_requests_total", **labels) == 3  # until worker 1 writes again
    assert value(workers[0], "modelreg_workers") == 3
    assert value(workers[0], "modelreg_connections") == 3
    assert value(workers[0], "modelreg_limit", name="connections") == 10_000
    assert value(workers[0], "registry_http_request_duration_seconds_bucket", le="+Inf", **labels) == 3


def test_what_a_crashed_worker_had_counted_stays_and_what_it_had_open_goes(tmp_path: Path) -> None:
    survivor, *crashed = [Metrics() for _ in range(3)]
    for number, worker in enumerate([survivor, *crashed]):
        worker._folder, worker._own_file = tmp_path, f"{number}-{1000 + number}.json"
        worker.connection_opened()
        worker.request_started("blob")
        answer(worker)
        worker.flush()

    fold_ended(tmp_path, 1001)
    fold_ended(tmp_path, 1002)
    fold_ended(tmp_path, 1002)

    assert value(survivor, "registry_http_requests_total", handler="manifest", method="get", code="200") == 3
    assert value(survivor, "modelreg_connections") == 1
    assert value(survivor, "registry_http_in_flight_requests", handler="blob") == 1
    assert value(survivor, "modelreg_workers") == 1


def test_sharing_writes_to_a_file_of_this_process(tmp_path: Path) -> None:
    metrics = Metrics()

    metrics.share(tmp_path, 7)

    assert json.loads((tmp_path / f"7-{os.getpid()}.json").read_text())
    metrics._folder = None


def test_every_endpoint_has_its_label() -> None:
    from registry.routes import LABELS

    assert set(LABELS.values()) <= HANDLERS


async def test_every_call_to_the_storage_that_is_counted_has_its_name() -> None:
    metrics, inner = Metrics(), MemoryBackend()
    backend = MeteredBackend(inner, metrics, driver="inmemory")
    await backend.start()

    await backend.create("log", b"")
    await backend.write("record", b"")
    await backend.touch("record")
    await backend.read("record", size_max=1)
    await backend.delete("record")
    await backend.probe()

    seen = await asyncio.to_thread(samples, metrics)
    for action in ("create", "write", "touch", "read", "delete", "probe"):
        labels = (("action", action), ("driver", "inmemory"))
        assert seen.get(("registry_storage_action_seconds_count", labels)) == 1, action
    await backend.close()
