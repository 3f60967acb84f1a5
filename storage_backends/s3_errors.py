"""The border where what botocore raises becomes a StorageError: what was asked, what came of it, no hosts and no secrets.

StorageUnavailable
└── TryAgain           as long as it lasts, and whether the request may have been done
ValueError
└── InTheWay           the store keeps files: a key is above or below another
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from botocore import exceptions as boto
from urllib3.exceptions import HTTPError

from storage_backends.interface import (
    ObjectMissing,
    PreconditionFailed,
    StorageFull,
    StorageUnavailable,
    UploadMissing,
)

_CODE: Final = re.compile(r"[A-Za-z0-9]{1,64}")
# ConditionalRequestConflict: another conditional write is under way. AWS asks to try again, which then says 412 or succeeds.
_NOT_DONE: Final = frozenset(
    {"ConditionalRequestConflict", "OperationAborted", "SlowDown", "SlowDownRead", "SlowDownWrite"}
    | {"ServiceUnavailable", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"}
)
_NOT_DONE_STATUSES: Final = frozenset({409, 429, 503})
_NOBODY_KNOWS: Final = frozenset({"InternalError", "RequestTimeout"})
_FULL: Final = frozenset({"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XMinioQuotaExceeded"})
_NOT_SENT: Final = (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)
_NOT_HELPED_BY_TRYING: Final = {
    boto.NoCredentialsError: "there are no credentials: give both keys, or the machine a role",
    boto.PartialCredentialsError: "the credentials are incomplete: give both keys",
    boto.CredentialRetrievalError: "the credentials could not be fetched",
    boto.NoRegionError: "there is no region: give one",
    boto.SSLError: "the store's certificate does not verify",
    boto.ParamValidationError: "botocore takes it for malformed",
}


class TryAgain(StorageUnavailable):
    """The request failed, and may succeed when it is sent once more.

    Attributes:
        is_done: False when the request had no effect, None when nobody knows.
    """

    def __init__(self, message: str, *, is_done: bool | None) -> None:
        super().__init__(message)
        self.is_done = is_done


class InTheWay(ValueError):
    """The store keeps files, and cannot keep one both at a key and below it."""


def below(key: str) -> ValueError:
    """What callers are told of a key that is above or below an object."""
    return ValueError(f"{key} is below an object, or above one: no key may be another key plus /…")


# What a caller can act on, by the code of the answer.
_MEANINGS: Final[dict[str, tuple[type[Exception], str]]] = {
    "NoSuchKey": (ObjectMissing, "no such object"),
    "404": (ObjectMissing, "no such object"),
    "NoSuchUpload": (UploadMissing, "no such upload"),
    "PreconditionFailed": (PreconditionFailed, "another version is there"),
    "412": (PreconditionFailed, "another version is there"),
    "ObjectParentIsFile": (InTheWay, "an object is above this key"),
    "ExistingObjectIsDirectory": (InTheWay, "objects are below this key"),
    "NoSuchBucket": (StorageUnavailable, "the bucket does not exist: create it"),
}


@contextmanager
def translated(what: str) -> Iterator[None]:
    """
    Args:
        what: was asked: an operation and a key.
    """
    try:
        yield
    except boto.ClientError as error:
        raise _of_answer(what, error) from error
    except _NOT_SENT as error:
        raise TryAgain(f"the object store cannot be reached ({what})", is_done=False) from error
    except tuple(_NOT_HELPED_BY_TRYING) as error:
        reason = next(text for kind, text in _NOT_HELPED_BY_TRYING.items() if isinstance(error, kind))
        raise StorageUnavailable(f"{what} cannot be sent: {reason}") from error
    except (boto.BotoCoreError, HTTPError, OSError) as error:
        # Its message may name the host.
        name = type(error).__name__
        raise TryAgain(f"the object store did not answer {what}: {name}", is_done=None) from error


def _of_answer(what: str, error: boto.ClientError) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _MEANINGS:
        kind, meaning = _MEANINGS[code]
        return kind(f"{what}: {meaning}")
    said = f"{what} was answered with {code if _CODE.fullmatch(code) else 'an error'} ({status})"
    if code in _FULL or status == 507:
        return StorageFull(f"the object store has no room: {said}")
    if code in _NOT_DONE or status in _NOT_DONE_STATUSES:
        return TryAgain(f"the object store is busy: {said}", is_done=False)
    if code in _NOBODY_KNOWS or status >= 500:
        return TryAgain(f"the object store failed: {said}", is_done=None)
    hint = "; check the credentials, the clock and the bucket's policy" if status in {401, 403} else ""
    return StorageUnavailable(f"the object store refuses us: {said}{hint}")
