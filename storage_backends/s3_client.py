"""Requests to an object store that speaks S3, each in the thread that calls, and trying them again.

botocore never repeats a request by itself: a repeated conditional write would meet its own effect and call it a conflict.
What may be repeated is repeated here, by `again`; who makes conditional writes decides with what it reads (s3_records.py).
"""

from __future__ import annotations

import base64
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, Final, Protocol, TypeVar

import boto3
from botocore.config import Config
from botocore.handlers import add_expect_header
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from storage_backends.interface import ObjectMissing, PreconditionFailed
from storage_backends.s3_errors import InTheWay, TryAgain, translated

T = TypeVar("T")

_RETRY_WAIT_MIN_S: Final = 0.05
_RETRY_WAIT_MAX_S: Final = 3.0
# Of botocore's notes about one request.
_ASKED: Final = "asked by the monotonic clock"


@dataclass(frozen=True, slots=True)
class S3Settings:
    """
    Attributes:
        prefix: of every key in the bucket; "" or ending with a slash.
        endpoint: URL of the store; None is AWS itself.
        access_key, secret_key: None for the standard chain: variables, files, roles of the machine.
        encryption: None, "AES256" or "aws:kms".
        part_size: bytes of the first parts of content.
        segment_size: bytes of the first objects that content is made of; None for one object, which a URL can stand for.
        read_timeout_s: without a byte of an answer.
        retry_timeout_s: for how long one request is tried again.
        url_endpoint: URL of the store as others reach it, for what is handed out; None for `endpoint`.
        url_life_s: for how long a URL may be used that is handed out, at most.
        trash_delay_s: for how long the bytes of deleted content stay, for those who read them or hold a URL.
    """

    bucket: str
    prefix: str = ""
    region: str | None = None
    endpoint: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    encryption: str | None = None
    key_id: str | None = None
    verify_tls: bool = True
    path_style: bool = True
    part_size: int = 16 * 1024 * 1024
    segment_size: int | None = None
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    retry_timeout_s: float = 60.0
    url_endpoint: str | None = None
    url_life_s: float = 15 * 60.0
    trash_delay_s: float = 20 * 60.0


@dataclass(frozen=True, slots=True)
class Listed:
    """An object as a listing shows it; `size` is what the store keeps, with what we add to a record."""

    key: str
    size: int
    version: str
    modified: float


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a multipart upload that is under way."""

    number: int
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class Multipart:
    """A multipart upload that is under way.

    Attributes:
        key: of the object that it will be.
        begun: seconds since the epoch, by the store's clock.
    """

    key: str
    id: str
    begun: float


class StoreClock:
    """The store's clock, told by the dates of its answers and carried on by our own monotonic one.

    An answer says that at some moment between its request and itself the store's clock showed a certain second. That bounds the
    difference of the two clocks: closely when the answer came at once, hardly when it took a minute to come, as the completion of
    a large upload may. Each answer moves the difference no further than into its bounds. Any thread may tell it of one.
    """

    def __init__(self) -> None:
        self._difference: float | None = None

    def learn(self, date: float, *, asked: float, answered: float) -> None:
        """
        Args:
            date: whole seconds since the epoch.
            asked, answered: of the monotonic clock.
        """
        least, most = date - answered, date + 1 - asked
        known = self._difference
        self._difference = (least + most) / 2 if known is None else min(max(known, least), most)

    def now(self) -> float:
        assert self._difference is not None, "no answer has come yet"
        return time.monotonic() + self._difference


class Pieces(Protocol):
    """What is sent piece by piece, from the beginning each time it is asked for; its length is that of all together."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[bytes | memoryview]: ...


class Body:
    """An answer that is still arriving; it never ends early."""

    def __init__(self, answer: dict[str, Any], what: str) -> None:
        self._stream = answer["Body"]
        self._what = what
        self._rest = int(answer["ContentLength"])
        self.version: str = answer["ETag"].strip('"')
        self.modified = float(int(answer["LastModified"].timestamp()))
        self.asked = _date_of(answer) or self.modified
        # "bytes 0-31/32"; without it the whole object was asked for.
        total = answer.get("ContentRange", "").rpartition("/")[2]
        self.object_size = int(total) if total.isdigit() else self._rest

    def read(self, size: int | None = None) -> bytes:
        """At most `size` bytes, or all; none only at the end.

        Raises:
            TryAgain: the connection broke, or ended before the size that was announced.
        """
        with translated(self._what):
            piece: bytes = self._stream.read(size)
        self._count(len(piece), is_end=size is None or not piece)
        return piece

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer`, or as much of it as is left; how much, 0 only at the end. Raises what `read` raises.

        botocore and urllib3 have such methods too, which read into new memory and copy it.
        """
        answer = self._stream._raw_stream
        with translated(self._what), answer._error_catcher():
            size: int = answer._fp.readinto(buffer)
        self._count(size, is_end=size == 0)
        return size

    def _count(self, size: int, *, is_end: bool) -> None:
        self._rest -= size
        if self._rest and is_end:
            raise TryAgain(f"the answer to {self._what} ended {self._rest} bytes early", is_done=None)

    def close(self) -> None:
        self._stream.close()


class S3Client:
    """One bucket, below one prefix. Keys are given and returned without it.

    Args:
        connections: to the store at once; more wait for one to be free.
    """

    def __init__(self, settings: S3Settings, *, connections: int) -> None:
        self._settings = settings
        self._clock = StoreClock()
        self._client: Any = _make_client(settings, connections)
        self._client.meta.events.register("before-call.s3", _note_when_asked)
        self._client.meta.events.register("after-call.s3", self._learn_time)
        # No request of ours goes to the address that others use.
        self._signer: Any = (
            _make_client(replace(settings, endpoint=settings.url_endpoint), 1)
            if settings.url_endpoint is not None
            else self._client
        )

    def close(self) -> None:
        self._client.close()
        self._signer.close()

    def now(self) -> float:
        """The store's time, right to two seconds; once it has answered anything."""
        return self._clock.now()

    def _learn_time(self, *, http_response: Any, context: dict[str, Any], **_: object) -> None:  # noqa: ANN401 - botocore's
        date = _seconds(http_response.headers.get("date"))
        if date is not None:
            self._clock.learn(date, asked=context[_ASKED], answered=time.monotonic())

    def again(self, call: Callable[[], T]) -> T:
        """What `call` returns, called until it no longer raises TryAgain, or for `retry_timeout_s`.

        It writes at most to keys of our own, which nothing can be in the way of for long (s3_records.py says when it is).
        """
        return self.tries(TryAgain, InTheWay)(call)

    def tries(self, *failures: type[Exception]) -> Retrying:
        return Retrying(
            retry=retry_if_exception_type(failures),
            wait=wait_random_exponential(_RETRY_WAIT_MIN_S, _RETRY_WAIT_MAX_S),
            stop=stop_after_delay(self._settings.retry_timeout_s),
            reraise=True,
        )

    def get(self, key: str, *, span: str | None = None, expect: str | None = None) -> Body:
        """
        Args:
            span: as in a Range header, "bytes=-32".

        Raises:
            ObjectMissing: no such key.
            PreconditionFailed: it is not the version `expect`.
        """
        options = _given(Range=span, IfMatch=_quoted(expect))
        with translated(f"GetObject {key}"):
            answer = self._client.get_object(**self._at(key), **options)
        return Body(answer, f"GetObject {key}")

    def url_of(self, key: str, life_s: int) -> str:
        """Where anybody can read an object for `life_s`, whole or a range, by a plain GET. Costs no request.

        It begins to count at once, and ends earlier where our own credentials do. What a browser is given is a file of
        bytes, never a page.
        """
        with translated(f"signing a URL of {key}"):
            url: str = self._signer.generate_presigned_url(
                "get_object",
                Params={
                    **self._at(key),
                    "ResponseContentType": "application/octet-stream",
                    "ResponseContentDisposition": "attachment",
                },
                ExpiresIn=life_s,
            )
        return url

    def head(self, key: str) -> Listed:
        """Raises: ObjectMissing."""
        with translated(f"HeadObject {key}"):
            answer = self._client.head_object(**self._at(key))
        modified = float(int(answer["LastModified"].timestamp()))
        return Listed(key, answer["ContentLength"], answer["ETag"].strip('"'), modified)

    def put(self, key: str, content: bytes | Pieces, *, expect: str | None = None) -> str:
        """Write an object, once; its version.

        Args:
            expect: the version that must be there, "" for absent, None for whatever is there.

        Raises:
            PreconditionFailed: something else is there.
            InTheWay: the key is below an object, or above one.
        """
        condition = {"IfNoneMatch": "*"} if expect == "" else _given(IfMatch=_quoted(expect))
        try:
            with translated(f"PutObject {key}"):
                answer = self._client.put_object(
                    **self._at(key), Body=content, **condition, **_checksum_of(content), **self._encryption()
                )
        except ObjectMissing as error:  # S3's answer to If-Match where there is nothing
            raise PreconditionFailed(f"{key} is gone") from error
        return str(answer["ETag"]).strip('"')

    def delete(self, key: str, *, expect: str | None = None) -> None:
        """Remove an object, once; absent may be fine, or PreconditionFailed."""
        with translated(f"DeleteObject {key}"):
            self._client.delete_object(**self._at(key), **_given(IfMatch=_quoted(expect)))

    def list(self, prefix: str, *, after: str = "") -> tuple[Sequence[Listed], bool]:
        """A page of what begins with `prefix` and is greater than `after`; whether there is more."""
        root, bucket = self._settings.prefix, self._settings.bucket
        start = {"StartAfter": root + after} if after else {}
        with translated("ListObjectsV2"):
            answer = self._client.list_objects_v2(Bucket=bucket, Prefix=root + prefix, **start)
        return [_listed(entry, root) for entry in answer.get("Contents", ())], bool(answer["IsTruncated"])

    def list_uploads(self, prefix: str, *, after: str = "") -> tuple[Sequence[Multipart], bool]:
        """A page of the multipart uploads whose keys begin with `prefix` and are greater than `after`; whether there is more.

        Of several to one key, a page that ends between them hides the rest: versitygw refuses the markers of uploads that it gives
        itself, so that keys have to do. Creating one twice makes several; when the others are gone, the rest is seen.
        """
        root, bucket = self._settings.prefix, self._settings.bucket
        start = {"KeyMarker": root + after} if after else {}
        with translated("ListMultipartUploads"):
            answer = self._client.list_multipart_uploads(Bucket=bucket, Prefix=root + prefix, **start)
        page = [
            Multipart(entry["Key"].removeprefix(root), entry["UploadId"], entry["Initiated"].timestamp())
            for entry in answer.get("Uploads", ())
        ]
        return page, bool(answer.get("IsTruncated")) and bool(page)

    def create_upload(self, key: str) -> str:
        with translated(f"CreateMultipartUpload {key}"):
            answer = self._client.create_multipart_upload(**self._at(key), **self._encryption())
        return str(answer["UploadId"])

    def upload_part(self, key: str, upload: str, number: int, content: Pieces) -> Part:
        """Raises: UploadMissing: it was completed or aborted."""
        with translated(f"UploadPart {key}"):
            answer = self._client.upload_part(
                **self._at(key), UploadId=upload, PartNumber=number, Body=content
            )
        return Part(number, len(content), str(answer["ETag"]))

    def complete_upload(self, key: str, upload: str, parts: Sequence[Part]) -> str:
        """Make the parts an object; its version. botocore sees an error that comes with status 200.

        Raises:
            UploadMissing: it was completed or aborted before.
        """
        listed = [{"PartNumber": part.number, "ETag": part.etag} for part in parts]
        with translated(f"CompleteMultipartUpload {key}"):
            answer = self._client.complete_multipart_upload(
                **self._at(key), UploadId=upload, MultipartUpload={"Parts": listed}
            )
        return str(answer["ETag"]).strip('"')

    def abort_upload(self, key: str, upload: str) -> None:
        """Raises: UploadMissing."""
        with translated(f"AbortMultipartUpload {key}"):
            self._client.abort_multipart_upload(**self._at(key), UploadId=upload)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._settings.bucket, "Key": self._settings.prefix + key}

    def _encryption(self) -> dict[str, str]:
        return _given(ServerSideEncryption=self._settings.encryption, SSEKMSKeyId=self._settings.key_id)


def _make_client(settings: S3Settings, connections: int) -> Any:  # noqa: ANN401 - boto3 makes its classes as it goes
    # Signing the payload too, and a checksum of each request, cost four times the processor time (measured); TLS protects
    # the way, and what is stored is hashed by whoever reads it.
    config = Config(
        signature_version="s3v4",
        s3={
            "payload_signing_enabled": False,
            "addressing_style": "path" if settings.path_style else "virtual",
        },
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # It would refuse a body that is neither bytes nor a file. A file is read 16 KiB at a time.
        parameter_validation=False,
        max_pool_connections=connections,
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        retries={"total_max_attempts": 1, "mode": "standard"},
        tcp_keepalive=True,
    )
    with translated("the object store's client"):
        session = boto3.session.Session(
            aws_access_key_id=settings.access_key,
            aws_secret_access_key=settings.secret_key,
            region_name=settings.region,
        )
        client = session.client(
            "s3", endpoint_url=settings.endpoint, verify=settings.verify_tls, config=config
        )
    # It would wait for a "100 Continue" before each body, the smallest too.
    client.meta.events.unregister("before-call.s3", add_expect_header)
    return client


def _checksum_of(content: object) -> dict[str, str]:
    """Of a record, so that the store refuses half a one: a writer that is killed closes its connection in good order, and a
    gateway may take what it has for all there is (versitygw 1.8), in the place of the record that was there."""
    if not isinstance(content, bytes):
        return {}  # content under a key that is used once, which nothing names before it is whole
    return {"ChecksumCRC32": base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode()}


def _date_of(answer: dict[str, Any]) -> float | None:
    """When the store answered, by its own clock."""
    return _seconds(answer["ResponseMetadata"]["HTTPHeaders"].get("date"))


def _seconds(date: str | None) -> float | None:
    return None if date is None else parsedate_to_datetime(date).timestamp()


def _note_when_asked(*, context: dict[str, Any], **_: object) -> None:
    context[_ASKED] = time.monotonic()


def _listed(entry: dict[str, Any], root: str) -> Listed:
    key = entry["Key"].removeprefix(root)
    # HEAD tells whole seconds: what a listing says beyond them would make two of one moment.
    return Listed(key, entry["Size"], entry["ETag"].strip('"'), float(int(entry["LastModified"].timestamp())))


def _given(**options: str | None) -> dict[str, str]:
    return {name: value for name, value in options.items() if value is not None}


def _quoted(version: str | None) -> str | None:
    return None if version is None else f'"{version}"'
