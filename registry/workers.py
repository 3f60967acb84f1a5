"""The processes that serve: one alone, or several on one port under a parent that looks after them.

    serve ─┬─ one worker: this very process
           └─ Supervisor ── fork ── worker 0, worker 1, …      each with a listening socket of its own (SO_REUSEPORT)

The parent opens every listening socket and keeps them all, so that connections that wait for a worker that crashed are
served by its successor. It knows nothing of HTTP. A worker ends when its parent does, however that happens.

    signal              effect
    SIGTERM, SIGINT     drain: accept nothing, finish what is under way for at most http.draintimeout, exit with 0
    SIGINT once more    end at once, exit with 130
    SIGHUP              read the configuration again (reload.py), which also happens when a file of it changes
    SIGUSR1             print what every thread is doing

Why SO_REUSEPORT, and why processes are forked: docs/adr/0010-workers.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import faulthandler
import functools
import gc
import logging
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from registry.config import Config
from registry.logs import configure_logging, log_event
from registry.metrics import fold_ended, process_metrics
from registry.reload import LOOK_INTERVAL_S, ConfigSource, Generations, RunWorker, reloaded

LOGGER = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

BACKLOG = 1024
# A worker that lived this long was sound; what then ended it is not a loop of crashes.
_SOUND_AFTER_S = 10.0
_FAST_CRASHES_MAX = 5
_BACK_OFF_FIRST_S, _BACK_OFF_MAX_S = 0.1, 5.0
# After the drain a worker closes its store; what takes longer than this hangs.
_CLOSE_GRACE_S = 5.0

# mallopt's numbers (malloc.h). Values: docs/adr/0010-workers.md.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
# One heap for all threads: each of up to 16 others would keep 64 MiB that it had once needed (16 pushes to S3: 1.3 GiB).
_ALLOCATOR = (
    (_M_MMAP_THRESHOLD, 32 << 20),
    (_M_TRIM_THRESHOLD, 64 << 20),
    (_M_TOP_PAD, 16 << 20),
    (_M_ARENA_MAX, 1),
)


class StartFailed(Exception):
    """Nothing can be served; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What `serve` tells its caller once every worker answers."""

    host: str
    port: int
    workers: int


def serve(
    config: Config,
    run_worker: RunWorker,
    *,
    on_serving: Callable[[Serving], None] = lambda _: None,
    source: ConfigSource | None = None,
) -> int:
    """Serve until a signal ends it.

    Args:
        source: where another configuration is to be had while we serve; None: nowhere.

    Returns:
        the exit status of the process: 0 after a clean drain.

    Raises:
        StartFailed: before anything was started.
    """
    count = config.worker_count
    listeners = listen(config.http.addr, count)
    host, port = listeners[0].getsockname()[:2]
    _print_stacks_on_sigusr1()
    try:
        if count == 1:
            return run_here(
                config,
                listeners[0],
                run_worker,
                on_ready=functools.cache(lambda: on_serving(Serving(host, port, 1))),
                source=source,
            )
        return Supervisor(
            config, listeners, run_worker, lambda: on_serving(Serving(host, port, count)), source
        ).run()
    finally:
        for listener in listeners:
            listener.close()


def listen(address: str, count: int) -> list[socket.socket]:
    """`count` listening sockets on one address; the kernel spreads connections over them.

    Raises:
        StartFailed: the address is taken, not ours, or not known.
    """
    host, _, port_text = address.rpartition(":")
    host, port = host.strip("[]"), int(port_text)
    if not host and not socket.has_dualstack_ipv6():
        host = "0.0.0.0"  # noqa: S104 - the operator wrote ":5000", which says all addresses
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sockets.append(_listen_once(host, port, shared=count > 1))
            port = sockets[0].getsockname()[1]  # the first one chooses when the port is 0
    except OSError as error:
        for opened in sockets:
            opened.close()
        raise StartFailed(
            f"cannot listen on {address}: {error.strerror or error}; choose another address with --listen or http.addr"
        ) from error
    return sockets


def _listen_once(host: str, port: int, *, shared: bool) -> socket.socket:
    flags = socket.AI_ADDRCONFIG if host else socket.AI_PASSIVE
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
    if not host:  # all addresses: an IPv6 socket serves both families
        found.sort(key=lambda entry: entry[0] != socket.AF_INET6)
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            if not hasattr(socket, "SO_REUSEPORT"):
                raise OSError(errno.ENOPROTOOPT, "this system has no SO_REUSEPORT; use one worker")  # noqa: TRY301
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if host else 0)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def run_here(
    config: Config,
    listener: socket.socket,
    run_worker: RunWorker,
    *,
    on_ready: Callable[[], None],
    source: ConfigSource | None,
    worker: int | None = None,
    parent_gone: int | None = None,
) -> int:
    """Serve in this process; answer its exit status.

    Args:
        on_ready: called each time that an application has begun to serve: the first, and each new one.
        source: of a new configuration, when we are asked for one or, without a parent that looks, a file has changed.
        worker: number of this worker, when there are several.
        parent_gone: a descriptor that becomes readable when the parent has ended; None when there is no parent.
    """
    tune_allocator()
    _allow_many_files()
    process_metrics().show_limits(config.limits)
    try:
        asyncio.run(_run(config, listener, run_worker, on_ready, source, worker, parent_gone))
    except Exception as error:  # noqa: BLE001 - the outermost frame: whatever it is, it is logged and ends the process
        _log_failure(error)
        return EXIT_FAILED
    return 0


async def _run(  # noqa: PLR0917 - asyncio.run's one call
    config: Config,
    listener: socket.socket,
    run_worker: RunWorker,
    on_ready: Callable[[], None],
    source: ConfigSource | None,
    worker: int | None,
    parent_gone: int | None,
) -> None:
    loop = asyncio.get_running_loop()

    def follow_log(new: Config) -> None:
        configure_logging(new.log, worker=worker)

    generations = Generations(config, listener, run_worker, source=source, apply=follow_log)
    stop = generations.stop

    def drain(signal_name: str) -> None:
        if not stop.is_set():
            limit_s = generations.config.http.draintimeout
            log_event(LOGGER, logging.INFO, "drain.started", cause=signal_name, limit_s=limit_s)
            listener.close()  # each generation has its own; those close at the same time
            generations.drain()
            # A thread, because what hangs may be the loop itself.
            watchdog = threading.Timer(limit_s + _CLOSE_GRACE_S, os._exit, (EXIT_FAILED,))
            watchdog.daemon = True
            watchdog.start()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.is_set():
            os._exit(EXIT_INTERRUPTED)  # the store is crash-safe: there is nothing to tidy
        loop.call_soon_threadsafe(drain, signal.Signals(number).name)

    def on_parent_gone(descriptor: int) -> None:
        loop.remove_reader(descriptor)
        drain("parent gone")

    signal.signal(signal.SIGTERM, on_signal)
    if parent_gone is None:
        signal.signal(signal.SIGINT, on_signal)
    else:  # Ctrl-C reaches the whole group; the parent alone decides what it means
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        loop.add_reader(parent_gone, on_parent_gone, parent_gone)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda _number, _frame: loop.call_soon_threadsafe(generations.reload))
    await generations.run(on_ready, follows_files=parent_gone is None)
    if not stop.is_set():
        raise RuntimeError("the worker ended by itself")
    log_event(LOGGER, logging.INFO, "drain.finished")


def _log_failure(error: Exception) -> None:
    # An error with a name of its own explains itself; a stack is for what nobody foresaw.
    foreseen = isinstance(error, OSError) or type(error).__module__.partition(".")[0] in {
        "registry",
        "storage_backends",
    }
    log_event(
        LOGGER,
        logging.ERROR,
        "worker.failed",
        error=None if foreseen else error,
        problem=str(error) or repr(error),
    )


@dataclass(slots=True)
class _Worker:
    number: int
    process: int
    started: float
    status_pipe: int
    config: Config
    is_ready: bool = False


class Supervisor:
    """Starts the workers, starts them again when they crash, passes signals on. Single-threaded, and no event loop:
    a process that forks should have neither."""

    def __init__(
        self,
        config: Config,
        listeners: list[socket.socket],
        run_worker: RunWorker,
        on_serving: Callable[[], None],
        source: ConfigSource | None = None,
    ) -> None:
        self._config = config
        # What a worker has served with: a configuration that cannot start must not be what one that crashed begins with.
        self._proven = config
        self._source = source
        self._look_at = float("inf") if source is None else time.monotonic() + LOOK_INTERVAL_S
        self._listeners = listeners
        self._run_worker = run_worker
        self._on_serving = on_serving
        self._workers: dict[int, _Worker] = {}
        self._restarts: list[tuple[float, int]] = []
        self._fast_crashes = 0
        self._was_serving = False
        self._stopping = False
        self._kill_at = float("inf")
        self._exit_status = 0
        self._metrics_folder = _new_folder()
        self._selector = selectors.DefaultSelector()
        self._alive_read, self._alive_write = os.pipe()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    def run(self) -> int:
        """Until every worker has ended; answers the exit status."""
        self._catch_signals()
        gc.freeze()  # what exists now is shared with the workers: a collection that wrote to it would copy every page
        for number in range(len(self._listeners)):
            self._start(number)
        try:
            self._supervise()
        finally:
            shutil.rmtree(self._metrics_folder, ignore_errors=True)
        return self._exit_status

    def _supervise(self) -> None:
        while self._workers or self._restarts:
            for key, _ in self._selector.select(self._seconds_to_next_deadline()):
                if key.data is None:
                    self._read_signals()
                else:
                    self._note_ready(key.data)
            self._reap()
            self._meet_deadlines()

    def _catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda _number, _frame: None)  # noticed through the wake-up socket
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)

    def _read_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._wake_read.recv(4096):
                if number == signal.SIGHUP:
                    if self._source is not None:
                        self._source.tell_again()
                    self._reload()
                elif number == signal.SIGINT and self._stopping:
                    self._kill_all(EXIT_INTERRUPTED)
                elif number in {signal.SIGINT, signal.SIGTERM}:
                    self._stop(exit_status=0)

    def _start(self, number: int) -> None:
        status_read, status_write = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(status_read)
            self._be_worker(number, status_write)  # does not return
        os.close(status_write)
        os.set_blocking(status_read, False)
        worker = _Worker(number, process, time.monotonic(), status_read, self._proven)
        self._workers[process] = worker
        self._selector.register(status_read, selectors.EVENT_READ, worker)

    def _be_worker(self, number: int, status_pipe: int) -> None:
        status = EXIT_FAILED
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._selector.close()
            self._wake_read.close()
            self._wake_write.close()
            os.close(self._alive_write)  # so that the parent holds the only one, and its end is seen
            for sibling in self._workers.values():
                os.close(sibling.status_pipe)
            for other, listener in enumerate(self._listeners):
                if other != number:
                    listener.close()
            configure_logging(self._proven.log, worker=number)
            process_metrics().share(self._metrics_folder, number)

            def ready() -> None:
                os.write(status_pipe, b"r")

            status = run_here(
                self._proven,
                self._listeners[number],
                self._run_worker,
                on_ready=ready,
                source=self._source,
                worker=number,
                parent_gone=self._alive_read,
            )
        finally:
            os._exit(status)

    def _note_ready(self, worker: _Worker) -> None:
        with contextlib.suppress(BlockingIOError):
            if os.read(worker.status_pipe, 1):
                worker.is_ready = True
                self._proven = worker.config
                self._renew(worker)
            else:  # it ended; the rest is `_reap`'s
                self._selector.unregister(worker.status_pipe)
        all_ready = len(self._workers) == len(self._listeners) and all(
            w.is_ready for w in self._workers.values()
        )
        if all_ready and not self._was_serving:
            self._was_serving = True
            self._on_serving()

    def _reap(self) -> None:
        while self._workers:
            process, wait_status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                return
            if worker := self._workers.pop(process, None):
                with contextlib.suppress(KeyError):
                    self._selector.unregister(worker.status_pipe)
                os.close(worker.status_pipe)
                fold_ended(self._metrics_folder, process)
                self._note_end(worker, os.waitstatus_to_exitcode(wait_status))

    def _note_end(self, worker: _Worker, exit_code: int) -> None:
        if self._stopping:
            if exit_code != 0:
                self._exit_status = self._exit_status or EXIT_FAILED
            return
        lived_s = time.monotonic() - worker.started
        ended_by = (
            f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit status {exit_code}"
        )
        log_event(
            LOGGER,
            logging.ERROR,
            "worker.ended",
            number=worker.number,
            process=worker.process,
            by=ended_by,
            lived_s=lived_s,
        )
        if not self._was_serving and not worker.is_ready:
            self._stop(exit_status=EXIT_FAILED)  # it could not start; another try would fail the same way
            return
        self._fast_crashes = self._fast_crashes + 1 if lived_s < _SOUND_AFTER_S else 0
        if self._fast_crashes >= _FAST_CRASHES_MAX:
            log_event(LOGGER, logging.ERROR, "workers.given-up", crashes=self._fast_crashes)
            self._stop(exit_status=EXIT_FAILED)
            return
        wait_s = (
            min(_BACK_OFF_FIRST_S * 2**self._fast_crashes, _BACK_OFF_MAX_S) if self._fast_crashes else 0.0
        )
        self._restarts.append((time.monotonic() + wait_s, worker.number))

    def _reload(self) -> None:
        """Take over what is configured now, if it can be used. Each worker reads it again by itself."""
        if self._stopping:
            return
        config = reloaded(self._source, self._config)
        if config is not None:
            self._config = config
            configure_logging(config.log)
            for worker in self._workers.values():
                if worker.is_ready:  # one that is not listens to no signal yet; `_note_ready` tells it
                    self._renew(worker)

    def _renew(self, worker: _Worker) -> None:
        if worker.config is not self._config:
            worker.config = self._config
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process, signal.SIGHUP)

    def _look(self) -> None:
        self._look_at = time.monotonic() + LOOK_INTERVAL_S
        if self._source is not None and self._source.has_changed(self._config):
            self._reload()

    def _stop(self, *, exit_status: int) -> None:
        self._exit_status = self._exit_status or exit_status
        self._stopping = True
        self._restarts.clear()
        for (
            listener
        ) in self._listeners:  # else the kernel would go on to accept for workers that take nothing more
            listener.close()
        self._kill_at = time.monotonic() + self._config.http.draintimeout + 2 * _CLOSE_GRACE_S
        self._signal_all(signal.SIGTERM)

    def _kill_all(self, exit_status: int) -> None:
        self._exit_status = exit_status
        self._kill_at = float("inf")
        self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def _seconds_to_next_deadline(self) -> float | None:
        deadline = min([self._kill_at, self._look_at, *(when for when, _ in self._restarts)])
        return None if deadline == float("inf") else max(0.0, deadline - time.monotonic())

    def _meet_deadlines(self) -> None:
        now = time.monotonic()
        if now >= self._kill_at:
            self._kill_all(EXIT_FAILED)
        if now >= self._look_at:
            self._look()
        due = [number for when, number in self._restarts if when <= now]
        self._restarts = [(when, number) for when, number in self._restarts if when > now]
        for number in due:
            self._start(number)


def _new_folder() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="modelkit-registry-"))
    except OSError as error:
        raise StartFailed(
            f"workers count together in files of a temporary folder, and none can be written ({error.strerror}); "
            "mount one at /tmp, name another with TMPDIR, or serve with --workers 1"
        ) from error


def _allow_many_files() -> None:
    """Each connection and each blob on its way is a file descriptor; the usual soft limit is 1024."""
    try:
        import resource
    except ImportError:  # not Unix
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 20 if hard == resource.RLIM_INFINITY else min(hard, 1 << 20)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def tune_allocator() -> bool:
    """Keep freed receive buffers in the process: glibc otherwise returns each to the kernel and faults it in again.

    Returns:
        whether this C library took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return False
    taken = [mallopt(option, value) == 1 for option, value in _ALLOCATOR]
    return all(taken)


def _print_stacks_on_sigusr1() -> None:
    if hasattr(signal, "SIGUSR1"):
        with contextlib.suppress(ValueError, OSError, AttributeError):  # no standard error to print to
            faulthandler.register(signal.SIGUSR1, all_threads=True)
