"""Loss masks of datasets ({prefix}_loss_mask.bin and .idx): 1 for tokens of answers, 0 for tokens of prompts.

A mask is a dataset of uint8 with the same sequences and documents as the dataset of its tokens. Readers that ignore it
read the tokens unchanged.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_lite.data.format.index_format import bin_path, idx_path
from megatron_lite.data.format.indexed_dataset import IndexedDataset
from megatron_lite.errors import DataError

SUFFIX = "_loss_mask"
MASK_TYPE = np.dtype(np.uint8)


def mask_prefix(prefix: str | Path) -> str:
    """Return the prefix of the loss mask of a dataset."""
    return f"{prefix}{SUFFIX}"


def has_mask(prefix: str | Path) -> bool:
    """Return whether a dataset has a loss mask."""
    return idx_path(mask_prefix(prefix)).is_file()


def open_mask(data: IndexedDataset) -> IndexedDataset:
    """Open the loss mask of a dataset.

    Raises:
        DataError: it is missing or damaged, or belongs to other tokens.
    """
    prefix = mask_prefix(data.prefix)
    if not has_mask(data.prefix):
        raise DataError(
            f"The dataset {data.prefix} does not mark its answers ({idx_path(prefix)} is missing), and --answer-loss "
            "trains on answers only",
            fix="Preprocess prompts with answers: megatron-lite preprocess --input-format prompt-completion or chat; "
            "or remove --answer-loss to train on all tokens",
        )
    mask = IndexedDataset(prefix)
    if mask.dtype != MASK_TYPE or not np.array_equal(mask.sizes, data.sizes):
        raise DataError(
            f"The loss mask {prefix} does not belong to the dataset {data.prefix}: "
            + (
                f"it has {len(mask):,} sequences of {mask.num_tokens:,} values, the dataset {len(data):,} sequences of "
                f"{data.num_tokens:,} tokens"
                if mask.dtype == MASK_TYPE
                else f"its values are {mask.dtype.name}, not {MASK_TYPE.name}"
            ),
            fix="Copy both pairs of files from the same place, or preprocess again with --overwrite",
        )
    return mask


def remove_mask(prefix: str | Path) -> None:
    """Remove the loss mask of an earlier dataset of this name, so that it is not taken for that of a new one."""
    for path in (idx_path(mask_prefix(prefix)), bin_path(mask_prefix(prefix))):
        path.unlink(missing_ok=True)
