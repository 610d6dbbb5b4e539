"""Checks of opened datasets: token ids, control codes, answers cut by --seq-length, samples evaluated repeatedly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_lite.config.data import DataSource
from megatron_lite.config.run import RunConfig
from megatron_lite.config.tuning import validation_groups
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.data.format.manifest import DatasetManifest, read_manifest
from megatron_lite.data.order.set_plan import SetPlan
from megatron_lite.data.serving.dataset import check_tokens
from megatron_lite.errors import DataError
from megatron_lite.formatting import format_count
from megatron_lite.schedules.length import test_samples

PROBES = 64
"""Sequences of a file whose token ids are checked when it is opened; every sample is checked when it is read."""
PROBED_TOKENS = 1 << 14
"""Tokens checked in each of these sequences."""


def check_vocabulary(data: IndexedDataset, vocab_size: int) -> None:
    """Check token ids at PROBES places of a file against the vocabulary, which finds a wrong tokenizer early.

    Raises:
        DataError: an id is outside the vocabulary.
    """
    if not vocab_size or not len(data):
        return
    for sequence in np.unique(np.linspace(0, len(data) - 1, PROBES).astype(np.int64)).tolist():
        size = min(PROBED_TOKENS, data.length(sequence))
        check_tokens(data.prefix, data.get(sequence, 0, size), vocab_size, f"sequence {sequence}")


def check_control_codes(config: RunConfig) -> None:
    """Check that the documents of each dataset begin with its code of --control-codes, as their manifests record it.

    Raises:
        DataError: a dataset has no or another code.
    """
    codes, data = config.tuning.control_codes, config.data
    training = data.sources or tuple(source for group in data.train_groups for source in group.sources)
    sets: list[tuple[str, Sequence[DataSource]]] = [
        (code, [source]) for code, source in zip(codes, training, strict=False)
    ]
    sets += [(code, group.sources) for code, group in zip(codes, validation_groups(config), strict=False)]
    for code, sources in sets:
        for source in sources:
            manifest = read_manifest(source.path)
            made = None if manifest is None else manifest.tokenizer.get("control_code")
            if made != code:
                found = f"with the code {made}" if made else "without a recorded control code"
                raise DataError(
                    f"The documents of {source.path} begin {found}, and --control-codes gives {code} for this dataset",
                    fix=f"Give the codes in the order of the datasets, or preprocess the corpus with --control-code "
                    f"{code}",
                )


def cut_answers(data: IndexedDataset, manifest: DatasetManifest | None, seq_length: int) -> str:
    """Return a warning about answers that the samples of a dataset with a loss mask cut; empty: none is cut."""
    if manifest is not None and manifest.packed_length:
        cut, total = int(manifest.report.get("cut", 0)), int(manifest.report.get("documents", 0))
        text = f"packing {data.prefix} in sequences of {manifest.packed_length} tokens cut {cut:,} of {total:,} answers"
        return text if cut else ""
    longer = int(np.count_nonzero(data.sizes > seq_length))
    # A boundary lies inside a document of n tokens with probability min(1, (n - 1) / L).
    cut = round(float(np.minimum(1.0, np.maximum(data.sizes - 1, 0) / seq_length).sum()))
    return (
        f"--seq-length {seq_length} cuts about {cut:,} of the {len(data):,} answers of {data.prefix}, whose rest is "
        f"then trained on without its prompt; {longer:,} are longer than a sample. Only these are cut if the dataset "
        f"is packed: megatron-lite data pack {data.prefix} PACKED --seq-length {seq_length}"
    )


def repeated_samples(config: RunConfig, plan: SetPlan) -> str:
    """Return a warning about a validation or test set that is smaller than one evaluation; empty: it is not."""
    wanted, iters, held = (
        test_samples(config),
        config.training.eval_iters,
        sum(source.epoch_samples for source in plan.sources),
    )
    if not plan.sources or held >= wanted:
        return ""
    name = plan.split if plan.name == plan.split else f"{plan.split} ({plan.name})"
    count = format_count(int(held), "sample") if held >= 1 else "less than one sample"
    return (
        f"the {name} set has {count}, and one evaluation reads {wanted:,} (--eval-iters {iters} with global batches of "
        f"{wanted // iters:,}): each sample is read about {wanted / max(held, 1.0):,.1f} times. Give a smaller "
        "--eval-iters or a larger set"
    )
