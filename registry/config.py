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
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    WithJsonSchema,
    field_validator,
    model_validator,
)

_DURATION = re.compile(r"(?:[0-9]{1,12}(?:\.[0-9]{1,9})?(?:ns|us|µs|ms|s|m|h))+", re.ASCII)
_DURATION_PART = re.compile(r"([0-9.]+)(ns|us|µs|ms|s|m|h)", re.ASCII)
_SECONDS_OF = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"([0-9]{1,15}) ?([KMGTPkmgtp]i?)?B?", re.ASCII)
_POWERS = " KMGTP"
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", re.ASCII)
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*", re.ASCII)
_HOST_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]_-]+", re.ASCII)
_ENDPOINT = re.compile(r"(?:https?://)?[A-Za-z0-9.:\[\]_-]+", re.ASCII)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}", re.ASCII)
_S3_ROOT = re.compile(r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+)*", re.ASCII)
_PREFIX = re.compile(r"/(?:[A-Za-z0-9._~-]+/)*", re.ASCII)

# More workers than this help only a machine that does nothing else; a team's container rarely is one.
WORKERS_AUTOMATIC_MAX = 4


def parse_duration(value: object) -> float:
    """Seconds of a Go duration ("1h30m", "10s", "250ms") or of a plain number, which counts seconds."""
    if type(value) in {int, float}:
        seconds = float(value)  # type: ignore[arg-type]
    elif isinstance(value, str) and _DURATION.fullmatch(value):
        seconds = sum(float(n) * _SECONDS_OF[unit] for n, unit in _DURATION_PART.findall(value))
    else:
        raise ValueError('should be a duration like "10s", "1h30m" or a number of seconds')
    if not 0 <= seconds < 1e10:
        raise ValueError("should not be negative, nor longer than three centuries")
    return seconds


def parse_size(value: object) -> int:
    """Bytes of "4MiB", "10GB", "512" or of a plain number."""
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        number, unit = match.groups()
        if unit is None:
            return int(number)
        base = 1024 if unit[-1] in "iI" else 1000
        return int(number) * int(base ** _POWERS.index(unit[0].upper()))
    raise ValueError('should be a size like "4MiB", "10GB" or a number of bytes')


def parse_address(value: object) -> str:
    if isinstance(value, str):
        host, colon, port = value.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if (
            colon
            and port.isascii()
            and port.isdigit()
            and int(port) <= 65535
            and (bracketed or ":" not in host)
        ):
            return value
    raise ValueError('should be an address like "127.0.0.1:5000", ":5000" or "[::1]:5000"')


def _path(value: object) -> Path:
    if isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        return Path(value).expanduser()
    raise ValueError("should be the path of a file or a folder")


Seconds = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": _DURATION.pattern}, {"type": "number", "minimum": 0}]}
    ),
]
Timeout = Annotated[Seconds, Field(gt=0)]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": _SIZE.pattern}, {"type": "integer", "minimum": 0}]}
    ),
]
Count = Annotated[int, Field(gt=0)]
Address = Annotated[
    str, BeforeValidator(parse_address), WithJsonSchema({"type": "string", "pattern": ":[0-9]+$"})
]
FilePath = Annotated[Path, BeforeValidator(_path), WithJsonSchema({"type": "string"})]


class Section(BaseModel):
    """A mapping of the file. Unknown keys are refused; a key with nothing after it (`delete:`) is its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_defaults(cls, value: object) -> object:
        return {} if value is None else value


class Accesslog(Section):
    disabled: bool = False


class Log(Section):
    level: Literal["debug", "info", "warn", "error"] = "info"
    formatter: Literal["text", "json"] = "text"
    fields: dict[str, str] = {}
    accesslog: Accesslog = Accesslog()

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
    secretkey: SecretStr | None = None
    secretkey_file: FilePath | None = None
    encrypt: bool = False
    keyid: str | None = None
    secure: bool = True
    skipverify: bool = False
    forcepathstyle: bool = True
    # S3 takes no smaller part; three larger ones on their way are more memory than an upload may have.
    chunksize: Annotated[Size, Field(ge=5 * 1024**2, le=32 * 1024**2)] = 16 * 1024**2
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
        if value is not None and not _ENDPOINT.fullmatch(value):
            raise ValueError('should be the address of the store, like "https://s3.example:9000"')
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
    disable: bool = False


class Uploadpurging(Section):
    enabled: bool = True
    age: Timeout = 168 * 3600.0
    interval: Timeout = 24 * 3600.0
    dryrun: bool = False


class Readonly(Section):
    enabled: bool = False


class Maintenance(Section):
    uploadpurging: Uploadpurging = Uploadpurging()
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

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("should have both certificate and key, or neither")
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
    secret: SecretStr | None = None
    secret_file: FilePath | None = None
    draintimeout: Seconds = 60.0
    headers: dict[str, list[str]] = {"X-Content-Type-Options": ["nosniff"]}
    tls: Tls = Tls()
    debug: Debug = Debug()

    @field_validator("host")
    @classmethod
    def _host_is_an_origin(cls, value: str | None) -> str | None:
        if value is not None and not _HOST_URL.fullmatch(value):
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
    trustedproxies: tuple[str, ...] = ()
    # aiohttp's own bounds, said here so that they are seen: a longer line or one header more is a 400.
    headersize: Count = 8190
    headercount: Count = 128
    # The spec asks for "at least 4 megabytes" (distribution-spec 1.1.1, "Pushing Manifests"); more only feeds an attacker.
    manifestsize: Annotated[Size, Field(gt=0)] = 4 * 1024 * 1024
    blobsize: Size = 0
    uploads: Count = 10_000
    uploadsperrepository: Count = 1_000
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


class Config(Section):
    version: Literal["0.1"] = "0.1"
    # 0 is automatic: one for each core that this process may use, at most WORKERS_AUTOMATIC_MAX.
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    log: Log = Log()
    storage: Storage = Storage(filesystem=Filesystem())
    http: Http = Http()
    catalog: Catalog = Catalog()
    tags: Tags = Tags()
    health: Health = Health()
    manifests: Manifests = Manifests()
    hub: Hub = Hub()
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
