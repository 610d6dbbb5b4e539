"""Tokenizer files of an export or import: copies or writes what transformers and megatron_lite each need."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.errors import DataError
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.tokenizer.huggingface import HuggingFaceTokenizer

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja"),
)
"""Tokenizer files of a Hugging Face folder."""


def find_tokenizer(folder: Path) -> TokenizerConfig | None:
    """Return the settings of a folder's tokenizer; None: it has none."""
    if (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return TokenizerConfig(type="HuggingFaceTokenizer", model=str(folder))
    if (folder / "tokenizer.model").is_file():
        return TokenizerConfig(type="SentencePieceTokenizer", model=str(folder / "tokenizer.model"))
    return None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a folder's tokenizer files into another folder, which is made.

    Raises:
        OSError: no room, no permission.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_tokenizer(config: TokenizerConfig, tokenizer: Tokenizer, folder: Path, positions: int) -> bool:
    """Write a run's tokenizer into an export's folder, as AutoTokenizer reads it.

    Args:
        config: the run's settings.
        tokenizer: the tokenizer built from them.
        folder: the export's.
        positions: the longest sequence.

    Returns:
        Whether there are files: a NullTokenizer has none.

    Raises:
        DataError: a file is missing.
        OSError: no room, no permission.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        given = Path(config.model) if config.type == "HuggingFaceTokenizer" else None
        own = given / "tokenizer.json" if given is not None and given.is_dir() else given
        if own is not None and own.is_file() and own.name == "tokenizer.json" and not config.vocab_extra_ids:
            copy_tokenizer(own.parent, folder)
        else:
            tokenizer.save(folder / "tokenizer.json")
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    elif config.type == "SentencePieceTokenizer":
        shutil.copyfile(config.model, folder / "tokenizer.model")
        about = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False}
    else:
        return False
    if not (folder / "tokenizer_config.json").is_file():
        end = end_of_text(tokenizer)
        words = {} if end is None else {"eos_token": tokenizer.token(end), "bos_token": tokenizer.token(end)}
        content = json.dumps({**about, **words, "model_max_length": positions}, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(content + "\n", encoding="utf-8")
    return True


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """Return the id of the end-of-document token; None: the vocabulary has none."""
    try:
        return tokenizer.eod
    except DataError:
        return None


def special_ids(tokenizer: Tokenizer, folder: Path) -> dict[str, int | None]:
    """Return bos_token_id and eos_token_id of an export, as its tokenizer's files declare them.

    Args:
        tokenizer: the run's, whose end-of-document token stands for what is not declared.
        folder: the export's, with the tokenizer's files.
    """
    end = end_of_text(tokenizer)
    ids = {"bos_token_id": end, "eos_token_id": end}
    about, spelled = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if about.is_file() and spelled.is_file():
        import tokenizers

        library, declared = tokenizers.Tokenizer.from_file(str(spelled)), json.loads(about.read_text(encoding="utf-8"))
        for key in ("bos_token", "eos_token"):
            word = declared.get(key)
            found = library.token_to_id(word["content"] if isinstance(word, dict) else word or "")
            ids[f"{key}_id"] = ids[f"{key}_id"] if found is None else found
    return ids
