"""Our extension, `/v2/<name>/_modelkit/…`: files of a ModelKit, its Kitfile, archives of a part of it, tensors.

Described in docs/extension.md. Reads only.
"""

from __future__ import annotations

import base64
import json
import math
import posixpath
from typing import Any, Final
from urllib.parse import quote, urlencode

from aiohttp import web

from kitspec.digest import Digest
from kitspec.errors import FileUnknown, FilterInvalid, ManifestInvalid, QueryInvalid
from kitspec.http_fields import format_next_link
from kitspec.path_glob import PathGlob
from kitspec.views import VIEW_VERSION, kept_entries
from registry.api.call import Call
from registry.api.listings import page_size
from registry.api.manifests import filters_of, known_reference
from registry.api.sending import send_content
from registry.auth.layers import LayerScope
from registry.content import Content, Literal
from registry.kits import ChosenKit, KitFile
from registry.tensors import TensorFile, TensorsInvalid, format_of, read_tensors

_GLOBS_MAX: Final = 32
_EXTENSION_URL: Final = "urn:modelkit-registry:extension:modelkit:v1"
ENDPOINTS: Final = ("_modelkit/files", "_modelkit/kitfile", "_modelkit/archive", "_modelkit/tensors")

# Types that a browser does not run, whatever the bytes are; everything else is handed over as bytes to be saved.
_SAFE_TYPES: Final = {
    ".csv": "text/csv; charset=utf-8",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".md": "text/markdown; charset=utf-8",
    ".parquet": "application/vnd.apache.parquet",
    ".png": "image/png",
    ".py": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".webp": "image/webp",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}


async def discover(call: Call) -> web.StreamResponse:
    """GET /v2/_oci/ext/discover: which extensions there are.

    Source: distribution-spec, extensions/_oci.md.
    """
    extension = {
        "name": "_modelkit",
        "description": "Parts of ModelKits: files, Kitfiles, archives, tensors, slices and views",
        "url": _EXTENSION_URL,
        "endpoints": list(ENDPOINTS),
    }
    _ = call
    return _json({"extensions": [extension]})


async def list_files(call: Call) -> web.StreamResponse:
    """GET files/<reference>?filter=&path=&prefix=&n=&last="""
    choice = await _readable_part(call)
    size_max = page_size(call, call.config.catalog.maxentries)
    page: list[KitFile] = []
    link: str | None = None
    files = call.services.kits.files(
        choice, prefix=call.query.one("prefix") or "", after=call.query.one("last"), globs=_globs(call)
    )
    async for file in files:
        # What several layers have at one path stays on one page: the next page begins behind the path.
        if len(page) >= size_max and not (page and page[-1].path == file.path):
            link = _next(call, page, size_max) if page else None  # n=0 asks for nothing: no page follows it
            break
        page.append(file)
    headers = {"Link": format_next_link(link)} if link is not None else {}
    return _json({"digest": choice.kit.digest, "files": [_about(file) for file in page]}, headers)


async def get_file(call: Call) -> web.StreamResponse:
    """GET and HEAD files/<reference>/<path>: one file, whole or a range."""
    choice = await _readable_part(call)
    file = await _find_file(call, choice)
    assert file.digest is not None
    media_type, disposition = _presentation(file.path)
    headers = {
        "Docker-Content-Digest": file.digest,
        "Content-Disposition": disposition,
        "X-Content-Type-Options": "nosniff",
        "Repr-Digest": f"sha-256=:{_base64(file.digest)}:",
    }
    return await send_content(call, file.content, etag=file.digest, media_type=media_type, headers=headers)


async def get_kitfile(call: Call) -> web.StreamResponse:
    """GET kitfile/<reference>: as YAML, or as JSON if that is what is asked for."""
    choice = await _kitfile_choice(call)
    kitfile = kept_entries(choice.kit.kitfile, choice.chosen)
    wants_json = call.query.one("format") == "json" or call.headers.get("Accept", "").startswith(
        "application/json"
    )
    content = kitfile.to_json() if wants_json else kitfile.to_yaml()
    return await send_content(
        call,
        Content([Literal(content)]),
        etag=Digest.of(content),
        media_type="application/json" if wants_json else "application/yaml",
        headers={"Vary": "Accept"},
    )


async def get_archive(call: Call) -> web.StreamResponse:
    """GET and HEAD archive/<reference>?filter=&path=: one tar of what was chosen, of known length, to be resumed."""
    choice = await _choice(call)
    patterns = call.query.all("path")
    content = await call.services.kits.archive(choice, _globs(call))
    places = [[str(section), index] for section, index in sorted(choice.chosen)]
    etag = Digest.of(json.dumps([VIEW_VERSION, choice.kit.digest, places, patterns]).encode())
    name = f"{call.name.rpartition('/')[2]}.tar"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return await send_content(call, content, etag=etag, media_type="application/x-tar", headers=headers)


async def list_tensors(call: Call) -> web.StreamResponse:
    """GET tensors/<reference>: the files that hold tensors, each with what its header says."""
    choice = await _readable_part(call)
    listed = [
        _tensor_summary(file, await _tensors(call, file))
        async for file in call.services.kits.files(choice)
        if not file.is_folder and format_of(file.path) is not None
    ]
    return _json({"digest": choice.kit.digest, "files": listed})


async def get_tensors(call: Call) -> web.StreamResponse:
    """GET tensors/<reference>/<path>: the header of one file; with `name=` the bytes of one tensor."""
    choice = await _readable_part(call)
    file = await _find_file(call, choice)
    tensors = await _tensors(call, file)
    name = call.query.one("name")
    if name is None:
        return _json({"digest": choice.kit.digest, **_tensor_header(file, tensors)})
    tensor = next((tensor for tensor in tensors.tensors if tensor.name == name), None)
    if tensor is None:
        raise FileUnknown(f"no tensor {name[:200]!a} in {file.path[:200]!a}")
    headers = {
        "X-Tensor-Dtype": tensor.dtype,
        "X-Tensor-Shape": ",".join(str(length) for length in tensor.shape),
    }
    etag = Digest.of(f"{file.digest} {tensor.start} {tensor.stop}".encode())
    content = file.content.part(tensor.start, tensor.stop)
    return await send_content(
        call, content, etag=etag, media_type="application/octet-stream", headers=headers
    )


async def _choice(call: Call) -> ChosenKit:
    """What was asked for, if the caller may read all of it."""
    return await _chosen(call, call.layers)


async def _readable_part(call: Call) -> ChosenKit:
    """What was asked for, without the layers that the caller may not read: for single files, and lists of them."""
    return await _chosen(call, call.layers, is_narrowed=True)


async def _kitfile_choice(call: Call) -> ChosenKit:
    may_read_all = call.layers is not None and call.layers.has_kitfile
    return await _chosen(call, None if may_read_all else call.layers)


async def _chosen(call: Call, scope: LayerScope | None, *, is_narrowed: bool = False) -> ChosenKit:
    reference, filters = known_reference(call.argument), filters_of(call)
    return await call.services.kits.choose(
        call.name, reference, filters, scope=scope, is_narrowed=is_narrowed
    )


async def _find_file(call: Call, choice: ChosenKit) -> KitFile:
    try:
        return await call.services.kits.find_file(choice, call.path)
    except FileUnknown as error:
        if call.layers is None:
            raise
        raise FileUnknown(f"{error.message}, of which you may read {call.layers}") from error


def _globs(call: Call) -> list[PathGlob]:
    patterns = call.query.all("path")
    if len(patterns) > _GLOBS_MAX:
        raise QueryInvalid(f"{len(patterns)} path= patterns; at most {_GLOBS_MAX} are allowed")
    try:
        return [PathGlob(pattern) for pattern in patterns]
    except FilterInvalid as error:
        raise QueryInvalid(str(error)) from error


def _about(file: KitFile) -> dict[str, Any]:
    pair = file.layer.pair
    about: dict[str, Any] = {"path": file.path, "type": "directory" if file.is_folder else "file"}
    if not file.is_folder:
        about |= {"size": file.size}
    about |= {"mode": f"{file.mode:04o}"}
    if file.digest is not None:
        about |= {"digest": file.digest}
    about |= {
        "layer": file.layer.digest,
        "section": str(pair.section),
        "entry": pair.entry.name or pair.entry.path,
    }
    if not file.is_folder and pair.layer_type.compression is None:
        about["offset"] = file.offset
    return about


async def _tensors(call: Call, file: KitFile) -> TensorFile:
    form = format_of(file.path)
    if form is None:
        raise FileUnknown(f"{file.path[:200]!a} holds no tensors; wanted a .safetensors or .gguf file")
    content = file.content

    async def read(start: int, stop: int) -> bytes:
        return await call.services.reader.read(content, start, stop)

    try:
        return await read_tensors(read, file.size, form)
    except TensorsInvalid as error:
        raise ManifestInvalid(f"{file.path[:200]!a} is no {form} file: {error}") from error


def _tensor_summary(file: KitFile, tensors: TensorFile) -> dict[str, Any]:
    parameters: dict[str, int] = {}
    for tensor in tensors.tensors:
        parameters[tensor.dtype] = parameters.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return {
        "path": file.path,
        "format": tensors.format,
        "size": file.size,
        "digest": file.digest,
        "tensors": len(tensors.tensors),
        "parameters": parameters,
        "metadata": dict(tensors.metadata),
    }


def _tensor_header(file: KitFile, tensors: TensorFile) -> dict[str, Any]:
    return {
        "path": file.path,
        "format": tensors.format,
        "metadata": dict(tensors.metadata),
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "start": tensor.start,
                "stop": tensor.stop,
            }
            for tensor in tensors.tensors
        ],
    }


def _presentation(path: str) -> tuple[str, str]:
    """`Content-Type` and `Content-Disposition` of a file: nothing that a browser would run."""
    name = posixpath.basename(path)
    media_type = _SAFE_TYPES.get(posixpath.splitext(name)[1].lower())
    kind = "attachment" if media_type is None else "inline"
    return media_type or "application/octet-stream", f"{kind}; filename*=UTF-8''{quote(name, safe='')}"


def _base64(digest: Digest) -> str:
    return base64.b64encode(bytes.fromhex(digest.encoded)).decode()


def _next(call: Call, page: list[KitFile], size_max: int) -> str:
    kept = [(key, value) for key in ("filter", "path", "prefix") for value in call.query.all(key)]
    query = urlencode([*kept, ("n", str(size_max)), ("last", page[-1].path)])
    return call.page_url(query)


def _json(document: dict[str, Any], headers: dict[str, str] | None = None) -> web.StreamResponse:
    body = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    return web.Response(body=body, headers={"Content-Type": "application/json", **(headers or {})})
