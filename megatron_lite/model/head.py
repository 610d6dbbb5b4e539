"""Head of the model: output projection to the vocabulary, and the loss.

Letters: s sequence, b micro-batch, h hidden, V padded vocabulary, tp size of the tensor-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from megatron_lite.config.model import ModelConfig
from megatron_lite.model.batch import MicroBatch
from megatron_lite.parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_lite.parallel.layers import Sharding
from megatron_lite.parallel.parameters import NamedParameter, vocabulary_parameter
from megatron_lite.parallel.tensor_parallel import column_parallel_linear

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
"""Global name of the embedding's table, which is also the weight of a tied head."""


class Head(nn.Module):
    """Output projection, with a weight [V/tp, h] of its own or the embedding's table (tied), and the loss.

    Args:
        config: the model.
        sharding: of the stage.
        table: the embedding's table, if the head is tied and the embedding is on the same stage. A tied head on another
            stage has a copy (parallel/shared.py).
    """

    def __init__(self, config: ModelConfig, sharding: Sharding, table: nn.Parameter | None = None) -> None:
        super().__init__()
        self.config = config
        self.sharding = sharding
        rows = config.padded_vocab_size // sharding.tp.size
        self.weight = sharding.empty(rows, config.hidden_size) if table is None else table
        # Autograd adds the gradients of a table's two uses in one stage before its hooks run: the embedding's entry
        # counts for both, unless the head's weight gradient is a deferred product.
        self.passes = 0 if table is not None and sharding.deferred is None else 1

    def forward(self, x: Tensor) -> Tensor:
        """`x` [s, b, h] (sequence parallel: [s/tp, b, h]) -> logits [s, b, V/tp]."""
        sharding = self.sharding
        return column_parallel_linear(x, self.weight, None, sharding.tp, sharding.split_sequence, sharding.deferred)

    def sample_losses(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """Return the mean token loss of each sample, without masked tokens; 0 for a sample without any other.

        The loss of a job is (sum, count) of these over all samples of the global batch, the same for any micro-batch
        size and layout. The logits are overwritten (see vocab_parallel_cross_entropy).

        Args:
            logits: [s, b, V/tp].
            batch: labels [b, s], and their mask.

        Returns:
            [b] fp32, the same on every tp rank.
        """
        labels = batch.labels.t()
        losses = vocab_parallel_cross_entropy(logits, labels, self.config.vocab_size, self.sharding.tp)
        if batch.loss_mask is None:
            return losses.mean(0)
        mask = batch.loss_mask.t()
        return (losses * mask).sum(0) / mask.sum(0).clamp(min=1.0)

    def named(self, name: str) -> Iterator[NamedParameter]:
        """Yield the weight, without padding rows, under the embedding's name if tied, else under the module's."""
        name = WORD_EMBEDDINGS if self.config.tied_embeddings else f"{name}.weight"
        yield vocabulary_parameter(name, self.weight, self.config.vocab_size, self.sharding.tp, self.passes)
