"""Head of the model: output projection to the vocabulary, and the loss.

Letters: s sequence, b micro-batch, E channels of the embedding (h, the hidden size, unless it is factorized), V padded
vocabulary, tp size of the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron_lite.config.model import ModelConfig
from megatron_lite.config.parameters import WORD_EMBEDDINGS
from megatron_lite.model.batch import MicroBatch
from megatron_lite.parallel.context_parallel import local_chunks
from megatron_lite.parallel.cross_entropy import LinearCrossEntropy
from megatron_lite.parallel.gemm import Accumulate
from megatron_lite.parallel.layers import Sharding
from megatron_lite.parallel.parameters import NamedParameter, vocabulary_parameter
from megatron_lite.parallel.tensor_parallel import column_parallel_linear


class Head(nn.Module):
    """Output projection, with a weight [V/tp, E] of its own or the embedding's table (tied), and the loss.

    Args:
        config: the model.
        sharding: of the stage.
        per_token: weigh each sample by its unmasked tokens in the mean loss; False: each sample counts the same.
        table: the embedding's table, if the head is tied and the embedding is on the same stage. A tied head on another
            stage has a copy (parallel/shared.py).
    """

    def __init__(
        self, config: ModelConfig, sharding: Sharding, *, per_token: bool = False, table: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.per_token = per_token
        self.sharding = sharding
        rows = config.padded_vocab_size // sharding.tp.size
        self.weight = sharding.empty(rows, config.embedding_width) if table is None else table
        self.cross_entropy = LinearCrossEntropy(
            config.vocab_size,
            sharding.tp,
            sharding.split_sequence,
            sharding.backend.loss_chunk,
            sharding.kernels.loss,
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` [s, b, E] (sequence parallel: [s/tp, b, E]) -> logits [s, b, V/tp]."""
        return column_parallel_linear(x, self.weight, None, self.sharding.tp, self.sharding.split_sequence)

    def token_losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each token, [s, b] fp32, without gradients: `x` as for forward, `labels` [s, b]."""
        return self.cross_entropy.losses(x, self.weight, labels)

    def sample_losses(
        self, x: Tensor, batch: MicroBatch, gradient_scale: Tensor | float, accumulate: Accumulate | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mean token loss of each sample times its weight, without masked tokens; 0 without any other.

        Under context parallelism it is the part of this rank's tokens: the sum over cp is the loss of the sample.

        The loss of a job is the sum of these over all samples of the global batch, divided by that of the weights: the
        same for any micro-batch size and layout.

        Args:
            x: hidden states [s, b, E] (sequence parallel: [s/tp, b, E]; context parallel: of this rank's tokens).
            batch: labels [b, s] of whole samples, and their mask.
            gradient_scale: factor on the sum of the samples' losses, whose gradients are computed.
            accumulate: adds the gradient of the weight; None: evaluation, without gradients.

        Returns:
            [b] fp32, the same on every tp rank, and the gradient of the hidden states, shaped like x.
        """
        assert batch.labels is not None, "the last stage reads labels"
        cp = self.sharding.cp
        labels, mask = local_chunks(batch.labels, cp, 1).t(), None
        if batch.loss_mask is None:
            share = 1.0 if self.per_token else 1 / batch.labels.shape[1]
            shares = torch.full(labels.shape, share, dtype=torch.float32, device=x.device)
        else:
            unmasked = batch.loss_mask.sum(1).clamp(min=1.0)
            mask = local_chunks(batch.loss_mask, cp, 1).t()
            shares = mask if self.per_token else mask / unmasked
        gradient = None
        if accumulate is None:
            losses = self.token_losses(x, labels)
        else:
            losses, gradient = self.cross_entropy.losses_and_gradients(
                x, self.weight, labels, shares * gradient_scale, accumulate
            )
        sums = (losses if mask is None else losses * mask).sum(0)
        if self.per_token:
            return sums, gradient
        # As a mean: shares that add up to 1 with rounding errors would change the loss.
        return (losses.mean(0) / cp.size if mask is None else sums / unmasked), gradient

    def sample_weights(self, batch: MicroBatch) -> Tensor | None:
        """Return the weight of each sample in the mean loss, [b] fp32: its unmasked tokens; None: 1 each."""
        if not self.per_token:
            return None
        count, length = batch.shape
        if batch.loss_mask is None:
            return torch.full((count,), float(length), dtype=torch.float32, device=self.weight.device)
        return batch.loss_mask.sum(1)

    def named(self, name: str) -> Iterator[NamedParameter]:
        """Yield the weight, without padding rows, under the embedding's name if tied, else under the module's."""
        name = WORD_EMBEDDINGS if self.config.tied_embeddings else f"{name}.weight"
        yield vocabulary_parameter(name, self.weight, self.config.vocab_size, self.sharding.tp)
