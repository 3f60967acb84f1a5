"""Which question of the Hugging Face Hub a path below `/hf/` asks, and of which repository.

    <endpoint>/api/models/<id>/tree/<revision>/<path>       <endpoint>/<id>/resolve/<revision>/<path>
    <endpoint>/api/datasets/<id>/tree/…                     <endpoint>/datasets/<id>/resolve/…

`<endpoint>` is what clients have behind `/hf/` in HF_ENDPOINT, any number of components; `<id>` is one or two. Together they are
the name of the repository. Paths are read from the left, on the characters as sent, and each has one meaning: the first component
that can be a word of the Hub's is one. So a repository is out of reach that has such a word as a component where the Hub has it.

Source: what huggingface_hub 0.23 to 2.4 send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal
from urllib.parse import parse_qsl, unquote

from kitspec.errors import ContentInvalid, NameInvalid, NameUnknown, OciError, QueryInvalid
from kitspec.names import RepositoryName
from kitspec.strict_json import parse_json

Operation = Literal["auth-check", "commits", "file", "info", "list", "paths-info", "refs", "tree", "whoami"]
RepoKind = Literal["model", "dataset"]

_KINDS: Final[dict[str, RepoKind]] = {"models": "model", "datasets": "dataset"}
# Of the Hub's further kinds there are none here.
_OTHER_KINDS: Final = frozenset(("spaces", "kernels"))
_WHOAMI: Final = "whoami-v2"
_AFTER_API: Final = frozenset((*_KINDS, *_OTHER_KINDS, _WHOAMI))
_FILE_WORDS: Final = frozenset(("resolve", "raw"))
# Behind an id: the operation, and how many components may follow.
_OPERATIONS: Final[dict[str, tuple[Operation, range]]] = {
    "auth-check": ("auth-check", range(1)),
    "commits": ("commits", range(1, 2)),
    "paths-info": ("paths-info", range(1, 2)),
    "refs": ("refs", range(1)),
    "revision": ("info", range(1, 2)),
    # A path has at most as many components as fit in a request line.
    "tree": ("tree", range(1, 8192)),
}


# huggingface_hub asks for 500 at a time; each costs a few look-ups.
PATHS_MAX: Final = 1_000


class HubPathUnknown(OciError):
    """A path that asks nothing this hub can answer."""

    code, status = "UNSUPPORTED", 404


@dataclass(frozen=True, slots=True)
class HubPath:
    """A question.

    Attributes:
        endpoint: what every name of a repository begins with, without a slash at either end; "" for nothing.
        id: of the repository below `endpoint`, in lower case; "" where the question is of none.
        revision: unescaped and unchecked; None where none is given.
        path: of a file or a folder, unescaped and unchecked; "" for the root.
    """

    operation: Operation
    kind: RepoKind = "model"
    endpoint: str = ""
    id: str = ""
    revision: str | None = None
    path: str = ""

    @property
    def name(self) -> RepositoryName:
        """
        Raises:
            NameInvalid: endpoint and id are none together.
        """
        return RepositoryName(f"{self.endpoint}/{self.id}" if self.endpoint else self.id)


def parse_hub_path(raw_path: str) -> HubPath:
    """Read what stands behind `/hf/`, as it was sent and without its query.

    The Hub's names have upper-case letters, a registry's have none: they are lowered.

    Raises:
        NameInvalid: no repository can have that name.
        NameUnknown: it asks for a kind of repository that is not here.
        HubPathUnknown: it is none of the paths above.
    """
    # Not lower() of anything but ASCII: that makes an ASCII "k" of a Kelvin sign.
    if not raw_path.isascii():
        raise _unknown()
    if raw_path.startswith("/"):
        raise NameInvalid("two slashes behind /hf; HF_ENDPOINT is to end without one")
    words = raw_path.split("/")
    for index, word in enumerate(words):
        if word == "api" and index + 1 < len(words) and words[index + 1] in _AFTER_API:
            return _checked(_parse_api(words[:index], words[index + 1 :]))
        if word in _FILE_WORDS and index > 0:
            return _checked(_parse_file(words[:index], words[index + 1 :]))
    raise _unknown()


def is_true(text: str | None) -> bool:
    """Whether a parameter is set: requests writes "True", httpx "true"."""
    return text is not None and text.lower() in ("true", "1")


def parse_paths_asked(body: bytes, content_type: str) -> tuple[list[str], bool]:
    """Paths and `expand` of a paths-info, from JSON or from a form, which is what clients send.

    Raises:
        QueryInvalid: they cannot be read, or are too many.
    """
    is_json = content_type.partition(";")[0].strip().lower() == "application/json"
    paths, is_expanded = _paths_of_json(body) if is_json else _paths_of_form(body)
    if len(paths) > PATHS_MAX:
        raise QueryInvalid(f"{len(paths)} paths; at most {PATHS_MAX} are allowed")
    return paths, is_expanded


def _paths_of_json(body: bytes) -> tuple[list[str], bool]:
    try:
        document = parse_json(body)
    except ContentInvalid as error:
        raise QueryInvalid(f"the body cannot be read: {error}") from error
    paths = document.get("paths") if isinstance(document, dict) else None
    listed = [paths] if isinstance(paths, str) else paths
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        raise QueryInvalid('wanted {"paths": ["…", …], "expand": true or false}')
    return listed, document.get("expand") is True


def _paths_of_form(body: bytes) -> tuple[list[str], bool]:
    try:
        # Bytes that are not UTF-8 become a character that stands in no path.
        pairs = parse_qsl(
            body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=PATHS_MAX + 16
        )
    except ValueError as error:
        raise QueryInvalid(f"more than {PATHS_MAX} paths, which is what is allowed") from error
    paths = [value for name, value in pairs if name in ("paths", "paths[]")]
    return paths, any(name == "expand" and is_true(value) for name, value in pairs)


def _parse_api(endpoint: Sequence[str], words: Sequence[str]) -> HubPath:
    base, (what, *rest) = "/".join(endpoint), words
    if what == _WHOAMI:
        if rest:
            raise _unknown()
        return HubPath("whoami", endpoint=base)
    if what in _OTHER_KINDS:
        raise NameUnknown(f"there are no {what} here; models and datasets are")
    kind = _KINDS[what]
    if not rest:
        return HubPath("list", kind, base)
    for size in (1, 2):
        if len(rest) > size and rest[size] in _OPERATIONS:
            operation, counts = _OPERATIONS[rest[size]]
            arguments = rest[size + 1 :]
            if len(arguments) not in counts:
                raise _unknown()
            revision = unquote(arguments[0]) if arguments else None
            path = unquote("/".join(arguments[1:]))
            return HubPath(operation, kind, base, "/".join(rest[:size]), revision, path)
    if len(rest) > 2:
        raise _unknown()
    return HubPath("info", kind, base, "/".join(rest))


def _parse_file(names: Sequence[str], words: Sequence[str]) -> HubPath:
    if len(words) < 2:
        raise _unknown()
    kind: RepoKind = "model"
    endpoint, id_ = names[:-2], names[-2:]
    for size in (2, 1):
        if len(names) > size and names[-size - 1] == "datasets":
            kind, endpoint, id_ = "dataset", names[: -size - 1], names[-size:]
            break
    path = unquote("/".join(words[1:]))
    return HubPath("file", kind, "/".join(endpoint), "/".join(id_), unquote(words[0]), path)


def _checked(path: HubPath) -> HubPath:
    """The path, if its names are names, with them in lower case."""
    path = replace(path, endpoint=path.endpoint.lower(), id=path.id.lower())
    if path.operation not in ("list", "whoami"):
        _ = path.name
    elif path.endpoint:
        _ = RepositoryName(path.endpoint)
    return path


def _unknown() -> HubPathUnknown:
    return HubPathUnknown(
        "the hub has nothing at this path; it answers /api/models, /api/datasets (info, revision, tree, paths-info, refs, "
        "commits) and <repository>/resolve/<revision>/<path>, below /hf/ and the rest of HF_ENDPOINT, without a slash at its end"
    )
