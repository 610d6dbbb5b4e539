"""What a run needs and an explanation does not: the files that its flags name, and data to train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_lite.config.data import DataConfig, TokenizerConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError


def missing_files(config: RunConfig) -> list[ConfigError]:
    """One error for each file that a run of `config` would look for in vain, naming the flag."""
    errors = [*_missing_tokenizer(config.tokenizer), *_missing_data(config.data)]
    checkpoint = config.checkpoint
    if checkpoint.exit_on_missing and not Path(checkpoint.load).is_dir():
        errors.append(
            ConfigError(
                "--load must name a folder of checkpoints under --exit-on-missing-checkpoint",
                found=f"{checkpoint.load or 'nothing given'}: there is no such folder",
                fix="Correct --load, or leave --exit-on-missing-checkpoint out to start from fresh weights",
            )
        )
    return errors


def _missing(flag: str, path: str, what: str) -> ConfigError:
    return ConfigError(f"{flag} must name {what} that exists", found=path or "nothing given", fix=f"Correct {flag}")


def _missing_tokenizer(tokenizer: TokenizerConfig) -> Iterator[ConfigError]:
    if tokenizer.type == "GPT2BPETokenizer":
        for flag, path in (("--vocab-file", tokenizer.vocab_file), ("--merge-file", tokenizer.merge_file)):
            if not Path(path).is_file():
                yield _missing(flag, path, "a file")
    elif tokenizer.type != "NullTokenizer" and not Path(tokenizer.model or "?").exists():
        yield _missing("--tokenizer-model", tokenizer.model, "a file or folder on this machine")


def _missing_data(data: DataConfig) -> Iterator[ConfigError]:
    if data.mock:
        return
    groups = {
        "--data-path": data.sources,
        **{
            f"--{split}-weighted-split-paths": tuple(source for group in groups for source in group.sources)
            for split, groups in (
                ("train", data.train_groups),
                ("valid", data.valid_groups),
                ("test", data.test_groups),
            )
        },
    }
    if not any(groups.values()):
        yield ConfigError(
            "A run needs data",
            found="neither --data-path nor --train-weighted-split-paths nor --mock-data",
            fix="Give one of them",
        )
    for flag, sources in groups.items():
        for source in sources:
            absent = [suffix for suffix in (".bin", ".idx") if not Path(source.path + suffix).is_file()]
            if absent:
                yield _missing(
                    flag, f"{source.path}: no {' and '.join(absent)}", "a dataset (the prefix of a .bin and an .idx)"
                )
