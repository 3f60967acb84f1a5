"""An identity together with what its proof rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from registry.auth.identity import Identity


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Login(Identity):
    """Somebody who has proved who they are.

    Attributes:
        binding: what the proof rests on, for tokens that are made of it: "password:<version>", "apikey:<id>", or "" for
            what cannot be taken back before it ends.
        is_current: whether that still holds; answers at once, and says yes right after the login.
    """

    binding: str = ""
    is_current: Callable[[], bool] = field(default=_always, compare=False, repr=False)
