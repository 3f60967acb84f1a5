"""end-1, and what those who run the registry ask it."""

from __future__ import annotations

import asyncio
import json

from aiohttp import web

from kitspec.errors import NameUnknown
from registry.api.call import Call
from registry.metrics import CONTENT_TYPE


async def get_base(_: Call) -> web.StreamResponse:
    """GET /v2/: this is a registry."""
    return web.Response(body=b"{}", headers={"Content-Type": "application/json"})


async def get_live(_: Call) -> web.StreamResponse:
    """The process answers."""
    return _state(is_good=True)


async def get_ready(call: Call) -> web.StreamResponse:
    """The worker can serve: its storage answers, and it is not on its way out."""
    health = call.services.health
    return _state(is_good=health.is_ready, problem="draining" if health.is_draining else health.problem)


async def get_started(call: Call) -> web.StreamResponse:
    """Start-up is over."""
    return _state(is_good=call.services.health.is_started)


async def get_metrics(call: Call) -> web.StreamResponse:
    """Prometheus' text format, over all workers."""
    if not call.config.http.debug.prometheus.enabled:
        raise NameUnknown("metrics are switched off (http.debug.prometheus.enabled)")
    return web.Response(
        body=await asyncio.to_thread(call.services.metrics.render), headers={"Content-Type": CONTENT_TYPE}
    )


def _state(*, is_good: bool, problem: str | None = None) -> web.StreamResponse:
    body = {"status": "ok"} if is_good else {"status": "unavailable", "reason": problem or "starting"}
    return web.Response(
        status=200 if is_good else 503,
        body=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Cache-Control": "no-store"},
    )
