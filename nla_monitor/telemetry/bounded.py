"""Values that no backend chokes on: bounded in length, and text that has a UTF-8 form."""

from __future__ import annotations

import hashlib
from typing import Final

NAME_CHARACTERS: Final = 200
"""Of names and ids. Backends cut or refuse long ones, and a label is kept with every series."""
CONTENT_CHARACTERS: Final = 8192
"""Of an explanation; an AV's longest is far below this."""
_DIGEST: Final = 8


def name(text: str) -> str:
    """A name or id in at most ``NAME_CHARACTERS``; of a longer one the beginning and a hash, so that two stay two."""
    text = encodable(text)
    if len(text) <= NAME_CHARACTERS:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=_DIGEST // 2).hexdigest()
    return f"{text[: NAME_CHARACTERS - _DIGEST - 1]}…{digest}"


def content(text: str) -> str:
    """An explanation in at most ``CONTENT_CHARACTERS``."""
    text = encodable(text)
    return text if len(text) <= CONTENT_CHARACTERS else f"{text[: CONTENT_CHARACTERS - 1]}…"


def encodable(text: str) -> str:
    """The text with half surrogates replaced: one in a label ends every scrape, one in a span its whole batch."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
