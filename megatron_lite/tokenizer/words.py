"""Safe split points of long texts for GPT-2's pre-tokenization pattern."""

from __future__ import annotations

import re
from collections.abc import Iterator

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_PIECE = 50_000
"""Characters handed over at once: the regex engine behind tiktoken overflows its stack on a blank run of a million."""

LETTERS = (
    "A-Za-z\\u00c0-\\u00d6\\u00d8-\\u00f6\\u00f8-\\u017f\\u0391-\\u03a1\\u03a3-\\u03a9\\u03b1-\\u03c9\\u0410-\\u044f"
    "\\u05d0-\\u05ea\\u0621-\\u063a\\u0641-\\u064a\\u3041-\\u3096\\u30a1-\\u30fa\\u4e00-\\u9fa5\\uac00-\\ud7a3"
)
SIGNS = "\\u2026\\u201c\\u201d\\u3001-\\u3003\\u300c\\u300d\\uff01\\uff0c\\uff1a\\uff1b\\uff1f"
CUT = re.compile(
    f"(?<=[{LETTERS}])(?=[\\x00-@\\[-`{{-\\x7f{SIGNS}])|(?<=[0-9])(?=[\\x00-/:-\\x7f{SIGNS}])|(?<=\\S)(?= )"
)
"""Places where a word of PATTERN surely ends, whatever stands around: after a letter before what is no letter, after a
digit before what is no digit, and after anything before a blank. Only characters whose class is beyond doubt."""

OVERLAP = 1024
MARGIN = 16
_LENGTH = OVERLAP + 2 * MARGIN
_RUN = re.compile("|".join(f"[{kind}]{{{_LENGTH}}}" for kind in (LETTERS, "0-9", "!-/:-@\\[-`{-~", " \\t\\n\\r")))


def pieces(text: str, limit: int = MAX_PIECE) -> Iterator[str]:
    """Cut a text where GPT-2's pattern cuts it anyway, so that the pieces' ids end to end are the text's.

    A piece is longer than `limit` only where there is no such place for long: a run of blanks, or of characters of
    one class.
    """
    start = 0
    while len(text) - start > limit:
        place = CUT.search(text, start + (limit + 1) // 2)
        if place is None:
            break
        yield text[start : place.start()]
        start = place.start()
    yield text[start:]


def overlaps(text: str, limit: int = MAX_PIECE) -> Iterator[tuple[int, int]]:
    """Stretches [begin, end) of OVERLAP characters inside runs of one class, `limit` or more characters apart.

    The word that such a stretch lies in is, for PATTERN, one that covers all of the stretch and reaches to the run's
    end (blanks: to the last one), also when the text is read from anywhere in the stretch on; and it begins at the
    same place when the text is read no further than to the stretch's end. MARGIN keeps off what happens at a run's
    ends: 's and its like, the blank before a word.
    """
    place = limit
    while place < len(text):
        found = _RUN.match(text, place)
        if found is None:
            place += _LENGTH
            continue
        yield place + MARGIN, place + MARGIN + OVERLAP
        place += _LENGTH + limit
