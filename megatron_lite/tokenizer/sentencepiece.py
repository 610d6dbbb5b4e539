"""SentencePiece tokenizer (extra `sentencepiece`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.errors import DataError, install_extra
from megatron_lite.tokenizer.base import TokenBatch, Tokenizer, find_bos, find_eod, rules_hash, vocabulary_fingerprint


class SentencePieceTokenizer(Tokenizer):
    """A .model file; the end of a document is its end-of-sentence piece unless --eod-token names another.

    Args:
        path: the .model file (--tokenizer-model).
        eod_token: name of the end-of-document piece; empty: the model's `</s>`, else the usual names.
        extra_ids: number of `<extra_id_N>` ids after the model's own (--vocab-extra-ids); text never becomes one.
    """

    def __init__(self, path: str, *, eod_token: str = "", extra_ids: int = 0) -> None:
        library = import_sentencepiece()
        if not path or not Path(path).is_file():
            raise DataError(
                "SentencePieceTokenizer needs a .model file",
                found=f"--tokenizer-model {path} is not a file" if path else "--tokenizer-model is not given",
                fix="Give the path of a sentencepiece model to --tokenizer-model",
            )
        try:
            self._library: Any = library.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise DataError(
                "A .model file must be a sentencepiece model",
                found=f"{path} does not load: {error}",
                fix="Give the path of a sentencepiece model to --tokenizer-model",
            ) from error
        pieces = [self._library.id_to_piece(i) for i in range(self._library.get_piece_size())]
        self._tokens = pieces + [f"<extra_id_{i}>" for i in range(extra_ids)]
        self._num_pieces = len(pieces)
        self._eod_token = eod_token
        self.unknown = int(self._library.unk_id()) if self._library.unk_id() >= 0 else None

    @property
    def vocab_size(self) -> int:
        """The model's pieces and the extra ids."""
        return len(self._tokens)

    @property
    def eod(self) -> int:
        """Id of the end-of-document piece."""
        if not self._eod_token and self._library.eos_id() >= 0:
            return int(self._library.eos_id())
        return find_eod({token: i for i, token in enumerate(self._tokens)}, self._eod_token)

    @property
    def bos(self) -> int:
        """Id of the model's beginning-of-sentence piece."""
        if self._library.bos_id() >= 0:
            return int(self._library.bos_id())
        return find_bos({token: i for i, token in enumerate(self._tokens)})

    def encode(self, text: str) -> list[int]:
        """Ids of the content of one text."""
        text.encode("utf-8")
        return list(self._library.encode(text, add_bos=False, add_eos=False))

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """Ids of many texts end to end."""
        for text in texts:
            text.encode("utf-8")
        encoded = self._library.encode(list(texts), num_threads=1, add_bos=False, add_eos=False)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = [np.array(one, np.uint32) for one in encoded]
        return TokenBatch(np.concatenate([np.empty(0, np.uint32), *ids]), lengths)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; extra ids are spelled out."""
        text, run = "", list[int]()
        for token_id in ids:
            if token_id < self._num_pieces:
                run.append(int(token_id))
            else:
                text += self._library.decode(run) + self.token(token_id)
                run = []
        return text + str(self._library.decode(run))

    def token(self, token_id: int) -> str:
        """The model's spelling, or `<id>` for an id it does not have."""
        return self._tokens[token_id] if 0 <= token_id < len(self._tokens) else f"<{token_id}>"

    def fingerprint(self) -> str:
        """Hash of the pieces."""
        return vocabulary_fingerprint(enumerate(self._tokens))

    def rules(self) -> str:
        """Hash of the model file, its normalization included."""
        return rules_hash(self._library.serialized_model_proto())


def import_sentencepiece() -> Any:
    """The library.

    Raises:
        DataError: it is not installed.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise DataError(
            "SentencePieceTokenizer needs the sentencepiece library",
            found="it is not installed",
            fix=install_extra("sentencepiece"),
        ) from error
    return sentencepiece
