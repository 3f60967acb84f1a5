"""A new configuration for a process that serves, without a connection that is refused or cut.

The application is built anew beside the one that serves (a *generation*), on the same listening socket. Once it answers,
the one before accepts nothing more, finishes what is under way however long that takes, and ends. A configuration that
cannot be used changes nothing: every problem is logged with the path of its key, once.

What is followed here: the configuration file, and what it names by `…_file`, `cafile` and `clientcas`; after a refusal all files that the
refused configuration names, for one that is put right may be all that it takes. Users, keys of
issuers and the certificate of the port are followed by what uses them (auth/watched_file.py, tls.py), at less cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from registry.audit import STANDARD_OUTPUT
from registry.auth.auth_config import Auth, Oidc, Token
from registry.background import running
from registry.config import Config
from registry.config_sources import ConfigInvalid, load_config
from registry.config_types import Section
from registry.event_sinks import secret_in
from registry.logs import log_event
from registry.tls import read_limited, tls_problems

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S: Final = 2.0
_SECRET_SIZE_MAX: Final = 64 * 1024

_Signature = tuple[int, int, int, int, int] | None


class RunWorker(Protocol):
    """What serves: builds the application, serves on `listener`, calls `ready`, and returns once it is told to end.

    Args:
        stop: drain for at most `http.draintimeout`.
        retire: a successor accepts: finish what is under way, with no limit but `stop`.
    """

    def __call__(
        self,
        config: Config,
        listener: socket.socket,
        *,
        stop: asyncio.Event,
        retire: asyncio.Event,
        ready: Callable[[], None],
    ) -> Awaitable[None]: ...


class ConfigSource:
    """What the operator gave at the start, to be read again.

    Args:
        running: what was read from it last.
    """

    def __init__(
        self,
        running: Config,
        path: Path | None,
        *,
        environ: Mapping[str, str],
        overrides: Mapping[str, object],
    ) -> None:
        self._path = path
        self._environ = environ
        self._overrides = overrides
        self._files_refused: tuple[Path, ...] = ()
        self._told: frozenset[str] = frozenset()
        self._told_of: _Signature = None
        self._loaded = self._seen = self._signatures(running)

    def has_changed(self, running: Config) -> bool:
        """Whether a file is another one than when all was loaded last, and no longer being written: as it was at the last look. Blocks."""
        seen, before = self._signatures(running), self._seen
        self._seen = seen
        if seen != before or seen == self._loaded:
            return False
        self._loaded = seen
        return True

    def load(self, running: Config) -> Config:
        """What is configured now, but for what only a restart can change, which is logged. Blocks.

        Raises:
            ConfigInvalid: with every problem.
        """
        # Before anything is read: what changes meanwhile is seen later. A file that nobody knew of is seen as changed, once.
        self._loaded = self._seen = self._signatures(running)
        try:
            loaded = load_config(self._path, environ=self._environ, overrides=self._overrides)
            if problems := (*opened_to_all(running, loaded.config), *file_problems(loaded.config)):
                raise ConfigInvalid(problems, files=named_files(loaded.config))  # noqa: TRY301 - as what load_config finds
        except ConfigInvalid as error:
            self._files_refused = error.files
            raise
        self._files_refused, self._told = (), frozenset()
        for warning in loaded.warnings:
            log_event(logger, logging.WARNING, "config.warning", problem=warning)
        return kept_until_restart(running, loaded.config)

    def untold(self, problems: Sequence[str]) -> list[str]:
        """Those of the problems of the last `load` that were not told before, of this very configuration file."""
        own = self._loaded[self._path] if self._path is not None else None
        told = self._told if own == self._told_of else frozenset()
        self._told, self._told_of = frozenset(problems), own
        return [problem for problem in problems if problem not in told]

    def tell_again(self) -> None:
        """Somebody asked for a reload, and wants to hear what comes of it."""
        self._told = frozenset()

    def _signatures(self, config: Config) -> dict[Path, _Signature]:
        own = [self._path] if self._path is not None else []
        return {path: _signature(path) for path in [*own, *followed_files(config), *self._files_refused]}


def followed_files(section: Section) -> Iterator[Path]:
    """The files whose content is part of the configuration, and that nothing else follows."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, Section):
                yield from followed_files(item)
            elif isinstance(item, Path) and (name.endswith("file") or name == "clientcas"):
                yield item


def named_files(config: Config) -> Iterator[Path]:
    """What `file_problems` looks at, and no more."""
    yield from followed_files(config)
    tls, auth, audit = config.http.tls, config.auth, config.log.audit
    yield from (path for path in (tls.certificate, tls.key) if path is not None)
    if audit is not None and audit != STANDARD_OUTPUT:
        yield from (audit, audit.parent)
    if auth is None:
        return
    if auth.htpasswd is not None:
        yield auth.htpasswd.path
    if auth.token is not None and auth.token.rootcertbundle is not None:
        yield auth.token.rootcertbundle
    for issuer in (*((auth.token,) if auth.token is not None else ()), *auth.oidc):
        if isinstance(issuer.jwks, Path):
            yield issuer.jwks


def file_problems(config: Config) -> tuple[str, ...]:
    """What is wrong with the files that `config` names, a line each with the path of the key. Blocks: it opens them all."""
    problems = [*tls_problems(config.http.tls), *_audit_problems(config.log.audit)]
    for number, endpoint in enumerate(config.notifications.endpoints):
        if endpoint.secret_file is not None:
            problems += _problem(
                f"notifications.endpoints.{number}.secret_file",
                endpoint.secret_file,
                secret_in,
                _SECRET_SIZE_MAX,
            )
    if config.auth is not None:
        problems += _auth_problems(config.auth)
    return tuple(problems)


def _audit_problems(path: Path | None) -> Iterator[str]:
    """What would end the start; nothing is created."""
    if path is None or path == STANDARD_OUTPUT:
        return
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            yield f"log.audit: the folder of {path} is not there"
        elif not os.access(path.parent, os.W_OK | os.X_OK):
            yield f"log.audit: {path} cannot be made in its folder"
    except OSError as error:
        yield f"log.audit: {path} cannot be reached: {error.strerror or error}"
    else:
        if stat.S_ISDIR(mode):
            yield f"log.audit: {path} is a folder"
        elif not os.access(path, os.W_OK):
            yield f"log.audit: {path} cannot be written"


def _auth_problems(auth: Auth) -> Iterator[str]:
    from registry.auth import htpasswd, verification_keys  # cryptography takes a tenth of a second

    key_size_max = verification_keys.FILE_SIZE_MAX
    if auth.htpasswd is not None:
        yield from _problem(
            "auth.htpasswd.path", auth.htpasswd.path, htpasswd.parse_htpasswd, htpasswd.FILE_SIZE_MAX
        )
    if auth.token is not None and auth.token.rootcertbundle is not None:
        yield from _problem(
            "auth.token.rootcertbundle",
            auth.token.rootcertbundle,
            verification_keys.parse_certificates,
            key_size_max,
        )
    issuers: list[tuple[str, Token | Oidc]] = [("auth.token", auth.token)] if auth.token is not None else []
    for key, issuer in [*issuers, *((f"auth.oidc.{n}", each) for n, each in enumerate(auth.oidc))]:
        if isinstance(issuer.jwks, Path):
            yield from _problem(f"{key}.jwks", issuer.jwks, verification_keys.parse_jwks, key_size_max)
        if issuer.cafile is not None:
            yield from _problem(
                f"{key}.cafile", issuer.cafile, verification_keys.parse_certificates, key_size_max
            )


def _problem(key: str, path: Path, parse: Callable[[bytes], object], size_max: int) -> Iterator[str]:
    try:
        parse(read_limited(path, size_max))
    except OSError as error:
        yield f"{key}: {path} cannot be read: {error.strerror or error}"
    except ValueError as error:
        yield f"{key}: {path}: {error}"


def _signature(path: Path) -> _Signature:
    """Different whenever the content may be; symlinks are followed, and their swap is another inode."""
    try:
        status = os.stat(path)  # noqa: PTH116 - one call, as cheap as can be
    except (OSError, ValueError):  # the latter for a name that no file can have
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def opened_to_all(running: Config, wanted: Config) -> Iterator[str]:
    """Blocks that guard the registry and are gone. A file that was cut off, by a full disk perhaps, must not open it."""
    sections = {
        "auth": (running.auth, wanted.auth),
        "http.accessControl": (running.http.accessControl, wanted.http.accessControl),
    }
    for key, (before, after) in sections.items():
        if before is not None and after is None:
            yield f"{key}: is gone, and without it more is allowed; restart if that is wanted"


def kept_until_restart(running: Config, wanted: Config) -> Config:
    """`wanted`, but for what only a restart can change: the address, the number of workers, going into memory. That is logged."""
    if wanted.storage.driver == "inmemory":
        _log_kept("storage", running.storage.driver, wanted.storage.driver)
        wanted = wanted.model_copy(update={"storage": running.storage})
    if wanted.http.addr != running.http.addr:
        _log_kept("http.addr", running.http.addr, wanted.http.addr)
        http = wanted.http.model_copy(update={"addr": running.http.addr})
        wanted = wanted.model_copy(update={"http": http})
    if wanted.worker_count != running.worker_count:
        _log_kept("workers", running.worker_count, wanted.worker_count)
    return wanted.model_copy(update={"workers": running.worker_count})


def _log_kept(key: str, running: object, wanted: object) -> None:
    log_event(
        logger,
        logging.WARNING,
        "reload.needs_restart",
        key=key,
        running=str(running),
        configured=str(wanted),
        effect="stays as it is until a restart",
    )


def reloaded(source: ConfigSource | None, running: Config) -> Config | None:
    """The new configuration, or None where there is none to be taken over; the log says why. Blocks."""
    if source is None:
        log_event(logger, logging.INFO, "reload.skipped", reason="nothing to reload")
        return None
    if running.storage.driver == "inmemory":
        log_event(
            logger,
            logging.WARNING,
            "reload.skipped",
            reason="storage.inmemory would be lost: restart instead",
        )
        return None
    try:
        return source.load(running)
    except ConfigInvalid as error:
        for problem in source.untold(error.problems):
            log_event(
                logger, logging.ERROR, "reload.refused", problem=problem, effect="nothing has been changed"
            )
        return None


@dataclass(slots=True)
class _Generation:
    config: Config
    task: asyncio.Task[None]
    retire: asyncio.Event


class Generations:
    """The applications of one process: the one that accepts, and those that finish what they had begun.

    Args:
        apply: makes what belongs to the process, such as its log, follow a configuration.
    """

    def __init__(
        self,
        config: Config,
        listener: socket.socket,
        run_worker: RunWorker,
        *,
        source: ConfigSource | None,
        apply: Callable[[Config], None],
    ) -> None:
        self.config = config
        self.stop = asyncio.Event()
        self._listener = listener
        self._run_worker = run_worker
        self._source = source
        self._apply = apply
        self._woken = asyncio.Event()
        self._is_reload_wanted = False
        self._retired: set[asyncio.Task[None]] = set()

    def drain(self) -> None:
        self.stop.set()
        self._woken.set()

    def reload(self) -> None:
        """Somebody asks for it."""
        if self._source is not None:
            self._source.tell_again()
        self._want_reload()

    def _want_reload(self) -> None:
        self._is_reload_wanted = True
        self._woken.set()

    async def run(self, on_ready: Callable[[], None], *, follows_files: bool) -> None:
        """Until `drain`, and what was under way then is finished. An error of the generation that accepts is raised.

        Args:
            on_ready: called each time that a generation has begun to serve.
            follows_files: whether to look by ourselves whether a file has changed: no parent does.
        """
        following = running(self._follow, "follow the configuration")
        async with following if follows_files else contextlib.nullcontext():
            await self._run(on_ready)

    async def _run(self, on_ready: Callable[[], None]) -> None:
        current = self._begin(self.config, on_ready)
        while True:
            await self._woken.wait()
            self._woken.clear()
            if current.task.done() or self.stop.is_set():
                break
            if self._is_reload_wanted:
                self._is_reload_wanted = False
                current = await self._reload(current, on_ready)
        await asyncio.gather(*self._retired, return_exceptions=True)
        await current.task

    async def _follow(self) -> None:
        """Reload when a file has changed, until cancelled."""
        while self._source is not None:
            await asyncio.sleep(LOOK_INTERVAL_S)
            if await asyncio.to_thread(self._source.has_changed, self.config):
                self._want_reload()

    def _begin(self, config: Config, ready: Callable[[], None]) -> _Generation:
        retire = asyncio.Event()
        task = asyncio.create_task(self._serve(config, retire, ready), name="generation")
        task.add_done_callback(lambda _: self._woken.set())
        return _Generation(config, task, retire)

    async def _serve(self, config: Config, retire: asyncio.Event, ready: Callable[[], None]) -> None:
        with self._listener.dup() as listener:
            await self._run_worker(config, listener, stop=self.stop, retire=retire, ready=ready)

    async def _reload(self, current: _Generation, on_ready: Callable[[], None]) -> _Generation:
        """Answers the generation that accepts from now on."""
        config = await asyncio.to_thread(reloaded, self._source, self.config)
        if config is None or self.stop.is_set():
            return current
        self._apply(config)
        ready = asyncio.Event()
        fresh = self._begin(config, ready.set)
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait([waiting, fresh.task], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not ready.is_set():
            self._apply(current.config)
            log_event(
                logger,
                logging.ERROR,
                "reload.failed",
                problem=str(fresh.task.exception() or "it ended before it served"),
                effect="what ran before serves on",
            )
            return current
        self.config = config
        current.retire.set()
        self._retired.add(current.task)
        current.task.add_done_callback(self._note_end)
        log_event(logger, logging.INFO, "reload.done")
        on_ready()
        return fresh

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._retired.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            if (error := task.exception()) is not None:
                log_event(logger, logging.ERROR, "reload.retired.failed", error=error, problem=str(error))
