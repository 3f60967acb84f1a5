"""Text from elsewhere on its way to a terminal."""

from __future__ import annotations

import unicodedata

# Cc and Cf move the cursor, hide text or turn its direction; Cs cannot be encoded; Zl and Zp break lines.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: str, *, keep: str = "") -> str:
    """`text` with every character that a terminal would act on, or not show, written as an escape.

    Args:
        keep: characters that pass as they are, such as a newline in a document of many lines.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in _HIDDEN
        else character.encode("unicode_escape").decode()
        for character in text
    )
