"""Blobs and uploads as an attacker or a broken client sends them."""

import asyncio
import gzip
import re
from collections.abc import AsyncIterator

import pytest

from kitspec.digest import Digest
from tests.registry.wire import (
    LAYER,
    Wire,
    assert_discreet,
    assert_refused,
    assert_refused_by_parser,
    parse_reply,
    path_of,
)


@pytest.fixture
def wire(registry_url: str) -> Wire:
    return Wire(registry_url)


async def test_B_40_a_put_without_a_digest_is_400_and_the_upload_goes_on(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")

    for query in ("", "?digest=", "?digests=sha256:x"):
        assert_refused(await wire("PUT", upload + query), 400, code="DIGEST_INVALID")
    assert (await wire("PUT", f"{upload}?digest={Digest.of(LAYER)}", body=LAYER)).status == 201


async def test_B_41_a_put_with_a_wrong_digest_is_400_and_ends_the_upload(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")
    await wire("PATCH", upload, body=LAYER)

    reply = await wire("PUT", f"{upload}?digest={Digest.of(b'other')}")

    assert_refused(reply, 400, code="DIGEST_INVALID")
    assert_refused(await wire("GET", upload), 404, code="BLOB_UPLOAD_UNKNOWN")
    for content in (LAYER, b"other"):
        assert_refused(await wire("GET", f"/v2/lib/a/blobs/{Digest.of(content)}"), 404, code="BLOB_UNKNOWN")


@pytest.mark.parametrize("digest", ["sha256:zz", "sha256", ":", "zz", "%00", "sha256:" + "a" * 1000])
async def test_B_42_a_put_with_what_is_no_digest_is_400_and_the_upload_goes_on(
    wire: Wire, digest: str
) -> None:
    upload = await wire.begin_upload("lib/a")

    assert_refused(await wire("PUT", f"{upload}?digest={digest}", body=LAYER), 400, code="DIGEST_INVALID")
    assert (await wire("GET", upload)).status == 204


async def test_B_43_a_single_post_with_a_wrong_digest_is_400_and_nothing_is_stored(wire: Wire) -> None:
    reply = await wire("POST", f"/v2/lib/a/blobs/uploads/?digest={Digest.of(b'other')}", body=LAYER)

    assert_refused(reply, 400, code="DIGEST_INVALID")
    for content in (LAYER, b"other"):
        assert (await wire("HEAD", f"/v2/lib/a/blobs/{Digest.of(content)}")).status == 404


async def test_B_44_a_repeated_chunk_is_refused_and_the_upload_says_where_it_is(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")
    await wire("PATCH", upload, headers={"Content-Range": "0-2"}, body=b"abc")

    again = await wire("PATCH", upload, headers={"Content-Range": "0-2"}, body=b"abc")

    assert_refused(again, 416, code="BLOB_UPLOAD_INVALID")
    assert again.header("Range") == "0-2"
    rest = await wire(
        "PATCH", path_of(again.header("Location")), headers={"Content-Range": "3-5"}, body=b"def"
    )
    assert (rest.status, rest.header("Range")) == (202, "0-5")
    assert (await wire("PUT", f"{upload}?digest={Digest.of(b'abcdef')}")).status == 201


async def test_B_45_a_gap_is_refused_and_nothing_is_kept(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")
    await wire("PATCH", upload, headers={"Content-Range": "0-2"}, body=b"abc")

    assert_refused(await wire("PATCH", upload, headers={"Content-Range": "5-7"}, body=b"xyz"), 416)
    closing = f"{upload}?digest={Digest.of(b'abcxyz')}"
    assert_refused(await wire("PUT", closing, headers={"Content-Range": "5-7"}, body=b"xyz"), 416)

    assert (await wire("GET", upload)).header("Range") == "0-2"
    assert (await wire("PUT", f"{upload}?digest={Digest.of(b'abc')}")).status == 201


@pytest.mark.parametrize("field", ["0-99", "0-0", "0-1"])
async def test_B_46_a_content_range_that_disagrees_with_the_length_is_refused(wire: Wire, field: str) -> None:
    upload = await wire.begin_upload("lib/a")

    assert_refused(await wire("PATCH", upload, headers={"Content-Range": field}, body=b"abc"), 400, 416)
    assert (await wire("PUT", f"{upload}?digest={Digest.of(b'abc')}", body=b"abc")).status in {201, 400, 404}


@pytest.mark.parametrize("state", ["forged", "e30", "A" * 3000, "..%2f..%2fetc"])
async def test_B_49_V_31_an_upload_id_that_was_forged_or_moved_is_404(wire: Wire, state: str) -> None:
    upload = await wire.begin_upload("lib/a")
    folder, _, identity = upload.rpartition("/")

    for forged in (f"{folder}/{state}", f"{folder}/{identity[:-1]}", f"/v2/lib/b/blobs/uploads/{identity}"):
        assert_refused(await wire("GET", forged), 404, code="BLOB_UPLOAD_UNKNOWN")
        assert_refused(await wire("PATCH", forged, body=LAYER), 404, code="BLOB_UPLOAD_UNKNOWN")
    assert (await wire("GET", f"{upload}?_state={state}")).status == 204


async def test_B_50_V_60_a_body_with_a_content_encoding_is_stored_as_it_came(wire: Wire) -> None:
    compressed = gzip.compress(b"\0" * 1_000_000, mtime=0)
    digest = Digest.of(compressed)

    pushed = await wire(
        "POST",
        f"/v2/lib/a/blobs/uploads/?digest={digest}",
        headers={"Content-Encoding": "gzip"},
        body=compressed,
    )
    got = await wire("GET", f"/v2/lib/a/blobs/{digest}")

    assert pushed.status == 201
    assert got.body == compressed
    assert "Content-Encoding" not in got.headers


async def test_B_51_an_empty_blob_is_a_blob(wire: Wire) -> None:
    digest = Digest.of(b"")
    upload = await wire.begin_upload("lib/a")

    by_put = await wire("PUT", f"{upload}?digest={digest}")
    by_post = await wire("POST", f"/v2/lib/b/blobs/uploads/?digest={digest}")

    assert (by_put.status, by_post.status) == (201, 201)
    for name in ("lib/a", "lib/b"):
        got = await wire("GET", f"/v2/{name}/blobs/{digest}")
        assert (got.status, got.header("Content-Length"), got.body) == (200, "0", b"")


async def test_B_52_what_arrived_before_the_peer_was_gone_is_kept(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")
    _, writer = await asyncio.open_connection(wire.host, wire.port)
    writer.write(f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode() + LAYER[:10])
    await writer.drain()
    writer.close()
    await writer.wait_closed()

    await wire.until_held(upload, "0-9")

    rest = await wire("PATCH", upload, headers={"Content-Range": "10-19"}, body=LAYER[10:20])
    assert rest.status == 202
    assert (await wire("PUT", f"{upload}?digest={Digest.of(LAYER[:20])}")).status == 201


async def test_B_53_a_body_without_a_length_is_taken(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")

    patched = await wire("PATCH", upload, body=[LAYER[:7], LAYER[7:300]])
    done = await wire("PUT", f"{upload}?digest={Digest.of(LAYER)}", body=[LAYER[300:]])

    assert (patched.status, patched.header("Range"), done.status) == (202, "0-299", 201)


async def test_B_53_V_66_a_body_in_chunks_of_one_byte_is_taken(wire: Wire) -> None:
    size = 50_000
    upload = await wire.begin_upload("lib/a")
    head = f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()

    answer = await wire.converse([head, b"1\r\nx\r\n" * size, b"0\r\n\r\n"])

    reply = parse_reply(answer, "PATCH")
    assert (reply.status, reply.header("Range")) == (202, f"0-{size - 1}")


@pytest.mark.parametrize(
    "body",
    [
        b"3\r\nabc\r\n0\r\n" + b"X-Trailer: 1\r\n" * 1000 + b"\r\n",
        b"zz\r\nabc\r\n0\r\n\r\n",
        b"-3\r\nabc\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\nabc\r\n",
        b"3\r\nabcdef\r\n0\r\n\r\n",
    ],
    ids=[
        "1,000 trailers",
        "no number",
        "negative",
        "overflow",
        "chunk longer than it says",
    ],
)
async def test_B_53_V_61_bad_chunks_are_400_or_an_end_and_the_server_goes_on(wire: Wire, body: bytes) -> None:
    upload = await wire.begin_upload("lib/a")
    head = f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()

    answer = await wire.converse([head + body])

    if answer:
        assert_refused_by_parser(answer, 400)
    assert (await wire("GET", upload)).status in {204, 404}


async def test_B_53_a_long_chunk_extension_is_refused_or_passed_over(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")
    head = f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()

    answer = await wire.converse([head + b"3;" + b"x" * 9_300 + b"\r\nabc\r\n0\r\n\r\n"])

    # llhttp keeps nothing of an extension, so its length costs nothing; refusing it is as good.
    reply = parse_reply(answer, "PATCH")
    assert reply.status in {202, 400}
    assert_discreet(reply)
    assert (await wire("GET", upload)).header("Range") == ("0-2" if reply.status == 202 else "0-0")


async def test_B_55_what_follows_a_body_is_the_next_request(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")
    request = f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n".encode()

    answer = await wire.converse([request + b"abcJUNK AND MORE\r\n\r\n"])

    # The parser sees both before a handler sees one: the PATCH is answered and then the junk, or the junk alone.
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]
    held = (await wire("GET", upload)).header("Range")
    assert (statuses, held) in [([202, 400], "0-2"), ([400], "0-0")]


async def test_B_56_two_puts_that_close_one_upload_make_one_blob(wire: Wire) -> None:
    digest = Digest.of(LAYER)
    upload = await wire.begin_upload("lib/a")
    await wire("PATCH", upload, body=LAYER)

    replies = await asyncio.gather(*(wire("PUT", f"{upload}?digest={digest}") for _ in range(4)))

    statuses = sorted(reply.status for reply in replies)
    assert 201 in statuses
    assert set(statuses) <= {201, 404, 416}
    assert (await wire("GET", f"/v2/lib/a/blobs/{digest}")).body == LAYER


async def test_B_56_two_patches_at_once_never_mix(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")

    def patch(letter: bytes) -> asyncio.Task[object]:
        async def slowly() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield letter * 1_000
                await asyncio.sleep(0)

        return asyncio.ensure_future(
            wire("PATCH", upload, headers={"Content-Range": "0-19999"}, body=slowly())
        )

    replies = await asyncio.gather(patch(b"a"), patch(b"b"))

    assert sorted(reply.status for reply in replies) == [202, 416]  # type: ignore[attr-defined]
    winner = b"a" if replies[0].status == 202 else b"b"  # type: ignore[attr-defined]
    assert (await wire("PUT", f"{upload}?digest={Digest.of(winner * 20_000)}")).status == 201


async def test_B_57_an_upload_that_was_deleted_takes_no_more(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")

    assert (await wire("DELETE", upload)).status == 204
    assert_refused(await wire("PATCH", upload, body=LAYER), 404, code="BLOB_UPLOAD_UNKNOWN")


async def test_B_58_mounts_give_the_blob_or_an_upload(wire: Wire) -> None:
    digest = await wire.push_blob("lib/a", LAYER)
    begin = "/v2/lib/b/blobs/uploads/"

    mounted = await wire("POST", f"{begin}?mount={digest}&from=lib/a")
    assert mounted.status == 201
    assert mounted.header("Docker-Content-Digest") == digest
    missing = await wire("POST", f"{begin}?mount={Digest.of(b'no')}&from=lib/a")
    assert missing.status == 202
    for query in (
        "mount=sha256:short&from=lib/a",
        f"mount={digest}&from=../a",
        f"mount={digest}&from=A%00",
        "mount=&from=lib/a",
    ):
        reply = await wire("POST", f"{begin}?{query}")
        assert reply.status in {202, 400}, query
        assert_discreet(reply)
        if reply.status == 400:
            assert_refused(reply, 400)
    anonymous = await wire("POST", f"/v2/lib/c/blobs/uploads/?mount={digest}")
    assert anonymous.status == 201
    assert (await wire("GET", f"/v2/lib/c/blobs/{digest}")).body == LAYER


@pytest.mark.parametrize(
    ("field", "start", "stop"),
    [
        ("bytes=0-", 0, 1000),
        ("bytes=-5", 995, 1000),
        ("bytes=-5000", 0, 1000),
        ("bytes=990-5000", 990, 1000),
        ("bytes=0-100000000000000000000", 0, 1000),
        ("bytes=0-0", 0, 1),
        ("Bytes=1-2", 1, 3),
    ],
)
async def test_B_59_a_range_that_lies_inside_is_206(wire: Wire, field: str, start: int, stop: int) -> None:
    digest = await wire.push_blob("lib/a", LAYER)

    reply = await wire("GET", f"/v2/lib/a/blobs/{digest}", headers={"Range": field})

    assert (reply.status, reply.body) == (206, LAYER[start:stop])
    assert reply.header("Content-Range") == f"bytes {start}-{stop - 1}/1000"
    assert reply.header("Content-Length") == str(stop - start)


@pytest.mark.parametrize("field", ["bytes=-0", "bytes=5-2", "bytes=5000-", "bytes=1000-1000"])
async def test_B_59_a_range_that_holds_nothing_is_416(wire: Wire, field: str) -> None:
    digest = await wire.push_blob("lib/a", LAYER)

    reply = await wire("GET", f"/v2/lib/a/blobs/{digest}", headers={"Range": field})

    assert_refused(reply, 416, code="RANGE_INVALID")
    assert reply.header("Content-Range") == f"bytes */{len(LAYER)}"


@pytest.mark.parametrize(
    "field",
    [
        "bytes=0-1,5-6",
        "bytes=" + ",".join(f"{n}-{n}" for n in range(0, 800, 2)),
        "abc",
        "items=0-1",
        "bytes=",
        "bytes=x-y",
        "bytes=0-9,0-9,0-9",
        "bytes=--1",
        "bytes",
        "=0-1",
        "bytes=0-1;q=1",
        "bytes=+1-2",
        "bytes=1_0-20",
    ],
    ids=lambda field: field[:20],
)
async def test_B_59_several_ranges_and_what_is_none_give_the_whole_or_416(wire: Wire, field: str) -> None:
    digest = await wire.push_blob("lib/a", LAYER)

    reply = await wire("GET", f"/v2/lib/a/blobs/{digest}", headers={"Range": field})

    if reply.status == 416:
        assert_refused(reply, 416)
    else:
        assert (reply.status, reply.body) == (200, LAYER)


@pytest.mark.parametrize("field", ['"', "W/", '"a', "a,b,c", "*,*", '""', '"\xff"', "W/" * 2000])
async def test_B_60_a_condition_that_is_none_is_as_if_nothing_matched(wire: Wire, field: str) -> None:
    digest = await wire.push_blob("lib/a", LAYER)
    target = f"/v2/lib/a/blobs/{digest}"

    assert (await wire("GET", target, headers={"If-None-Match": field})).status == 200
    ranged = await wire("GET", target, headers={"Range": "bytes=0-0", "If-Range": field})
    assert (ranged.status, ranged.body) == (200, LAYER)


async def test_B_60_a_weak_tag_is_good_for_if_none_match_and_not_for_if_range(wire: Wire) -> None:
    digest = await wire.push_blob("lib/a", LAYER)
    target = f"/v2/lib/a/blobs/{digest}"
    etag = (await wire("GET", target)).header("ETag")

    assert (await wire("GET", target, headers={"If-None-Match": f"W/{etag}"})).status == 304
    ranged = await wire("GET", target, headers={"Range": "bytes=0-0", "If-Range": f"W/{etag}"})
    assert ranged.status == 200


async def test_B_61_no_accept_encoding_changes_a_blob(wire: Wire) -> None:
    zeros = bytes(100_000)
    digest = await wire.push_blob("lib/a", zeros)

    for field in ("gzip", "gzip, br, zstd", "*", "identity;q=0"):
        reply = await wire("GET", f"/v2/lib/a/blobs/{digest}", headers={"Accept-Encoding": field})
        assert (reply.status, reply.body) == (200, zeros)
        assert "Content-Encoding" not in reply.headers
        assert reply.header("Content-Length") == "100000"


async def test_B_65_slow_uploads_do_not_hold_up_others(wire: Wire) -> None:
    slow = []
    for _ in range(100):
        upload = await wire.begin_upload("lib/slow")
        _, writer = await asyncio.open_connection(wire.host, wire.port)
        writer.write(f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nx".encode())
        await writer.drain()
        slow.append(writer)

    async with asyncio.timeout(10):
        digest = await wire.push_blob("lib/a", LAYER)
        got = await wire("GET", f"/v2/lib/a/blobs/{digest}")

    for writer in slow:
        writer.close()
    assert got.body == LAYER
