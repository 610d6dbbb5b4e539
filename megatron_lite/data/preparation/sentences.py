"""Sentence splitter for --split-sentences, based on nltk's punkt."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from typing import Any

from megatron_lite.errors import DataError, install_extra


class SentenceSplitter:
    """Punkt sentence splitter for one language.

    Args:
        language: name of the punkt model.
        keep_newlines: include the line breaks after a sentence in the sentence, as Megatron does.

    Raises:
        DataError: nltk is not installed, or has no punkt data for the language.
    """

    def __init__(self, language: str, keep_newlines: bool) -> None:
        try:
            punkt, data = (importlib.import_module(f"nltk.{name}") for name in ("tokenize.punkt", "data"))
            tokenizer = punkt.PunktTokenizer
        except (ImportError, AttributeError) as error:
            old = isinstance(error, AttributeError)
            problem = "is older than version 3.9" if old else "is not installed"
            raise DataError(
                f"The nltk library, which --split-sentences needs, {problem}",
                fix="Upgrade it: pip install -U nltk" if old else install_extra("sentences"),
            ) from error
        try:
            self._punkt: Any = tokenizer(language)
        except (LookupError, ValueError, OSError) as error:
            raise DataError(
                f"nltk's data for --split-sentences in the language {language} are missing: there is no folder "
                f"tokenizers/punkt_tab/{language} in any of these folders: {', '.join(data.path)}",
                fix="Run `python -m nltk.downloader punkt_tab` (without a network, on another machine, and copy its "
                "folder "
                "nltk_data to one of these folders), or give a language that punkt_tab has, such as english",
            ) from error
        if keep_newlines:
            self._punkt._lang_vars = _newline_keeping_variables(punkt)

    def split(self, text: str) -> list[str]:
        """Return the sentences of a text; at least one, which may be empty."""
        return list(self._punkt.tokenize(text)) or [""]

    def fingerprint(self) -> str:
        """Return a hash of the model: abbreviations, collocations, sentence starters and orthographic context."""
        model = self._punkt._params
        parts = (model.abbrev_types, model.collocations, model.sent_starters, model.ortho_context.items())
        return "sha256:" + hashlib.sha256(json.dumps([sorted(part) for part in parts]).encode()).hexdigest()


def _newline_keeping_variables(punkt: Any) -> Any:
    class Variables(punkt.PunktLanguageVars):
        """Punkt's rules, with trailing whitespace included in the sentence."""

        _period_context_fmt = r"""
            \S*                          # some word material
            %(SentEndChars)s             # a potential sentence ending
            \s*                          # whitespace belongs to the sentence
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
