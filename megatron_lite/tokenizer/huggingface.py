"""Hugging Face tokenizers: encoding with the `tokenizers` library, or with tiktoken where the ids are the same.

`read_gpt2` reads vocab.json + merges.txt, `read_hugging_face` tokenizer.json.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_lite.config.files import cached_tokenizer
from megatron_lite.config.text_file import require_text, text_lines
from megatron_lite.errors import DataError, install_extra
from megatron_lite.tokenizer import fast as fast_path
from megatron_lite.tokenizer.base import (
    EOD_NAMES,
    TokenBatch,
    Tokenizer,
    find_bos,
    find_eod,
    rules_hash,
    vocabulary_fingerprint,
)

if TYPE_CHECKING:
    import tokenizers

MAX_ID = 1 << 31
MAX_SLOW = 1 << 24
"""Characters of the longest text that the `tokenizers` library is given: it takes up to 130 bytes for each."""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` and the end of a document, with tiktoken in its place where the ids are the same.

    Args:
        library: the tokenizer; its truncation, padding and BPE dropout are turned off, and the template of its
            post-processor (`<s> $A </s>`) is never applied.
        eod_token: name of the end-of-document token; empty: `declared_eod`, else the usual names.
        declared_eod: what the tokenizer's own files call the end of a sequence.
        declared_bos: what they call its beginning.
        use_fast: encode with tiktoken where ids are provably the same.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        *,
        eod_token: str = "",
        declared_eod: str = "",
        declared_bos: str = "",
        use_fast: bool = True,
    ) -> None:
        library.no_truncation()
        library.no_padding()
        if getattr(library.model, "dropout", None) is not None:
            library.model.dropout = None
        self._library = library
        self._eod_token = eod_token
        self._declared_eod = declared_eod
        self._declared_bos = declared_bos
        self._vocabulary: dict[str, int] = library.get_vocab(with_added_tokens=True)
        self.unknown = _unknown_id(library)
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

    @property
    def bos(self) -> int:
        """Id of the beginning-of-text token."""
        return find_bos(self._vocabulary, self._declared_bos or _template_start(self._spec()["post_processor"]))

    def encode(self, text: str) -> list[int]:
        """Ids of the content of one text; added tokens that stand in it become their ids."""
        if self._fast is not None and not self._holds_added(text):
            return self._fast.encode(text)
        return self._encode_slowly([text])[0]

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """Ids of many texts end to end."""
        if self._fast is not None:
            return super().encode_flat(texts) if any(map(self._holds_added, texts)) else self._fast.encode_flat(texts)
        encoded = [np.array(ids, np.uint32) for ids in self._encode_slowly(texts)]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return TokenBatch(np.concatenate([np.empty(0, np.uint32), *encoded]), lengths)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, special tokens included."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """The vocabulary's spelling, or `<id>` for an id it does not have."""
        return self._library.id_to_token(token_id) or f"<{token_id}>"

    def fingerprint(self) -> str:
        """Hash of the vocabulary."""
        return vocabulary_fingerprint((token_id, token) for token, token_id in self._vocabulary.items())

    def rules(self) -> str:
        """Hash of the tokenizer's description: normalizer, pre-tokenizer, model, added tokens."""
        spec = self._spec()
        spec.pop("post_processor")  # never applied
        return rules_hash(json.dumps(spec, sort_keys=True).encode())

    def _spec(self) -> dict[str, Any]:
        """The tokenizer as tokenizer.json describes it; takes a second for a quarter of a million tokens."""
        spec: dict[str, Any] = json.loads(self._library.to_str())
        return spec

    def save(self, path: Path) -> None:
        """Write the tokenizer as a tokenizer.json in which the end-of-document token is a special token.

        Raises:
            OSError: no room, no permission.
        """
        import tokenizers as hf

        library = hf.Tokenizer.from_str(self._library.to_str())
        with contextlib.suppress(DataError):  # a vocabulary without one
            library.add_special_tokens([self.token(self.eod)])
        path.write_text(library.to_str(pretty=True), encoding="utf-8")

    def _holds_added(self, text: str) -> bool:
        return any(token in text for token in self._added)

    def _encode_slowly(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            _refuse(text)
        try:
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                "The tokenizer must be able to spell every text",
                found=f"it says: {error}",
                fix="Leave the text out, or give a tokenizer with an unknown token or byte fallback",
            ) from error
        # Some pre-tokenizers make a blank of an empty text.
        return [encoding.ids if text else [] for text, encoding in zip(texts, encodings, strict=True)]


def _unknown_id(library: tokenizers.Tokenizer) -> int | None:
    """Id of the unknown token; a Unigram model keeps it by number, the other models by name."""
    import tokenizers as hf

    if isinstance(library.model, hf.models.Unigram):
        found: int | None = json.loads(library.to_str())["model"]["unk_id"]
        return found
    unknown = getattr(library.model, "unk_token", None)
    return library.get_vocab(with_added_tokens=True).get(unknown) if unknown else None


def _template_start(processor: dict[str, Any] | None) -> str:
    """The token that a post-processor's template has before the text; empty if it has none."""
    match processor:
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, *_]}:
            return token
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [str(token), _]}:
            return token
        case {"type": "Sequence", "processors": [*parts]}:
            return next((token for part in parts if (token := _template_start(part))), "")
    return ""


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
    model, cutter = spec["model"], spec["pre_tokenizer"]
    plain_model = not any(
        model.get(key) for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    )
    byte_level = (
        cutter is not None
        and cutter["type"] == "ByteLevel"
        and not cutter["add_prefix_space"]
        and cutter.get("use_regex", True)
    )
    added = spec["added_tokens"]
    if not (
        plain_model and byte_level and spec["normalizer"] is None and len(added) <= 16  # looked for in every text
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
    return HuggingFaceTokenizer(_gpt2_library(vocab_file, merge_file), eod_token=eod_token, use_fast=use_fast)


def _gpt2_library(vocab_file: str, merge_file: str) -> tokenizers.Tokenizer:
    import tokenizers as hf

    for flag, path in (("--vocab-file", vocab_file), ("--merge-file", merge_file)):
        if not path or not Path(path).is_file():
            raise DataError(
                "GPT2BPETokenizer needs vocab.json and merges.txt",
                found=f"{flag} {path} is not a file" if path else f"{flag} is not given",
                fix="Give --vocab-file and --merge-file, or choose another --tokenizer-type",
            )
    vocabulary = _read_vocabulary(vocab_file)
    merges = _read_merges(merge_file)
    try:
        library = hf.Tokenizer(hf.models.BPE(vocabulary, merges))
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            "vocab.json and merges.txt must belong together",
            found=f"{vocab_file} and {merge_file} do not load: {error}",
            fix="Give the two files of one tokenizer to --vocab-file and --merge-file",
        ) from error
    absent = [symbol for symbol in fast_path.byte_of_symbol() if symbol not in vocabulary]
    if absent:
        raise DataError(
            "A byte-level vocabulary spells every byte, or text would be lost",
            found=f"{vocab_file} lacks {len(absent)} of 256 ({' '.join(absent[:5])} …)",
            fix="Use a byte-level BPE's vocab.json, such as the one of tools/train_tokenizer.py",
        )
    library.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = hf.decoders.ByteLevel()
    return library


def _read_vocabulary(path: str) -> dict[str, int]:
    """The content of a vocab.json."""
    try:
        vocabulary = json.loads(require_text(path, "--vocab-file"))
    except (ValueError, RecursionError) as error:
        raise _does_not_load(path, str(error)) from error
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise _does_not_load(path, "it is not a JSON object of tokens and ids")
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < MAX_ID:
            raise _does_not_load(path, f"the id of {token[:40]!r} is {str(number)[:40]}")
    return vocabulary


def _read_merges(path: str) -> list[tuple[str, str]]:
    """The pairs of a merges.txt, in order."""
    merges = list[tuple[str, str]]()
    for number, line in enumerate(text_lines(require_text(path, "--merge-file")), 1):
        if line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise _does_not_load(f"{path}:{number}", f"{line[:40]!r} is not two tokens with one space between them")
        merges.append((left, right))
    return merges


def _does_not_load(place: str, reason: str) -> DataError:
    return DataError(
        "GPT2BPETokenizer reads a vocab.json and a merges.txt of GPT-2's format",
        found=f"{place} does not load: {reason}",
        fix="Give the two files of one tokenizer to --vocab-file and --merge-file",
    )


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
        library = _gpt2_library(str(Path(name, "vocab.json")), str(Path(name, "merges.txt")))
        eos, bos = _declared(Path(name))
        # The tokenizer.json of the same model lists its end-of-document token as a special token.
        known = library.get_vocab()
        library.add_special_tokens([token for token in (eod_token, eos, *EOD_NAMES) if token in known][:1])
    else:
        text = require_text(path, "--tokenizer-model")
        try:
            library = hf.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                "tokenizer.json must be a file of Hugging Face's tokenizers",
                found=f"{path} does not load: {error}",
                fix="Give its path, or the folder's, to --tokenizer-model",
            ) from error
        eos, bos = _declared(path.parent) if path.name == "tokenizer.json" else ("", "")
    if extra_ids:
        library.add_special_tokens([f"<extra_id_{i}>" for i in range(extra_ids)])
    return HuggingFaceTokenizer(library, eod_token=eod_token, declared_eod=eos, declared_bos=bos, use_fast=use_fast)


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


def _declared(folder: Path) -> tuple[str, str]:
    """The `eos_token` and `bos_token` of tokenizer_config.json, in either spelling; empty where it has none."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return "", ""
    try:
        declared = json.loads(require_text(path, "--tokenizer-model"))
        eos, bos = (declared.get(key) or "" for key in ("eos_token", "bos_token"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(
            "tokenizer_config.json must be a JSON object", found=f"{path}: {error}", fix="Repair it, or remove it"
        ) from error
    eos, bos = (str(token.get("content", "") if isinstance(token, dict) else token) for token in (eos, bos))
    return eos, bos
