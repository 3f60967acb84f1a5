"""All wiring of one worker, top to bottom; imports everything, imported by the command line alone."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

from aiohttp import web

from kitspec.errors import OciError
from registry import hash_state, layout
from registry.answer_memo import Answer
from registry.api.call import Services
from registry.audit import AuditedJournal, AuditedLogins, AuditLog, open_audit
from registry.auth.guard import Guard
from registry.auth.policy import Policy, granted
from registry.background import running
from registry.body import Slots
from registry.config import S3, Config, Garbagecollection, Redirect, Uploadpurging
from registry.connection import Connection
from registry.content_reader import ContentReader
from registry.derived import DerivedRecords
from registry.freshness import Freshness
from registry.garbage import Collected, CollectionBusy, CollectionObserver, Collector
from registry.health import Health
from registry.hosted import HostedRegistry
from registry.http_limits import LimitedConnection, Server
from registry.journal import Actor, Follower, Journal, acting
from registry.kits import Kits
from registry.layer_access import LayerAccess
from registry.logs import access_log, log_event
from registry.member_index import MemberIndexes
from registry.metered_backend import MeteredBackend
from registry.metrics import process_metrics
from registry.middleware import Dispatch, make_request
from registry.notifications import make_deliverers
from registry.overlay import Overlay
from registry.quotas import QuotaRegistry
from registry.tls import ServerTls, with_hsts
from registry.upload_sessions import UploadSessions
from registry.views import Views
from storage_backends.interface import StorageBackend, StorageError, StorageUnavailable
from storage_backends.local import LocalBackend
from storage_backends.memory import MemoryBackend

if TYPE_CHECKING:
    from registry.auth.accounts import Accounts

logger = logging.getLogger(__name__)

_SEGMENT_SIZE: Final = 64 * 1024 * 1024
# How often what is to end looks whether connections are left.
_FINISH_LOOK_FIRST_S, _FINISH_LOOK_MAX_S = 0.01, 0.5
# For a request that has been told to end.
_CUT_S: Final = 1.0


def make_backend(config: Config) -> StorageBackend:
    """The storage that is configured, not started."""
    storage = config.storage
    if storage.s3 is not None:
        return _s3_backend(storage.s3, storage.redirect)
    if storage.filesystem is None:
        return MemoryBackend()
    limits = config.limits
    return LocalBackend(
        storage.filesystem.rootdirectory,
        durable=storage.durability == "full",
        reserve=lambda size: min(limits.diskreserve, size * limits.diskreservepercent // 100),
    )


def _s3_backend(storage: S3, redirect: Redirect) -> StorageBackend:
    """Raises: StorageUnavailable: boto3 is not installed."""
    try:
        from storage_backends.s3 import S3Backend, S3Settings  # boto3 takes a quarter of a second
    except ImportError as error:
        raise StorageUnavailable(
            f"storage.s3 needs {error.name}: pip install 'modelkit-registry[s3]'"
        ) from error
    encryption = ("aws:kms" if storage.keyid else "AES256") if storage.encrypt else None
    return S3Backend(
        S3Settings(
            storage.bucket,
            prefix=f"{storage.rootdirectory}/" if storage.rootdirectory else "",
            # A store of one's own rarely has regions, and signatures need one.
            region=storage.region or ("us-east-1" if storage.endpoint else None),
            endpoint=storage.endpoint,
            access_key=storage.accesskey,
            secret_key=storage.secretkey.get_secret_value() if storage.secretkey else None,
            encryption=encryption,
            key_id=storage.keyid,
            verify_tls=not storage.skipverify,
            path_style=storage.forcepathstyle,
            part_size=storage.chunksize,
            segment_size=_segment_size(storage, redirect),
            connect_timeout_s=storage.connecttimeout,
            read_timeout_s=storage.readtimeout,
            retry_timeout_s=storage.retrytimeout,
            url_endpoint=redirect.endpoint,
            url_life_s=redirect.expiry,
        ),
        content_prefix=layout.BLOBS,
    )


def _segment_size(storage: S3, redirect: Redirect) -> int | None:
    if storage.segmentsize is not None:
        return storage.segmentsize or None
    return _SEGMENT_SIZE if redirect.disable else None


@asynccontextmanager
async def services_of(config: Config, audit: AuditLog | None = None) -> AsyncIterator[Services]:
    """What handlers share, with the tasks that keep it well.

    Args:
        audit: where writes, logins and the keys of users are recorded.
    """
    metrics = process_metrics()
    metrics.show_limits(config.limits)
    backend = MeteredBackend(make_backend(config), metrics, driver=config.storage.driver)
    if not await asyncio.to_thread(hash_state.load):
        log_event(logger, logging.WARNING, "hash.state.unavailable", effect="uploads in parts are read twice")
    async with AsyncExitStack() as stack:
        stack.push_async_callback(backend.close)
        await backend.start()
        is_read_only = config.storage.maintenance.readonly.enabled
        limits, driver = config.limits, config.health.storagedriver
        # What can be made again is not written where nothing may be.
        records = Overlay(backend) if is_read_only else backend
        indexes = await stack.enter_async_context(MemberIndexes(records))
        sessions = UploadSessions(
            backend,
            count_max=limits.uploads,
            per_repository_max=limits.uploadsperrepository,
            per_owner_max=limits.uploadsperuser,
            size_max=limits.blobsize or None,
            indexes=indexes,
        )
        collection = config.storage.maintenance.garbagecollection
        freshness = Freshness(backend, grace_s=None if is_read_only else collection.grace)
        journal = _journal(backend, audit, is_writable=not is_read_only)
        registry = _registry(config)(
            backend,
            sessions,
            allow_sparse=config.manifests.allowsparse,
            referrers_max=limits.referrerspersubject,
            freshness=freshness,
            journal=journal,
            on_manifest_lookup=lambda hit: metrics.manifest_looked_up(hit=hit),
        )
        reader = ContentReader(backend, indexes)
        stack.callback(reader.close)
        derived = DerivedRecords(records, freshness)
        kits = Kits(registry, derived, indexes)
        stack.callback(kits.close)
        health = Health(backend, interval_s=driver.interval, threshold=driver.threshold)
        if driver.enabled:
            await stack.enter_async_context(running(health.watch, "health"))
        purging = config.storage.maintenance.uploadpurging
        if purging.enabled and not is_read_only:
            await stack.enter_async_context(
                running(lambda: _purge_uploads(backend, sessions, purging), "purge uploads")
            )
        if collection.enabled and not is_read_only:
            collector = make_collector(config, backend, sessions, journal, observer=metrics)
            await stack.enter_async_context(running(lambda: _collect(collector, collection), "collect"))
        if config.storage.driver != "inmemory":
            follower = Follower(
                journal,
                on_change=registry.refresh,
                on_gap=registry.forget,
                interval_s=config.journal.poll,
                keep_s=config.journal.keep,
            )
            await stack.enter_async_context(running(follower.run, "follow the journal"))
        if not is_read_only:
            for deliverer in make_deliverers(config, backend, journal, metrics):
                await stack.enter_async_context(running(deliverer.run, f"notify {deliverer.name}"))
        accounts: Accounts | None = None
        if config.auth is not None:
            from registry.auth.accounts import open_accounts  # cryptography takes a tenth of a second

            accounts = await stack.enter_async_context(
                open_accounts(
                    config,
                    config.auth,
                    records,
                    AuditedLogins(metrics) if audit is not None else metrics,
                    lambda *asked: granted(guard.policy, *asked),
                )
            )
        policy = Policy.from_config(config.http.accessControl, config.auth)
        guard = Guard(policy, accounts.authenticator if accounts is not None else None)
        views = Views(registry, records, derived, kits, reader)
        yield Services(
            config=config,
            registry=registry,
            kits=kits,
            views=views,
            layers=LayerAccess(backend, derived, kits, views),
            reader=reader,
            health=health,
            metrics=metrics,
            slots=Slots(backend.source_appends_max),
            guard=guard,
            accounts=accounts,
            audit=audit,
        )


def _registry(config: Config) -> Callable[..., HostedRegistry]:
    return functools.partial(QuotaRegistry, quotas=config.quotas) if config.quotas else HostedRegistry


def _journal(backend: StorageBackend, audit: AuditLog | None, *, is_writable: bool) -> Journal:
    # What nothing may be written to has nothing to tell either.
    if audit is None or not is_writable:
        return Journal(backend, is_writable=is_writable)
    return AuditedJournal(backend, audit)


def make_collector(
    config: Config,
    backend: StorageBackend,
    sessions: UploadSessions,
    journal: Journal,
    *,
    grace_s: float | None = None,
    observer: CollectionObserver | None = None,
) -> Collector:
    """
    Args:
        grace_s: other than the one that is configured.
    """
    maintenance = config.storage.maintenance
    return Collector(
        backend,
        sessions,
        journal,
        grace_s=maintenance.garbagecollection.grace if grace_s is None else grace_s,
        upload_age_s=maintenance.uploadpurging.age,
        journal_keep_s=config.journal.keep,
        observer=observer,
    )


async def run_worker(
    config: Config,
    listener: socket.socket,
    *,
    stop: asyncio.Event,
    retire: asyncio.Event | None = None,
    ready: Callable[[], None],
) -> None:
    """Serve on `listener` until `stop` is set, then drain for at most `http.draintimeout`.

    Args:
        retire: set when a successor accepts: what is under way is finished, with no limit until `stop` is set.
        ready: called once, when connections are answered.
    """
    config = with_hsts(config)
    async with (
        _serving_tls(config) as context,
        open_audit(config.log.audit) as audit,
        services_of(config, audit) as services,
    ):
        dispatch = _NamingDispatch(services)
        if (log := access_log()) is not None:
            log.user = _acting_name
        server = Server(
            dispatch if audit is None else _audited(dispatch, audit),
            config,
            services.metrics,
            make_connection=lambda server, **arguments: Connection(server, dispatch, **arguments),
            request_factory=make_request,
        )
        acceptor = await asyncio.get_running_loop().create_server(
            server,
            sock=listener,
            ssl=context,
            backlog=listener.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
        )
        services.health.is_started = True
        ready()
        try:
            await _first_set(stop, retire or asyncio.Event())
            acceptor.close()
            await _finish(server, stop)
        finally:
            services.health.is_draining = True
            acceptor.close()
            # Not by aiohttp's own way, which would take no more of the bodies that are on their way.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(config.http.draintimeout):
                    await _finish(server, is_patient=False)
            await server.shutdown(_CUT_S)
            if log is not None:
                await asyncio.to_thread(log.flush)


async def _first_set(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


async def _finish(server: Server, stop: asyncio.Event | None = None, *, is_patient: bool = True) -> None:
    """Wait until every connection has finished what it was about, or `stop` is set.

    Args:
        is_patient: let one whose next request is on its way, or that has not asked for anything yet, ask: it would be cut otherwise.
            But once: what we know is of yesterday.
    """
    stop = stop or asyncio.Event()
    wait_s = _FINISH_LOOK_FIRST_S
    while not stop.is_set():
        for connection in server.connections:
            assert isinstance(connection, LimitedConnection)
            connection.retire(is_patient=is_patient)
        await asyncio.sleep(0)  # those that were closed just now are lost to us
        if not server.connections:
            break
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), wait_s)
        wait_s = min(2 * wait_s, _FINISH_LOOK_MAX_S)


class _NamingDispatch(Dispatch):
    """Knows whose a kept answer is, for the access log: no request was looked at that could have said so."""

    def count_kept_answer(self, answer: Answer, identity: str, peer: object) -> None:
        before = acting.set(Actor(answer.identity.name))
        super().count_kept_answer(answer, identity, peer)
        acting.reset(before)


def _acting_name() -> str:
    return acting.get().name


def _audited(
    dispatch: Dispatch, audit: AuditLog
) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        audit.request_begins()
        response = await dispatch(request)
        audit.request_ends(request.method, request.rel_url.raw_path, response.status)
        return response

    return answer


@asynccontextmanager
async def _serving_tls(config: Config) -> AsyncIterator[ssl.SSLContext | None]:
    """Raises: TlsUnusable."""
    if config.http.tls.certificate is None:
        yield None
        return
    tls = await asyncio.to_thread(ServerTls, config.http.tls)
    async with running(tls.follow, "follow the certificate"):
        yield tls.context


async def _purge_uploads(backend: StorageBackend, sessions: UploadSessions, purging: Uploadpurging) -> None:
    """End abandoned uploads, now and every interval; several workers may do it at once."""
    while True:
        try:
            expired = await sessions.expire(now=backend.now(), age_s=purging.age, dry_run=purging.dryrun)
        except StorageError as error:
            log_event(logger, logging.WARNING, "uploads.purge.failed", reason=str(error))
        else:
            for upload in expired:
                log_event(logger, logging.INFO, "upload.expired", upload=upload, dry_run=purging.dryrun)
        await asyncio.sleep(purging.interval)


async def _collect(collector: Collector, collection: Garbagecollection) -> None:
    """Collect when it is time and nobody else does: each worker of each replica looks, at moments of its own."""
    while True:
        await asyncio.sleep(collection.interval / 8 * random.uniform(0.5, 1.5))  # noqa: S311 - no secret
        try:
            collected = await collector.run_when_due(interval_s=collection.interval)
        except (StorageError, OciError, CollectionBusy) as error:
            log_event(logger, logging.WARNING, "collection.failed", reason=str(error))
        else:
            if collected is not None:
                log_event(logger, logging.INFO, "collection.done", **collected.fields())


async def collect_once(config: Config, *, grace_s: float | None, dry_run: bool) -> Collected:
    """Collect what is configured to be served, also while it is.

    Raises:
        CollectionBusy: somebody else collects.
        OciError, StorageError: something could not be read.
    """
    async with AsyncExitStack() as stack:
        backend = make_backend(config)
        stack.push_async_callback(backend.close)
        await backend.start()
        limits = config.limits
        sessions = UploadSessions(
            backend,
            count_max=limits.uploads,
            per_repository_max=limits.uploadsperrepository,
            per_owner_max=limits.uploadsperuser,
            size_max=limits.blobsize or None,
        )
        collector = make_collector(config, backend, sessions, Journal(backend), grace_s=grace_s)
        return await collector.run(dry_run=dry_run)
