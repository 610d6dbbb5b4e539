"""Sentence splitting with nltk's punkt, for --split-sentences."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from typing import Any

from megatron_lite.errors import DataError, install_extra


class SentenceSplitter:
    """Punkt for one language. `keep_newlines` makes line breaks that end a sentence part of it, as Megatron does.

    Raises:
        DataError: nltk is not installed, or has no punkt data of that language.
    """

    def __init__(self, language: str, keep_newlines: bool) -> None:
        try:
            punkt, data = (importlib.import_module(f"nltk.{name}") for name in ("tokenize.punkt", "data"))
            tokenizer = punkt.PunktTokenizer
        except (ImportError, AttributeError) as error:
            raise DataError(
                "--split-sentences needs the nltk library, 3.9 or newer",
                found="it is older" if isinstance(error, AttributeError) else "it is not installed",
                fix=install_extra("sentences"),
            ) from error
        try:
            self._punkt: Any = tokenizer(language)
        except (LookupError, ValueError, OSError) as error:
            raise DataError(
                "--split-sentences needs nltk's punkt data",
                found=f"there is no folder tokenizers/punkt_tab/{language} in any of {', '.join(data.path)}",
                fix="Run python -m nltk.downloader punkt_tab; without a network, run it elsewhere and copy its "
                "nltk_data folder to one of these, or name the folder in NLTK_DATA",
            ) from error
        if keep_newlines:
            self._punkt._lang_vars = _newline_keeping_variables(punkt)

    def split(self, text: str) -> list[str]:
        """The sentences of a text; at least one, which may be empty."""
        return list(self._punkt.tokenize(text)) or [""]

    def fingerprint(self) -> str:
        """Hash of the model: its abbreviations, collocations, words that begin sentences, and how words are written."""
        model = self._punkt._params
        parts = (model.abbrev_types, model.collocations, model.sent_starters, model.ortho_context.items())
        return "sha256:" + hashlib.sha256(json.dumps([sorted(part) for part in parts]).encode()).hexdigest()


def _newline_keeping_variables(punkt: Any) -> Any:
    class Variables(punkt.PunktLanguageVars):
        """Punkt's rules, with a sentence reaching over the blanks that follow it."""

        _period_context_fmt = r"""
            \S*                          # some word material
            %(SentEndChars)s             # a potential sentence ending
            \s*                          # blanks belong to the sentence
            (?=(?P<after_tok>
                %(NonWord)s              # either other punctuation
                |
                (?P<next_tok>\S+)        # or some other token
            ))"""

        def period_context_re(self) -> re.Pattern[str]:
            return re.compile(
                self._period_context_fmt
                % {"NonWord": self._re_non_word_chars, "SentEndChars": self._re_sent_end_chars},
                re.UNICODE | re.VERBOSE,
            )

    return Variables()
