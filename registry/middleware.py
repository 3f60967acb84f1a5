"""What surrounds every handler: finding the route, errors as JSON, the request's id, its log line and its metrics."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from kitspec.errors import (
    BlobUploadInvalid,
    NameUnknown,
    OciError,
    RangeInvalid,
    ServerError,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unsupported,
    UploadOutOfOrder,
)
from kitspec.http_fields import format_upload_range
from registry.answer_memo import Answer, AnswerMemo
from registry.api.call import Call, Services
from registry.api.hub import error_headers
from registry.api.sending import SENT
from registry.api.uploads import mount_source
from registry.auth.client_address import FORWARDED_FOR, ClientAddresses
from registry.auth.cross_site import refuse_other_sites
from registry.auth.identity import Scope
from registry.auth.policy import Action
from registry.body import RECEIVED, discard
from registry.connection import Connection
from registry.http_limits import LimitedConnection
from registry.journal import Actor, acting
from registry.logs import access_log, request_id
from registry.requests_in_flight import RequestInFlight, RequestsInFlight
from registry.routes import LABELS, PROBES, Access, Endpoint, Route, Target, methods_of, route_of, target_of
from registry.storage_errors import translated

logger = logging.getLogger("registry.http")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_OWN_HEADERS = {
    "Server": "modelkit-registry",
    "Docker-Distribution-Api-Version": "registry/2.0",
    "X-Content-Type-Options": "nosniff",
}


class Request(web.BaseRequest):
    """A request whose answer gets the headers that every answer has, whoever makes it."""

    answer_headers: Mapping[str, str] = _OWN_HEADERS  # of one that never reached Dispatch, too

    is_answered = False

    @property
    def keep_alive(self) -> bool:
        """Whether another request may follow on this connection."""
        connection = self.protocol
        is_retired = isinstance(connection, LimitedConnection) and connection.is_retired
        return super().keep_alive and not is_retired

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        response.headers.update(self.answer_headers)
        self.is_answered = True


def make_request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> Request:
    """For aiohttp's server, which has its own idea of what a request is."""
    return Request(message, payload, protocol, writer, task, asyncio.get_running_loop())


class Dispatch:
    """Answers requests. One for each worker."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.memo = AnswerMemo(services.registry.backend, services.guard)
        config = services.config
        self._addresses = ClientAddresses(config.limits.trustedproxies)
        self._in_flight = RequestsInFlight(config.limits, services.metrics.request_refused)
        self._prefix = config.http.prefix.rstrip("/")
        self._headers = _headers_of_answers(config.http.headers)
        self._access_log = None if config.log.accesslog.disabled else access_log()
        self._is_read_only = config.storage.maintenance.readonly.enabled

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        assert isinstance(request, Request)
        loop = asyncio.get_running_loop()
        started = loop.time()
        offered = request.headers.get("X-Request-Id", "")
        identity = offered if _REQUEST_ID.fullmatch(offered) else secrets.token_hex(8)
        request_id.set(identity)
        address = self._address_of(request)
        acting.set(Actor(address=address, agent=request.headers.get("User-Agent", "")))
        request.answer_headers = self._headers | {"X-Request-Id": identity}
        target = self._target(request)
        label = LABELS[target.endpoint] if target is not None else "other"
        metrics = self._services.metrics
        metrics.request_started(label)
        status = 499  # what a drain cuts off is not answered
        in_flight = self._in_flight.request()
        try:
            response = await self._answer(request, target, address, in_flight)
            status = response.status
        finally:
            in_flight.end()
            seconds = loop.time() - started
            if isinstance(request.protocol, Connection):
                request.protocol.release_body()
            received = request.content.total_bytes + request.get(RECEIVED, 0)
            sent = request.writer.output_size + request.get(SENT, 0)
            metrics.request_finished(
                label, request.method, status, seconds=seconds, received=received, sent=sent
            )
            if self._access_log is not None:
                self._access_log.record(
                    remote=address,
                    method=request.method,
                    path=request.rel_url.raw_path,
                    status=status,
                    seconds=seconds,
                    received=received,
                    sent=sent,
                    agent=request.headers.get("User-Agent", ""),
                    identity=identity,
                )
        return response

    async def _answer(
        self, request: Request, target: Target | None, address: str, in_flight: RequestInFlight
    ) -> web.StreamResponse:
        call: Call | None = None
        try:
            with translated():
                if target is None or target.endpoint not in PROBES:
                    in_flight.count_for_address(self._in_flight.key_of(address))
                call, route = self._find(request, target)
                await self._let_in(call, route, in_flight)
                response = await route.handler(call)
            if not response.prepared:
                # Here, so that the memo sees the headers, and the counters the bytes, as they are sent.
                await response.prepare(request)
                if call.versions and isinstance(response, web.Response):
                    self._remember(request, response, call)
                await response.write_eof()
        except OciError as error:
            is_of_hub = target is not None and target.endpoint is Endpoint.HUB
            return await self._refuse(request, error, error_headers(error) if is_of_hub else {})
        except RequestPayloadError:
            # What arrived of an upload before is kept.
            return await self._refuse(
                request, BlobUploadInvalid("the body of the request is not well-formed HTTP")
            )
        except ConnectionError:
            return self._break_off(request)
        except Exception:
            logger.exception("an unexpected error; the client saw only the request's id")
            failure = ServerError(f"an internal error; the log has it under {request_id.get()}")
            return await self._refuse(request, failure)
        return response

    async def _refuse(
        self, request: Request, error: OciError, headers: Mapping[str, str] = MappingProxyType({})
    ) -> web.StreamResponse:
        if request.is_answered:
            # Headers promise bytes that do not come: never a clean end of a wrong body.
            logger.error("an answer was broken off: %s", error)
            return self._break_off(request)
        response = error_response(request, error)
        response.headers.update(headers)
        if isinstance(error, Unauthorized):
            for challenge in self._services.guard.challenges(error):
                response.headers.add("WWW-Authenticate", challenge)
        is_all_read = request.content.at_eof()
        if not is_all_read:
            response.force_close()
        try:
            await response.prepare(request)
            await response.write_eof()
            if not is_all_read and not await discard(request):
                self._break_off(request)
        except (ConnectionError, RequestPayloadError):
            self._break_off(request)
        return response

    def _break_off(self, request: Request) -> web.StreamResponse:
        """Close the connection now; what is returned is for the log."""
        request.protocol.force_close()
        return web.Response(status=499)  # nginx's word for a client that left

    def _remember(self, request: Request, response: web.Response, call: Call) -> None:
        protocol = request.protocol
        if request.method == "GET" and isinstance(protocol, Connection) and protocol.memorable is not None:
            name, who = protocol.memorable, call.identity
            self.memo.keep(name, request, response, call.versions, identity=who, policy=call.policy)

    def count_kept_answer(self, answer: Answer, identity: str, peer: object) -> None:
        """Count and log an answer that the connection gave by itself."""
        metrics = self._services.metrics
        metrics.manifest_looked_up(hit=True)
        metrics.request_started("manifest")
        metrics.request_finished("manifest", "GET", 200, seconds=0.0, received=0, sent=answer.size)
        if self._access_log is not None:
            self._access_log.record(
                remote=self._addresses.address_of(
                    str(peer[0]) if isinstance(peer, tuple) else "", answer.forwarded_for
                ),
                method="GET",
                path=answer.path,
                status=200,
                seconds=0.0,
                received=0,
                sent=answer.size,
                agent=answer.agent,
                identity=identity,
            )

    def _target(self, request: Request) -> Target | None:
        path = request.rel_url.raw_path
        return target_of(path.removeprefix(self._prefix)) if path.startswith(self._prefix) else None

    def _address_of(self, request: Request) -> str:
        return self._addresses.address_of(request.remote or "", request.headers.getall(FORWARDED_FOR, ()))

    async def _let_in(self, call: Call, route: Route, in_flight: RequestInFlight) -> None:
        """Find out who asks, and whether they may. Before a byte of the body is read, or asked for.

        Raises:
            CredentialsNeeded, Denied, TooManyRequests: they may not, or not now.
        """
        if route.access is Access.OPEN:
            return
        if route.method != "GET" and route.access is not Access.PULL:
            refuse_other_sites(call.headers, call.config.http.host)
        guard, name = self._services.guard, call.raw_name
        call.policy = guard.policy
        scope = _scope_of(route, name, call)
        call.identity = await guard.identify(call.request, scope)
        acting.set(replace(acting.get(), name=call.identity.name))
        in_flight.count_for_user(call.identity.name)
        actions = _actions_of(route, name)
        decision = guard.require(call.identity, actions, name, scope)
        if actions == Access.PULL.value:
            call.layers = decision.layers

    def _find(self, request: Request, target: Target | None) -> tuple[Call, Route]:
        if target is None:
            raise NameUnknown("nothing is here; the registry's endpoints begin with /v2/")
        route = route_of(target.endpoint, request.method)
        if route is None:
            allowed = methods_of(target.endpoint)
            raise Unsupported(f"{request.method[:20]!a} is not supported here; {allowed} are", detail=allowed)
        if self._is_read_only and route.access in (Access.PUSH, Access.DELETE):
            raise Unsupported("the registry is in read-only mode (storage.maintenance.readonly)")
        return Call(request, self._services, target.name, target.argument, target.path), route


def _headers_of_answers(configured: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What every answer has: our own, where the operator does not say otherwise."""
    named = {name.lower() for name in configured}
    own = {name: value for name, value in _OWN_HEADERS.items() if name.lower() not in named}
    return own | {name: ", ".join(values) for name, values in configured.items()}


def _actions_of(route: Route, name: str) -> tuple[Action, ...]:
    """What the caller must be allowed to do, any of it."""
    is_of_no_repository = route.access is Access.PULL and not name
    actions: tuple[Action, ...] = (Access.CATALOG if is_of_no_repository else route.access).value
    return actions


# What a token has to be for. Source: Distribution asks the same of its clients.
_TOKEN_ACTIONS = {
    Access.PULL: ("pull",),
    Access.PUSH: ("pull", "push"),
    Access.DELETE: ("delete",),
}


def _scope_of(route: Route, name: str, call: Call) -> Scope:
    """What a token has to be for, to be named in a challenge."""
    if route.access is Access.CATALOG or (route.access is Access.PULL and not name):
        return [("registry", "catalog", ("*",))]
    if route.access is Access.METRICS:
        return [("registry", "metrics", ("*",))]
    if route.access not in _TOKEN_ACTIONS:
        return []
    scope = [("repository", name, _TOKEN_ACTIONS[route.access])]
    if route.endpoint is Endpoint.UPLOADS and (source := mount_source(call)) is not None:
        scope.append(("repository", source, ("pull",)))
    return scope


def error_response(request: web.BaseRequest, error: OciError) -> web.StreamResponse:
    """The specification's JSON, with the headers that go with some errors."""
    headers = {"Content-Type": "application/json"}
    match error:
        case UploadOutOfOrder():
            headers["Range"] = format_upload_range(error.offset)
            headers["Location"] = request.rel_url.raw_path
        case RangeInvalid():
            headers["Content-Range"] = f"bytes */{error.size}"
        case Unsupported(detail=str(allowed)):
            headers["Allow"] = allowed
        case TooManyRequests():
            headers["Retry-After"] = str(error.retry_after_s)
        case Unavailable():
            headers["Retry-After"] = "5"
        case _:
            pass
    return web.Response(status=error.status, body=error.to_json(), headers=headers)
