"""kitclient: pack, push, pull and unpack ModelKits, from an application or from the command line.

    from kitclient import LayoutRegistry, Place, RemoteRegistry, copy, pack, unpack

Nothing here prints, changes the working folder or reads the command line. Everything is asynchronous; registries are
async context managers; what goes wrong is a `ClientError` (kitclient.errors) or an `OciError` (kitspec.errors).
docs/client.md has examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kitclient.errors import ClientError as ClientError
    from kitclient.image_layout import LayoutRegistry as LayoutRegistry
    from kitclient.kit_files import KitFile as KitFile
    from kitclient.modelkit import ModelKit as ModelKit
    from kitclient.modelkit import read_modelkit as read_modelkit
    from kitclient.packing import Packed as Packed
    from kitclient.packing import PackStyle as PackStyle
    from kitclient.packing import pack as pack
    from kitclient.remote import RemoteRegistry as RemoteRegistry
    from kitclient.single_files import FileList as FileList
    from kitclient.single_files import cat as cat
    from kitclient.single_files import list_files as list_files
    from kitclient.staging import Existing as Existing
    from kitclient.transfer import Place as Place
    from kitclient.transfer import copy as copy
    from kitclient.unpacking import unpack as unpack

__version__ = "0.1.0"

_HOMES = {
    "ClientError": "kitclient.errors",
    "Existing": "kitclient.staging",
    "FileList": "kitclient.single_files",
    "KitFile": "kitclient.kit_files",
    "LayoutRegistry": "kitclient.image_layout",
    "ModelKit": "kitclient.modelkit",
    "PackStyle": "kitclient.packing",
    "Packed": "kitclient.packing",
    "Place": "kitclient.transfer",
    "RemoteRegistry": "kitclient.remote",
    "cat": "kitclient.single_files",
    "copy": "kitclient.transfer",
    "list_files": "kitclient.single_files",
    "pack": "kitclient.packing",
    "read_modelkit": "kitclient.modelkit",
    "unpack": "kitclient.unpacking",
}

__all__ = [*_HOMES]  # noqa: PLE0604  (strings they are)


def __getattr__(name: str) -> Any:  # noqa: ANN401  (whatever it is)
    """Import late: the command line starts without what it does not use."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
