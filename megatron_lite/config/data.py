"""Data config: dataset paths, blend, split and sample order; tokenizer config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One .bin/.idx pair of a blend: `path` is the common prefix of both files."""

    path: str
    weight: float | None = None
    """Share of the blend; None for every source of a blend: by size."""
    start: float = 0.0
    end: float = 1.0
    """Range of the file's documents, as shares of their number (weighted splits only)."""


@dataclass(frozen=True, kw_only=True)
class DataGroup:
    """A named blend of sources: `train`, or one of several validation sets."""

    name: str
    sources: tuple[DataSource, ...]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Datasets of a run: either `sources` cut by `split`, or groups given per split."""

    sources: tuple[DataSource, ...] = ()
    split: str = "969,30,1"
    """Shares of train, validation and test documents, in Megatron's spellings."""
    train_groups: tuple[DataGroup, ...] = ()
    valid_groups: tuple[DataGroup, ...] = ()
    test_groups: tuple[DataGroup, ...] = ()
    mock: bool = False
    """Random tokens instead of a dataset (--mock-data)."""
    index_order: Literal["legacy", "modern"] = "legacy"
    """legacy: Megatron-DeepSpeed's order and split rounding; modern: Megatron-LM's."""
    sampling: Literal["concatenated", "slice"] = "concatenated"
    """concatenated: documents end to end, cut into samples; slice: one random slice of each document an epoch."""
    cache_path: str = ""
    """Folder of the index cache; empty: beside the dataset."""
    sampler: Literal["single", "cyclic"] = "single"
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    prefetch: int = 2
    """Micro-batches read ahead by the loader's thread; 0: none."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer, by Megatron's names, and where its files lie."""

    type: Literal["GPT2BPETokenizer", "HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"] = (
        "GPT2BPETokenizer"
    )
    vocab_file: str = ""
    merge_file: str = ""
    model: str = ""
    """HuggingFaceTokenizer: tokenizer.json or a folder that holds it; SentencePieceTokenizer: the .model file."""
    vocab_size: int = 0
    """NullTokenizer: entries before the end-of-document token, which gets this id."""
    vocab_extra_ids: int = 0
    eod_token: str = ""
    """Name of the token that ends a document; empty: what the tokenizer's files say, else the usual names."""
    fast: bool = True
    """Encode with tiktoken (extra `fast`) where it provably gives the same ids."""
