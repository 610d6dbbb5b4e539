"""SentencePiece tokenizer: .model files of the sentencepiece library (extra `sentencepiece`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.errors import DataError, install_extra
from megatron_lite.tokenizer.base import TokenBatch, Tokenizer, find_bos, find_eod, rules_hash, vocabulary_fingerprint


class SentencePieceTokenizer(Tokenizer):
    """Tokenizer of a .model file.

    Args:
        path: the .model file (--tokenizer-model).
        eod_token: name of the end-of-document piece; empty: the model's end-of-sentence piece, or else common names.
        extra_ids: number of `<extra_id_N>` ids after those of the model (--vocab-extra-ids); encoding never returns
            them.
    """

    def __init__(self, path: str, *, eod_token: str = "", extra_ids: int = 0) -> None:
        library = import_sentencepiece()
        if not path or not Path(path).is_file():
            problem = "is a folder, not a file" if Path(path).is_dir() else "does not exist"
            raise DataError(
                f"--tokenizer-model {path} {problem}"
                if path
                else "--tokenizer-type SentencePieceTokenizer is given without --tokenizer-model",
                fix="Give --tokenizer-model the path of a sentencepiece .model file",
            )
        try:
            self._library: Any = library.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"Cannot read {path} as a sentencepiece model: {error}",
                fix="Give --tokenizer-model a sentencepiece .model file, or copy the file again if it is damaged",
            ) from error
        pieces = [self._library.id_to_piece(i) for i in range(self._library.get_piece_size())]
        self._tokens = pieces + [f"<extra_id_{i}>" for i in range(extra_ids)]
        self._num_pieces = len(pieces)
        self._eod_token = eod_token
        self.unknown = int(self._library.unk_id()) if self._library.unk_id() >= 0 else None

    @property
    def vocab_size(self) -> int:
        """Number of pieces of the model and extra ids."""
        return len(self._tokens)

    @property
    def eod(self) -> int:
        """Id of the end-of-document piece."""
        if not self._eod_token and self._library.eos_id() >= 0:
            return int(self._library.eos_id())
        return find_eod({token: i for i, token in enumerate(self._tokens)}, self._eod_token)

    @property
    def bos(self) -> int:
        """Id of the beginning-of-sentence piece."""
        if self._library.bos_id() >= 0:
            return int(self._library.bos_id())
        return find_bos({token: i for i, token in enumerate(self._tokens)})

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        text.encode("utf-8")
        return list(self._library.encode(text, add_bos=False, add_eos=False))

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """Return the concatenated ids of many texts."""
        for text in texts:
            text.encode("utf-8")
        encoded = self._library.encode(list(texts), num_threads=1, add_bos=False, add_eos=False)
        return TokenBatch.of([np.array(one, np.uint32) for one in encoded])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; extra ids appear as `<extra_id_N>`."""
        text, run = "", list[int]()
        for token_id in ids:
            if token_id < self._num_pieces:
                run.append(int(token_id))
            else:
                text += self._library.decode(run) + self.token(token_id)
                run = []
        return text + str(self._library.decode(run))

    def token(self, token_id: int) -> str:
        """Return the piece, or `<id>` for an unknown id."""
        return self._tokens[token_id] if 0 <= token_id < len(self._tokens) else f"<{token_id}>"

    def fingerprint(self) -> str:
        """Return a hash of the pieces."""
        return vocabulary_fingerprint(enumerate(self._tokens))

    def rules(self) -> str:
        """Return a hash of the model file, which includes its normalization rules."""
        return rules_hash(self._library.serialized_model_proto())


def import_sentencepiece() -> Any:
    """Return the sentencepiece library.

    Raises:
        DataError: the library is not installed.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise DataError(
            "The sentencepiece library, which --tokenizer-type SentencePieceTokenizer needs, is not installed",
            fix=install_extra("sentencepiece"),
        ) from error
    return sentencepiece
