"""end-3, 7 and 9: manifests."""

from __future__ import annotations

from aiohttp import web

from kitspec.digest import Digest
from kitspec.errors import (
    Denied,
    FilterInvalid,
    ManifestTypeUnsupported,
    ManifestUnknown,
    QueryInvalid,
    TagInvalid,
)
from kitspec.manifest import parse_manifest
from kitspec.names import Tag
from kitspec.selection import Filter, parse_filter
from registry.api.blobs import refuse_when_deletes_are_off
from registry.api.call import Call
from registry.api.conditions import Verdict, verdict_of
from registry.auth.policy import Action
from registry.hosted import tag_is_taken


async def get_manifest(call: Call) -> web.StreamResponse:
    """GET and HEAD, by tag or by digest; the bytes and the media type are those of the push, or a view's own."""
    reference, filters = known_reference(call.argument), filters_of(call)
    found = await call.services.views.find_manifest(call.name, reference, filters, scope=call.layers)
    if call.layers is not None:
        await call.services.layers.require_manifest(call.name, reference, found.manifest, call.layers)
    manifest, call.versions = found.manifest, found.versions
    headers = {
        "Docker-Content-Digest": manifest.digest,
        "ETag": f'"{manifest.digest}"',
    }
    if found.of is not None:
        source = call.url(f"/v2/{call.name}/manifests/{found.of}")
        headers["Link"] = f'<{source}>; rel="canonical"'
    verdict = verdict_of(call.headers, manifest.digest)
    if verdict is not Verdict.GO_ON:
        return web.Response(status=verdict.value, headers=headers)
    headers["Content-Type"] = manifest.media_type
    return web.Response(body=manifest.content, headers=headers)


async def put_manifest(call: Call) -> web.StreamResponse:
    """PUT by tag, or by digest with any number of `tag=` parameters."""
    reference = _reference(call.argument)
    tags = _tags(call, reference)
    media_type = _media_type(call)
    content = await call.read_manifest(call.config.limits.manifestsize)
    manifest = parse_manifest(content, media_type)
    await _check_tags(call, tags, reference if isinstance(reference, Digest) else Digest.of(content))
    await call.services.views.materialise(call.name, manifest)
    stored = await call.registry.store_manifest(
        call.name,
        manifest,
        content,
        media_type,
        expect=reference if isinstance(reference, Digest) else None,
        tags=tags,
        may_move_tags=call.may(Action.UPDATE, call.name),
    )
    call.services.kits.index_soon(manifest)
    headers = {
        "Location": call.url(f"/v2/{call.name}/manifests/{stored.digest}"),
        "Docker-Content-Digest": stored.digest,
        "Content-Length": "0",
    }
    if manifest.subject is not None:
        headers["OCI-Subject"] = manifest.subject.digest
    if tags:
        headers["OCI-Tag"] = ", ".join(tags)
    return web.Response(status=201, headers=headers)


async def delete_manifest(call: Call) -> web.StreamResponse:
    """DELETE: by tag only the tag; by digest the manifest and its tags."""
    refuse_when_deletes_are_off(call)
    reference = known_reference(call.argument)
    if isinstance(reference, Digest):
        await _refuse_collisions(call, reference)
    await call.registry.delete_manifest(call.name, reference)
    return web.Response(status=202, headers={"Content-Length": "0"})


async def _check_tags(call: Call, tags: tuple[Tag, ...], digest: Digest) -> None:
    """A tag that is there is updated, another one created; each is a right of its own. No tag is special (V-12).

    Raises:
        Denied: the caller has not got the one that a tag takes; nothing is stored.
    """
    may_create, may_update = call.may(Action.CREATE, call.name), call.may(Action.UPDATE, call.name)
    if may_create and may_update:
        return
    for tag in tags:
        target = await call.registry.tag_target(call.name, tag)
        if target is None and not may_create:
            raise Denied(
                f"{call.name}:{tag} is not there, and you may update tags here but not create them",
                detail={"tag": tag},
            )
        if target is not None and target != digest and not may_update:
            raise tag_is_taken(call.name, tag)


async def _refuse_collisions(call: Call, digest: Digest) -> None:
    """zot's `detectManifestCollision`: with a manifest its tags go, and somebody else may mean another one of them.

    Raises:
        Denied: it has more tags than one.
    """
    if not call.may(Action.DETECT_COLLISION, call.name):
        return
    tags = await call.registry.tags_of(call.name, digest)
    if len(tags) > 1:
        raise Denied(
            f"{digest} has {len(tags)} tags, {', '.join(tags[:5])}{', …' if len(tags) > 5 else ''}; "
            "delete the tags one by one (detectManifestCollision)"
        )


def _reference(text: str) -> Tag | Digest:
    return Digest(text) if ":" in text else Tag(text)


def known_reference(text: str) -> Tag | Digest:
    """A reference to look up: what cannot be a tag is a tag that does not exist."""
    try:
        return _reference(text)
    except TagInvalid as error:
        raise ManifestUnknown(f"no manifest {text[:160]!a}: that cannot be a tag") from error


def filters_of(call: Call) -> list[Filter]:
    """`filter=`, any number of times, in the syntax of kit's `--filter`.

    Raises:
        QueryInvalid: it is none.
    """
    try:
        return [parse_filter(text) for text in call.query.all("filter")]
    except FilterInvalid as error:
        raise QueryInvalid(str(error)) from error


def _tags(call: Call, reference: Tag | Digest) -> tuple[Tag, ...]:
    asked = call.query.all("tag")
    if isinstance(reference, Tag):
        if asked:
            raise QueryInvalid("tag= goes with a push by digest; this one names a tag in its path")
        return (reference,)
    if len(asked) > call.config.limits.tagsperput:
        raise QueryInvalid(
            f"{len(asked)} tags in one push; at most {call.config.limits.tagsperput} are allowed"
        )
    return tuple(dict.fromkeys(Tag(text) for text in asked))


def _media_type(call: Call) -> str:
    """`Content-Type` without parameters, which the specification has us ignore."""
    field = call.headers.get("Content-Type")
    if field is None:
        raise ManifestTypeUnsupported("a manifest needs its media type in Content-Type")
    return field.partition(";")[0].strip().lower()
