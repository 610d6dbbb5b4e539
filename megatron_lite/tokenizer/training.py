"""Tokenizer training: byte-level BPE or sentencepiece models from text files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_lite.errors import ConfigError, DataError
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
    """Learn GPT-2's kind of vocabulary: 256 bytes, then merges, then the special tokens, the first of which ends
    documents.

    Writes tokenizer.json and tokenizer_config.json (HuggingFaceTokenizer) and vocab.json and merges.txt
    (GPT2BPETokenizer) into `folder`; all four say the same ids.

    Returns:
        The vocabulary's size: less than asked for where the text has no more pairs to merge.

    Raises:
        ConfigError: `vocab_size` cannot hold the bytes and the special tokens.
        DataError: there was no text.
    """
    import tokenizers as hf

    if vocab_size < 256 + len(special_tokens):
        raise ConfigError(
            "A byte-level vocabulary holds 256 bytes and the special tokens",
            found=f"--vocab-size is {vocab_size}, and there are {len(special_tokens)} special tokens",
            fix=f"Give --vocab-size at least {256 + len(special_tokens)}",
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
    library.train_from_iterator(_counted(texts), trainer=trainer)
    library.add_special_tokens(list(special_tokens))
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    vocabulary = sorted(library.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    library.model.save(str(folder))  # merges.txt, and a vocab.json that lacks the special tokens
    (folder / "vocab.json").write_text(json.dumps(dict(vocabulary), ensure_ascii=False), encoding="utf-8")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special_tokens[0] if special_tokens else None}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
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
    """Learn a sentencepiece model that falls back to bytes, and write it to `path` (which ends in .model).

    Returns:
        The vocabulary's size.

    Raises:
        ConfigError: sentencepiece refuses the settings (mostly: too large a vocabulary for the text).
        DataError: there was no text, or sentencepiece is not installed.
    """
    library = import_sentencepiece()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (line for text in _counted(texts) for line in text.splitlines() if line.strip())
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
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            "sentencepiece must be able to learn a vocabulary of this size from this text",
            found=f"--vocab-size is {vocab_size}; it says: {str(error)[-300:]}",
            fix="Give a smaller --vocab-size or more text",
        ) from error
    return int(library.SentencePieceProcessor(model_file=str(path)).get_piece_size())


def _counted(texts: Iterable[str]) -> Iterator[str]:
    """The texts.

    Raises:
        DataError: there is none.
    """
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise DataError(
            "A tokenizer is learnt from text",
            found="the input has no document with text in it",
            fix="Give --input files whose --json-keys hold text",
        )
