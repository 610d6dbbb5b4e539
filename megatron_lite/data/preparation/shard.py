"""Shard writer of preprocessing: one unit's dataset, with a checksum."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lite.data.format.indexed_dataset import BLOCK, IndexedDatasetWriter


@dataclass(frozen=True)
class Shard:
    """A finished shard: the name of its files without ending, and the size and CRC-32 of its .bin."""

    name: str
    num_bytes: int
    checksum: int


class ShardWriter(IndexedDatasetWriter):
    """An IndexedDatasetWriter that takes batches of documents."""

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        super().__init__(prefix, dtype)
        self.checksum = 0
        """CRC-32 of the .bin so far."""

    def __enter__(self) -> ShardWriter:
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes of the .bin so far."""
        return self.num_tokens * self.dtype.itemsize

    def add_batch(
        self,
        tokens: npt.NDArray[np.generic],
        lengths: npt.NDArray[np.int64],
        sequences: npt.NDArray[np.int64],
    ) -> None:
        """Append documents.

        Args:
            tokens: of all sequences end to end, [tokens].
            lengths: tokens of each sequence, [sequences].
            sequences: sequences of each document, [documents]; a document may have none.
        """
        stored = self._to_stored(tokens)
        self.checksum = zlib.crc32(stored.data, self.checksum)
        with self._writing():
            self._files["bin"].write(stored.data)
        self._sizes.frombytes(lengths.astype(np.int32).tobytes())
        self._documents.frombytes((self.num_sequences + np.cumsum(sequences)).astype(np.int64).tobytes())
        self.num_sequences += len(lengths)
        self.num_documents += len(sequences)
        self.num_tokens += len(stored)
        if len(self._sizes) >= BLOCK or len(self._documents) >= BLOCK:
            self._spill()
