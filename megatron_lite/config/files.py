"""Existence checks for the files and datasets named by flags, skipped by `explain`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_lite.config.data import DataConfig, TokenizerConfig
from megatron_lite.config.paths import suggest_dataset, suggest_path
from megatron_lite.config.run import RunConfig
from megatron_lite.errors import ConfigError

TOKENIZERS = (
    "Give one: --tokenizer-type HuggingFaceTokenizer --tokenizer-model PATH (a tokenizer.json or its folder), "
    "--vocab-file vocab.json --merge-file merges.txt (GPT-2's BPE), --tokenizer-type SentencePieceTokenizer "
    "--tokenizer-model X.model, or --tokenizer-type NullTokenizer --vocab-size N for --mock-data"
)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def missing_files(config: RunConfig) -> list[ConfigError]:
    """Return an error for each file that a run of `config` needs and that does not exist, naming the flag."""
    errors = [*missing_tokenizer(config.tokenizer), *_missing_data(config.data)]
    checkpoint = config.checkpoint
    if checkpoint.exit_on_missing and not Path(checkpoint.load).is_dir():
        errors.append(
            ConfigError(
                f"--load {checkpoint.load} does not exist or is not a directory (--exit-on-missing-checkpoint)",
                fix=f"{suggest_path('--load', checkpoint.load)} Without --exit-on-missing-checkpoint the run would "
                "start from fresh weights",
            )
        )
    return errors


def _missing(flag: str, path: str, what: str, hint: str = "") -> ConfigError:
    fix = suggest_path(flag, path) if path else f"Give {flag} the path of {what}"
    return ConfigError(f"{flag} {path} does not exist" if path else f"{flag} is not given", fix=hint + fix)


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
            if not Path(path).is_file():
                yield _missing(flag, path, "a file")
    elif tokenizer.type != "NullTokenizer" and not Path(tokenizer.model or "?").exists():
        hub = tokenizer.type == "HuggingFaceTokenizer"
        if not hub or cached_tokenizer(tokenizer.model) is None:
            download = "A model of the hub is downloaded first with `hf download NAME`. " if hub else ""
            yield _missing("--tokenizer-model", tokenizer.model, "a file or folder on this machine", download)


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
            "No data are given: neither --data-path nor --train-weighted-split-paths nor --mock-data",
            fix="Give --data-path PREFIX, the common prefix of a .bin/.idx pair that `megatron-lite preprocess` "
            "wrote, or --mock-data for random tokens",
        )
    for flag, sources in groups.items():
        for source in sources:
            absent = [suffix for suffix in (".bin", ".idx") if not Path(source.path + suffix).is_file()]
            if absent and len(sources) > 1 and _is_number(source.path):
                yield ConfigError(
                    f"{flag} has {source.path} where a dataset is expected",
                    rule="Weights and datasets alternate, or there are no weights",
                    fix=f"Write {flag} WEIGHT PREFIX WEIGHT PREFIX, for example {flag} 0.7 data/a 0.3 data/b",
                )
            elif absent:
                yield ConfigError(
                    f'The dataset "{source.path}" ({flag}) does not exist: there is no '
                    f"{' and no '.join(source.path + suffix for suffix in absent)}",
                    fix=suggest_dataset(source.path),
                )
