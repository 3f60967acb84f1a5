"""Where kitclient keeps its things."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Locations:
    """A root folder, and what is where in it."""

    root: Path

    @property
    def storage(self) -> Path:
        """The local store: an OCI image layout."""
        return self.root / "storage"

    @property
    def credentials(self) -> Path:
        return self.root / "credentials.json"

    @property
    def certificates(self) -> Path:
        """A folder for each host: whom to trust there, and what to show, as in Docker's `certs.d`."""
        return self.root / "certs.d"

    @property
    def uploads(self) -> Path:
        """Notes about uploads that can be gone on with."""
        return self.root / "uploads"


def locations(
    chosen: str | os.PathLike[str] | None = None, *, environment: Mapping[str, str] = os.environ
) -> Locations:
    """The root folder: `chosen`, else `KITCLIENT_HOME`, else the platform's place for a user's data."""
    root = chosen or environment.get("KITCLIENT_HOME")
    if root:
        return Locations(Path(root).expanduser().absolute())
    import platformdirs

    return Locations(Path(platformdirs.user_data_dir("kitclient", appauthor=False)))
