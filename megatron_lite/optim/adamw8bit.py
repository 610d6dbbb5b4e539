"""AdamW with moments in 8 bits: block-wise dynamic quantization (Dettmers et al. 2022, arXiv:2110.02861).

Of the second moment the root is quantized: then an element whose second moment rounds to zero has a first moment that
does, too, and no update is divided by epsilon alone. Checkpoints hold the moments in fp32, so that any layout and AdamW
itself load them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_lite.config.optimizer import OptimizerConfig
from megatron_lite.config.runtime import QUANTIZATION_BLOCK as BLOCK
from megatron_lite.optim.update_rule import CHUNK, PieceState, UpdateRule, prepare, states_of_shards
from megatron_lite.parallel.buffers import Shard


def dynamic_codes(*, signed: bool) -> list[float]:
    """Return the 256 values that a code stands for, times the scale of its block; in rising order.

    Seven decades from 1e-7 to 1, each with twice as many values as the one below it, and 0 and 1. Unlike in the paper
    -1 is a value, so that a quantized block does not change when it is quantized again.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        width = 0.9 / count
        means = [(0.1 + (place + 0.5) * width) * 10.0 ** (exponent - 6) for place in range(count)]
        values += [sign * mean for mean in means for sign in ((1, -1) if signed else (1,))]
    values.sort()
    if signed:
        values[0] = -1.0
    assert len(values) == 256
    return values


class Quantized:
    """Flat tensor in 8 bits: a code for each element and a scale for each block.

    Args:
        length: elements.
        signed: whether elements may be negative.
        device: of the codes.
    """

    def __init__(self, length: int, *, signed: bool, device: torch.device) -> None:
        blocks = -(-length // BLOCK)
        values = dynamic_codes(signed=signed)
        self._values = torch.tensor(values, dtype=torch.float32, device=device)
        middles = [(low + high) / 2 for low, high in pairwise(values)]
        self._middles = torch.tensor(middles, dtype=torch.float32, device=device)
        self.codes = torch.full((blocks * BLOCK,), values.index(0.0), dtype=torch.uint8, device=device)
        self.scales = torch.zeros(blocks, dtype=torch.float32, device=device)

    def read(self, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) in fp32; start is a multiple of BLOCK."""
        end = -(-stop // BLOCK) * BLOCK
        values = self._values.index_select(0, self.codes[start:end].int()).view(-1, BLOCK)
        return values.mul_(self.scales[start // BLOCK : end // BLOCK, None]).view(-1)[: stop - start]

    def write(self, start: int, elements: Tensor, applies: Tensor) -> None:
        """Quantize elements from `start`, a multiple of BLOCK; nothing changes if `applies` is false."""
        length = elements.numel()
        blocks = torch.nn.functional.pad(elements, (0, -length % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1)
        tiny = torch.finfo(torch.float32).tiny
        codes = torch.bucketize(blocks / scales.clamp(min=tiny)[:, None], self._middles, out_int32=True).to(torch.uint8)
        end = start + blocks.numel()
        for held, new in (
            (self.codes[start:end], codes.view(-1)),
            (self.scales[start // BLOCK : end // BLOCK], scales),
        ):
            held.copy_(torch.where(applies, new, held))


@dataclass(frozen=True, eq=False)
class _Moments:
    """Moments of one shard: the first, and the root of the second."""

    first: Quantized
    root: Quantized


class AdamW8bit(UpdateRule):
    """AdamW over flat shards with quantized moments, chunk by chunk.

    The blocks of each piece begin with it, so that copies of a parameter on several ranks stay equal.

    Args:
        config: hyperparameters.
        shards: main parameters, one piece each.
    """

    def __init__(self, config: OptimizerConfig, shards: Sequence[Shard]) -> None:
        self._config = config
        self._shards = tuple(shards)
        device = shards[0].values.device if shards else torch.device("cpu")
        self._steps = torch.zeros((), dtype=torch.float64, device=device)
        self._moments = [
            _Moments(
                Quantized(shard.values.numel(), signed=True, device=device),
                Quantized(shard.values.numel(), signed=False, device=device),
            )
            for shard in shards
        ]
        self._staged: list[dict[str, Tensor]] = []

    def step(self, lr: float, weight_decay: float, divisor: Tensor | None, applies: Tensor) -> None:
        """Update the main parameters."""
        self._staged = []
        beta1, beta2 = self._config.adam_beta1, self._config.adam_beta2
        steps = self._steps + 1.0
        correction = (1.0 - beta2**steps).sqrt().float()
        for shard, moments in zip(self._shards, self._moments, strict=True):
            lr_of_shard = lr * shard.lr_factor
            rate = (applies * lr_of_shard / (1.0 - beta1**steps)).float()
            kept = 1.0 - applies.float() * (lr_of_shard * weight_decay if shard.decay else 0.0)
            for start, stop in _chunks(shard):
                gradient, value = shard.gradients[start:stop], shard.values[start:stop]
                prepare(gradient, divisor, applies)
                first = moments.first.read(start, stop).lerp_(gradient, 1.0 - beta1)
                second = moments.root.read(start, stop).square_().mul_(beta2)
                root = second.addcmul_(gradient, gradient, value=1.0 - beta2).sqrt_()
                value.mul_(kept).addcdiv_(first * rate, root / correction + self._config.adam_eps, value=-1.0)
                moments.first.write(start, first, applies)
                moments.root.write(start, root, applies)
        self._steps.add_(applies)

    def states(self) -> list[PieceState]:
        """Return copies of the moments in fp32, in host memory: a GPU may have no room for them."""
        for shard, moments in zip(self._shards if not self._staged else (), self._moments, strict=False):
            length = shard.values.numel()
            device = shard.values.device if shard.values.is_meta else torch.device("cpu")
            staged = {name: torch.empty(length, device=device) for name in ("exp_avg", "exp_avg_sq")}
            for start, stop in _chunks(shard):
                staged["exp_avg"][start:stop].copy_(moments.first.read(start, stop))
                staged["exp_avg_sq"][start:stop].copy_(moments.root.read(start, stop).square_())
            self._staged.append(staged)
        return states_of_shards(self._shards, self._staged)

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes and scales."""
        held = [quantized for moments in self._moments for quantized in (moments.first, moments.root)]
        return sum(quantized.codes.nbytes + quantized.scales.nbytes for quantized in held)

    def load(self, applied: int) -> None:
        """Set the number of steps, and quantize the tensors that `states` returned last."""
        self._steps.fill_(applied)
        self.adopt()

    def adopt(self) -> None:
        """Quantize the tensors that `states` returned last."""
        always = torch.ones((), dtype=torch.bool, device=self._steps.device)
        for shard, moments, staged in zip(self._shards, self._moments, self._staged, strict=False):
            for start, stop in _chunks(shard):
                first, second = (tensor[start:stop].to(shard.values.device) for tensor in staged.values())
                moments.first.write(start, first, always)
                moments.root.write(start, second.sqrt(), always)
        self._staged = []


def _chunks(shard: Shard) -> Iterator[tuple[int, int]]:
    length = shard.values.numel()
    for start in range(0, length, CHUNK):
        yield start, min(start + CHUNK, length)
