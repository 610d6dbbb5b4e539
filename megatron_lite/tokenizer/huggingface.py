"""Tokenizers that Hugging Face's `tokenizers` library runs: GPT-2's vocab.json + merges.txt, and tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_lite.config.files import cached_tokenizer
from megatron_lite.errors import DataError, install_extra
from megatron_lite.tokenizer import fast as fast_path
from megatron_lite.tokenizer.base import TokenBatch, Tokenizer, find_eod, vocabulary_fingerprint

if TYPE_CHECKING:
    import tokenizers

MAX_SLOW = 1 << 24
"""Characters of the longest text that the `tokenizers` library is given: it takes up to 130 bytes for each."""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` and the end of a document, with tiktoken in its place where the ids are the same.

    Args:
        library: the tokenizer; its truncation and padding are turned off.
        eod_token: name of the end-of-document token; empty: `declared_eod`, else the usual names.
        declared_eod: what the tokenizer's own files call the end of a sequence.
        use_fast: encode with tiktoken where ids are provably the same.
        template: add what the tokenizer's post-processor adds (LLaMA's first token), as both Megatrons do.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        *,
        eod_token: str = "",
        declared_eod: str = "",
        use_fast: bool = True,
        template: bool = True,
    ) -> None:
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._eod_token = eod_token
        self._declared_eod = declared_eod
        self._template = template
        self._vocabulary: dict[str, int] = library.get_vocab(with_added_tokens=True)
        unknown = getattr(library.model, "unk_token", None)
        self.unknown = self._vocabulary.get(unknown) if unknown else None
        self._added = tuple(token.content for token in library.get_added_tokens_decoder().values())
        self._fast = fast_encoder(library) if use_fast else None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._vocabulary.values()) + 1

    @property
    def eod(self) -> int:
        """Id of the end-of-document token."""
        return find_eod(self._vocabulary, self._eod_token, self._declared_eod)

    def encode(self, text: str) -> list[int]:
        """Ids of one text; added tokens that stand in it become their ids."""
        if self._fast is not None and not self._holds_added(text):
            return self._fast.encode(text)
        _refuse(text)
        return self._library.encode(text, add_special_tokens=self._template).ids

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """Ids of many texts end to end."""
        if self._fast is None:
            return self._encode_slowly(texts)
        if any(map(self._holds_added, texts)):
            return super().encode_flat(texts)
        return self._fast.encode_flat(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, special tokens included."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """The vocabulary's spelling, or `<id>` for an id it does not have."""
        return self._library.id_to_token(token_id) or f"<{token_id}>"

    def fingerprint(self) -> str:
        """Hash of the vocabulary."""
        return vocabulary_fingerprint((token_id, token) for token, token_id in self._vocabulary.items())

    def _holds_added(self, text: str) -> bool:
        return any(token in text for token in self._added)

    def _encode_slowly(self, texts: Sequence[str]) -> TokenBatch:
        for text in texts:
            _refuse(text)
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=self._template)
        encoded = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return TokenBatch(np.concatenate([np.empty(0, np.uint32), *encoded]), lengths)


def _refuse(text: str) -> None:
    """Raises what `encode` may raise before the library, which would need 130 bytes a character, or replace a half."""
    text.encode("utf-8")
    if len(text) > MAX_SLOW:
        raise DataError(
            "A text that tiktoken does not encode fits in memory",
            found=f"{len(text):,} characters (at most {MAX_SLOW:,} without tiktoken)",
            fix=f"Leave it out, or cut it. For a byte-level BPE such as GPT-2's: {install_extra('fast')}",
        )


def fast_encoder(library: tokenizers.Tokenizer) -> fast_path.FastByteBpe | None:
    """The fast encoder of a plain GPT-2-like byte-level BPE; None for anything else."""
    import tokenizers as hf

    if not isinstance(library.model, hf.models.BPE):
        return None
    spec: dict[str, Any] = json.loads(library.to_str())
    model, cutter, after = spec["model"], spec["pre_tokenizer"], spec["post_processor"]
    plain_model = not any(
        model.get(key)
        for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    )
    byte_level = (
        cutter is not None
        and cutter["type"] == "ByteLevel"
        and not cutter["add_prefix_space"]
        and cutter.get("use_regex", True)
    )
    added = spec["added_tokens"]
    if not (
        plain_model
        and byte_level
        and spec["normalizer"] is None
        and (after is None or after["type"] == "ByteLevel")
        and len(added) <= 16  # looked for in every text
    ):
        return None
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    rules = library.model

    def reaches_itself(token: str) -> bool:
        return len(rules.tokenize(token)) == 1

    return fast_path.build(model["vocab"], merges, reaches_itself)


def read_gpt2(vocab_file: str, merge_file: str, *, eod_token: str = "", use_fast: bool = True) -> HuggingFaceTokenizer:
    """GPT-2's byte-level BPE. `<|endoftext|>` written in a text is plain text here, as it is to Megatron.

    Raises:
        DataError: a file is missing or damaged, or the vocabulary cannot spell every byte.
    """
    import tokenizers as hf

    for flag, path in (("--vocab-file", vocab_file), ("--merge-file", merge_file)):
        if not path or not Path(path).is_file():
            raise DataError(
                "GPT2BPETokenizer needs vocab.json and merges.txt",
                found=f"{flag} {path} is not a file" if path else f"{flag} is not given",
                fix="Give --vocab-file and --merge-file, or choose another --tokenizer-type",
            )
    try:
        library = hf.Tokenizer(hf.models.BPE.from_file(vocab_file, merge_file))
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            "vocab.json and merges.txt must belong together",
            found=f"{vocab_file} and {merge_file} do not load: {error}",
            fix="Give the two files of one tokenizer to --vocab-file and --merge-file",
        ) from error
    vocabulary = library.get_vocab()
    absent = [symbol for symbol in fast_path.byte_of_symbol() if symbol not in vocabulary]
    if absent:
        raise DataError(
            "A byte-level vocabulary spells every byte, or text would be lost",
            found=f"{vocab_file} lacks {len(absent)} of 256 ({' '.join(absent[:5])} …)",
            fix="Use a byte-level BPE's vocab.json, such as the one of tools/train_tokenizer.py",
        )
    library.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = hf.decoders.ByteLevel()
    return HuggingFaceTokenizer(library, eod_token=eod_token, use_fast=use_fast, template=False)


def read_hugging_face(
    name: str, *, eod_token: str = "", extra_ids: int = 0, use_fast: bool = True
) -> HuggingFaceTokenizer:
    """A tokenizer.json, a folder that holds one, or the name of a model in Hugging Face's local cache.

    Args:
        name: the file, folder or name (--tokenizer-model, --tokenizer-name-or-path).
        eod_token: name of the end-of-document token; empty: the folder's own, else the usual names.
        extra_ids: number of `<extra_id_N>` tokens to append (--vocab-extra-ids).
        use_fast: encode with tiktoken where ids are provably the same.

    Raises:
        DataError: there is no such file, or it does not load.
    """
    import tokenizers as hf

    path = _tokenizer_json(name)
    if path is None:
        folder = Path(name)
        return read_gpt2(str(folder / "vocab.json"), str(folder / "merges.txt"), eod_token=eod_token, use_fast=use_fast)
    try:
        library = hf.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            "tokenizer.json must be a file of Hugging Face's tokenizers",
            found=f"{path} does not load: {error}",
            fix="Give its path, or the folder's, to --tokenizer-model",
        ) from error
    if extra_ids:
        library.add_special_tokens([f"<extra_id_{i}>" for i in range(extra_ids)])
    declared = _declared_eod(path.parent) if path.name == "tokenizer.json" else ""
    return HuggingFaceTokenizer(library, eod_token=eod_token, declared_eod=declared, use_fast=use_fast)


def _tokenizer_json(name: str) -> Path | None:
    """Where the tokenizer.json of a file, folder or cached name lies; None: a folder of vocab.json and merges.txt."""
    path = Path(name)
    if name and path.is_file():
        return path
    if name and path.is_dir():
        if (path / "tokenizer.json").is_file():
            return path / "tokenizer.json"
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return None
        hint = "; it has a sentencepiece model: --tokenizer-type SentencePieceTokenizer" * any(path.glob("*.model"))
        raise DataError(
            "A tokenizer's folder holds tokenizer.json, or vocab.json and merges.txt",
            found=f"{path} holds neither{hint}",
            fix="Save it there with save_pretrained of a fast tokenizer, or give another --tokenizer-model",
        )
    cached = cached_tokenizer(name)
    if cached is None:
        raise DataError(
            "HuggingFaceTokenizer reads a tokenizer.json, a folder that holds one, or a downloaded model's name",
            found=f"{name!r} is none of these" if name else "--tokenizer-model is not given",
            fix="Give --tokenizer-model PATH; a model of the hub is downloaded first with `hf download NAME`",
        )
    return cached


def _declared_eod(folder: Path) -> str:
    """The `eos_token` of tokenizer_config.json, in either of its spellings; empty if it says none."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return ""
    try:
        declared = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(
            "tokenizer_config.json must be a JSON object", found=f"{path}: {error}", fix="Repair it, or remove it"
        ) from error
    return str(declared["content"] if isinstance(declared, dict) else declared or "")
