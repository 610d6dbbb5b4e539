"""Fast encoder of BPE tokenizers with gigatoken, compared with the `tokenizers` library before it is used.

gigatoken reads a tokenizer.json (byte-level BPE, BPE with byte fallback) and remembers the tokens of every word that it
meets, which makes it about ten times as fast as tiktoken. The memory of these words has no bound: random words take
7 bytes for each byte of text. The encoder is therefore created again when the process has grown by TOLERATED bytes.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import resource
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_lite.tokenizer.base import TokenBatch

if TYPE_CHECKING:
    import tokenizers

Ids = npt.NDArray[np.uint32]

TOLERATED = 32 << 20
"""Bytes of growth of the process after which the encoder is created again (a tenth of a second for GPT-2's)."""

CHECKED_EVERY = 1 << 21
"""Characters encoded between two readings of the process's size."""

STATM = Path("/proc/self/statm")
WITHOUT_STATM = 1 << 27
"""Characters after which the encoder is created again on a system without /proc."""

TABLED = 0x34000
"""Code point after the planes of letters and symbols."""

SYMBOLS = ((0x1F000, 0x1FBEF), (0xE0000, 0xE01EF))
"""Blocks of emoji, symbols and tags: what is added to them is no letter and no number."""

RECENT = (
    (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0x1C89, 0x1C8A), (0xA7CB, 0xA7DC), (0xA7F1, 0xA7F1),
    (0x105C0, 0x105F3), (0x10940, 0x10959), (0x10D40, 0x10D85), (0x10EC2, 0x10EC7), (0x1123F, 0x11240),
    (0x11380, 0x113D3), (0x116D0, 0x116E3), (0x11BC0, 0x11BF9), (0x11DB0, 0x11DE9), (0x11F02, 0x11F59),
    (0x1342F, 0x143FA), (0x16100, 0x16139), (0x16D40, 0x16D79), (0x16EA0, 0x16ED3), (0x16FF2, 0x16FF6),
    (0x187F8, 0x187FF), (0x18CFF, 0x18DF2), (0x1B132, 0x1B155), (0x1CCF0, 0x1CCF9), (0x1D2C0, 0x1D2D3),
    (0x1DF25, 0x1DF2A), (0x1E030, 0x1E06D), (0x1E4D0, 0x1E4F9), (0x1E5D0, 0x1E5FA), (0x1E6C0, 0x1E6FF),
    (0x2B739, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x2EBF0, 0x2EE5D), (0x31350, 0x33479),
)  # fmt: skip
"""Ranges with the letters and numbers of Unicode 15 to 17 (and some neighbours)."""

EMPTY: Ids = np.empty(0, np.uint32)

_agrees: dict[str, bool] = {}
"""By tokenizer.json that this process has built an encoder for: whether it gave the ids of `tokenizers`."""


def build(library: tokenizers.Tokenizer) -> GigatokenBpe | None:
    """Return the gigatoken encoder of a tokenizer; None if it is not installed, or gives other ids for the probe text.

    Args:
        library: the tokenizer, without truncation, padding and dropout.
    """
    import tokenizers as hf

    if not isinstance(library.model, hf.models.BPE) or importlib.util.find_spec("gigatoken") is None:
        return None
    spec = library.to_str()
    try:
        encoder = GigatokenBpe(spec)
    except (ValueError, RuntimeError, NotImplementedError):  # a tokenizer.json that gigatoken does not support
        return None
    if spec not in _agrees:
        texts = probe_texts()
        ours = encoder.encode_flat(texts)
        expected = [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = [len(ids) for ids in expected]
        _agrees[spec] = ours.lengths.tolist() == lengths and ours.ids.tolist() == list(itertools.chain(*expected))
    return encoder if _agrees[spec] else None


class GigatokenBpe:
    """Encoder of one thread.

    Args:
        spec: content of a tokenizer.json, whose template is not applied.

    Raises:
        ValueError: gigatoken does not support the tokenizer.
    """

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._create()

    @staticmethod
    def is_uncertain(text: str) -> bool:
        """Return whether a text has characters that the libraries may classify differently (`recent_characters`)."""
        units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")
        units = units[units >= RECENT[0][0]]  # most characters of most scripts
        if not recent_units()[units].any():
            return False
        return bool(recent_characters()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")].any())

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """Return the concatenated ids of texts of any length.

        Raises:
            UnicodeEncodeError: a text contains half of a surrogate pair.
        """
        encode = self._library.encode
        try:
            encoded = [encode(text) if text else EMPTY for text in texts]
        except TypeError:
            for text in texts:
                text.encode("utf-8")
            raise
        self._left -= sum(map(len, texts))
        if self._left < 0:
            self._bound_memory()
        return TokenBatch.of(encoded)

    def _create(self) -> None:
        from gigatoken import Tokenizer

        self._library = Tokenizer.from_json(self._spec)
        self._first_size = process_size()
        self._left = CHECKED_EVERY if self._first_size else WITHOUT_STATM

    def _bound_memory(self) -> None:
        """Create the encoder again if the process has grown, or where its size is unknown."""
        size = process_size()
        if size is None or size > (self._first_size or 0) + TOLERATED:
            del self._library
            self._create()
        self._left = CHECKED_EVERY if size else WITHOUT_STATM


def process_size() -> int | None:
    """Return the bytes of memory that this process holds; None: unknown."""
    try:
        resident = STATM.read_bytes().split()[1]
    except OSError:
        return None
    return int(resident) * resource.getpagesize()


@functools.cache
def recent_characters() -> npt.NDArray[np.bool_]:
    """Return which characters may be letters or numbers in some versions of Unicode only, [0x110000].

    Each library splits words by the tables of one version. A text with such characters is encoded with the `tokenizers`
    library: those without a category in this Python's version, and letters and numbers of version 15 and later.
    """
    recent = np.ones(0x110000, np.bool_)
    recent[:TABLED] = [unicodedata.category(chr(code)) == "Cn" for code in range(TABLED)]
    for low, high in SYMBOLS:
        recent[low : high + 1] = False
    for low, high in RECENT:
        recent[low : high + 1] = True
    return recent


@functools.cache
def recent_units() -> npt.NDArray[np.bool_]:
    """Return which UTF-16 code units begin a recent character, or share its high surrogate, [0x10000]."""
    recent = recent_characters()
    units = recent[:0x10000].copy()
    units[0xD800:0xDC00] = recent[0x10000:].reshape(1024, 1024).any(axis=1)
    units[0xDC00:0xE000] = False
    return units


@functools.cache
def probe_texts() -> list[str]:
    """Return texts that exercise the rules of a BPE tokenizer: classes of characters, spaces, contractions, digits."""
    scripts = [chr(code) for code in range(0x20, 0x3000, 7)] + [chr(code) for code in range(0x3000, 0x1F700, 211)]
    spaces = ["", " ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u2003", "\x0b", "\x1c", "\x85", "\u3000"]
    latin = ["don't", "I'LL", "we've", "x's", "O'Neil", "1234567", "3.14", "__init__", "a_b", "++", "/**", "A", "#!"]
    latin += ["na\u00efve", "e\u0301", "\ufb01", "\u21165", "\u00b2", "\uff11\uff12", "\u00c9", "\u00df", "\u0130"]
    words = [
        *latin,
        "\U0001f642",
        "\U0001f469\u200d\U0001f680",
        "\u6771\u4eac\u3001",
        "\u0e20\u0e32\u0e29\u0e32",
        "\u200b",
    ]
    words += ["\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd", "\u0939\u093f\u0928\u094d\u0926\u0940"]
    mixed = [f"{space}{word}{other}" for word in words for space, other in zip(spaces, spaces[::-1], strict=True)]
    classes = [f"a{character}1{character} {character}{character}!" for character in scripts if character.isprintable()]
    text = "def f(x):\n    return {'a': x, \"b\": [1, 2, 300]}  # The quick brown fox\n\n\n"
    return ["", *words, *mixed[::3], "".join(mixed), "".join(classes), " ".join(classes), text, text.upper(), *spaces]
