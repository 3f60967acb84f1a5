"""One request, as handlers see it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from aiohttp import web

from kitspec.errors import ManifestTooLarge, QueryInvalid
from kitspec.names import RepositoryName
from registry.auth.guard import Guard
from registry.auth.identity import ANONYMOUS, Identity
from registry.auth.layers import LayerScope
from registry.auth.policy import NOBODY, Action, Decision, Policy, without_limits
from registry.body import Slots, pieces_of, upload_of
from registry.content_reader import ContentReader
from registry.hosted import HostedRegistry, Versions
from registry.kits import Kits
from registry.layer_access import LayerAccess
from registry.upload_sessions import Chunks
from registry.views import Views

if TYPE_CHECKING:
    from registry.audit import AuditLog
    from registry.auth.accounts import Accounts
    from registry.config import Config
    from registry.health import Health
    from registry.metrics import Metrics

# 45 tags and a digest fit in a request line; more parameters are an attack.
_QUERY_PARAMETERS_MAX = 128


@dataclass(frozen=True, slots=True)
class Services:
    """What the handlers of one worker share."""

    config: Config
    registry: HostedRegistry
    kits: Kits
    views: Views
    layers: LayerAccess
    reader: ContentReader
    health: Health
    metrics: Metrics
    slots: Slots
    guard: Guard
    accounts: Accounts | None = None
    audit: AuditLog | None = None


class Query:
    """Query parameters: one that is meant once and comes twice is refused, so that nobody reads another than we do."""

    def __init__(self, query_string: str) -> None:
        try:
            # What is not UTF-8 becomes a character that no name, tag or digest may hold.
            pairs = parse_qsl(query_string, keep_blank_values=True, max_num_fields=_QUERY_PARAMETERS_MAX)
        except ValueError as error:
            raise QueryInvalid(f"more than {_QUERY_PARAMETERS_MAX} query parameters") from error
        self._values: dict[str, list[str]] = {}
        for name, value in pairs:
            self._values.setdefault(name, []).append(value)

    def one(self, name: str) -> str | None:
        """The parameter's value, None when it is absent.

        Raises:
            QueryInvalid: it is there more than once.
        """
        values = self._values.get(name)
        if values is None:
            return None
        if len(values) > 1:
            raise QueryInvalid(f"the parameter {name} is given {len(values)} times; wanted once")
        return values[0]

    def all(self, name: str) -> list[str]:
        return self._values.get(name, [])


@dataclass(slots=True)
class Call:
    """A request that has found its route.

    Attributes:
        path: of a file in a ModelKit, unescaped and unchecked; for the hub what follows `/hf/`, as it was sent.
        identity: who asks.
        policy: the one that was in force when the request began.
        layers: of the repository's kits, that may be read; None for all. Set where the route needs a read, before the handler.
        versions: the records that the answer rests on, where it rests on nothing else; may be given again while they last.
    """

    request: web.BaseRequest
    services: Services
    raw_name: str
    argument: str
    path: str = ""
    name: RepositoryName = field(init=False)
    identity: Identity = ANONYMOUS
    policy: Policy = NOBODY
    layers: LayerScope | None = None
    versions: Versions = ()
    _query: Query | None = None

    def __post_init__(self) -> None:
        if self.raw_name:
            self.name = RepositoryName(self.raw_name)

    @property
    def registry(self) -> HostedRegistry:
        return self.services.registry

    @property
    def config(self) -> Config:
        return self.services.config

    def may(self, action: Action, name: RepositoryName) -> bool:
        """Whether the caller may do something beyond what the route needs."""
        return self.services.guard.decide(self.identity, action, name).is_allowed

    def reading(self, name: RepositoryName) -> Decision:
        """On a repository in a list: a token for the catalogue names none, so what counts is what its bearer may read."""
        return self.services.guard.decide(without_limits(self.identity), Action.READ, name)

    @property
    def headers(self) -> Mapping[str, str]:
        return self.request.headers

    @property
    def query(self) -> Query:
        if self._query is None:
            self._query = Query(self.request.rel_url.raw_query_string)
        return self._query

    def url(self, path: str) -> str:
        """For `Location` and `Link`: below the configured public address, or relative; never what the client called us."""
        http = self.config.http
        origin = http.host if http.host is not None and not http.relativeurls else ""
        return f"{origin}{http.prefix.rstrip('/')}{path}"

    def page_url(self, query: str) -> str:
        """For `Link`: the path that was asked for, with another query."""
        path = self.request.rel_url.raw_path.removeprefix(self.config.http.prefix.rstrip("/"))
        return self.url(f"{path}?{query}")

    def body_size(self) -> int | None:
        """`Content-Length`; None for a chunked body."""
        return self.request.content_length

    def upload(self) -> AbstractAsyncContextManager[Chunks]:
        """The body, which may be large, to be stored."""
        return upload_of(self.request, self.services.slots)

    async def read_manifest(self, size_max: int) -> bytes:
        """The body of a manifest PUT.

        Raises:
            ManifestTooLarge: it is larger than `size_max`; reading stopped there.
        """
        declared = self.body_size()
        if declared is not None and declared > size_max:
            raise ManifestTooLarge(f"a manifest of {declared} bytes; at most {size_max} are allowed")
        parts: list[bytes] = []
        received = 0
        async for chunk in pieces_of(self.request):
            received += len(chunk)
            if received > size_max:
                raise ManifestTooLarge(f"a manifest of more than {size_max} bytes, which is what is allowed")
            parts.append(chunk)
        return b"".join(parts)
