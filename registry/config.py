"""What can be configured, as types: the shape of CNCF Distribution's `config.yml`, and our own `hub`, `limits` and `manifests`.

`Config()` is a complete configuration: every key has a default. Reading files, variables and flags is `config_sources.py`.
Durations are seconds (`float`) and sizes are bytes (`int`) once they are here. A key that nothing reads has no place here.
Every key is described in docs/operations.md and deploy/config.example.yml; tests compare the three.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from registry.auth.auth_config import Auth
from registry.auth.policy_config import AccessControl, checked_pattern
from registry.config_types import (
    Address,
    Count,
    CountOrAny,
    FilePath,
    Networks,
    Seconds,
    Secret,
    Section,
    Size,
    Timeout,
    is_origin,
)
from registry.notifications_config import Notifications

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", re.ASCII)
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*", re.ASCII)
# What an answer says of itself: with another word on it clients would cut it short, or wait for more.
_OWN_HEADERS: Final = frozenset(
    {
        *("connection", "content-encoding", "content-length", "content-range", "content-type", "date"),
        *("keep-alive", "link", "location", "proxy-authenticate", "proxy-connection", "range", "retry-after"),
        *("te", "trailer", "transfer-encoding", "upgrade", "www-authenticate", "x-request-id"),
        *("docker-content-digest", "docker-upload-uuid", "etag"),
    }
)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}", re.ASCII)
# Each costs a request when it is begun, when it is completed and when it is read.
_SEGMENT_SIZE_MIN = 32 * 1024**2
_S3_ROOT = re.compile(r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+)*", re.ASCII)
_PREFIX = re.compile(r"/(?:[A-Za-z0-9._~-]+/)*", re.ASCII)

# More workers than this help only a machine that does nothing else; a team's container rarely is one.
WORKERS_AUTOMATIC_MAX = 4


class Accesslog(Section):
    disabled: bool = False


class Log(Section):
    level: Literal["debug", "info", "warn", "error"] = "info"
    formatter: Literal["text", "json"] = "text"
    fields: dict[str, str] = Field(default_factory=dict)
    accesslog: Accesslog = Accesslog()
    # "stdout" is that.
    audit: FilePath | None = None

    @field_validator("fields", mode="before")
    @classmethod
    def _scalars_are_texts(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value or {}
        return {key: str(text) if isinstance(text, int | float) else text for key, text in value.items()}


class Filesystem(Section):
    rootdirectory: FilePath = Path("var/registry")


class Inmemory(Section):
    pass


class S3(Section):
    bucket: str
    region: str | None = None
    regionendpoint: str | None = None
    rootdirectory: str = ""
    accesskey: str | None = None
    secretkey: Secret = None
    secretkey_file: FilePath | None = None
    encrypt: bool = False
    keyid: str | None = None
    secure: bool = True
    skipverify: bool = False
    forcepathstyle: bool = True
    # S3 takes no smaller part; three larger ones on their way are more memory than an upload may have.
    chunksize: Annotated[Size, Field(ge=5 * 1024**2, le=32 * 1024**2)] = 16 * 1024**2
    # None: one object where downloads are redirected, for a URL stands for one; else 64MiB.
    segmentsize: Size | None = None
    connecttimeout: Timeout = 5.0
    readtimeout: Timeout = 30.0
    retrytimeout: Timeout = 60.0

    @field_validator("bucket")
    @classmethod
    def _bucket_is_a_name(cls, value: str) -> str:
        if not _BUCKET.fullmatch(value):
            raise ValueError("should be the name of a bucket")
        return value

    @field_validator("rootdirectory")
    @classmethod
    def _root_is_a_prefix(cls, value: str) -> str:
        prefix = value.strip("/")
        if prefix and not _S3_ROOT.fullmatch(prefix):
            raise ValueError('should be a folder in the bucket, like "/registry"')
        return prefix

    @field_validator("regionendpoint")
    @classmethod
    def _endpoint_is_a_host(cls, value: str | None) -> str | None:
        if value is not None and not is_origin(value if "://" in value else f"https://{value}"):
            raise ValueError('should be the address of the store, like "https://s3.example:9000"')
        return value

    @field_validator("segmentsize")
    @classmethod
    def _segments_are_worth_it(cls, value: int | None) -> int | None:
        if value is not None and 0 < value < _SEGMENT_SIZE_MIN:
            raise ValueError("should be 0, for one object, or at least 32MiB")
        return value

    @model_validator(mode="after")
    def _both_keys_or_none(self) -> Self:
        if (self.accesskey is None) != (self.secretkey is None):
            raise ValueError(
                "should have both accesskey and secretkey, or neither: then they come from the environment"
            )
        if self.keyid is not None and not self.encrypt:
            raise ValueError("should have encrypt: true beside keyid")
        return self

    @property
    def endpoint(self) -> str | None:
        """`regionendpoint` as a URL; None for AWS itself."""
        if self.regionendpoint is None or "://" in self.regionendpoint:
            return self.regionendpoint
        return f"{'https' if self.secure else 'http'}://{self.regionendpoint}"


class Delete(Section):
    enabled: bool = True


class Redirect(Section):
    """Downloads that a store answers itself, by way of a URL that we sign. Only S3 can."""

    disable: bool = False
    # A redirect costs the client a connection to another host, which a megabyte from here does not take as long as.
    minsize: Size = 1024**2
    endpoint: str | None = None
    # Whoever sees the URL can read the blob for so long (security.md's S8 allows a quarter of an hour).
    expiry: Annotated[Seconds, Field(ge=1, le=15 * 60)] = 15 * 60.0
    networks: Networks = ()
    exceptnetworks: Networks = ()

    @field_validator("endpoint")
    @classmethod
    def _endpoint_is_a_url(cls, value: str | None) -> str | None:
        if value is not None and not is_origin(value):
            raise ValueError('should be the store\'s address for clients, like "https://s3.example:9000"')
        return value


class Uploadpurging(Section):
    enabled: bool = True
    age: Timeout = 168 * 3600.0
    interval: Timeout = 24 * 3600.0
    dryrun: bool = False


class Garbagecollection(Section):
    enabled: bool = True
    # A kit of 400 GB takes nine hours between its first blob and its manifest at 100 Mbit/s.
    grace: Annotated[Timeout, Field(ge=10)] = 24 * 3600.0
    interval: Timeout = 24 * 3600.0


class Readonly(Section):
    enabled: bool = False


class Maintenance(Section):
    uploadpurging: Uploadpurging = Uploadpurging()
    garbagecollection: Garbagecollection = Garbagecollection()
    readonly: Readonly = Readonly()


STORAGE_DRIVERS = ("filesystem", "inmemory", "s3")


class Storage(Section):
    filesystem: Filesystem | None = None
    inmemory: Inmemory | None = None
    s3: S3 | None = None
    durability: Literal["full", "none"] = "full"
    delete: Delete = Delete()
    redirect: Redirect = Redirect()
    maintenance: Maintenance = Maintenance()

    @model_validator(mode="before")
    @classmethod
    def _name_a_driver(cls, value: object) -> object:
        if isinstance(value, str):  # `storage: inmemory`, as Distribution has it
            value = {value: {}}
        if not isinstance(value, dict):
            return value
        value = {key: {} if key in STORAGE_DRIVERS and item is None else item for key, item in value.items()}
        if not any(driver in value for driver in STORAGE_DRIVERS):
            value["filesystem"] = {}
        return value

    @model_validator(mode="after")
    def _one_driver(self) -> Self:
        named = [driver for driver in STORAGE_DRIVERS if getattr(self, driver) is not None]
        if len(named) > 1:
            raise ValueError(f"should name one driver, not both {' and '.join(named)}")
        return self

    @property
    def driver(self) -> Literal["filesystem", "inmemory", "s3"]:
        if self.s3 is not None:
            return "s3"
        return "inmemory" if self.filesystem is None else "filesystem"


class Tls(Section):
    certificate: FilePath | None = None
    key: FilePath | None = None
    minimumtls: Literal["tls1.2", "tls1.3"] = "tls1.2"
    clientcas: list[FilePath] = Field(default_factory=list)
    clientauth: Literal["require-and-verify-client-cert", "verify-client-cert-if-given"] = (
        "require-and-verify-client-cert"
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("should have both certificate and key, or neither")
        if self.clientcas and self.certificate is None:
            raise ValueError("should have certificate and key beside clientcas")
        return self


class Prometheus(Section):
    enabled: bool = True
    path: Literal["/metrics"] = "/metrics"


class Debug(Section):
    prometheus: Prometheus = Prometheus()


class Http(Section):
    # Nothing asks for a password yet: what has no file listens to this machine only.
    addr: Address = "127.0.0.1:5000"
    host: str | None = None
    prefix: str = "/"
    relativeurls: bool = False
    secret: Secret = None
    secret_file: FilePath | None = None
    draintimeout: Seconds = 60.0
    headers: dict[str, list[str]] = Field(default={"X-Content-Type-Options": ["nosniff"]})
    tls: Tls = Tls()
    debug: Debug = Debug()
    accessControl: AccessControl | None = None  # noqa: N815 - zot's name

    @field_validator("host")
    @classmethod
    def _host_is_an_origin(cls, value: str | None) -> str | None:
        if value is not None and not is_origin(value):
            raise ValueError('should be the address clients use, like "https://registry.example:5000"')
        return value

    @field_validator("prefix")
    @classmethod
    def _prefix_is_a_folder(cls, value: str) -> str:
        if not _PREFIX.fullmatch(value):
            raise ValueError('should begin and end with a slash, like "/registry/"')
        return value

    @field_validator("headers", mode="before")
    @classmethod
    def _one_value_is_a_list(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value or {}
        return {name: [text] if isinstance(text, str) else text for name, text in value.items()}

    @field_validator("headers")
    @classmethod
    def _headers_are_sound(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for name, texts in value.items():
            if not _HEADER_NAME.fullmatch(name) or not all(_HEADER_VALUE.fullmatch(text) for text in texts):
                raise ValueError(f"should hold header names and printable values: {name!r}")
            if name.lower() in _OWN_HEADERS:
                raise ValueError(f"{name} is the answer's own; leave it out")
        return value


class Catalog(Section):
    maxentries: Count = 10_000


class Tags(Section):
    maxtags: Count = 10_000


class Storagedriver(Section):
    enabled: bool = True
    interval: Timeout = 10.0
    threshold: Count = 3


class Health(Section):
    storagedriver: Storagedriver = Storagedriver()


class Manifests(Section):
    allowsparse: bool = False


class Journal(Section):
    # Older entries are removed by the next collection, unless a reader still needs them.
    keep: Annotated[Timeout, Field(ge=600)] = 7 * 24 * 3600.0
    poll: Timeout = 5.0


class Hub(Section):
    enabled: bool = True
    root: Literal["auto", "kit"] = "auto"


class Limits(Section):
    """What one client, or all of them, may take. Each is shown by /metrics as `modelreg_limit{name=…}`."""

    # A peer that is silent is let go; one that makes progress never is: a push of a day is legal.
    headertimeout: Timeout = 10.0
    bodyidletimeout: Timeout = 60.0
    writeidletimeout: Timeout = 60.0
    keepalivetimeout: Timeout = 75.0
    connections: Count = 10_000
    connectionsperaddress: Count = 256
    # In each worker; 0 for any. As many as an address may have connections, and more for a user, who may be a CI system.
    requestsperaddress: CountOrAny = 256
    requestsperuser: CountOrAny = 1_024
    trustedproxies: tuple[str, ...] = ()
    # aiohttp's own bounds, said here so that they are seen: a longer line or one header more is a 400.
    headersize: Count = 8190
    headercount: Count = 128
    # The spec asks for "at least 4 megabytes" (distribution-spec 1.1.1, "Pushing Manifests"); more only feeds an attacker.
    manifestsize: Annotated[Size, Field(gt=0)] = 4 * 1024 * 1024
    blobsize: Size = 0
    uploads: Count = 10_000
    uploadsperrepository: Count = 1_000
    # Security.md's L-15 begins with 100, which a CI system whose jobs are cut off would have open within a week.
    uploadsperuser: Count = 1_000
    # The smaller of the two is kept free: 5 % of a large disk is a lot, 5 GiB of a small one too.
    diskreserve: Size = 5 * 1024**3
    diskreservepercent: Annotated[int, Field(ge=0, lt=100)] = 5
    pagesize: Count = 1_000
    referrerspagesize: Annotated[Size, Field(gt=0)] = 4 * 1024 * 1024
    referrerspersubject: Count = 10_000
    tagsperput: Annotated[int, Field(ge=10)] = 45

    @field_validator("trustedproxies", mode="before")
    @classmethod
    def _addresses_or_networks(cls, value: object) -> object:
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            raise ValueError('should be a list of addresses or networks, like ["10.0.0.0/8"]')
        for text in value:
            ipaddress.ip_network(text)
        return tuple(value)


class Quota(Section):
    """What the repositories that a pattern matches may hold together."""

    repositories: str
    size: Annotated[Size, Field(gt=0)] | None = None
    tags: Count | None = None

    @field_validator("repositories")
    @classmethod
    def _repositories_are_a_pattern(cls, value: str) -> str:
        return checked_pattern(value)

    @model_validator(mode="after")
    def _something_is_limited(self) -> Self:
        if self.size is None and self.tags is None:
            raise ValueError("should have size or tags, or both")
        return self


class Config(Section):
    version: Literal["0.1"] = "0.1"
    # 0 is automatic: one for each core that this process may use, at most WORKERS_AUTOMATIC_MAX.
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    log: Log = Log()
    storage: Storage = Storage(filesystem=Filesystem())
    auth: Auth | None = None
    http: Http = Http()
    catalog: Catalog = Catalog()
    tags: Tags = Tags()
    health: Health = Health()
    manifests: Manifests = Manifests()
    notifications: Notifications = Notifications()
    journal: Journal = Journal()
    hub: Hub = Hub()
    quotas: list[Quota] = Field(default_factory=list)
    limits: Limits = Limits()

    @field_validator("version", mode="before")
    @classmethod
    def _version_is_a_number_in_yaml(cls, value: object) -> object:
        return str(value) if isinstance(value, float) else value

    @model_validator(mode="after")
    def _memory_is_not_shared(self) -> Self:
        if self.storage.driver == "inmemory" and self.workers > 1:
            raise ValueError("storage.inmemory is one process's memory: it needs workers: 1")
        return self

    @model_validator(mode="after")
    def _auth_fits_http(self) -> Self:
        if self.auth is not None:
            has_client_cas = bool(self.http.tls.clientcas)
            problems = list(self.auth.problems(host=self.http.host, has_client_cas=has_client_cas))
            if problems:
                raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _whom_the_policy_names_can_log_in(self) -> Self:
        access = self.http.accessControl
        if self.auth is None and access is not None and access.names_anybody:
            raise ValueError(
                "http.accessControl names users, groups or a defaultPolicy, and nobody can log in: give auth, or say anonymousPolicy"
            )
        return self

    @model_validator(mode="after")
    def _somebody_can_be_in_a_group(self) -> Self:
        access, auth = self.http.accessControl, self.auth
        if access is None or auth is None:
            return self
        problems = [
            f"http.accessControl.{key}: nobody can be in {name!r}: http.accessControl.groups has no such group, "
            "and no auth.oidc with claimmapping.groups and a prefix that it begins with"
            for key, name in access.named_groups()
            if name not in access.groups and not auth.may_give_group(name)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def worker_count(self) -> int:
        if self.workers:
            return self.workers
        if self.storage.driver == "inmemory":
            return 1
        return max(1, min(_usable_cores(), WORKERS_AUTOMATIC_MAX))


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
