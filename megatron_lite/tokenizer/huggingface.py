"""Hugging Face and GPT-2 tokenizers: encoding with the `tokenizers` library, or a faster one that gives the same ids.

`read_gpt2` reads vocab.json + merges.txt, `read_hugging_face` tokenizer.json.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_lite.config.files import cached_tokenizer
from megatron_lite.config.text_file import require_text, text_lines
from megatron_lite.errors import DataError, install_extra
from megatron_lite.tokenizer import fast, gigatoken_bpe
from megatron_lite.tokenizer.base import (
    EOD_NAMES,
    TokenBatch,
    Tokenizer,
    describe_text,
    find_bos,
    find_eod,
    rules_hash,
    vocabulary_fingerprint,
)

if TYPE_CHECKING:
    import tokenizers

FastEncoder = gigatoken_bpe.GigatokenBpe | fast.FastByteBpe
ENCODERS = ("gigatoken", "tiktoken")
"""Libraries that encode faster than `tokenizers`, in order of preference."""

MAX_ID = 1 << 31
MAX_SLOW = 1 << 24
"""Maximum characters of a text that is encoded with the `tokenizers` library (up to 130 bytes of memory each)."""


class HuggingFaceTokenizer(Tokenizer):
    """Tokenizer of the `tokenizers` library, encoding with a faster library if the ids are the same.

    Args:
        library: the tokenizer; truncation, padding and BPE dropout are disabled, and the template of its post-processor
            (`<s> $A </s>`) is never applied.
        eod_token: name of the end-of-document token; empty: `declared_eod`, or else the common names.
        declared_eod: name of the end-of-sequence token in the tokenizer's files.
        declared_bos: name of the beginning-of-sequence token in the tokenizer's files.
        encoders: faster libraries to encode with, in order of preference; the first one that is installed and suits the
            tokenizer is used.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        *,
        eod_token: str = "",
        declared_eod: str = "",
        declared_bos: str = "",
        encoders: Sequence[str] = ENCODERS,
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
        self._holds_added = re.compile("|".join(map(re.escape, self._added))).search if self._added else None
        self._encoders = tuple(encoders)

    @functools.cached_property
    def fast(self) -> FastEncoder | None:
        """The faster encoder, built when it is first needed; None: there is none, or it could give other ids."""
        builders: dict[str, Callable[[tokenizers.Tokenizer], FastEncoder | None]] = {
            "gigatoken": gigatoken_bpe.build,
            "tiktoken": fast.build_for,
        }
        return next((found for name in self._encoders if (found := builders[name](self._library)) is not None), None)

    @property
    def vocab_size(self) -> int:
        """Largest id plus one, including added tokens."""
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
        """Return the ids of one text; added tokens in the text become their ids."""
        return self.encode_flat([text]).ids.tolist()

    def encode_flat(self, texts: Sequence[str]) -> TokenBatch:
        """Return the concatenated ids of many texts."""
        if self.fast is None:
            return TokenBatch.of(self._encode_with_library(texts))
        holds_added, is_uncertain = self._holds_added, self.fast.is_uncertain
        others = [
            i
            for i, text in enumerate(texts)
            if (holds_added is not None and holds_added(text)) or (not text.isascii() and is_uncertain(text))
        ]
        if not others:
            return self.fast.encode_flat(texts)
        by_library = dict(zip(others, self._encode_with_library([texts[i] for i in others]), strict=True))
        batch = self.fast.encode_flat([text for i, text in enumerate(texts) if i not in by_library])
        rest = iter(np.split(batch.ids, np.cumsum(batch.lengths)[:-1]))
        return TokenBatch.of([by_library[i] if i in by_library else next(rest) for i in range(len(texts))])

    def compare_encoders(self, texts: Sequence[str]) -> str:
        """Return the difference between the ids of the faster encoder and the library's; empty: none."""
        if self.fast is None:
            return ""
        for text, expected in zip(texts, self._encode_with_library(texts), strict=True):
            found = self.encode_flat([text]).ids
            if not np.array_equal(found, expected):
                same = min(len(found), len(expected))
                at = int(np.argmax(np.append(found[:same] != expected[:same], True)))
                return (
                    f"{type(self.fast).__name__} encodes a text as {found[at : at + 4].tolist()} …, the tokenizers "
                    f"library as {expected[at : at + 4].tolist()} …, after {at} equal tokens"
                )
        return ""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, including special tokens."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """Return the vocabulary entry, or `<id>` for an unknown id."""
        return self._library.id_to_token(token_id) or f"<{token_id}>"

    def fingerprint(self) -> str:
        """Return a hash of the vocabulary."""
        return vocabulary_fingerprint((token_id, token) for token, token_id in self._vocabulary.items())

    def rules(self) -> str:
        """Return a hash of the tokenizer's description: normalizer, pre-tokenizer, model, added tokens."""
        spec = self._spec()
        spec.pop("post_processor")  # never applied
        return rules_hash(json.dumps(spec, sort_keys=True).encode())

    def _spec(self) -> dict[str, Any]:
        """Return the content of tokenizer.json; takes a second for a quarter of a million tokens."""
        spec: dict[str, Any] = json.loads(self._library.to_str())
        return spec

    def save(self, path: Path) -> None:
        """Write the tokenizer as a tokenizer.json with the end-of-document token as a special token.

        Raises:
            OSError: the disk is full, or the permission is missing.
        """
        import tokenizers as hf

        library = hf.Tokenizer.from_str(self._library.to_str())
        with contextlib.suppress(DataError):  # a vocabulary without an end-of-document token
            library.add_special_tokens([self.token(self.eod)])
        path.write_text(library.to_str(pretty=True), encoding="utf-8")

    def _is_refused(self, text: str) -> bool:
        try:
            self._library.encode(text, add_special_tokens=False)
        except Exception:  # the library raises plain Exception
            return True
        return False

    def _encode_with_library(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        for text in texts:
            # Before the library, which would take 130 bytes a character, and replace half of a surrogate pair.
            text.encode("utf-8")
            if len(text) > MAX_SLOW:
                raise DataError(
                    f"Cannot encode {describe_text(text)}: the tokenizers library takes at most {MAX_SLOW:,} at once",
                    fix="Split this text, or remove it from the input. If the tokenizer is a byte-level BPE such as "
                    f"GPT-2's, tiktoken encodes texts of any length. {install_extra('fast')}",
                )
        try:
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            refused = next(filter(self._is_refused, texts), texts[0])
            raise DataError(
                f"The tokenizer cannot encode {describe_text(refused)}: {error}",
                fix="Use a tokenizer that has an unknown token or byte fallback, or remove this text from the input",
            ) from error
        # Some pre-tokenizers turn an empty text into a space.
        return [
            np.array(encoding.ids if text else [], np.uint32) for text, encoding in zip(texts, encodings, strict=True)
        ]


def _unknown_id(library: tokenizers.Tokenizer) -> int | None:
    """Return the id of the unknown token; a Unigram model stores its id, other models its name."""
    import tokenizers as hf

    if isinstance(library.model, hf.models.Unigram):
        found: int | None = json.loads(library.to_str())["model"]["unk_id"]
        return found
    unknown = getattr(library.model, "unk_token", None)
    return library.get_vocab(with_added_tokens=True).get(unknown) if unknown else None


def _template_start(processor: dict[str, Any] | None) -> str:
    """Return the token before the text in a post-processor's template; empty if there is none."""
    match processor:
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, *_]}:
            return token
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [str(token), _]}:
            return token
        case {"type": "Sequence", "processors": [*parts]}:
            return next((token for part in parts if (token := _template_start(part))), "")
    return ""


def read_gpt2(
    vocab_file: str, merge_file: str, *, eod_token: str = "", encoders: Sequence[str] = ENCODERS
) -> HuggingFaceTokenizer:
    """Read GPT-2's byte-level BPE. `<|endoftext|>` in a text is encoded as plain text, as in Megatron.

    Raises:
        DataError: a file is missing or damaged, or the vocabulary lacks a byte.
    """
    return HuggingFaceTokenizer(_gpt2_library(vocab_file, merge_file), eod_token=eod_token, encoders=encoders)


def _gpt2_library(vocab_file: str, merge_file: str) -> tokenizers.Tokenizer:
    import tokenizers as hf

    for flag, path in (("--vocab-file", vocab_file), ("--merge-file", merge_file)):
        if not path or not Path(path).is_file():
            problem = "is a folder, not a file" if Path(path).is_dir() else "does not exist"
            raise DataError(
                f"{flag} {path} {problem}" if path else f"{flag} is not given",
                rule="--tokenizer-type GPT2BPETokenizer reads a vocab.json and a merges.txt",
                fix="Give --vocab-file vocab.json and --merge-file merges.txt, or use another --tokenizer-type",
            )
    vocabulary = _read_vocabulary(vocab_file)
    merges = _read_merges(merge_file)
    try:
        library = hf.Tokenizer(hf.models.BPE(vocabulary, merges))
    except Exception as error:  # the library raises plain Exception
        raise DataError(
            f"{vocab_file} and {merge_file} do not belong to the same tokenizer: {error}",
            fix="Give --vocab-file and --merge-file the two files of the same tokenizer",
        ) from error
    absent = [symbol for symbol in fast.byte_of_symbol() if symbol not in vocabulary]
    if absent:
        raise DataError(
            f"{vocab_file} is not the vocabulary of a byte-level BPE: it has no tokens for {len(absent)} of the 256 "
            "byte values "
            f"({' '.join(absent[:5])} …), so some text could not be encoded",
            fix="Give --vocab-file the vocab.json of a byte-level BPE, such as GPT-2's or one that "
            "tools/train_tokenizer.py wrote",
        )
    library.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = hf.decoders.ByteLevel()
    return library


def _read_vocabulary(path: str) -> dict[str, int]:
    """Return the content of a vocab.json."""
    try:
        vocabulary = json.loads(require_text(path, "--vocab-file"))
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise _unreadable(path, "it is not a JSON object of tokens and ids")
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < MAX_ID:
            raise _unreadable(
                path, f"the id of {token[:40]!r} is {str(number)[:40]}, not a whole number from 0 to {MAX_ID - 1:,}"
            )
    return vocabulary


def _read_merges(path: str) -> list[tuple[str, str]]:
    """Return the pairs of a merges.txt, in order."""
    merges = list[tuple[str, str]]()
    for number, line in enumerate(text_lines(require_text(path, "--merge-file")), 1):
        if line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise _unreadable(f"{path}:{number}", f"{line[:40]!r} is not two tokens with one space between them")
        merges.append((left, right))
    return merges


def _unreadable(place: str, reason: str) -> DataError:
    return DataError(
        f"Cannot read {place} as a file of a GPT-2 tokenizer: {reason}",
        fix="If this is the intended file, it is damaged: copy or download it again. Otherwise give --vocab-file the "
        "vocab.json and --merge-file the merges.txt of one GPT-2 tokenizer",
    )


def read_hugging_face(
    name: str, *, eod_token: str = "", extra_ids: int = 0, encoders: Sequence[str] = ENCODERS
) -> HuggingFaceTokenizer:
    """Read a tokenizer.json from a file, a folder, or a model in Hugging Face's local cache.

    Args:
        name: the file, folder or model name (--tokenizer-model, --tokenizer-name-or-path).
        eod_token: name of the end-of-document token; empty: the name in the folder's files, or else the common names.
        extra_ids: number of `<extra_id_N>` tokens to append (--vocab-extra-ids).
        encoders: see HuggingFaceTokenizer.

    Raises:
        DataError: the file does not exist, or cannot be read.
    """
    import tokenizers as hf

    path = _tokenizer_json(name)
    if path is None:
        library = _gpt2_library(str(Path(name, "vocab.json")), str(Path(name, "merges.txt")))
        eos, bos = _declared(Path(name))
        # As in the tokenizer.json of the same model, the end-of-document token is a special token.
        known = library.get_vocab()
        library.add_special_tokens([token for token in (eod_token, eos, *EOD_NAMES) if token in known][:1])
    else:
        text = require_text(path, "--tokenizer-model")
        try:
            library = hf.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"{path} is not a valid Hugging Face tokenizer file: {error}",
                fix="Copy the file again, or give --tokenizer-model another tokenizer.json",
            ) from error
        eos, bos = _declared(path.parent) if path.name == "tokenizer.json" else ("", "")
    if extra_ids:
        library.add_special_tokens([f"<extra_id_{i}>" for i in range(extra_ids)])
    return HuggingFaceTokenizer(library, eod_token=eod_token, declared_eod=eos, declared_bos=bos, encoders=encoders)


def _tokenizer_json(name: str) -> Path | None:
    """Return the path of the tokenizer.json of a file, folder or model; None: a folder of vocab.json and merges.txt."""
    path = Path(name)
    if name and path.is_file():
        return path
    if name and path.is_dir():
        if (path / "tokenizer.json").is_file():
            return path / "tokenizer.json"
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return None
        if any(path.glob("*.model")):
            fix = f"Use --tokenizer-type SentencePieceTokenizer --tokenizer-model {next(path.glob('*.model'))}"
        else:
            fix = (
                "Write a tokenizer.json there (in transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…)), "
                "or "
                "give another --tokenizer-model"
            )
        raise DataError(
            f"The folder {path} (--tokenizer-model) has neither a tokenizer.json nor a vocab.json and merges.txt",
            fix=fix,
        )
    cached = cached_tokenizer(name)
    if cached is None:
        raise DataError(
            f"--tokenizer-model {name} is neither a file or folder nor a model in the local Hugging Face cache"
            if name
            else "--tokenizer-type HuggingFaceTokenizer is given without --tokenizer-model",
            fix="Give --tokenizer-model the path of a tokenizer.json or of its folder; download a model of the "
            "Hugging Face "
            "Hub first with `hf download NAME`",
        )
    return cached


def _declared(folder: Path) -> tuple[str, str]:
    """Return `eos_token` and `bos_token` of tokenizer_config.json (text or object); empty if missing."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return "", ""
    try:
        declared = json.loads(require_text(path, "--tokenizer-model"))
        eos, bos = (declared.get(key) or "" for key in ("eos_token", "bos_token"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a valid JSON object: {error}", fix=f"Copy {path} again") from error
    eos, bos = (str(token.get("content", "") if isinstance(token, dict) else token) for token in (eos, bos))
    return eos, bos
