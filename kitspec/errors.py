"""The error codes of the distribution specification, as exceptions that cross the wire and stay the same error.

    OciError
    ├── BlobUnknown            404 BLOB_UNKNOWN
    ├── BlobUploadInvalid      400 BLOB_UPLOAD_INVALID
    │   └── UploadOutOfOrder   416 BLOB_UPLOAD_INVALID
    ├── BlobUploadUnknown      404 BLOB_UPLOAD_UNKNOWN
    ├── DigestInvalid          400 DIGEST_INVALID
    ├── FileUnknown            404 FILE_UNKNOWN        ours: no such file in a ModelKit
    ├── ManifestBlobUnknown    400 MANIFEST_BLOB_UNKNOWN
    ├── ManifestInvalid        400 MANIFEST_INVALID
    │   ├── ManifestTooLarge   413 MANIFEST_INVALID
    │   └── ManifestTypeUnsupported  415 MANIFEST_INVALID
    ├── ManifestUnknown        404 MANIFEST_UNKNOWN
    ├── NameInvalid            400 NAME_INVALID
    ├── NameUnknown            404 NAME_UNKNOWN
    ├── SizeInvalid            400 SIZE_INVALID
    │   └── BlobTooLarge       413 SIZE_INVALID
    ├── TagInvalid             400 TAG_INVALID
    ├── QueryInvalid           400 UNSUPPORTED
    ├── RangeInvalid           416 RANGE_INVALID
    ├── Unauthorized           401 UNAUTHORIZED
    ├── Denied                 403 DENIED
    ├── Unsupported            405 UNSUPPORTED
    ├── RequestTimeout         408 UNSUPPORTED
    ├── TooManyRequests        429 TOOMANYREQUESTS
    ├── ServerError            500 UNKNOWN             our bug, or a store that failed
    ├── Unavailable            503 UNAVAILABLE         not now; a retry may help
    └── StorageFull            507 UNAVAILABLE         not before somebody makes room

    ContentInvalid (ValueError)                        a document, not a request, breaks its rules
    ├── KitfileInvalid
    ├── FilterInvalid
    ├── LayerTarInvalid
    └── ReferenceInvalid

Source: distribution-spec 1.1.1, "Error Codes"; TAG_INVALID and RANGE_INVALID are CNCF Distribution's,
FILE_UNKNOWN is our own (docs/extension.md).
"""

from __future__ import annotations

import json
from typing import Any, ClassVar


class OciError(Exception):
    """An answer of a registry that is not the one hoped for.

    Attributes:
        code: of the specification's table.
        status: the HTTP status it is sent with.
        detail: anything JSON can carry that helps the caller; never a secret, never a path of the server.
    """

    code: ClassVar[str] = "UNKNOWN"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, detail: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail

    def to_json(self) -> bytes:
        """The body of the specification: `{"errors": [{"code", "message", "detail"?}]}`."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.detail is not None:
            error["detail"] = self.detail
        return json.dumps({"errors": [error]}).encode()


class BlobUnknown(OciError):
    code, status = "BLOB_UNKNOWN", 404


class BlobUploadInvalid(OciError):
    code, status = "BLOB_UPLOAD_INVALID", 400


class UploadOutOfOrder(BlobUploadInvalid):
    """A chunk does not begin where the upload ends, or another request is writing to the upload."""

    status = 416

    def __init__(self, message: str, *, offset: int = 0, detail: object = None) -> None:
        super().__init__(message, detail=detail)
        self.offset = offset


class BlobUploadUnknown(OciError):
    code, status = "BLOB_UPLOAD_UNKNOWN", 404


class DigestInvalid(OciError):
    code, status = "DIGEST_INVALID", 400


class FileUnknown(OciError):
    code, status = "FILE_UNKNOWN", 404


class ManifestBlobUnknown(OciError):
    code, status = "MANIFEST_BLOB_UNKNOWN", 400


class ManifestInvalid(OciError):
    code, status = "MANIFEST_INVALID", 400


class ManifestTooLarge(ManifestInvalid):
    status = 413


class ManifestTypeUnsupported(ManifestInvalid):
    status = 415


class ManifestUnknown(OciError):
    code, status = "MANIFEST_UNKNOWN", 404


class NameInvalid(OciError):
    code, status = "NAME_INVALID", 400


class NameUnknown(OciError):
    code, status = "NAME_UNKNOWN", 404


class SizeInvalid(OciError):
    code, status = "SIZE_INVALID", 400


class BlobTooLarge(SizeInvalid):
    status = 413


class TagInvalid(OciError):
    code, status = "TAG_INVALID", 400


class QueryInvalid(OciError):
    code, status = "UNSUPPORTED", 400


class RangeInvalid(OciError):
    """A range that cannot be served.

    Attributes:
        size: of the whole content, for `Content-Range: bytes */size`.
    """

    code, status = "RANGE_INVALID", 416

    def __init__(self, message: str, *, size: int, detail: object = None) -> None:
        super().__init__(message, detail=detail)
        self.size = size


class Unauthorized(OciError):
    code, status = "UNAUTHORIZED", 401


class Denied(OciError):
    code, status = "DENIED", 403


class Unsupported(OciError):
    code, status = "UNSUPPORTED", 405


class RequestTimeout(OciError):
    code, status = "UNSUPPORTED", 408


class TooManyRequests(OciError):
    """Not so many at once.

    Attributes:
        retry_after_s: whole seconds before another try may succeed, for `Retry-After`.
    """

    code, status = "TOOMANYREQUESTS", 429

    def __init__(self, message: str, *, retry_after_s: int = 5, detail: object = None) -> None:
        super().__init__(message, detail=detail)
        self.retry_after_s = retry_after_s


class ServerError(OciError):
    code, status = "UNKNOWN", 500


class Unavailable(OciError):
    code, status = "UNAVAILABLE", 503


class StorageFull(Unavailable):
    status = 507


class ContentInvalid(ValueError):
    """A document breaks its rules; the message says which, where, and what was wanted."""


class KitfileInvalid(ContentInvalid):
    pass


class FilterInvalid(ContentInvalid):
    pass


class LayerTarInvalid(ContentInvalid):
    pass


class ReferenceInvalid(ContentInvalid):
    pass


# The first class for a (code, status) pair wins, then the first for the code alone, then the status.
_BY_CODE_AND_STATUS: dict[tuple[str, int], type[OciError]] = {}
_BY_CODE: dict[str, type[OciError]] = {}
_BY_STATUS: dict[int, type[OciError]] = {
    401: Unauthorized,
    403: Denied,
    405: Unsupported,
    408: RequestTimeout,
    429: TooManyRequests,
    503: Unavailable,
    507: StorageFull,
}


def _register(parent: type[OciError]) -> None:
    for leaf in parent.__subclasses__():
        _BY_CODE_AND_STATUS.setdefault((leaf.code, leaf.status), leaf)
        _BY_CODE.setdefault(leaf.code, leaf)
        _register(leaf)


_register(OciError)


def error_from_response(status: int, body: bytes, *, otherwise: str) -> OciError:
    """The error that a registry's reply carries, whoever wrote the reply.

    Args:
        status: of the HTTP reply, 400 or above.
        body: as received, bounded by the caller; need not be JSON.
        otherwise: the message when the body has none.
    """
    code, message, detail = "", otherwise, None
    try:
        document = json.loads(body)
        first = document["errors"][0]
        code = str(first.get("code", ""))
        message = str(first.get("message") or otherwise)
        detail = first.get("detail")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    kind = _BY_CODE_AND_STATUS.get((code, status)) or _BY_STATUS.get(status) or _BY_CODE.get(code)
    if kind is None:
        kind = ServerError if status >= 500 else OciError
    if issubclass(kind, RangeInvalid):
        return kind(message, size=0, detail=detail)
    return kind(message, detail=detail)
