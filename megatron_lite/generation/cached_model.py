"""Cached forward passes for generation: logits of the next tokens, over the stages of a pipeline.

Letters: b rows of a pass, V' padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lite.backend.group import Group
from megatron_lite.model.attention import CachedPass
from megatron_lite.model.batch import MicroBatch
from megatron_lite.model.gpt import GPTStage
from megatron_lite.pipeline.forward import stage_forward


class CachedModel:
    """This rank's stage with the KV cache of a batch of rows. All ranks of the model make the same calls.

    Args:
        stage: in evaluation mode, without sequence parallelism.
        pp: pipeline group of this rank; of one rank if the stage is the whole model.
        num_rows: rows of the cache.
        max_length: longest row.
    """

    def __init__(self, stage: GPTStage, pp: Group, num_rows: int, max_length: int) -> None:
        self._stage = stage
        self._pp = pp
        self._cache = stage.new_cache(num_rows, max_length)
        self._device = stage.sharding.backend.device

    @torch.inference_mode()
    def first(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor | None:
        """Compute the first tokens of rows, of different lengths; return the logits after the last token of each.

        Returns:
            [b, V'], gathered over tp; None: this rank does not have the last stage.
        """
        length = max(map(len, tokens))
        # Padding on the right: no query attends to it (KVCache).
        padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in tokens], device=self._device)
        last = torch.tensor([len(row) - 1 for row in tokens], device=self._device)
        return self._logits(padded, None, self._cache.first(rows), last)

    @torch.inference_mode()
    def next(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor | None:
        """Compute one token of every row at its position; return the logits after it, as `first`."""
        inputs, at = (torch.tensor(x, device=self._device).unsqueeze(1) for x in (tokens, positions))
        return self._logits(inputs, at, self._cache.next(positions), torch.zeros_like(inputs[:, 0]))

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows of the cache; the rows that are left are numbered from 0."""
        self._cache.keep(rows)

    def _logits(self, tokens: Tensor, positions: Tensor | None, cache: CachedPass, last: Tensor) -> Tensor | None:
        """Run the stage on tokens [b, s]; return the logits after the tokens with the indices `last` [b]."""
        stage = self._stage
        batch = MicroBatch(tokens=tokens, labels=tokens, position_ids=positions)
        hidden = stage_forward(stage, self._pp, batch, cache)
        if stage.output_layer is None:
            return None
        ends = hidden[last, torch.arange(len(last), device=self._device)]
        logits: Tensor = stage.output_layer(ends.unsqueeze(0))[0]
        tp = stage.sharding.tp
        return logits if tp.size == 1 else tp.all_gather(logits.t().contiguous()).t()
