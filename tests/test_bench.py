"""The harness's arithmetic, and that all of it runs."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench import s3
from bench.figures import Measure, Target, as_markdown, judge, table
from bench.servers import OURS, OURS_ON_S3, Candidate, Place, Server, ServerFailed, running
from bench.wire import Connection, Source, UnexpectedReply
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


@contextmanager
def _answering(status: int, body: bytes = b"", **fields: str) -> Iterator[str]:
    """The URL of a server that gives every GET the same answer."""

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **fields}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _digest(content: bytes) -> str:
    return f"sha256:{sha256(content).hexdigest()}"


def test_a_pull_goes_where_the_server_sends_it_and_says_so():
    with (
        _answering(200, b"blob") as store,
        _answering(307, b"go there", Location=f"{store}/key?signature=s") as registry,
        Connection(registry) as sent_on,
        Connection(store) as served,
    ):
        assert sent_on.pull("bench/model", _digest(b"blob"))
        assert sent_on.pull("bench/model", _digest(b"blob")), "the body of the redirect was read too"
        assert not served.pull("bench/model", _digest(b"blob"))
        sent_on.check("bench/model", _digest(b"blob"))
        with pytest.raises(UnexpectedReply, match="came back as"):
            sent_on.check("bench/model", _digest(b"another"))


def test_a_store_that_refuses_a_redirected_pull_is_an_error_never_a_figure():
    with (
        _answering(403) as store,
        _answering(307, Location=f"{store}/key?signature=s") as registry,
        Connection(registry) as connection,
        pytest.raises(UnexpectedReply, match="403"),
    ):
        connection.pull("bench/model", _digest(b"blob"))


def test_a_server_is_on_s3_when_its_command_names_a_bucket():
    assert Candidate("ours-s3", OURS_ON_S3).is_on_s3
    assert not Candidate("ours", OURS).is_on_s3
    assert not Candidate("elsewhere", url="http://127.0.0.1:5000").is_on_s3


def test_a_server_that_does_not_start_says_what_it_wrote_and_leaves_no_folder(tmp_path):
    broken = Candidate("broken", "sh -c 'echo no such bucket: {bucket}; exit 3'")

    with pytest.raises(ServerFailed) as caught, running(broken, Place(tmp_path), 1):
        pass

    assert re.search(r"no such bucket: broken-[0-9a-f]{8}\n", caught.value.__notes__[0])
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_server_is_told_where_it_is_and_whether_to_redirect(tmp_path):
    told = "sh -c 'echo {endpoint} {streams} $KEY; exit 3'"
    place = Place(tmp_path, {"endpoint": "http://store"}, {"KEY": "k"})

    for streams, wanted in ((True, "http://store true k\n"), (False, "http://store false k\n")):
        with pytest.raises(ServerFailed) as caught, running(Candidate("t", told), place, 1, streams=streams):
            pass
        assert wanted in caught.value.__notes__[0]


def test_the_object_store_is_the_one_of_the_tests():
    """Makefile, conformance and bench name it each: `make` cannot ask Python before there is a venv."""
    named = re.findall(r"versitygw-(v[0-9.]+)/versitygw", (ROOT / "Makefile").read_text())
    pinned = re.findall(
        r'versitygw", version = "(v[0-9.]+)"', (ROOT / "conformance/versions.toml").read_text()
    )

    assert named == pinned == [s3.VERSITYGW_VERSION]


@pytest.mark.s3
@pytest.mark.timeout(300)
def test_a_quick_run_on_s3_measures_every_workload():
    workloads = [workload.name for workload in s3.WORKLOADS]
    chosen = [word for workload in workloads for word in ("--only", workload)]
    command = [sys.executable, "-m", "bench", "--quick", "--server", "ours-s3", *chosen]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)

    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("\nmeasure ") :]
    measured = [measure.name for workload in s3.WORKLOADS for measure in workload.measures]
    assert [name for name in measured if f"\n{name}, " not in table] == []


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
