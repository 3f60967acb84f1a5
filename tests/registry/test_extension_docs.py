"""The lines of docs/extension.md work as they stand, and every endpoint of the extension has one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest

from registry.api.modelkits import ENDPOINTS
from tests.registry.kits import Kit, tar_of
from tests.registry.wire import Wire

DOCUMENT = (Path(__file__).parents[2] / "docs" / "extension.md").read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
    for line in block.splitlines()
    if "curl " in line
]
TENSOR = "embeddings.word_embeddings.weight"


def safetensors() -> bytes:
    header = json.dumps({TENSOR: {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(range(128))


async def push_kit(wire: Wire) -> None:
    """In the shape of the one that `make demo` pushes."""
    kit = Kit()
    kit.add(
        "model",
        "model",
        tar_of({"model/config.json": b"{}", "model/model.safetensors": safetensors()}),
        name="minilm",
    )
    kit.add("code", "embed.py", tar_of({"embed.py": b"print()\n"}))
    kit.add("docs", "README.md", tar_of({"README.md": b"# A model\n"}))
    await kit.push(wire, "demo/minilm", "v1")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
@pytest.mark.parametrize("line", LINES)
async def test_a_line_works(line: str, registry_url: str, tmp_path: Path) -> None:
    await push_kit(Wire(registry_url))
    host = registry_url.removeprefix("http://")
    assert "curl -s" in line
    # A refusal is an answer to curl, unless it is told otherwise.
    script = line.replace("curl -s", "curl -sS --fail-with-body")

    shell = await asyncio.create_subprocess_exec(
        "bash",
        "-euo",
        "pipefail",
        "-c",
        script,
        cwd=tmp_path,
        env={**os.environ, "REG": host, "KIT": "demo/minilm", "TAG": "v1", "no_proxy": "127.0.0.1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await shell.communicate()

    assert shell.returncode == 0, output
    assert output or any(tmp_path.iterdir())


def test_every_endpoint_of_the_extension_is_described_with_a_line() -> None:
    for endpoint in ENDPOINTS:
        assert f"/{endpoint}/" in DOCUMENT
        assert any(f"/{endpoint}/" in line for line in LINES), endpoint
    assert any("/v2/_oci/ext/discover" in line for line in LINES)
