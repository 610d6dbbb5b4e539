"""Checkpoint import: streams the tensors of a foreign checkpoint into a native one and checks the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.reading import CheckpointReader
from megatron_lite.checkpoint.rewriting import write_source
from megatron_lite.checkpoint.writing import SaveRequest
from megatron_lite.config.batch import BatchConfig
from megatron_lite.config.data import DataConfig
from megatron_lite.config.optimizer import PrecisionConfig
from megatron_lite.config.run import RunConfig
from megatron_lite.config.tokenizer import TokenizerConfig
from megatron_lite.config.vocabulary import padded_vocab_size
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.interop.foreign import ForeignModel
from megatron_lite.interop.huggingface import open_model
from megatron_lite.interop.megatron.opening import MegatronOptions, open_megatron
from megatron_lite.interop.output_folder import check_output, new_folder
from megatron_lite.interop.safetensors_writer import size_of
from megatron_lite.interop.streamed_logits import streamed_logits
from megatron_lite.interop.tokenizer_files import copy_tokenizer
from megatron_lite.interop.verify import TOLERANCE, Verification, require_transformers, sample_tokens, verify_logits
from megatron_lite.runs.comparison import config_as_json
from megatron_lite.runs.foreign import Kind, Recognised, recognise
from megatron_lite.runs.manifest import Provenance
from megatron_lite.schedules.progress import Progress
from megatron_lite.tokenizer.base import Tokenizer
from megatron_lite.tokenizer.build import build_tokenizer

TOKENIZER_FOLDER = "tokenizer"
"""Where the tokenizer's files are copied to, inside the output."""
_PRECISIONS = {torch.float32: "fp32", torch.float64: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of an import.

    Attributes:
        kind: the source's kind (--from); None: recognised.
        dtype: what weights are converted to; None: as they are.
        seq_length: the longest sequence; 0: the model's positions, 4,096 at most.
        ignored_keys: unknown keys of config.json, Megatron args and DeepSpeed config keys that may be ignored.
        verify: whether logits are compared with transformers (Hugging Face folders only).
        tolerance: see verify.TOLERANCE.
        megatron: for checkpoints of Megatron-LM and DeepSpeed.
    """

    kind: Kind | None = None
    dtype: torch.dtype | None = None
    seq_length: int = 0
    ignored_keys: Sequence[str] = field(default_factory=tuple)
    verify: bool = True
    tolerance: float = TOLERANCE
    megatron: MegatronOptions = field(default_factory=MegatronOptions)


@dataclass(frozen=True)
class ImportReport:
    """Result of an import."""

    path: Path
    """The folder that --load takes."""
    config: RunConfig
    size: int
    verification: Verification | None
    notes: tuple[str, ...]
    goes_on: bool = False
    """True if the optimizer's state was imported, so that a run can be resumed."""


Advance = Callable[[str, int, int], None]
"""Progress callback: the current step, the amount done and the total."""


def find_source(folder: Path, kind: Kind | None) -> Recognised:
    """Return the checkpoint to import.

    Raises:
        CheckpointError: there is none, it is megatron_lite's own, or it is of another kind than was said.
    """
    found = recognise(folder)
    if found is None:
        raise CheckpointError(
            f"{folder} "
            f"{'contains no checkpoint of a known format' if folder.is_dir() else 'is not an existing folder'}",
            fix="Give a Hugging Face folder with config.json and weights, or a checkpoint folder of Megatron-LM or "
            "Megatron-DeepSpeed",
        )
    if found.kind is Kind.MEGATRON_LITE:
        raise CheckpointError(
            f"{folder} is {found.title}, which needs no import",
            fix=f"Give --load {folder} to the training command",
        )
    if kind not in (None, found.kind):
        assert kind is not None
        raise CheckpointError(
            f"--from {kind.value} is given, but {folder} is {found.title}",
            fix=f"Remove --from, or give --from {found.kind.value}",
        )
    return found


def open_foreign(source: Recognised, options: ImportOptions) -> ForeignModel:
    """Read everything of a foreign checkpoint but its tensors' values.

    Raises:
        CheckpointError: it is damaged, or has settings that are not supported.
        ConfigError: options are given that are for another kind.
    """
    _check_options(source, options)
    if source.kind is Kind.HUGGING_FACE:
        return open_model(
            source.folder, seq_length=options.seq_length, ignored_keys=options.ignored_keys, dtype=options.dtype
        )
    megatron = replace(
        options.megatron, dtype=options.dtype, seq_length=options.seq_length, ignored_keys=options.ignored_keys
    )
    return open_megatron(source, megatron)


def _check_options(source: Recognised, options: ImportOptions) -> None:
    """Refuse options that a kind has no use for."""
    if source.kind is not Kind.HUGGING_FACE:
        return
    megatron = options.megatron
    unused: dict[str, Any] = {
        " ".join(megatron.flags): megatron.flags,
        "--weights-only": megatron.weights_only,
        "--replicated": megatron.replicated,
        "--checkpoint-version": megatron.checkpoint_version is not None,
    }
    given = [name for name, value in unused.items() if value]
    if given:
        raise ConfigError(
            f"{', '.join(given)} {'do' if len(given) > 1 else 'does'} not apply: {source.folder} is {source.title}",
            fix=f"Remove {' and '.join(given)}",
        )


def import_checkpoint(
    folder: Path, output: Path, options: ImportOptions, advance: Advance = lambda what, done, total: None
) -> ImportReport:
    """Write a foreign checkpoint as a checkpoint of megatron_lite, with its tokenizer's files beside it.

    Args:
        folder: the foreign checkpoint.
        output: the folder for --load; it must not exist, or be empty.
        options: see ImportOptions.
        advance: progress callback.

    Raises:
        CheckpointError: the source cannot be imported, its logits differ from transformers', or there is no room.
            Nothing is left of the output.
        ConfigError: transformers is needed and not installed.
    """
    source = find_source(folder, options.kind)
    check_output(output)
    verify = options.verify and source.kind is Kind.HUGGING_FACE
    if verify:
        require_transformers("import")
    foreign = open_foreign(source, options)
    tokenizer = build_tokenizer(foreign.tokenizer) if foreign.tokenizer is not None else None
    config = run_config(foreign, output)
    fingerprints = {"imported from": f"{source.kind.value} {source.folder.absolute()}"}
    if tokenizer is not None:
        fingerprints["tokenizer"] = tokenizer.fingerprint()
    with new_folder(output, size_of(foreign.tensors.tensors)) as partial:
        if foreign.tokenizer is not None and foreign.tokenizer.model:
            given = Path(foreign.tokenizer.model)
            copy_tokenizer(given if given.is_dir() else given.parent, partial / TOKENIZER_FOLDER)
        scalars = {"progress": replace(Progress(), iteration=foreign.iteration).to_dict(), **foreign.scalars}
        report = write_source(
            SaveRequest(partial, foreign.iteration, scalars, Provenance(_described(config), fingerprints)),
            foreign.tensors,
            progress=lambda done, total: advance("importing", done, total),
        )
        verification = None
        if verify:
            verification = _verify(source.folder, report.path, foreign, tokenizer, options, advance)
    return ImportReport(output, config, report.size, verification, foreign.notes, bool(foreign.scalars))


def run_config(foreign: ForeignModel, output: Path) -> RunConfig:
    """Return the config that the checkpoint's manifest holds: model, tokenizer, precision and sequence length."""
    model = foreign.model
    padded = padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by, 1)
    tokenizer = TokenizerConfig(type="NullTokenizer", vocab_size=model.vocab_size - 1)
    if foreign.tokenizer is not None and not foreign.tokenizer.model:
        tokenizer = foreign.tokenizer
    elif foreign.tokenizer is not None:
        files = output.absolute() / TOKENIZER_FOLDER
        given = Path(foreign.tokenizer.model)
        tokenizer = replace(foreign.tokenizer, model=str(files if given.is_dir() else files / given.name))
    return RunConfig(
        model=replace(model, padded_vocab_size=padded),
        batch=BatchConfig(seq_length=foreign.seq_length, micro_batch_size=1, global_batch_size=1),
        tokenizer=tokenizer,
        precision=PrecisionConfig(dtype=_PRECISIONS[foreign.dtype]),  # type: ignore[arg-type]
    )


def _described(config: RunConfig) -> dict[str, Any]:
    """Return what an imported model says of itself; it has no schedule and no data."""
    stored = config_as_json(config)
    return {name: stored[name] for name in ("model", "tokenizer", "precision")} | {
        "batch": {"seq_length": config.batch.seq_length}
    }


def _verify(
    folder: Path,
    checkpoint: Path,
    foreign: ForeignModel,
    tokenizer: Tokenizer | None,
    options: ImportOptions,
    advance: Advance,
) -> Verification:
    """Compare the logits of what was written with those that transformers computes from the source."""
    model = foreign.model
    tokens, text = sample_tokens(tokenizer, DataConfig(), foreign.seq_length, model.vocab_size)
    written = CheckpointReader(checkpoint)
    expected = streamed_logits(
        model, written, tokens, lambda done, total: advance("verifying, layer by layer", done, total)
    )
    return verify_logits(folder, tokens, text, expected, tolerance=options.tolerance)
