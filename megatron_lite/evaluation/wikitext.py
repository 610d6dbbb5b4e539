"""WikiText detokenizer and word count.

Published perplexities put the words together again before they are tokenised, and count those of the file as it is.
"""

from __future__ import annotations

import re

_RULES = tuple(
    (re.compile(pattern), written)
    for pattern, written in (
        (r"s '", "s'"),
        (r" @([-,.])@ ", r"\1"),
        (r" ([:;.!?,]) ", r"\1 "),
        # Pairs touch what they enclose.
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
"""The rules of Megatron-LM's wikitext detokenizer (tasks/zeroshot_gpt), in its order, for figures that compare."""


def detokenize(text: str) -> str:
    """WikiText's words put together, as they were written."""
    for pattern, written in _RULES:
        text = pattern.sub(written, text)
    return text


def num_words(text: str) -> int:
    """WikiText's own count of its tokens, in which the end of a line is one: 217,646 in WikiText-2's validation."""
    return len(text.split()) + text.count("\n")
