"""Detokenizers of WikiText and the Penn Treebank, and their word counts.

Published perplexities are computed on detokenized text, and normalized by the words of the original file. The rules can
be undone, so that the likelihood of the detokenized text is that of the original (Radford et al. 2019, section 3.1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]


def _rules(given: Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]) -> tuple[_Rule, ...]:
    return tuple((re.compile(pattern), written) for pattern, written in given)


_WIKITEXT = _rules(
    (
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

_PENN_TREEBANK = _rules(
    (
        (r" n't", "n't"),
        (r" '", "'"),
        (r" \n", "\n"),
        (r"\n ", "\n"),
        (r"^ ", ""),
        # N stands for a number. Megatron-LM's rule removes the space before it: "of N million" -> "of1 million".
        (r"([$#]) N(?= |\n|$)", r"\g<1>1"),
        (r"(?<= )N(?= |\n|$)", "1"),
    )
)
"""Rules of Megatron-LM's ptb detokenizer, except for the numbers."""


def detokenize_wikitext(text: str) -> str:
    """Return WikiText without the spaces of its tokenization."""
    return _apply(_WIKITEXT, text)


def detokenize_penn_treebank(text: str) -> str:
    """Return the Penn Treebank, as preprocessed by Mikolov, without the spaces of its tokenization."""
    return _apply(_PENN_TREEBANK, text)


def num_words(text: str) -> int:
    """Return the number of words by which both are normalized, line ends included.

    217,646 in WikiText-2 validation, 245,569 in the test sets of WikiText-2 and 103, 82,430 in the Penn Treebank's.
    """
    return len(text.split()) + text.count("\n")


def _apply(rules: Iterable[_Rule], text: str) -> str:
    for pattern, written in rules:
        text = pattern.sub(written, text)
    return text
