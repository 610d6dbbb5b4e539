"""WikiText detokenizer and word count.

Published perplexities are computed on detokenized text, and normalized by the words of the original file.
"""

from __future__ import annotations

import re

_RULES = tuple(
    (re.compile(pattern), written)
    for pattern, written in (
        (r"s '", "s'"),
        (r" @([-,.])@ ", r"\1"),
        (r" ([:;.!?,]) ", r"\1 "),
        # No space inside brackets and quotes.
        (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
        # Headings: "= = Career = =".
        (r"=(?: =)+", lambda found: "=" * found.group().count("=")),
        (r" ° ", "°"),
        (r" \n", "\n"),
        (r"\n ", "\n"),
        (r" N ", " 1 "),
        (r" 's", "'s"),
    )
)
"""Rules of Megatron-LM's wikitext detokenizer (tasks/zeroshot_gpt), in the same order."""


def detokenize(text: str) -> str:
    """Return WikiText without the spaces of its tokenization."""
    for pattern, written in _RULES:
        text = pattern.sub(written, text)
    return text


def num_words(text: str) -> int:
    """Return the number of words as counted by WikiText, line ends included: 217,646 in WikiText-2 validation."""
    return len(text.split()) + text.count("\n")
