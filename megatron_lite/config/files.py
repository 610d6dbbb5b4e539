"""Existence checks for the files and datasets named by flags, skipped by `explain`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_lite.config.data import DataConfig
from megatron_lite.config.origins import with_spellings
from megatron_lite.config.paths import suggest_dataset, suggest_path
from megatron_lite.config.run import RunConfig
from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.errors import ConfigError

TOKENIZERS = (
    "Add one of these: --tokenizer-type HuggingFaceTokenizer --tokenizer-model PATH (a tokenizer.json or its folder); "
    "--vocab-file vocab.json --merge-file merges.txt (GPT-2's BPE); --tokenizer-type SentencePieceTokenizer "
    "--tokenizer-model X.model; or, with --mock-data, --tokenizer-type NullTokenizer --vocab-size N"
)
LISTS_OF_DATASETS = (
    "--data-args-path ",
    *(f"--{split}-weighted-split-paths-path " for split in ("train", "valid", "test")),
)
"""Flags of files that list datasets."""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def missing_files(
    config: RunConfig, unread: Sequence[ConfigError] = (), spellings: Mapping[str, str] | None = None
) -> list[ConfigError]:
    """Return an error for each file that a run of `config` needs and that does not exist, naming the flag.

    Args:
        config: of the run.
        unread: errors of files that parsing could not read (ParsedRun.missing), which are returned, too.
        spellings: aliases by which flags were given (ParsedRun.spellings), for the errors.
    """
    errors = [*unread, *missing_tokenizer(config.tokenizer)]
    # Without the file that lists the datasets, there are none in the config.
    if not any(error.problem.startswith(LISTS_OF_DATASETS) for error in unread):
        errors += _missing_data(config.data)
    checkpoint = config.checkpoint
    if checkpoint.exit_on_missing and not Path(checkpoint.load).is_dir():
        suggest = suggest_path("--load", checkpoint.load)
        errors.append(
            ConfigError(
                f"--load {checkpoint.load} {_absence(checkpoint.load)} (--exit-on-missing-checkpoint is given)",
                fix=f"{suggest if suggest.endswith('?') else f'{suggest}.'} To start from newly initialized weights, "
                "remove --exit-on-missing-checkpoint",
            )
        )
    return [with_spellings(error, spellings or {}) for error in errors]


def _absence(path: str) -> str:
    return "is a file, not a folder" if Path(path).is_file() else "does not exist"


def _missing(flag: str, path: str, hint: str = "") -> ConfigError:
    problem = "is a folder, not a file" if Path(path).is_dir() else "does not exist"
    return ConfigError(f"{flag} {path} {problem}", fix=hint + suggest_path(flag, path))


def missing_tokenizer(tokenizer: TokenizerConfig) -> Iterator[ConfigError]:
    """Yield an error for each file of the tokenizer that is not on this machine."""
    files = {"--vocab-file": tokenizer.vocab_file, "--merge-file": tokenizer.merge_file}
    if tokenizer.type == "GPT2BPETokenizer" and not any(files.values()):
        model = tokenizer.model
        yield ConfigError(
            f"--tokenizer-model {model} is given without --tokenizer-type" if model else "No tokenizer is given",
            fix=f"Add --tokenizer-type {_type_of(model)}" if model else TOKENIZERS,
        )
    elif tokenizer.type == "GPT2BPETokenizer":
        for flag, path in files.items():
            if not path:
                (given,) = files.keys() - {flag}
                yield ConfigError(
                    f"{given} {files[given]} is given without {flag}",
                    rule="A GPT-2 tokenizer has two files, vocab.json and merges.txt",
                    fix=f"Add {flag} with the other file",
                )
            elif not Path(path).is_file():
                yield _missing(flag, path)
    elif tokenizer.type != "NullTokenizer" and not Path(tokenizer.model or "?").exists():
        hub = tokenizer.type == "HuggingFaceTokenizer"
        if not hub or cached_tokenizer(tokenizer.model) is None:
            if not tokenizer.model:
                yield ConfigError(
                    f"--tokenizer-type {tokenizer.type} is given without --tokenizer-model",
                    fix="Add --tokenizer-model with the path of a tokenizer.json or of its folder"
                    if hub
                    else "Add --tokenizer-model with the path of a sentencepiece .model file",
                )
            else:
                download = "Download a model of the Hugging Face Hub first: `hf download NAME`. " if hub else ""
                yield _missing("--tokenizer-model", tokenizer.model, download)


def cached_tokenizer(name: str) -> Path | None:
    """Return the tokenizer.json of a model in Hugging Face's cache (`hf download`); None if there is none."""
    if not name or name.count("/") > 1:
        return None
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(name, "tokenizer.json")
    except ValueError:  # not a name that the hub could have
        return None
    return Path(found) if isinstance(found, str) else None


def _type_of(model: str) -> str:
    return "SentencePieceTokenizer" if model.endswith(".model") else "HuggingFaceTokenizer"


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
            "No training data are given: neither --data-path nor --train-weighted-split-paths nor --mock-data",
            fix="Add --data-path PREFIX, where `megatron-lite preprocess` wrote PREFIX.bin and PREFIX.idx, or "
            "--mock-data "
            "for random tokens",
        )
    for flag, sources in groups.items():
        for source in sources:
            absent = [suffix for suffix in (".bin", ".idx") if not Path(source.path + suffix).is_file()]
            if absent and len(sources) > 1 and _is_number(source.path):
                yield ConfigError(
                    f"{flag} has the number {source.path} where the path of a dataset is expected",
                    rule="Weights and paths alternate, or there are paths only",
                    fix=f"Write {flag} WEIGHT PREFIX WEIGHT PREFIX, for example {flag} 0.7 data/a 0.3 data/b",
                )
            elif absent:
                missing = " and no ".join(f'"{source.path}{suffix}"' for suffix in absent)
                yield ConfigError(
                    f'The dataset "{source.path}" ({flag}) does not exist: there is no {missing}',
                    fix=suggest_dataset(source.path),
                )
