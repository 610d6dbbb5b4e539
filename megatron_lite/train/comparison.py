"""Rank consistency check at start: config, code, files, device support, tokenizer and data of all ranks."""

from __future__ import annotations

from megatron_lite.backend.base import Backend
from megatron_lite.backend.comparison import Comparison
from megatron_lite.backend.kernels import KERNELS, Kernels, choose_kernels
from megatron_lite.config.arguments import raise_all
from megatron_lite.config.devices import FLOAT64, device_errors
from megatron_lite.config.files import missing_files
from megatron_lite.config.run import RunConfig
from megatron_lite.config.shared_fields import data_paths, shared_values
from megatron_lite.data.format.fingerprint import data_fingerprints
from megatron_lite.errors import ConfigError, MegatronLiteError
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.tokenizer.build import build_tokenizer

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


def compare_runs(config: RunConfig, code: str, backend: Backend) -> bool:
    """Compare configuration and code of all ranks, and check that each has its files and a capable device.

    A collective call, before anything depends on the ranks having the same configuration.

    Args:
        config: as the command line gives it.
        code: fingerprint of this rank's code.
        backend: this rank's, connected to the others.

    Returns:
        True if this rank is to fingerprint its data: the first rank of a node, or every rank if paths differ.

    Raises:
        RankDifferenceError: something differs, or some ranks lack a file or a capability.
        ConfigError: all ranks lack it.
    """
    failure = None
    try:
        if backend.world_size > 1:  # the command line of a single rank has been checked for it
            raise_all(missing_files(config))
        check_capabilities(config, backend)
    except ConfigError as error:
        failure = error
    values = {**shared_values(config), "code": f"code {code}", _PATHS: "\n".join(data_paths(config))}
    verdict = backend.compare(RUNS, values, failure=failure)
    return 0 in (backend.rank, backend.local_rank) or _PATHS in verdict.differing


def check_capabilities(config: RunConfig, backend: Backend) -> None:
    """Check that the backend can run a configuration.

    Raises:
        ConfigError: the first thing that it cannot do.
    """
    able, precision = backend.capabilities(), config.precision
    if precision.dtype not in able.dtypes:
        raise ConfigError(
            f"{backend.device_name()} does not support {precision.dtype}, in which the run computes; it supports "
            f"{', '.join(sorted(able.dtypes))}",
            fix=f"Use {' or '.join(f'--{dtype}' for dtype in sorted(able.dtypes))}, or another --device",
        )
    if config.runtime.compile != "off" and not able.compile:
        raise ConfigError(
            f"{backend.device_name()} does not support --compile (torch.compile)",
            fix="Remove --compile, or use another --device",
        )
    if config.fp8.format != "off" and not able.fp8:
        raise ConfigError(
            f"{backend.device_name()} has no fp8 matrix products (--fp8-format {config.fp8.format})",
            rule="A GPU of compute capability 8.9 or higher has them",
            fix="Remove --fp8-format",
        )
    if not able.float64 and (flag := FLOAT64.found(config)):
        raise ConfigError(f"{backend.device_name()} cannot run {flag}", rule=FLOAT64.reason, fix=FLOAT64.fix)
    for error in device_errors(backend.name, config):
        raise error


def agree_on_kernels(config: RunConfig, backend: Backend) -> Kernels:
    """Choose the kernels of a run, the same on every rank; a collective call.

    Raises:
        RankDifferenceError: packages are missing on some ranks, or have other versions.
        ConfigError: a flag asks for a kernel that no rank has.
    """
    kernels, failure = Kernels(), None
    try:
        if config.runtime.engine == "native":
            kernels = choose_kernels(config, backend.device, gpu=backend.vendor_kernels)
    except ConfigError as error:
        failure = error
    values = {function: f"{function} by {kernel}" for function, kernel in kernels.names.items()}
    backend.compare(KERNELS, values, failure=failure)
    return kernels


def open_files(config: RunConfig, backend: Backend, *, reads_data: bool) -> tuple[Tokenizer, dict[str, str]]:
    """Build the tokenizer, fingerprint the data, and compare both over all ranks; a collective call.

    Args:
        config: the run.
        backend: this rank's, connected to the others.
        reads_data: this rank fingerprints the data, which takes tens of milliseconds per dataset.

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
    # A dataset's fingerprint ends with its path, which may differ between nodes.
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
