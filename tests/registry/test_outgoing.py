"""What a manifest says about elsewhere is never asked for there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.registry.conftest import Serve
from tests.registry.wire import OCI_LAYER, Wire, assert_refused, descriptor, image

NAME = "team/kit"
FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"


class Elsewhere:
    """Somebody who is not to be called."""

    def __init__(self) -> None:
        self.url = ""
        self.calls = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.calls += 1
        writer.close()


@pytest.fixture
async def elsewhere() -> AsyncIterator[Elsewhere]:
    place = Elsewhere()
    async with await asyncio.start_server(place.answer, "127.0.0.1", 0) as server:
        place.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield place


@pytest.mark.parametrize("media_type", [OCI_LAYER, FOREIGN])
@pytest.mark.parametrize("is_sparse", [False, True])
async def test_A_54_V_29_the_urls_of_a_descriptor_are_never_fetched(
    serve: Serve, elsewhere: Elsewhere, media_type: str, *, is_sparse: bool
) -> None:
    layer = descriptor(b"elsewhere", media_type, urls=[f"{elsewhere.url}/layer", "file:///etc/passwd"])
    async with serve(manifests={"allowsparse": is_sparse}) as url:
        wire = Wire(url)
        await wire.push_blob(NAME, b"{}")

        reply = await wire.put_manifest(NAME, "v1", image(layers=[layer]))

        if is_sparse or media_type == FOREIGN:
            assert reply.status == 201
        else:
            assert_refused(reply, 400, code="MANIFEST_BLOB_UNKNOWN")
        for target in (
            f"blobs/{layer['digest']}",
            "_modelkit/files/v1",
            "_modelkit/archive/v1",
            "manifests/v1.only.model",
        ):
            assert_refused(await wire("GET", f"/v2/{NAME}/{target}"), 404)
    assert elsewhere.calls == 0
