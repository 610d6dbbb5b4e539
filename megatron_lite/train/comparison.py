"""Start-up comparison of all ranks: configuration, code, files, device support, tokenizer and data."""

from __future__ import annotations

from pathlib import Path

import megatron_lite
from megatron_lite.backend.base import Backend
from megatron_lite.backend.comparison import Comparison
from megatron_lite.config.arguments import raise_all
from megatron_lite.config.files import missing_files
from megatron_lite.config.run import RunConfig
from megatron_lite.config.shared_fields import data_paths, shared_values
from megatron_lite.data.format.fingerprint import data_fingerprints
from megatron_lite.errors import ConfigError, MegatronLiteError
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.tokenizer.build import build_tokenizer
from megatron_lite.train.capabilities import check_capabilities
from megatron_lite.train.provenance import code_fingerprint

_PATHS = "data paths"

RUNS = Comparison(
    topic="configuration",
    problem="Ranks differ in configuration or code, or lack files",
    fix="Start every rank with the same command line and the same megatron_lite, on nodes that have all files",
    note=frozenset({_PATHS}),
)
FILES = Comparison(
    topic="files",
    problem="Ranks read different tokenizers or data",
    fix="Copy the same files to every node, or give every rank the same paths",
)


def compare_runs(config: RunConfig, backend: Backend) -> bool:
    """Compare configuration and code of all ranks, and that each has its files and a device that can do what is asked.

    A collective call, before anything depends on the ranks having the same configuration.

    Args:
        config: as the command line gives it.
        backend: this rank's, joined to the others.

    Returns:
        Whether this rank is to fingerprint the data that it reads: the first of its node, or every rank where paths
        differ.

    Raises:
        RankDifferenceError: something differs, or some ranks lack a file or a capability.
        ConfigError: all ranks lack it.
    """
    failure = None
    try:
        raise_all(missing_files(config))
        check_capabilities(config, backend)
    except ConfigError as error:
        failure = error
    code = f"code {code_fingerprint(Path(megatron_lite.__file__).parent)} of megatron_lite {megatron_lite.__version__}"
    paths = "\n".join(data_paths(config))
    differences = backend.compare(RUNS, {**shared_values(config), "code": code, _PATHS: paths}, failure=failure)
    return 0 in (backend.rank, backend.local_rank) or _PATHS in differences.differing


def open_files(config: RunConfig, backend: Backend, *, reads_data: bool) -> tuple[Tokenizer, dict[str, str]]:
    """Build the tokenizer, fingerprint the data, and compare both over all ranks; a collective call.

    Args:
        config: the run.
        backend: this rank's, joined to the others.
        reads_data: whether this rank fingerprints the data, which takes tens of milliseconds per dataset.

    Returns:
        The tokenizer, and the fingerprints of the tokenizer and of the data, if this rank read them.

    Raises:
        RankDifferenceError: tokenizer or data differ, or cannot be read on some ranks.
        DataError: they cannot be read on any.
    """
    found: dict[str, str] = {}
    tokenizer, failure = None, None
    try:
        tokenizer = build_tokenizer(config.tokenizer)
        found["tokenizer"] = tokenizer.fingerprint()
        if reads_data:
            found |= data_fingerprints(config)
    except MegatronLiteError as error:
        failure = error
    # A dataset's fingerprint ends with its path, by which it may be known elsewhere.
    parts = {name: text.partition(" of ") for name, text in found.items()}
    backend.compare(
        FILES,
        {name: f"{name} {identity}" for name, (identity, _, _) in parts.items()},
        details={name: path for name, (_, _, path) in parts.items() if path},
        failure=failure,
        checked=reads_data or failure is not None,
    )
    assert tokenizer is not None, "the comparison raises this rank's failure"
    return tokenizer, found
