"""The harness's arithmetic, and that all of it runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.figures import Measure, Target, as_markdown, judge, table
from bench.servers import Server
from bench.wire import Source
from bench.workloads import QUICK, Material

ROOT = Path(__file__).parent.parent
RATE = Measure("push", "GB/s", more_is_better=True, target=Target(">=", 1.5))
TIME = Measure("pack", "s", more_is_better=False, target=Target("<=", 1.0))
MEMORY = Measure("memory", "MiB", more_is_better=False, target=Target("<", 150, is_ratio=False))


def _judged(measure, ours, peer):
    (row,) = judge([measure], {measure.name: {"ours": ours, "peer": peer}}, "ours", "peer")
    return row


def test_a_ratio_is_of_the_medians_and_the_bests_stand_beside_it():
    row = _judged(RATE, [3.0, 1.0, 8.0], [2.0, 1.0, 4.0])

    assert (row.ours, row.peer, row.ratio) == (3.0, 2.0, 1.5)
    assert (row.ours_best, row.peer_best, row.best_ratio) == (8.0, 4.0, 2.0)


def test_the_best_of_a_time_is_the_shortest():
    row = _judged(TIME, [3.0, 1.0], [2.0, 4.0])

    assert (row.ours_best, row.peer_best) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("measure", "ours", "peer", "is_met"),
    [
        (RATE, [1.5], [1.0], True),
        (RATE, [1.49], [1.0], False),
        (TIME, [1.0], [1.0], True),
        (TIME, [1.01], [1.0], False),
        (MEMORY, [149.9], [1.0], True),
        (MEMORY, [150.0], [500.0], False),
        (MEMORY, [149.9], [], True),
        (RATE, [9.0], [], None),
        (RATE, [], [1.0], None),
        (Measure("cpu", "s/GiB", more_is_better=False), [1.0], [1.0], None),
    ],
)
def test_a_target_is_met_at_its_limit_and_undecided_without_a_peer(measure, ours, peer, is_met):
    assert _judged(measure, ours, peer).is_met is is_met


def test_rows_keep_the_order_of_the_measures_and_leave_out_what_was_not_measured():
    rows = judge([RATE, TIME, MEMORY], {"memory": {"ours": [1.0]}, "push": {"ours": [1.0]}}, "ours", "peer")

    assert [row.measure.name for row in rows] == ["push", "memory"]


def test_a_table_names_both_sides_and_says_what_was_met():
    cells = table([_judged(RATE, [3.0], [1.0])], "ours", "zot")

    assert as_markdown(cells).splitlines() == [
        "| measure | target | ours | zot | ratio | ratio of bests | met |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| push, GB/s | >= 1.5 x | 3 (3) | 1 (1) | 3.00 | 3.00 | yes |",
    ]


def test_every_blob_of_a_source_is_new_and_its_digest_is_of_all_of_it(tmp_path):
    from hashlib import sha256

    source = Source(tmp_path / "source", 1000, head=b"head", rest=b"rest")

    first, second = source.blob(), source.blob()

    assert first.digest != second.digest
    assert first.digest == f"sha256:{sha256(first.path.read_bytes() + first.tail).hexdigest()}"
    assert first.size == source.size


def test_cpu_time_and_memory_are_of_the_process_and_its_children():
    burn = "import os; os.fork(); sum(range(10**7)); print(flush=True); open(0).read()"
    with subprocess.Popen(
        [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        server = Server("burner", "", process.pid)
        for _ in range(2):
            process.stdout.readline()

        cpu_s, peak_mib = server.cpu_s(), server.peak_memory_mib()

        alone = Server("burner", "", os.getpid())
        process.communicate()
    assert cpu_s > 0.1
    assert 1 < peak_mib < 1000
    assert alone.cpu_s() >= 0


def test_only_large_files_of_a_server_are_removed_between_two_pushes(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "large").write_bytes(bytes(1 << 20))
    (tmp_path / "blobs" / "record").write_bytes(b"{}")

    Server("ours", "", folder=tmp_path).remove_blobs()
    Server("elsewhere", "").remove_blobs()

    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["record"]


def test_quick_material_is_made_once_and_small(tmp_path):
    material = Material(tmp_path, QUICK)

    assert material.large.size < 9 << 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "large", "several", "small"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_quick_run_against_memory_measures_every_workload():
    serve = (
        f"{sys.prefix}/bin/modelkit-registry serve --listen 127.0.0.1:{{port}} --storage memory: --workers 1"
    )
    workloads = ["push", "push-stream", "pull", "push-8", "pull-8", "small-pushes", "manifests", "memory"]
    workloads += ["indexing", "first-byte", "file-stream"]
    chosen = [word for workload in workloads for word in ("--only", workload)]
    command = [sys.executable, "-m", "bench", "--quick", "--server", f"memory={serve}", *chosen]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)

    assert done.returncode == 0, done.stderr
    rows = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("push", "pull", "8 ", "small", "manifest", "peak", "first"))
    ]
    assert len([row for row in rows if " memory " in row]) >= 12
