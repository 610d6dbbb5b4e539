"""Tokenizer training: byte-level BPE and sentencepiece models."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_lite.errors import ConfigError, DataError
from megatron_lite.formatting import format_count
from megatron_lite.runs.atomic import replace_file
from megatron_lite.tokenizer.sentencepiece import import_sentencepiece

END_OF_TEXT = "<|endoftext|>"


def train_byte_level_bpe(
    texts: Iterable[str],
    folder: Path,
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    min_frequency: int = 2,
    progress: bool = False,
) -> int:
    """Train a vocabulary like GPT-2's: 256 bytes, then merges, then the special tokens.

    Writes tokenizer.json and tokenizer_config.json (HuggingFaceTokenizer) and vocab.json and merges.txt
    (GPT2BPETokenizer), with the same ids, into `folder`.

    Args:
        texts: training texts.
        folder: output folder.
        vocab_size: maximum number of tokens, including the special ones.
        special_tokens: appended to the vocabulary; the first is the end-of-document token.
        min_frequency: minimum count of a merged pair.
        progress: show the progress bars of the library.

    Returns:
        The size of the vocabulary, which is below `vocab_size` if the text has no more pairs to merge.

    Raises:
        ConfigError: `vocab_size` is too small for the bytes and the special tokens.
        DataError: the texts are empty.
    """
    import tokenizers as hf

    if vocab_size < 256 + len(special_tokens):
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small for the 256 byte values and "
            f"{format_count(len(special_tokens), 'special token')}",
            fix=f"Use --vocab-size {256 + len(special_tokens)} or more",
        )
    library = hf.Tokenizer(hf.models.BPE())
    library.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens),
        min_frequency=min_frequency,
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    library.train_from_iterator(_require_text(texts), trainer=trainer)
    library.add_special_tokens(list(special_tokens))
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    vocabulary = sorted(library.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    library.model.save(str(folder))  # writes merges.txt, and a vocab.json without the special tokens
    (folder / "vocab.json").write_text(json.dumps(dict(vocabulary), ensure_ascii=False), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special_tokens[0] if special_tokens else None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return len(vocabulary)


def train_sentencepiece(
    texts: Iterable[str],
    path: Path,
    *,
    vocab_size: int,
    kind: Literal["unigram", "bpe"] = "unigram",
    special_tokens: Sequence[str] = (),
    character_coverage: float = 0.9995,
    threads: int = 1,
) -> int:
    """Train a sentencepiece model with byte fallback, and write it to `path` (suffix .model).

    Returns:
        The size of the vocabulary.

    Raises:
        ConfigError: sentencepiece rejects the settings (usually because the vocabulary is too large for the text).
        DataError: the texts are empty, or sentencepiece is not installed.
    """
    library = import_sentencepiece()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (line for text in _require_text(texts) for line in text.splitlines() if line.strip())
    model = io.BytesIO()
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            user_defined_symbols=list(special_tokens),
            num_threads=threads,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        replace_file(path, model.getvalue())
    except RuntimeError as error:
        raise ConfigError(
            f"sentencepiece cannot train a model of --vocab-size {vocab_size} on this text: "
            f"{str(error)[-300:].rstrip('.')}",
            fix="Use a smaller --vocab-size, or more text",
        ) from error
    return int(library.SentencePieceProcessor(model_file=str(path)).get_piece_size())


def _require_text(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts.

    Raises:
        DataError: all texts are empty.
    """
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise DataError(
            "The input contains no text to train a tokenizer on",
            fix="Give --input files that have text; in JSON lines, under the key of --json-keys",
        )
