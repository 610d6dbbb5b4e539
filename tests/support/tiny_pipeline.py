"""Test doubles of the pipeline executor: scalar stages, micro-batches and random streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Batch:
    tokens: torch.Tensor
    number: int
    sources: tuple[int, ...] | None = None

    @property
    def shape(self):
        return tuple(self.tokens.shape)


class Scale(nn.Module):
    """Stage that multiplies by a scalar weight: the loss of a chain is the product of weights times the mean token."""

    hidden_dtype = torch.float32

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(weight)))

    def forward(self, x, batch):
        x = batch.tokens.t().unsqueeze(-1).float() if x is None else x
        return x * self.weight

    def sample_losses(self, x, batch, gradient_scale, accumulate):
        gradient = None if accumulate is None else torch.full_like(x, gradient_scale / len(x))
        return x.squeeze(-1).mean(0), gradient

    def sample_weights(self, batch):
        return None

    def hidden_shape(self, length, batch_size):
        return length, batch_size, 1


class Streams:
    """Random streams that record the (iteration, micro-batch) of each action."""

    def __init__(self):
        self.positions = []

    def set_microbatch(self, iteration, microbatch):
        self.positions.append((iteration, microbatch))


def batches(count):
    return [Batch(torch.full((2, 4), number + 1), number=10 + number, sources=(0, 1)) for number in range(count)]
