import json

import pytest

from kitspec import errors
from kitspec.errors import (
    BlobTooLarge,
    ManifestInvalid,
    ManifestTooLarge,
    OciError,
    RangeInvalid,
    ServerError,
    Unavailable,
    UploadOutOfOrder,
    error_from_response,
)

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, OciError) and kind is not OciError
]


def made(kind):
    return kind("told", size=0, detail={"a": 1}) if kind is RangeInvalid else kind("told", detail={"a": 1})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_crosses_the_wire_and_stays_the_same(kind):
    error = made(kind)

    back = error_from_response(kind.status, error.to_json(), otherwise="?")

    assert (back.code, back.status, back.message, back.detail) == (kind.code, kind.status, "told", {"a": 1})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_in_the_tree_at_the_head_of_the_module(kind):
    assert f"── {kind.__name__} " in errors.__doc__


def test_the_body_is_the_specifications():
    assert json.loads(ManifestInvalid("why").to_json()) == {
        "errors": [{"code": "MANIFEST_INVALID", "message": "why"}]
    }
    assert UploadOutOfOrder("late", offset=7).offset == 7


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (413, b"", OciError),
        (413, b'{"errors":[{"code":"MANIFEST_INVALID"}]}', ManifestTooLarge),
        (413, b'{"errors":[{"code":"SIZE_INVALID"}]}', BlobTooLarge),
        (400, b'{"errors":[{"code":"MANIFEST_INVALID"}]}', ManifestInvalid),
        (404, b'{"errors":[{"code":"MANIFEST_INVALID"}]}', ManifestInvalid),
        (503, b"<html>", Unavailable),
        (502, b"[]", ServerError),
        (500, b'{"errors":[]}', ServerError),
        (418, b'{"errors":[{"code":"TEAPOT"}]}', OciError),
        (416, b'{"errors":[{"code":"RANGE_INVALID"}]}', RangeInvalid),
        (500, b"[" * 100_000, ServerError),
        (500, b'{"errors":["text"]}', ServerError),
        (500, b'\xff{"errors"', ServerError),
    ],
)
def test_replies_of_others_become_the_nearest_error(status, body, kind):
    error = error_from_response(status, body, otherwise="no words")

    assert type(error) is kind
    assert error.message == "no words"
