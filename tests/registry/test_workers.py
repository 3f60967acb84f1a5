"""Worker processes: started, replaced, drained. Each test runs the real parent in a process of its own."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from registry.config import Config
from registry.workers import StartFailed, listen, serve, tune_allocator

ROOT = Path(__file__).parents[2]
SOON_S = 20.0

# An application that is as small as can be: it says who it is, crashes, and takes its time, when it is asked to.
PROGRAM = textwrap.dedent(
    """
    import asyncio, os, sys
    from aiohttp import web
    from registry.config_sources import load_config
    from registry.logs import configure_logging
    from registry.metrics import process_metrics
    from registry.workers import serve

    async def answer(request):
        process_metrics().request_started("base")
        process_metrics().request_finished("base", "GET", 200, seconds=0, received=0, sent=0)
        if request.path == "/crash":
            os._exit(3)
        if request.path == "/slow":
            sys.stdout.write("slow begins\\n")
            sys.stdout.flush()
            await asyncio.sleep(float(request.query_string))
        if request.path == "/metrics":
            return web.Response(body=await asyncio.to_thread(process_metrics().render))
        return web.Response(text=str(os.getpid()))

    async def run_worker(config, listener, *, stop, retire, ready):
        if os.environ.get("FAIL") == "start":
            raise OSError(5, "the disk is gone")
        if os.environ.get("FAIL") == "later":
            asyncio.get_running_loop().call_later(0.05, os._exit, 3)
        runner = web.ServerRunner(web.Server(answer, access_log=None), shutdown_timeout=config.http.draintimeout)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        ready()
        await stop.wait()
        await runner.cleanup()

    config = load_config(environ=os.environ).config
    configure_logging(config.log)
    sys.exit(serve(config, run_worker, on_serving=lambda serving: print("serving", serving.port, flush=True)))
    """
)


@dataclass
class Served:
    process: "subprocess.Popen[str]"
    log: Path
    port: int = 0

    def get(self, path: str = "/") -> str:
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=SOON_S) as answer:
            return answer.read().decode()

    def workers(self, count: int) -> set[int]:
        """The processes that answer, once there are `count` of them."""
        seen: set[int] = set()
        ends = time.monotonic() + SOON_S
        while len(seen) < count and time.monotonic() < ends:
            seen.add(int(self.get()))
        return seen

    def ended(self) -> int:
        return self.process.wait(SOON_S)

    def logged(self, text: str) -> bool:
        ends = time.monotonic() + SOON_S
        while time.monotonic() < ends:
            if text in self.log.read_text():
                return True
            time.sleep(0.02)
        return False


Start = Callable[..., Served]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Served] = []
    (tmp_path / "program.py").write_text(PROGRAM)

    def starting(workers: int, **environ: str) -> Served:
        log = tmp_path / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, tmp_path / "program.py"],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "MODELREG_HTTP_ADDR": "127.0.0.1:0",
                    "MODELREG_WORKERS": str(workers),
                    "TMPDIR": str(tmp_path),
                    **environ,
                },
            )
        served = Served(process, log)
        running.append(served)
        assert process.stdout is not None
        if match := re.match(r"serving (\d+)", process.stdout.readline()):
            served.port = int(match[1])
        return served

    yield starting
    for served in running:
        if served.process.poll() is None:
            served.process.kill()
        served.process.wait(SOON_S)
        assert served.process.stdout is not None
        served.process.stdout.close()


def test_one_worker_is_this_very_process(start: Start) -> None:
    served = start(1)

    assert served.workers(1) == {served.process.pid}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_B_209_a_signal_drains_and_ends_with_0(start: Start, workers: int, number: signal.Signals) -> None:
    served = start(workers)

    served.process.send_signal(number)

    assert served.ended() == 0
    assert served.log.read_text().count("drain.finished") == workers
    assert list(served.log.parent.glob("modelkit-registry-*")) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_B_209_what_is_under_way_is_finished_and_nothing_new_is_taken(start: Start, workers: int) -> None:
    served = start(workers)
    with socket.create_connection(("127.0.0.1", served.port)) as peer:
        peer.sendall(b"GET /slow?1 HTTP/1.0\r\n\r\n")
        assert served.process.stdout is not None
        assert served.process.stdout.readline() == "slow begins\n"

        served.process.terminate()
        assert served.logged("drain.started")
        assert refuses_soon(served.port)
        answer = b"".join(iter(lambda: peer.recv(4096), b""))

    assert answer.startswith(b"HTTP/1.0 200 OK")
    assert served.ended() == 0


def refuses_soon(port: int) -> bool:
    ends = time.monotonic() + SOON_S
    while time.monotonic() < ends:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return True
    return False


@pytest.mark.parametrize("workers", [1, 2])
def test_B_209_the_second_interrupt_ends_at_once(start: Start, workers: int) -> None:
    served = start(workers)
    with socket.create_connection(("127.0.0.1", served.port)) as peer:
        peer.sendall(b"GET /slow?60 HTTP/1.0\r\n\r\n")
        assert served.process.stdout is not None
        assert served.process.stdout.readline() == "slow begins\n"

        served.process.send_signal(signal.SIGINT)
        assert served.logged("drain.started")
        served.process.send_signal(signal.SIGINT)

        assert served.ended() == 130


@pytest.mark.parametrize("workers", [1, 2])
def test_B_209_hangup_and_usr1_end_nothing(start: Start, workers: int) -> None:
    served = start(workers)

    served.process.send_signal(signal.SIGHUP)
    served.process.send_signal(signal.SIGUSR1)

    assert served.logged("nothing to reload")
    assert served.logged("most recent call first")
    assert len(served.workers(workers)) == workers


def test_L_31_a_worker_that_crashes_is_replaced_and_the_others_serve_on(start: Start) -> None:
    """Whatever it was at: nothing is a job of its own here that would have to be tried again."""
    served = start(2)
    before = served.workers(2)

    os.kill(before.pop(), signal.SIGKILL)
    after = served.workers(2)

    assert len(after) == 2
    assert before < after
    assert served.logged("worker.ended number=")
    assert served.logged('by="signal SIGKILL"')


def test_a_connection_that_waits_for_a_crashed_worker_is_served_by_the_next(start: Start) -> None:
    served = start(2)

    for process in served.workers(2):
        os.kill(process, signal.SIGSTOP)
    waiting = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(8)]
    for peer in waiting:
        peer.sendall(b"GET / HTTP/1.0\r\n\r\n")
    stopped = [int(line) for line in children(served.process.pid)]
    for process in stopped:
        os.kill(process, signal.SIGKILL)

    for peer in waiting:
        peer.settimeout(SOON_S)
        assert peer.recv(100).startswith(b"HTTP/1.0 200")
        peer.close()


def children(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def test_workers_that_keep_crashing_are_given_up(start: Start) -> None:
    served = start(2, FAIL="later")

    assert served.ended() == 1
    assert served.logged("workers.given-up")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_start_is_not_tried_again(start: Start, workers: int) -> None:
    served = start(workers, FAIL="start")

    assert served.ended() == 1
    log = served.log.read_text()
    assert "the disk is gone" in log
    assert "Traceback" not in log


def test_workers_end_when_their_parent_is_killed(start: Start) -> None:
    served = start(2)
    workers = served.workers(2)

    served.process.kill()
    served.ended()

    ends = time.monotonic() + SOON_S
    while any(is_running(process) for process in workers) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not any(is_running(process) for process in workers)


def is_running(process: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def test_metrics_are_of_all_workers_and_survive_a_crash(start: Start) -> None:
    served = start(2)
    workers = served.workers(2)
    for _ in range(50):
        served.get()

    at_least = counted(served.get("/metrics"))
    ends = time.monotonic() + SOON_S
    while counted(served.get("/metrics")) < 52 and time.monotonic() < ends:
        time.sleep(0.1)
    settled = counted(served.get("/metrics"))
    os.kill(workers.pop(), signal.SIGKILL)
    served.workers(2)

    assert settled >= max(52, at_least)
    assert counted(served.get("/metrics")) >= settled - 2  # its last second may be lost


def counted(exposition: str) -> float:
    (line,) = re.findall(
        r'^registry_http_requests_total\{code="200",handler="base",method="get"\} (.*)$',
        exposition,
        re.MULTILINE,
    )
    return float(line)


def test_connections_are_spread_over_the_workers(start: Start) -> None:
    served = start(2)

    answers = [served.get() for _ in range(64)]

    # Sixty-four throws of a fair coin: fewer than 12 on one side happen once in a million.
    assert min(answers.count(process) for process in set(answers)) >= 12


def test_a_taken_address_is_said_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        with pytest.raises(
            StartFailed, match=f"cannot listen on {address}: Address already in use; .*--listen"
        ):
            listen(address, 1)


@pytest.mark.parametrize("address", ["no-such-host.invalid:5000", "192.0.2.1:0"])
def test_an_address_that_is_not_ours_is_refused(address: str) -> None:
    with pytest.raises(StartFailed, match="cannot listen on"):
        listen(address, 1)


def test_several_workers_without_a_temporary_folder_are_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    config = Config.model_validate({"http": {"addr": "127.0.0.1:0"}, "workers": 2})

    with pytest.raises(StartFailed, match=r"TMPDIR.*--workers 1"):
        serve(config, run_worker=_never)


async def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("nothing is to be served")


def test_no_host_is_all_addresses() -> None:
    (listener,) = listen(":0", 1)
    port = listener.getsockname()[1]

    with listener, socket.create_connection(("127.0.0.1", port)):
        pass


async def test_listening_sockets_of_one_address_are_of_one_port() -> None:
    sockets = listen("127.0.0.1:0", 3)

    assert len({opened.getsockname() for opened in sockets}) == 1
    for opened in sockets:
        opened.close()
    await asyncio.sleep(0)


def test_glibc_takes_the_allocator_settings() -> None:
    code = "import sys; from registry.workers import tune_allocator; sys.exit(not tune_allocator())"
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    if not libc:
        pytest.skip("this C library is not glibc")

    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
    assert callable(tune_allocator)
